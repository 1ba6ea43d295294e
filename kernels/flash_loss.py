"""Cross-entropy against a dense set of negatives of a large catalog, without a buffer of scores.

As in flash attention, forward goes over the catalog once: beside each session's log-sum-exp it sums the embeddings by
their probabilities, relative to a running maximum, which is all that the queries' gradient needs. Backward goes over it
once more for the catalog's gradient, with the roles swapped: a program has some items and goes over all sessions. Both
multiply twice a tile, what a buffer of scores takes in three products, and nothing of size B x V is written. Nothing
is added by atomics: programs write sums of their own, which are joined in one order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shapes, tiles
from .columns import Columns
from .losses import Dlogits, Problem, losses_fwd, query_bwd, scale_of
from .tiles import launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def is_flash(query: Tensor, catalog: Tensor, neg: Tensor | None, positives: Tensor | None, precision: str) -> bool:
    """Whether these kernels take a loss; neg are bits (B, W) uint8, ids (B, n) or None for all items."""
    (b, d), v = query.shape, catalog.shape[0]
    if positives is not None and positives.shape[1] > shapes.FLASH_POSITIVES:
        return False
    if not shapes.narrow(precision, query, catalog) or b == 0:
        return False
    dense = neg is None or neg.dtype == torch.uint8 or neg.shape[1] * shapes.FLASH_IDS >= v
    return dense and 0 < d <= shapes.FLASH_WIDTH and v >= shapes.FLASH_ITEMS


def saved_bytes(query: Tensor, catalog: Tensor, neg: Tensor | None, logits: int, needs_query: bool) -> int:
    """How much goes from forward to backward, with `logits` a row of target and positives; see `Saved`."""
    (b, d), words = query.shape, _words(catalog) if _are_ids(neg) else 0
    return 4 * b * (logits + words + (d if needs_query else 0))


def _words(catalog: Tensor) -> int:
    """Of 32 bits, in an even number, that hold a bit for each item."""
    return -(-catalog.shape[0] // 64) * 2


def _are_ids(neg: Tensor | None) -> bool:
    return neg is not None and neg.dtype != torch.uint8


@dataclass(frozen=True)
class Saved:
    """What goes from forward to backward beside the log-sum-exps, in one memory."""

    memory: Tensor  # uint8
    pos: Tensor  # (B, 1 + P) float32, the logits of target and positives
    bits: Tensor | None  # (B, W) int32, the bits of a slice of ids; None for other negatives
    query: Tensor | None  # (B, d) float32, the negatives' embeddings summed by their probabilities; None: not needed

    @classmethod
    def of(cls, p: Problem, neg: Tensor | None, memory: Tensor) -> Saved:
        """The views of `memory`; where it is empty, as without gradients, of memory that lasts as long as forward."""
        (b, k), d = p.pos_ids.shape, p.query.shape[1]
        words = _words(p.catalog) if _are_ids(neg) else 0
        whole = (
            memory if memory.numel() > 0 else torch.empty(4 * b * (k + words), dtype=torch.uint8, device=memory.device)
        )
        floats = whole.view(torch.float32)
        pos, bits, query = floats.split([b * k, b * words, floats.numel() - b * (k + words)])
        return cls(
            memory,
            pos.view(b, k),
            bits.view(torch.int32).view(b, words) if words else None,
            query.view(b, d) if query.numel() > 0 else None,
        )


@triton.jit(do_not_specialize=["V", "N", "stride_bits"])
def _expand_kernel(Neg, Bits, V, N, stride_bits, BLOCK: tl.constexpr):
    """Sets the bits of a row's ids, which are zero before."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(Neg + row * N + offs, mask=offs < N, other=-1)
    real = (ids >= 0) & (ids < V)
    items = tl.where(real, ids, 0).to(tl.int32)
    tl.atomic_or(Bits + row * stride_bits + (items >> 5), 1 << (items & 31), mask=real, sem="relaxed")


