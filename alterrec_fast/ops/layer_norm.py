"""LayerNorm for item tables: torch's, or on CUDA where Triton is present kernels made for many short rows."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TRITON = importlib.util.find_spec("triton") is not None
WIDEST = 4096  # numbers in a row, at most, for the kernels


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


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (V, d), weight and bias (d,) -> (V, d). Equivalent to: ``F.layer_norm(x, (d,), weight, bias, eps)``."""
    same = x.dtype == weight.dtype == bias.dtype == torch.float32
    if TRITON and x.is_cuda and same and 0 < x.shape[1] <= WIDEST:
        out: Tensor = _LayerNorm.apply(x.contiguous(), weight, bias, eps)
        return out
    return F.layer_norm(x, (x.shape[1],), weight, bias, eps)
