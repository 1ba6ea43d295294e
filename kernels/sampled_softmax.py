"""Sampled softmax: negatives gathered block by block, never all of them; for machines without the CUDA extension.

Negatives that all sessions share are the columns of a dense problem over them alone (slice_cross_entropy.py). Those
of each session have their logits kept from forward to backward. The catalog's gradient is a sum over entries, the
negatives and the wanted items, sorted by item: no atomics, and one order for every sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .losses import Problem, Slopes, losses_fwd, query_bwd, report, shift_of, widened
from .slice_cross_entropy import Columns, dense_bwd, slice_cross_entropy_fwd
from .tiles import launch

BLOCK_N = 64  # negatives at a time
BLOCK_D = 64  # columns of their rows at a time
RUN = 16  # entries whose items one program looks after


@triton.jit(do_not_specialize=["B", "V", "N", "scale", "stride_qb", "stride_cv", "K"])
def _gather_kernel(
    Query,
    Catalog,
    Bias,
    LogQ,
    Wanted,
    Negatives,
    Logits,
    Tops,
    Sums,
    Bad,
    B,
    V,
    N,
    scale,
    stride_qb,
    stride_cv,
    K,
    HAS_BIAS: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    CHECK: tl.constexpr,
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One session's negatives: their logits, -inf where there is none, and the log-sum-exp over one split of them."""
    row = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    target = tl.load(Wanted + row * K + tl.arange(0, 1))
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for block in range(split, tl.cdiv(N, BLOCK_N), splits):
        place = block * BLOCK_N + tl.arange(0, BLOCK_N)
        items = tl.load(Negatives + row * N + place, mask=place < N, other=-1).to(tl.int64)
        member = (items >= 0) & (items != target) & (target >= 0)
        known = member & (items < V)
        e_rows = Catalog + items[:, None] * (stride_cv * UNIT_C)
        dots = tl.zeros([BLOCK_N], tl.float32)
        for begin in range(0, D, BLOCK_D):
            offs_d = begin + tl.arange(0, BLOCK_D)
            q = tl.load(Query + row * (stride_qb * UNIT_Q) + offs_d, mask=offs_d < D, other=0.0)
            e = tl.load(e_rows + offs_d[None, :], mask=known[:, None] & (offs_d < D)[None, :], other=0.0)
            dots += tl.sum(widened(e, PRODUCT) * widened(q, PRODUCT)[None, :], 1)
        logits = dots * scale + shift_of(Bias, LogQ, items, known, scale, HAS_BIAS, HAS_LOG_Q)
        if CHECK:
            report(Bad, tl.zeros([BLOCK_N], tl.int64) + row, logits, known)
        logits = tl.where(member, logits, float("-inf"))
        if HAS_LOGITS:
            tl.store(Logits + row * N + place, logits, mask=place < N)
        largest = tl.maximum(top, tl.max(logits, 0))
        safe = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(logits - safe), 0)
        top = largest
    at = split * B + row + tl.arange(0, 1)
    tl.store(Tops + at, top)
    tl.store(Sums + at, total)


