"""Sampled softmax: negatives gathered block by block, never all of them; for machines without the CUDA extension.

Negatives that all sessions share are the columns of a dense problem over them alone (slice_cross_entropy.py). Those
of each session have their logits saved from forward to backward. The catalog's gradient is a sum over entries, the
negatives, targets and positives, sorted by item: no atomics, and one order for every sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shapes, tiles
from .columns import Columns
from .losses import Dlogits, Problem, gathered_dots, losses_fwd, query_bwd, report, scale_of, shift_of, widened
from .slice_cross_entropy import dense_bwd, slice_cross_entropy_fwd
from .tiles import launch


@triton.jit(do_not_specialize=["B", "V", "N", "scale", "stride_qb", "stride_cv", "K"])
def _gather_kernel(
    Query,
    Catalog,
    Bias,
    LogQ,
    PosIds,
    Neg,
    Logits,
    Tops,
    Sums,
    Bad,
    B,
    V,
    N,
    scale,
    Temperature,
    stride_qb,
    stride_cv,
    K,
    HAS_LOGITS: tl.constexpr,
    TERMS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One session's negatives: their logits, -inf where there is none, and the log-sum-exp over one split of them."""
    scale = scale_of(scale, Temperature)
    row = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    target = tl.load(PosIds + row * K + tl.arange(0, 1))
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for block in range(split, tl.cdiv(N, BLOCK_N), splits):
        place = block * BLOCK_N + tl.arange(0, BLOCK_N)
        items = tl.load(Neg + row * N + place, mask=place < N, other=-1).to(tl.int64)
        member = (items >= 0) & (items != target) & (target >= 0)
        known = member & (items < V)
        dots = gathered_dots(Query, Catalog, row, items, known, stride_qb, stride_cv, FORM)
        shift, allowed = shift_of(Bias, LogQ, items, known, scale, TERMS)
        logits = dots * scale + shift
        if TERMS.CHECK:
            report(Bad, tl.zeros([BLOCK_N], tl.int64) + row, logits, allowed)
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
    Neg,
    Logits,
    Weights,
    Lse,
    Partial,
    B,
    V,
    N,
    stride_cv,
    FORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_D columns of a session's gradient, over one split of its negatives."""
    row = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    BLOCK_D: tl.constexpr = FORM.BLOCK_D
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    weight, lse = tl.load(Weights + row), tl.load(Lse + row)
    grad = tl.zeros([BLOCK_D], tl.float32)
    for block in range(split, tl.cdiv(N, BLOCK_N), splits):
        place = block * BLOCK_N + tl.arange(0, BLOCK_N)
        items = tl.load(Neg + row * N + place, mask=place < N, other=-1).to(tl.int64)
        logits = tl.load(Logits + row * N + place, mask=place < N, other=float("-inf"))
        dlogits = weight * tl.exp(logits - lse)
        known = (items >= 0) & (items < V) & (dlogits != 0.0)
        e_rows = Catalog + items[:, None] * (stride_cv * FORM.UNIT_C)
        e = tl.load(e_rows + offs_d[None, :], mask=known[:, None] & (offs_d < FORM.D)[None, :], other=0.0)
        grad += tl.sum(widened(e, FORM) * dlogits[:, None], 0)
    tl.store(Partial + (split * B + row) * FORM.D + offs_d, grad, mask=offs_d < FORM.D)


