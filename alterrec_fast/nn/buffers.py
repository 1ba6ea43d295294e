"""What the modules share: buffers whose digits the loss needs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


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
