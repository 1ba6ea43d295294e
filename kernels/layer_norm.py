"""LayerNorm of matrices with many short rows, an item table's: each pass reads and writes every row once.

`layer_norm_adam` is backward and the table's step of Adam in one pass, which neither writes nor reads its gradient.

torch's kernels take two to four times as long where a row is a few hundred numbers (docs/gpu.md). Backward computes the
rows' means and deviations again, from rows that it reads anyway; the gradients of weight and bias are sums that every
program keeps in registers, so that each has one order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shapes
from .tiles import launch

TILE = 2048  # numbers that a program holds at a time
PROGRAMS = 12  # for each SM, that share the rows in backward: whole waves of 3 or 4 at a time


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


@triton.jit
def _grad_of_rows(weighted, x, scale, D: tl.constexpr):
    """weighted: gradient times weight, x: normalised rows, both [R, BLOCK_D]; scale: 1 / deviation [R]."""
    along = tl.sum(weighted * x, 1) / D
    mean = tl.sum(weighted, 1) / D
    return (weighted - mean[:, None] - x * along[:, None]) * scale[:, None]


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
        tl.store(GradX + at, _grad_of_rows(weighted, x, scale, D), mask=inside)
        grad_weight += grad * x
        grad_bias += grad
    share = tl.program_id(0) * D + offs_d
    tl.store(GradWeight + share, tl.sum(grad_weight, 0), mask=in_d)
    tl.store(GradBias + share, tl.sum(grad_bias, 0), mask=in_d)


@triton.jit(do_not_specialize=["V"])
def _layer_norm_adam_kernel(
    Grad,
    X,
    Weight,
    Moment,
    Square,
    Step,
    Rate,
    GradWeight,
    GradBias,
    V,
    eps,
    log_beta1,
    log_beta2,
    fresh1,
    fresh2,
    adam_eps,
    weight_decay,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """As `_layer_norm_grad_kernel`, but X is stepped by its gradient in place, and so are its moments."""
    offs_d = tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    weight = tl.load(Weight + offs_d, mask=in_d, other=0.0)[None, :]
    grad_weight = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    # In float64: early on 1 - beta ** step is the difference of two numbers that are nearly equal.
    step = tl.load(Step).to(tl.float64)
    rate = (tl.load(Rate) / (1.0 - tl.exp(step * log_beta1))).to(tl.float32)
    root = tl.sqrt(1.0 - tl.exp(step * log_beta2)).to(tl.float32)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(V, BLOCK_V), tl.num_programs(0)):
        rows = block * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = (rows < V)[:, None] & in_d[None, :]
        at = rows[:, None] * D + offs_d[None, :]
        grad = tl.load(Grad + at, mask=inside, other=0.0)
        table = tl.load(X + at, mask=inside, other=0.0)
        moment = tl.load(Moment + at, mask=inside, other=0.0)
        square = tl.load(Square + at, mask=inside, other=0.0)
        x, scale = _normalised(table, in_d[None, :], eps, D)
        grad_weight += grad * x
        grad_bias += grad
        grad = _grad_of_rows(grad * weight, x, scale, D) + weight_decay * table
        moment += fresh1 * (grad - moment)
        square += fresh2 * (grad * grad - square)
        tl.store(X + at, table - rate * moment / (tl.sqrt(square) / root + adam_eps), mask=inside)
        tl.store(Moment + at, moment, mask=inside)
        tl.store(Square + at, square, mask=inside)
    share = tl.program_id(0) * D + offs_d
    tl.store(GradWeight + share, tl.sum(grad_weight, 0), mask=in_d)
    tl.store(GradBias + share, tl.sum(grad_bias, 0), mask=in_d)


def _blocks(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"D": width, "BLOCK_D": block, "BLOCK_V": max(1, TILE // block), "num_warps": 4}


def _programs(x: Tensor, blocks: dict[str, int]) -> int:
    return min(triton.cdiv(len(x), blocks["BLOCK_V"]), PROGRAMS * shapes.sm_count(x.device))


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (V, d), weight and bias (d,), all float32 and contiguous -> (V, d)."""
    out, blocks = torch.empty(x.shape, device=x.device), _blocks(x.shape[1])
    launch(_layer_norm_kernel, (triton.cdiv(len(x), blocks["BLOCK_V"]),), x, weight, bias, out, len(x), eps, **blocks)
    return out


def layer_norm_bwd(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """grad, x (V, d), weight (d,), all float32 and contiguous -> gradients of x, weight and bias."""
    (v, d), blocks = x.shape, _blocks(x.shape[1])
    programs = _programs(x, blocks)
    grad_x, shares = torch.empty(v, d, device=x.device), torch.empty(2, programs, d, device=x.device)
    launch(_layer_norm_grad_kernel, (programs,), grad, x, weight, grad_x, shares[0], shares[1], v, eps, **blocks)
    grad_weight, grad_bias = shares.sum(1)
    return grad_x, grad_weight, grad_bias


@dataclass(frozen=True)
class Adam:
    """State and settings of Adam for one parameter (V, d)."""

    moment: Tensor  # (V, d) float32, changed in place
    square: Tensor  # (V, d) float32, changed in place
    step: Tensor  # () float32, the number of this step, from 1
    rate: Tensor  # () float32
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def layer_norm_adam(grad: Tensor, x: Tensor, weight: Tensor, eps: float, adam: Adam) -> tuple[Tensor, Tensor]:
    """Steps x (V, d) in place by the gradient grad (V, d) of its LayerNorm -> gradients of weight and bias (d,)."""
    (v, d), blocks = x.shape, _blocks(x.shape[1])
    programs = _programs(x, blocks)
    shares = torch.empty(2, programs, d, device=x.device)
    launch(
        _layer_norm_adam_kernel,
        (programs,),
        grad,
        x,
        weight,
        adam.moment,
        adam.square,
        adam.step,
        adam.rate,
        shares[0],
        shares[1],
        v,
        eps,
        math.log(adam.betas[0]),
        math.log(adam.betas[1]),
        1.0 - adam.betas[0],
        1.0 - adam.betas[1],
        adam.eps,
        adam.weight_decay,
        **blocks,
    )
    grad_weight, grad_bias = shares.sum(1)
    return grad_weight, grad_bias