@triton.jit(do_not_specialize=["N", "entries", "pos_entries", "limit", "stride_qb", "K"])
def _segment_kernel(
    Items,
    Order,
    Query,
    PosDlogits,
    Logits,
    Weights,
    Lse,
    Columns,
    ColumnBias,
    Grad,
    GradBias,
    N,
    entries,
    pos_entries,
    limit,
    stride_qb,
    K,
    SHARED: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_GRAD_BIAS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RUN: tl.constexpr,
):
    """BLOCK_D columns of the gradients of the items whose first entry lies among RUN entries.

    Entry i < pos_entries is i of PosIds, B x K; those behind are negatives: i of B x N, whose dlogit multiplies its
    session's query, or with SHARED i of N, whose sum over all sessions is a row of Columns. A query whose dlogit is 0
    is not read: where the target is ignored it may be NaN.
    """
    start = tl.program_id(0).to(tl.int64) * RUN
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < FORM.D
    for place in range(start, tl.minimum(start + RUN, entries)):
        item = tl.load(Items + place)
        before = tl.load(Items + tl.maximum(place - 1, 0))
        if ((place == 0) | (item != before)) & (item < limit):
            grad = tl.zeros([BLOCK_D], tl.float32)
            bias = 0.0
            at, current = place, item
            while current == item:
                entry = tl.load(Order + at)
                if entry < pos_entries:
                    dlogit = tl.load(PosDlogits + entry)
                    bias += dlogit
                    if HAS_GRAD:
                        q_row = Query + (entry // K) * (stride_qb * FORM.UNIT_Q)
                        q = tl.load(q_row + offs_d, mask=offs_d < tl.where(dlogit != 0.0, FORM.D, 0), other=0.0)
                        grad += dlogit * widened(q, FORM)
                elif SHARED:
                    bias += tl.load(ColumnBias + entry - pos_entries)
                    if HAS_GRAD:
                        grad += tl.load(Columns + (entry - pos_entries) * FORM.D + offs_d, mask=in_d, other=0.0)
                else:
                    row = (entry - pos_entries) // N
                    weight, lse = tl.load(Weights + row), tl.load(Lse + row)
                    dlogit = weight * tl.exp(tl.load(Logits + entry - pos_entries) - lse)
                    bias += dlogit
                    if HAS_GRAD:
                        q_row = Query + row * (stride_qb * FORM.UNIT_Q)
                        q = tl.load(q_row + offs_d, mask=offs_d < tl.where(dlogit != 0.0, FORM.D, 0), other=0.0)
                        grad += dlogit * widened(q, FORM)
                at += 1
                current = tl.where(at < entries, tl.load(Items + tl.minimum(at, entries - 1)), limit)
            if HAS_GRAD:
                tl.store(Grad + item.to(tl.int64) * FORM.D + offs_d, grad, mask=in_d)
            if HAS_GRAD_BIAS and tl.program_id(1) == 0:
                tl.store(GradBias + item, bias)


@dataclass(frozen=True)
class Gradients:
    """Of query and catalog in their dtypes, or the query's in float32, of bias in float32; empty where they are not
    needed."""

    query: Tensor
    catalog: Tensor  # (V, d), or a row for each of `items`
    bias: Tensor  # (V,)
    items: Tensor  # int64, ascending: the items that have entries, where the catalog's gradient is sparse; else empty


def sampled_softmax_fwd(p: Problem, neg: Tensor, saved: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """neg (B, n), or (n,) shared by all; saved (B, n) float32 gets the logits of (B, n) negatives, None: not saved.

    -> losses (B,), lse (B,), logits (B, 1 + P) of target and positives; all float32.
    """
    if neg.ndim == 1:
        return slice_cross_entropy_fwd(p, Columns(neg.shape[0], 0, neg.contiguous(), None))
    b, n = neg.shape
    if b != p.query.shape[0]:
        raise ValueError(f"neg must be ({p.query.shape[0]}, n), got {tuple(neg.shape)}")
    splits = _splits(n)
    tops, sums = p.floats(splits, b), p.floats(splits, b)
    launch(
        _gather_kernel,
        (b, splits),
        **p.arguments(shapes.GATHER_WIDTH),
        Neg=neg.contiguous(),
        Logits=saved,
        Tops=tops,
        Sums=sums,
        N=n,
        HAS_LOGITS=saved is not None,
        **shapes.GATHER,
    )
    return losses_fwd(p, tops, sums)


def sampled_softmax_bwd(
    p: Problem, neg: Tensor, saved: Tensor | None, x: Dlogits, sparse: bool, needs: list[bool]
) -> Gradients:
    """neg (B, n), or (n,) shared by all; saved (B, n) float32 as forward filled it, not read where all share them.

    needs: whether the gradients of query, catalog and bias are needed, and the query's in float32. -> those of query
    (B, d), catalog (V, d), or with `sparse` a row for each item that has entries, and bias (V,); empty where they are
    not.
    """
    neg, shared = neg.contiguous(), neg.ndim == 1
    columns = Columns(neg.numel(), 0, neg, None)
    column_sums = p.floats(columns.count, p.query.shape[1]) if shared and needs[1] else None
    column_bias = p.floats(columns.count) if shared and (needs[1] or needs[2]) else None
    grad_query = p.query.new_empty(0)
    if shared:
        part = dense_bwd(p, columns, x, needs[0], column_sums, column_bias)
        grad_query = grad_query if part is None else query_bwd(p, x, part[None], p.grad_dtype(needs))
    elif needs[0]:
        grad_query = query_bwd(p, x, _query_sums(p, neg, saved, x), p.grad_dtype(needs))
    items = p.pos_ids.new_empty(0)
    if not (needs[1] or needs[2]):
        return Gradients(grad_query, p.catalog.new_empty(0), p.floats(0), items)

    v = p.catalog.shape[0]
    ids = torch.cat([p.pos_ids.flatten(), neg.flatten().long()])
    rows, order = torch.where((ids < 0) | (ids >= v), v, ids).sort(stable=True)
    limit = v
    if sparse:
        items, rows = rows.unique_consecutive(return_inverse=True)
        limit = int((items < v).sum())
        items = items[:limit]
    entries = {"Items": rows, "Order": order, "entries": rows.numel(), "limit": limit}
    sums = {"Columns": column_sums, "ColumnBias": column_bias, "Logits": saved}
    grad_catalog, grad_bias = _item_grads(p, neg, x, entries, sums, needs)
    if sparse and needs[2]:
        grad_bias = p.query.new_zeros(v, dtype=torch.float32).index_copy_(0, items, grad_bias)
    return Gradients(grad_query, grad_catalog, grad_bias, items)


def _item_grads(
    p: Problem, neg: Tensor, x: Dlogits, entries: dict[str, Any], sums: dict[str, Tensor | None], needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """-> gradients (limit, d) of the catalog and (limit,) of the bias, empty where they are not needed; rows without
    entries are zero."""
    d, limit = p.query.shape[1], entries["limit"]
    grad_catalog = torch.zeros((limit, d) if needs[1] else 0, dtype=p.catalog.dtype, device=p.catalog.device)
    grad_bias = torch.zeros(limit if needs[2] else 0, dtype=torch.float32, device=p.query.device)
    block_d, run = shapes.SEGMENT["BLOCK_D"], shapes.SEGMENT["RUN"]
    launch(
        _segment_kernel,
        (triton.cdiv(entries["entries"], run), triton.cdiv(d, block_d) if needs[1] else 1),
        **entries,
        **sums,
        **x.arguments(),
        Query=p.query,
        Grad=grad_catalog,
        GradBias=grad_bias,
        N=neg.shape[-1],
        pos_entries=p.pos_ids.numel(),
        stride_qb=tiles.strides(p.query),
        K=p.pos_ids.shape[1],
        SHARED=neg.ndim == 1,
        HAS_GRAD=needs[1],
        HAS_GRAD_BIAS=needs[2],
        FORM=p.form(block_d),
        **shapes.SEGMENT,
    )
    return grad_catalog, grad_bias


def _query_sums(p: Problem, neg: Tensor, saved: Tensor | None, x: Dlogits) -> Tensor:
    """-> (splits, B, d) float32, what the negatives add to the query's gradient; neg (B, n) contiguous."""
    (b, n), d = neg.shape, p.query.shape[1]
    splits = _splits(n)
    partial = p.floats(splits, b, d)
    launch(
        _gather_query_grad_kernel,
        (b, splits, triton.cdiv(d, shapes.GATHER_WIDTH)),
        Catalog=p.catalog,
        Neg=neg,
        Logits=saved,
        Weights=x.weights,
        Lse=x.lse,
        Partial=partial,
        B=b,
        V=p.catalog.shape[0],
        N=n,
        stride_cv=tiles.strides(p.catalog),
        FORM=p.form(shapes.GATHER_WIDTH),
        **shapes.GATHER,
    )
    return partial


def _splits(n: int) -> int:
    """Programs that share a session's negatives."""
    return max(1, triton.cdiv(n, shapes.NEGATIVES_A_PROGRAM))
