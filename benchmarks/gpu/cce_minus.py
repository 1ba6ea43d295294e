"""CCE-: cross-entropy over sampled negatives in Triton, written from its paper, as a baseline on a GPU.

Zhelnin et al., "Faster and Memory-Efficient Training of Sequential Recommendation Models for Large Catalogs", 2025
(arXiv 2509.09682). As there: no gathered (B, n, d) tensor exists; the forward keeps each row's log-sum-exp alone; the
backward computes the logits again and adds the gradient of the catalog by atomics.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 64  # negatives scored at a time


@triton.jit
def _forward_kernel(Query, Catalog, Target, Neg, Lse, Loss, N, stride_nb, stride_nn, D: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64: it is multiplied by strides below
    offs_d, offs_n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_d = offs_d < D
    q = tl.load(Query + row * D + offs_d, mask=in_d, other=0.0).to(tl.float32)
    target = tl.load(Target + row)
    label = tl.sum(q * tl.load(Catalog + target * D + offs_d, mask=in_d, other=0.0).to(tl.float32))
    top, total = label, label * 0.0 + 1.0
    for begin in range(0, N, BLOCK_N):
        ids = tl.load(Neg + row * stride_nb + (begin + offs_n) * stride_nn, mask=begin + offs_n < N, other=-1)
        real = (ids >= 0) & (ids != target)
        vectors = tl.load(Catalog + ids[:, None] * D + offs_d, mask=real[:, None] & in_d, other=0.0).to(tl.float32)
        logits = tl.where(real, tl.sum(vectors * q, 1), float("-inf"))
        higher = tl.maximum(top, tl.max(logits))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher))
        top = higher
    lse = top + tl.log(total)
    tl.store(Lse + row, lse)
    tl.store(Loss + row, lse - label)


@triton.jit
def _backward_kernel(Query, Catalog, Target, Neg, Lse, Grad, GradQuery, GradCatalog, N, stride_nb, stride_nn,
                     D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_d, offs_n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_d = offs_d < D
    q = tl.load(Query + row * D + offs_d, mask=in_d, other=0.0).to(tl.float32)
    target, lse, grad = tl.load(Target + row), tl.load(Lse + row), tl.load(Grad)
    vector = tl.load(Catalog + target * D + offs_d, mask=in_d, other=0.0).to(tl.float32)
    dlogit = (tl.exp(tl.sum(q * vector) - lse) - 1.0) * grad
    grad_q = dlogit * vector
    tl.atomic_add(GradCatalog + target * D + offs_d, dlogit * q, mask=in_d)
    for begin in range(0, N, BLOCK_N):
        ids = tl.load(Neg + row * stride_nb + (begin + offs_n) * stride_nn, mask=begin + offs_n < N, other=-1)
        real = (ids >= 0) & (ids != target)
        inside = real[:, None] & in_d
        vectors = tl.load(Catalog + ids[:, None] * D + offs_d, mask=inside, other=0.0).to(tl.float32)
        dlogits = tl.where(real, tl.exp(tl.sum(vectors * q, 1) - lse) * grad, 0.0)
        grad_q += tl.sum(dlogits[:, None] * vectors, 0)
        tl.atomic_add(GradCatalog + ids[:, None] * D + offs_d, dlogits[:, None] * q, mask=inside)
    tl.store(GradQuery + row * D + offs_d, grad_q, mask=in_d)


class CceMinus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, catalog: Tensor, target: Tensor, neg: Tensor) -> Tensor:
        B, D = query.shape
        lse, loss = (torch.empty(B, device=query.device) for _ in range(2))
        ctx.shape = {"D": D, "BLOCK_N": BLOCK_N, "BLOCK_D": triton.next_power_of_2(D)}
        _forward_kernel[(B,)](query, catalog, target, neg, lse, loss, neg.shape[1], *neg.stride(), **ctx.shape)
        ctx.save_for_backward(query, catalog, target, neg, lse)
        return loss.mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, catalog, target, neg, lse = ctx.saved_tensors
        grad = grads[0].float() / len(query)
        grad_query = torch.empty_like(query, dtype=torch.float32)
        grad_catalog = torch.zeros_like(catalog, dtype=torch.float32)  # atomics add in float32
        outputs = (lse, grad, grad_query, grad_catalog, neg.shape[1], *neg.stride())
        _backward_kernel[(len(query),)](query, catalog, target, neg, *outputs, **ctx.shape)
        return grad_query.to(query.dtype), grad_catalog.to(catalog.dtype), None, None


def cce_minus(query: Tensor, catalog: Tensor, target: Tensor, neg: Tensor) -> Tensor:
    """The mean loss; query (B, d), catalog (V, d) contiguous, target (B,) int64, neg (B, n) int64 with any strides."""
    loss: Tensor = CceMinus.apply(query, catalog, target, neg)
    return loss
