"""The optimiser of a FusedItemEmbedding, in the shape that torch's schedulers, scalers and loops expect."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alterrec_fast.ops import checks

if TYPE_CHECKING:
    from alterrec_fast.nn.fused_item_embedding import FusedItemEmbedding

DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {"betas": (0.9, 0.999), "eps": 1e-8},
    "rowwise_adagrad": {"eps": 1e-10},
    "sgd": {},
}


def check_options(optimizer: str, lr: float | Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a parameter group. Raises TypeError for an unknown one, ValueError for a value out of range."""
    if optimizer not in DEFAULTS:
        raise ValueError(f"optimizer must be one of {', '.join(DEFAULTS)}, got {optimizer!r}")
    for name in ("clip_norm", "max_norm"):
        if name in options:
            raise ValueError(
                f"{name}: the norm of the whole gradient is known only when the last tile's is, and by then the first "
                "tiles are updated; clip_value clips each element"
            )
    known = DEFAULTS[optimizer] | {"weight_decay": 0.0, "clip_value": None}
    for name in options:
        if name not in known:
            raise TypeError(f"{optimizer} takes {', '.join(known)}, got {name}")
    group: dict[str, Any] = {"lr": lr} | known | options
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must be one number, got a tensor of shape {tuple(lr.shape)}")
    else:
        checks.check_number("lr", lr)
        if not lr >= 0.0:
            raise ValueError(f"lr must be at least 0, got {lr}")
    betas = group.get("betas", (0.0, 0.0))
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    for name in ("eps", "weight_decay"):
        checks.check_number(name, group.get(name, 0.0))
        if not group.get(name, 0.0) >= 0.0:
            raise ValueError(f"{name} must be at least 0, got {group[name]}")
    clip = group["clip_value"]
    if clip is not None and not clip > 0.0:
        raise ValueError(f"clip_value must be above 0 or None, got {clip}")
    return group


class TableOptimizer(torch.optim.Optimizer):
    """One parameter group, whose options may change between steps; its "parameters" are buffers without a gradient.

    The moments are the module's buffers, so that this optimiser's state dict holds the options alone.
    """

    _step_supports_amp_scaling = True  # a GradScaler hands over its scale instead of looking for gradients
    grad_scale: Tensor | None  # set by a GradScaler for its call of `step` alone
    found_inf: Tensor

    def __init__(self, items: FusedItemEmbedding, options: dict[str, Any]):
        super().__init__(_buffers_of(items), dict(options))
        self._items = items

    def take_buffers(self, items: FusedItemEmbedding) -> None:
        """After the module's buffers were replaced, as ``to(device)`` does."""
        self.param_groups[0]["params"] = _buffers_of(items)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | float | None = None,
        found_inf: Tensor | float | None = None,
    ) -> Any:
        """`FusedItemEmbedding.step`. A GradScaler's `step` sets scale and flag; without them they are the arguments.

        Raises RuntimeError after GradScaler.unscale_, which cannot reach a gradient that is not there yet.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if hasattr(self, "found_inf"):
            if self.grad_scale is None:
                raise RuntimeError("GradScaler.unscale_ cannot unscale a fused table's gradient; step() does it")
            grad_scale, found_inf = self.grad_scale, self.found_inf
        self._items.apply_pending(self.param_groups[0], grad_scale, found_inf is not None and bool(found_inf))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops what was passed backward since the last step."""
        self._items.zero_grad()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_items": self._items}


def _buffers_of(items: FusedItemEmbedding) -> list[Tensor]:
    return [x for x in (items.table, items.norm_weight, items.norm_bias) if x is not None]