@triton.jit(do_not_specialize=["B", "V", "N", "stride_cv"])
def _gather_query_grad_kernel(
    Catalog,
    Negatives,
    Logits,
    Weights,
    LogPartition,
    Parts,
    B,
    V,
    N,
    stride_cv,
    D: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of a session's gradient, over one split of its negatives."""
    row = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    weight, partition = tl.load(Weights + row), tl.load(LogPartition + row)
    grad = tl.zeros([BLOCK_D], tl.float32)
    for block in range(split, tl.cdiv(N, BLOCK_N), splits):
        place = block * BLOCK_N + tl.arange(0, BLOCK_N)
        items = tl.load(Negatives + row * N + place, mask=place < N, other=-1).to(tl.int64)
        logits = tl.load(Logits + row * N + place, mask=place < N, other=float("-inf"))
        slopes = weight * tl.exp(logits - partition)
        known = (items >= 0) & (items < V) & (slopes != 0.0)
        e_rows = Catalog + items[:, None] * (stride_cv * UNIT_C)
        e = tl.load(e_rows + offs_d[None, :], mask=known[:, None] & (offs_d < D)[None, :], other=0.0)
        grad += tl.sum(widened(e, PRODUCT) * slopes[:, None], 0)
    tl.store(Parts + (split * B + row) * D + offs_d, grad, mask=offs_d < D)


@triton.jit(do_not_specialize=["N", "entries", "wanted", "limit", "stride_qb", "K"])
def _segment_kernel(
    Items,
    Order,
    Query,
    Pulls,
    Logits,
    Weights,
    LogPartition,
    Columns,
    ColumnBias,
    Grad,
    GradBias,
    N,
    entries,
    wanted,
    limit,
    stride_qb,
    K,
    SHARED: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_GRAD_BIAS: tl.constexpr,
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RUN: tl.constexpr,
):
    """BLOCK_D columns of the gradients of the items whose first entry lies among RUN entries.

    Entry i < wanted is wanted item i of B x K; those behind are negatives: i of B x N, which pulls with its session's
    query, or with SHARED i of N, whose sum over all sessions is a row of Columns.
    """
    start = tl.program_id(0).to(tl.int64) * RUN
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    for place in range(start, tl.minimum(start + RUN, entries)):
        item = tl.load(Items + place)
        before = tl.load(Items + tl.maximum(place - 1, 0))
        if ((place == 0) | (item != before)) & (item < limit):
            grad = tl.zeros([BLOCK_D], tl.float32)
            bias = 0.0
            at, here = place, item
            while here == item:
                entry = tl.load(Order + at)
                if entry < wanted:
                    slope = tl.load(Pulls + entry)
                    bias += slope
                    if HAS_GRAD:
                        q = tl.load(Query + (entry // K) * (stride_qb * UNIT_Q) + offs_d, mask=in_d, other=0.0)
                        grad += slope * widened(q, PRODUCT)
                elif SHARED:
                    bias += tl.load(ColumnBias + entry - wanted)
                    if HAS_GRAD:
                        grad += tl.load(Columns + (entry - wanted) * D + offs_d, mask=in_d, other=0.0)
                else:
                    row = (entry - wanted) // N
                    weight, partition = tl.load(Weights + row), tl.load(LogPartition + row)
                    slope = weight * tl.exp(tl.load(Logits + entry - wanted) - partition)
                    bias += slope
                    if HAS_GRAD:
                        q = tl.load(Query + row * (stride_qb * UNIT_Q) + offs_d, mask=in_d, other=0.0)
                        grad += slope * widened(q, PRODUCT)
                at += 1
                here = tl.where(at < entries, tl.load(Items + tl.minimum(at, entries - 1)), limit)
            if HAS_GRAD:
                tl.store(Grad + item.to(tl.int64) * D + offs_d, grad, mask=in_d)
            if HAS_GRAD_BIAS and tl.program_id(1) == 0:
                tl.store(GradBias + item, bias)


@dataclass(frozen=True)
class Gradients:
    """Of query and catalog in their dtypes, of bias in float32; empty where they are not needed."""

    query: Tensor
    catalog: Tensor  # (V, d), or a row for each of `items`
    bias: Tensor  # (V,)
    items: Tensor  # int64, ascending: the items that have entries, where the catalog's gradient is sparse; else empty


def sampled_softmax_fwd(p: Problem, negatives: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """negatives (B, n), or (n,) shared by all; kept (B, n) float32 gets the logits of (B, n) negatives, None: not kept.

    -> losses (B,), log_partition (B,), logits (B, 1 + P) of the wanted items; all float32.
    """
    if negatives.ndim == 1:
        return slice_cross_entropy_fwd(p, Columns(negatives.shape[0], 0, negatives.contiguous(), None))
    b, n = negatives.shape
    splits = _splits(n)
    tops, sums = p.floats(splits, b), p.floats(splits, b)
    launch(
        _gather_kernel,
        (b, splits),
        **p.arguments(),
        Negatives=negatives.contiguous(),
        Logits=kept,
        Tops=tops,
        Sums=sums,
        N=n,
        HAS_LOGITS=kept is not None,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )
    return losses_fwd(p, tops, sums)


def sampled_softmax_bwd(
    p: Problem, negatives: Tensor, kept: Tensor | None, x: Slopes, sparse: bool, needs: list[bool]
) -> Gradients:
    """negatives (B, n), or (n,) shared by all; kept (B, n) float32 as forward filled it, not read where all share them.

    needs: whether the gradients of query, catalog and bias are wanted. -> those of query (B, d), catalog (V, d), or
    with `sparse` a row for each item that has entries, and bias (V,); empty where they are not.
    """
    shared = negatives.ndim == 1
    negatives = negatives.contiguous()
    d = p.query.shape[1]
    columns = Columns(negatives.numel(), 0, negatives, None)
    column_sums = p.floats(columns.count, d) if shared and needs[1] else None
    column_bias = p.floats(columns.count) if shared and (needs[1] or needs[2]) else None
    grad_query = p.query.new_empty(0)
    if shared:
        part = dense_bwd(p, columns, x, needs[0], column_sums, column_bias)
        grad_query = grad_query if part is None else query_bwd(p, x, part[None])
    elif needs[0]:
        grad_query = _query_grad(p, negatives, kept, x)
    items = p.wanted.new_empty(0)
    grad_catalog, grad_bias = p.catalog.new_empty(0), p.floats(0)
    if not (needs[1] or needs[2]):
        return Gradients(grad_query, grad_catalog, grad_bias, items)

    v = p.catalog.shape[0]
    ids = torch.cat([p.wanted.flatten(), negatives.flatten().long()])
    rows, order = torch.where((ids < 0) | (ids >= v), v, ids).sort(stable=True)
    limit = v
    if sparse:
        items, rows = rows.unique_consecutive(return_inverse=True)
        limit = int((items < v).sum())
        items = items[:limit]
    # Rows without entries are not written; a sparse gradient has none.
    if needs[1]:
        grad_catalog = torch.zeros(limit, d, dtype=p.catalog.dtype, device=p.catalog.device)
    if needs[2]:
        grad_bias = torch.zeros(limit, dtype=torch.float32, device=p.query.device)
    constants = p.arguments()
    launch(
        _segment_kernel,
        (triton.cdiv(rows.numel(), RUN), triton.cdiv(d, 128) if needs[1] else 1),
        Items=rows,
        Order=order,
        Query=p.query,
        Pulls=x.pulls,
        Logits=kept,
        Weights=x.weights,
        LogPartition=x.log_partition,
        Columns=column_sums,
        ColumnBias=column_bias,
        Grad=grad_catalog,
        GradBias=grad_bias,
        N=negatives.shape[-1],
        entries=rows.numel(),
        wanted=p.wanted.numel(),
        limit=limit,
        stride_qb=constants["stride_qb"],
        K=constants["K"],
        SHARED=shared,
        HAS_GRAD=needs[1],
        HAS_GRAD_BIAS=needs[2],
        D=d,
        UNIT_Q=constants["UNIT_Q"],
        PRODUCT=constants["PRODUCT"],
        BLOCK_D=128,
        RUN=RUN,
        num_warps=1,
    )
    if sparse and needs[2]:
        grad_bias = p.query.new_zeros(v, dtype=torch.float32).index_copy_(0, items, grad_bias)
    return Gradients(grad_query, grad_catalog, grad_bias, items)


def _query_grad(p: Problem, negatives: Tensor, kept: Tensor | None, x: Slopes) -> Tensor:
    (b, n), d = negatives.shape, p.query.shape[1]
    splits, constants = _splits(n), p.arguments()
    parts = p.floats(splits, b, d)
    launch(
        _gather_query_grad_kernel,
        (b, splits, triton.cdiv(d, BLOCK_D)),
        Catalog=p.catalog,
        Negatives=negatives,
        Logits=kept,
        Weights=x.weights,
        LogPartition=x.log_partition,
        Parts=parts,
        B=b,
        V=p.catalog.shape[0],
        N=n,
        stride_cv=constants["stride_cv"],
        D=d,
        UNIT_C=constants["UNIT_C"],
        PRODUCT=constants["PRODUCT"],
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )
    return query_bwd(p, x, parts)


def _splits(n: int) -> int:
    """A program for every 4,096 negatives of a session: sessions alone are enough to fill a GPU."""
    return max(1, triton.cdiv(n, 4096))
