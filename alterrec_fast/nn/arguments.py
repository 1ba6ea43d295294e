"""Checks of arguments that the modules share: a TypeError names the argument, what was expected and what was given."""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor, nn


def kind(value: object) -> str:
    """How a message names what was given: "a tensor (3, 4)", "a list", "None"."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def integer(name: str, value: Any) -> int:
    """value as an int: Python's, NumPy's or a tensor's of one integer; TypeError for all else, bool and 2.0 too."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {_value(value)}") from None


def number(name: str, value: Any) -> float:
    """value as a float; TypeError for what is no real number, as a tensor, which would get no gradient."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {_value(value)}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """value itself; TypeError unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_value(value)}")
    return value


def check_tensor(name: str, value: Any, expected: str = "a tensor") -> None:
    """Raise TypeError unless value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {expected}, got {kind(value)}")


def _value(value: Any) -> str:
    return f"{kind(value)} {value!r}" if isinstance(value, str | bool | float) else kind(value)


class KeepsDtype(nn.Module):
    """A module whose buffers move with it, but keep their dtype under ``half()`` and the like.

    What they hold, counts of items or their logarithms, would lose digits that the loss needs, or overflow.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsDtype:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self