@triton.jit(
    do_not_specialize=["B", "V", "first_column", "scale", "stride_qb", "stride_cv", "stride_bits", "columns", "K"]
)
def _forward_kernel(
    Query,
    Catalog,
    Bias,
    LogQ,
    Ids,
    Bits,
    PosIds,
    Tops,
    Sums,
    Partial,
    Bad,
    B,
    V,
    columns,
    first_column,
    scale,
    Temperature,
    stride_qb,
    stride_cv,
    stride_bits,
    K,
    HAS_IDS: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    TERMS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Of every splits-th tile of items: the largest logit of a session's negatives, the sum of exponentials relative
    to it, and, with HAS_GRAD, the embeddings' sum weighted by these, to Partial (splits, B, D)."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    split, splits = tl.program_id(1), tl.num_programs(1)
    in_b, safe_rows = rows < B, tl.minimum(rows, B - 1)
    query = tiles.resident_query(Query, safe_rows, stride_qb, FORM)
    target = tl.load(PosIds + rows.to(tl.int64) * K, mask=in_b, other=-1).to(tl.int32)
    bits_rows = safe_rows.to(tl.int64) * stride_bits
    scale = scale_of(scale, Temperature)
    to_log2 = scale * LOG2E  # logits in units of log 2, whose exponential is one instruction
    UNIT: tl.constexpr = FORM.UNIT_C
    BLOCK_D: tl.constexpr = FORM.BLOCK_D
    # Weights are relative to the largest; float16, which holds nothing below 6e-8, gets them 2 ** 15 times as large.
    SHIFT: tl.constexpr = 15.0 if FORM.PRODUCT == "fp16" else 0.0
    top = tl.full([BLOCK_B], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for tile in range(first_column // BLOCK_V + split, tl.cdiv(V, BLOCK_V), splits):
        items = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        safe_items = tl.minimum(items, V - 1)
        embeddings = tiles.operand(tiles.load_rows(Catalog, safe_items, stride_cv, UNIT, FORM), FORM)
        scores = tl.dot(tiles.operand(query, FORM), tl.trans(embeddings), input_precision="ieee")
        inside = (items >= first_column) & (items < V)
        if TERMS.HAS_BIAS:
            bias = tl.load(Bias + safe_items).to(tl.float32)
            scores += bias[None, :]
            inside &= bias != float("-inf")
        if TERMS.CHECK:
            wrong = (target >= 0)[:, None] & inside[None, :] & ~(tl.abs(scores) < float("inf"))
            tiles.report(Bad, scores * scale, wrong, rows)
        if HAS_BITS:
            word = (tile * (BLOCK_V // 32) + tl.arange(0, BLOCK_V // 32))[None, :]
            words = tl.load(Bits + bits_rows[:, None] + word, mask=word < stride_bits, other=0)
            words = tl.where(word == (target >> 5)[:, None], words & ~(1 << (target & 31))[:, None], words)
            set_ = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
            scores = tl.where(tl.reshape(set_, scores.shape) != 0, scores, float("-inf"))
        else:
            scores = tl.where(items[None, :] != target[:, None], scores, float("-inf"))
        if (tile * BLOCK_V < first_column) | (tile * BLOCK_V > V - BLOCK_V):
            scores = tl.where(inside[None, :], scores, float("-inf"))
        largest = tl.maximum(top, tl.max(scores, 1) * to_log2 - SHIFT)
        safe = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2(scores * to_log2 - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        if HAS_GRAD:
            acc = tl.dot(tiles.operand(weights, FORM), embeddings, acc * shrink[:, None], input_precision="ieee")
        top = largest
    # Rows whose target is ignored have no negatives, and may have been NaN.
    counts = target >= 0
    at = split.to(tl.int64) * B + rows
    tl.store(Tops + at, tl.where(counts, top * LN2, float("-inf")), mask=in_b)
    tl.store(Sums + at, tl.where(counts, total, 0.0), mask=in_b)
    if HAS_GRAD:
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        places = Partial + at[:, None] * FORM.D + offs_d
        tl.store(places, tl.where(counts[:, None], acc, 0.0), mask=in_b[:, None] & (offs_d < FORM.D))


@triton.jit(do_not_specialize=["B", "splits"])
def _join_kernel(Tops, Lse, Partial, Out, B, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """One session: the embeddings' sums of all splits, now relative to the log-sum-exp, in their order."""
    row = tl.program_id(0).to(tl.int64)
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    lse = tl.load(Lse + row)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for begin in range(0, splits, BLOCK_S):
        split = begin + offs_s
        shrink = tl.exp(tl.load(Tops + split * B + row, mask=split < splits, other=float("-inf")) - lse)
        mask = (split < splits)[:, None] & (offs_d < D)[None, :]
        part = tl.load(Partial + (split * B + row)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        acc += shrink[:, None] * part
    tl.store(Out + row * D + offs_d, tl.sum(acc, 0), mask=offs_d < D)


@triton.jit(
    do_not_specialize=["B", "V", "first_column", "scale", "stride_qb", "stride_cv", "stride_bits", "columns", "K"]
)
def _backward_kernel(
    Query,
    Catalog,
    Bias,
    LogQ,
    Ids,
    Bits,
    PosIds,
    Weights,
    Lse,
    PosDlogits,
    Grad,
    GradBias,
    Unit,
    Bad,
    B,
    V,
    columns,
    first_column,
    scale,
    Temperature,
    stride_qb,
    stride_cv,
    stride_bits,
    K,
    HAS_IDS: tl.constexpr,
    HAS_BITS: tl.constexpr,
    COUNT_POS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_GRAD_BIAS: tl.constexpr,
    TERMS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The gradients of BLOCK_V items and of their biases, over all sessions, times what Unit holds. No query may be
    NaN."""
    tile = tl.program_id(0)
    items = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    safe_items = tl.minimum(items, V - 1)
    UNIT_C: tl.constexpr = FORM.UNIT_C
    UNIT_Q: tl.constexpr = FORM.UNIT_Q
    BLOCK_D: tl.constexpr = FORM.BLOCK_D
    embeddings = tiles.operand(tiles.load_rows(Catalog, safe_items, stride_cv, UNIT_C, FORM), FORM)
    to_log2 = scale_of(scale, Temperature) * LOG2E
    bias = tl.zeros([BLOCK_V], tl.float32)
    if TERMS.HAS_BIAS:
        bias = tl.load(Bias + safe_items).to(tl.float32) * to_log2
    acc = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    sums = tl.zeros([BLOCK_V], tl.float32)
    for begin in range(0, B, BLOCK_B):
        rows = begin + tl.arange(0, BLOCK_B)
        in_b, safe_rows = rows < B, tl.minimum(rows, B - 1)
        at_pos = rows.to(tl.int64) * K
        query = tiles.operand(tiles.load_rows(Query, safe_rows, stride_qb, UNIT_Q, FORM), FORM)
        target = tl.load(PosIds + at_pos, mask=in_b, other=-1).to(tl.int32)
        weight = tl.load(Weights + rows, mask=in_b, other=0.0)
        # Exponentials of rows without weight, as those beyond B are, are 0.
        lse = tl.where(weight != 0.0, tl.load(Lse + rows, mask=in_b, other=0.0) * LOG2E, float("inf"))
        logits = tl.dot(embeddings, tl.trans(query), input_precision="ieee") * to_log2
        if TERMS.HAS_BIAS:
            logits += bias[:, None]
        dlogits = tl.exp2(logits - lse[None, :]) * weight[None, :]
        if HAS_BITS:
            word = (tile * (BLOCK_V // 32) + tl.arange(0, BLOCK_V // 32))[:, None]
            words = Bits + (safe_rows.to(tl.int64) * stride_bits)[None, :] + word
            words = tl.load(words, mask=word < stride_bits, other=0)
            set_ = (words[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1
            dlogits = tl.where(tl.reshape(set_, dlogits.shape) != 0, dlogits, 0.0)
        pos = tl.load(PosDlogits + at_pos, mask=in_b, other=0.0)
        dlogits = tl.where(items[:, None] == target[None, :], pos[None, :], dlogits)
        for k in tl.static_range(1, COUNT_POS):  # a loop would keep the one around it from being pipelined
            item = tl.load(PosIds + at_pos + k, mask=in_b, other=-1).to(tl.int32)
            if tl.max((item // BLOCK_V == tile).to(tl.int32), 0) > 0:
                pos = tl.load(PosDlogits + at_pos + k, mask=in_b, other=0.0)
                dlogits += tl.where(items[:, None] == item[None, :], pos[None, :], 0.0)
        if HAS_GRAD_BIAS:
            sums += tl.sum(dlogits, 1)
        if HAS_GRAD:
            acc = tl.dot(tiles.operand(dlogits, FORM), query, acc, input_precision="ieee")
    if Unit is not None:
        unit = tl.load(Unit)
        acc *= unit
        sums *= unit
    real, padding = items < V, items < first_column
    if HAS_GRAD:
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        places = Grad + items.to(tl.int64)[:, None] * FORM.D + offs_d
        grad = tl.where(padding[:, None], 0.0, acc)
        tl.store(places, tiles.operand(grad, FORM), mask=real[:, None] & (offs_d < FORM.D))
    if HAS_GRAD_BIAS:
        tl.store(GradBias + items, tl.where(padding, 0.0, sums), mask=real)


def _columns(p: Problem, first_item: int, neg: Tensor | None, saved: Saved) -> Columns:
    return Columns.of(p, first_item, neg if saved.bits is None else saved.bits.view(torch.uint8))


def _expand(p: Problem, ids: Tensor, bits: Tensor) -> None:
    """ids (B, n) -> their bits (B, W) int32."""
    bits.zero_()
    launch(
        _expand_kernel,
        (ids.shape[0], triton.cdiv(ids.shape[1], shapes.EXPAND["BLOCK"])),
        Neg=ids.contiguous(),
        Bits=bits,
        V=p.catalog.shape[0],
        N=ids.shape[1],
        stride_bits=bits.shape[1],
        **shapes.EXPAND,
    )


def flash_loss_fwd(p: Problem, first_item: int, neg: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor]:
    """neg as `is_flash` takes them; memory uint8 gets what backward needs, `saved_bytes` of it, or is empty.

    -> losses (B,), lse (B,) float32."""
    (b, d), saved = p.query.shape, Saved.of(p, neg, memory)
    if neg is not None and saved.bits is not None:
        _expand(p, neg, saved.bits)
    blocks = shapes.flash_blocks(d, p.bias is not None or p.bad is not None, p.query.device)
    sessions = triton.cdiv(b, blocks.b)
    splits = max(1, shapes.FLASH_PROGRAMS * shapes.sm_count(p.query.device) // sessions)
    splits = min(splits, triton.cdiv(p.catalog.shape[0], blocks.v))
    tops, sums = p.floats(splits, b), p.floats(splits, b)
    partial = p.floats(splits, b, d) if saved.query is not None else None
    launch(
        _forward_kernel,
        (sessions, splits),
        **p.arguments(blocks.d),
        **_columns(p, first_item, neg, saved).arguments(),
        Tops=tops,
        Sums=sums,
        Partial=partial,
        HAS_GRAD=partial is not None,
        **blocks.options(),
    )
    losses, lse, pos_logits = losses_fwd(p, tops, sums)
    if memory.numel() > 0:
        saved.pos.copy_(pos_logits)
    if saved.query is not None:
        launch(
            _join_kernel,
            (b,),
            Tops=tops,
            Lse=lse,
            Partial=partial,
            Out=saved.query,
            B=b,
            splits=splits,
            D=d,
            BLOCK_D=blocks.d,
            **shapes.JOIN,
        )
    return losses, lse


def flash_loss_bwd(
    p: Problem, first_item: int, neg: Tensor | None, grad_losses: Tensor, lse: Tensor, memory: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """needs as `slice_cross_entropy_bwd` has it, which returns the same."""
    saved = Saved.of(p, neg, memory)
    x = Dlogits.of(p, grad_losses, lse, saved.pos)
    grad_query, grad_catalog, grad_bias = p.query.new_empty(0), p.catalog.new_empty(0), p.floats(0)
    if needs[0]:
        if saved.query is None:
            raise ValueError("saved holds nothing for the query's gradient, since the query did not require one")
        grad_query = query_bwd(p, x, (x.weights[:, None] * saved.query)[None], p.grad_dtype(needs))
    if needs[1] or needs[2]:
        (v, d), device = p.catalog.shape, p.query.device
        grad_catalog = torch.empty(v, d, dtype=p.catalog.dtype, device=device) if needs[1] else grad_catalog
        grad_bias = p.floats(v) if needs[2] else grad_bias
        blocks = shapes.flash_blocks(d, p.bias is not None or p.pos_ids.shape[1] > 1, device)
        # Ignored rows have dlogits of 0, but may hold NaN, and 0 * NaN is NaN.
        real = replace(p, query=p.query.masked_fill(p.ignored, 0.0))
        x, unit = x.ranged(p)
        launch(
            _backward_kernel,
            (triton.cdiv(v, blocks.v),),
            **real.arguments(blocks.d),
            **_columns(p, first_item, neg, saved).arguments(),
            **x.arguments(),
            Grad=grad_catalog,
            GradBias=grad_bias,
            Unit=unit,
            COUNT_POS=p.pos_ids.shape[1],
            HAS_GRAD=needs[1],
            HAS_GRAD_BIAS=needs[2],
            **blocks.options(),
        )
    return grad_query, grad_catalog, grad_bias
