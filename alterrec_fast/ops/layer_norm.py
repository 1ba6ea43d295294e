"""LayerNorm of item tables: torch's, or on CUDA where Triton is present kernels made for many short rows."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TRITON = importlib.util.find_spec("triton") is not None
WIDEST = 4096  # numbers in a row, at most, for the kernels


class RowNorm(NamedTuple):
    """The LayerNorm that a catalog's rows go through when they are read; none without a weight."""

    norm_weight: Tensor | None = None  # (d,) float32, as the bias
    norm_bias: Tensor | None = None
    norm_eps: float = 1e-5

    def of(self, rows: Tensor) -> Tensor:
        """rows (n, d) -> (n, d); float32 with a norm, else the rows themselves."""
        if self.norm_weight is None:
            return rows
        wide = rows if rows.dtype == torch.float64 else rows.float()
        with torch.autocast(rows.device.type, enabled=False):
            return F.layer_norm(wide, (rows.shape[1],), self.norm_weight, self.norm_bias, self.norm_eps)


NO_NORM = RowNorm()


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        from alterrec_fast.kernels.layer_norm import layer_norm_fwd

        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out: Tensor = layer_norm_fwd(x, weight, bias, eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from alterrec_fast.kernels.layer_norm import layer_norm_bwd

        x, weight = ctx.saved_tensors
        return *layer_norm_bwd(grad.contiguous(), x, weight, ctx.eps), None


def has_kernels(*tensors: Tensor) -> bool:
    """Whether the kernels take x (V, d) and its weight and bias."""
    fitting = 0 < tensors[0].shape[1] <= WIDEST and all(t.dtype == torch.float32 for t in tensors)
    return TRITON and fitting and tensors[0].is_cuda


def layer_norm_adam(
    x: Tensor, norm: torch.nn.LayerNorm, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """A step of Adam on x (V, d), whose LayerNorm has the gradient grad (V, d), in place and in one pass.

    state and group: of a `torch.optim.Adam` that is capturable, as it has them; a state that is empty is filled. Needs
    `has_kernels`. Returns the gradients of the LayerNorm's weight and bias. To rounding what the LayerNorm's backward
    and the optimiser do, without the table's gradient in memory.
    """
    from alterrec_fast.kernels.layer_norm import Adam, layer_norm_adam

    if not state:
        state["step"] = torch.zeros((), device=x.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(x), torch.zeros_like(x)
    state["step"].add_(1)
    adam = Adam(
        state["exp_avg"], state["exp_avg_sq"], state["step"], group["lr"], group["betas"], group["eps"],
        group["weight_decay"],
    )  # fmt: skip
    grads: tuple[Tensor, Tensor] = layer_norm_adam(grad, x, norm.weight, norm.eps, adam)
    return grads


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (V, d), weight and bias (d,) -> (V, d). Equivalent to: ``F.layer_norm(x, (d,), weight, bias, eps)``."""
    if has_kernels(x, weight, bias):
        out: Tensor = _LayerNorm.apply(x.contiguous(), weight, bias, eps)
        return out
    return F.layer_norm(x, (x.shape[1],), weight, bias, eps)
