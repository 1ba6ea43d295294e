"""Triton's interpreter in place of a GPU: `make gpu-proof` sets TRITON_INTERPRET=1 and runs this folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("these tests need TRITON_INTERPRET=1, set before the process starts")

# The interpreter patches triton.language anew in every call of a device function, which takes most of its time. Once
# for each kernel is enough.
_patch = interpreter._patch_lang
interpreter._patch_lang = lambda _: _patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter.InterpretedFunction.__call__ = lambda self, *args, **options: self.rewrite()(*args, **options)

GUARD = 64  # elements on either side of a guarded tensor
SENTINEL = 85  # in every byte of them


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Tensors that torch.empty, zeros and full make lie between sentinels, which must be whole in the end: the
    interpreter reports no store that is out of bounds."""
    guards: list[Tensor] = []

    def padded(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **options: Any) -> Tensor:
            plain = make(*args, **options)
            size = plain.numel()
            memory = torch.cat([plain.new_ones(GUARD), plain.reshape(-1), plain.new_ones(GUARD)])
            for guard in (memory[:GUARD], memory[GUARD + size :]):
                guard.view(torch.uint8).fill_(SENTINEL)
                guards.append(guard)
            return memory[GUARD : GUARD + size].view(plain.shape)

        return wrapped

    for name in ("empty", "zeros", "full"):
        monkeypatch.setattr(torch, name, padded(getattr(torch, name)))
    yield guards
    monkeypatch.undo()
    assert guards
    assert all(bool((guard.view(torch.uint8) == SENTINEL).all()) for guard in guards)
