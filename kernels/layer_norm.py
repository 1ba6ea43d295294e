"""LayerNorm of matrices with many short rows, an item table's: each pass reads and writes every row once.

torch's kernels take two to four times as long where a row is a few hundred numbers (docs/gpu.md). Backward computes the
rows' means and deviations again, from rows that it reads anyway; the gradients of weight and bias are sums that every
program keeps in registers, so that each has one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .tiles import launch

TILE = 2048  # numbers that a program holds at a time
PROGRAMS = 4  # on each SM, that share the rows in backward


@triton.jit
def _normalised(x, in_d, eps, D: tl.constexpr):
    """x [R, BLOCK_D], zero beyond D -> (x - mean) / deviation, zero beyond D, and 1 / deviation [R]."""
    centred = tl.where(in_d, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * scale[:, None], scale


@triton.jit(do_not_specialize=["V"])
def _layer_norm_kernel(X, Weight, Bias, Out, V, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_d = tl.arange(0, BLOCK_D)
    inside = (rows < V)[:, None] & (offs_d < D)[None, :]
    at = rows[:, None] * D + offs_d[None, :]
    x, _ = _normalised(tl.load(X + at, mask=inside, other=0.0), (offs_d < D)[None, :], eps, D)
    weight = tl.load(Weight + offs_d, mask=offs_d < D, other=0.0)
    bias = tl.load(Bias + offs_d, mask=offs_d < D, other=0.0)
    tl.store(Out + at, x * weight[None, :] + bias[None, :], mask=inside)


@triton.jit(do_not_specialize=["V"])
def _layer_norm_grad_kernel(
    Grad,
    X,
    Weight,
    GradX,
    GradWeight,
    GradBias,
    V,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """GradX (V, D), and this program's share of the gradients of weight and bias, (programs, D)."""
    offs_d = tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    weight = tl.load(Weight + offs_d, mask=in_d, other=0.0)[None, :]
    grad_weight = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(V, BLOCK_V), tl.num_programs(0)):
        rows = block * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = (rows < V)[:, None] & in_d[None, :]
        at = rows[:, None] * D + offs_d[None, :]
        grad = tl.load(Grad + at, mask=inside, other=0.0)
        x, scale = _normalised(tl.load(X + at, mask=inside, other=0.0), in_d[None, :], eps, D)
        weighted = grad * weight
        along = tl.sum(weighted * x, 1) / D
        mean = tl.sum(weighted, 1) / D
        tl.store(GradX + at, (weighted - mean[:, None] - x * along[:, None]) * scale[:, None], mask=inside)
        grad_weight += grad * x
        grad_bias += grad
    share = tl.program_id(0) * D + offs_d
    tl.store(GradWeight + share, tl.sum(grad_weight, 0), mask=in_d)
    tl.store(GradBias + share, tl.sum(grad_bias, 0), mask=in_d)


def _blocks(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"D": width, "BLOCK_D": block, "BLOCK_V": max(1, TILE // block), "num_warps": 4}


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (V, d), weight and bias (d,), all float32 and contiguous -> (V, d)."""
    out, blocks = torch.empty(x.shape, device=x.device), _blocks(x.shape[1])
    launch(_layer_norm_kernel, (triton.cdiv(len(x), blocks["BLOCK_V"]),), x, weight, bias, out, len(x), eps, **blocks)
    return out


def layer_norm_bwd(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """grad, x (V, d), weight (d,), all float32 and contiguous -> gradients of x, weight and bias."""
    (v, d), blocks = x.shape, _blocks(x.shape[1])
    programs = min(triton.cdiv(v, blocks["BLOCK_V"]), PROGRAMS * tiles.processors(x.device))
    grad_x, shares = torch.empty(v, d, device=x.device), torch.empty(2, programs, d, device=x.device)
    launch(_layer_norm_grad_kernel, (programs,), grad, x, weight, grad_x, shares[0], shares[1], v, eps, **blocks)
    grad_weight, grad_bias = shares.sum(1)
    return grad_x, grad_weight, grad_bias
