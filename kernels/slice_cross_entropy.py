"""Cross-entropy against a dense set of negatives: tiles of scores are computed where they are needed, never all stored.

Forward leaves one log-sum-exp a session. Backward computes the tiles again, some columns of all sessions at a time: the
gradients of the logits go to a buffer of bounded size, whose products with catalog and queries are the gradients of
queries and catalog. Each item's gradient is one product over all sessions: nothing is added by atomics, and every sum
has one order. float32 that tensor cores may not take for TF32 is multiplied by torch into the same buffer: its
library's plain multiply-adds are more than twice as fast as Triton's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shapes, tiles
from .columns import Buffer, Columns, dtype_of_products, embeddings, multiply, multiply_into, no_autocast, product
from .losses import Dlogits, Problem, losses_fwd, report, scale_of, shift_of
from .tiles import launch


class Scored(NamedTuple):
    """What `_logits` reads: a problem and its columns, and where products were computed before the buffer of them."""

    Query: Any
    Catalog: Any
    Bias: Any
    LogQ: Any
    Ids: Any
    Dots: Any
    Bad: Any
    V: Any
    columns: Any
    first_column: Any
    first_tile: Any
    width: Any
    scale: Any
    stride_qb: Any
    stride_cv: Any


@triton.jit
def _words(Bits, rows, in_b, tile, stride_bits, HAS_BITS: tl.constexpr, BLOCK_V: tl.constexpr):
    """The tile's bits, [BLOCK_B, BLOCK_V // 32]; without bits all are set."""
    word = (tile * (BLOCK_V // 32) + tl.arange(0, BLOCK_V // 32))[None, :]
    inside = in_b[:, None] & (word < stride_bits)
    if HAS_BITS:
        return tl.load(Bits + (rows * stride_bits)[:, None] + word, mask=inside, other=0)
    else:
        return tl.where(in_b[:, None] & (word >= 0), -1, 0)


@triton.jit
def _any_of(words, HAS_BITS: tl.constexpr):
    """Whether a tile has a negative; without bits nothing is asked, since its loads can then be begun early."""
    if HAS_BITS:
        return tl.max(tl.ravel((words != 0).to(tl.int32)), 0) > 0
    else:
        return True


@triton.jit
def _places(rows, tile, width, BLOCK_V: tl.constexpr):
    """Of a tile in a buffer (B, width tiles), which is small enough for 32 bits. From products with a constant the
    compiler sees how far they are aligned: without that there are no wide loads and stores, and a register for each."""
    return (rows.to(tl.int32) * width * BLOCK_V)[:, None] + tile * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]


@triton.jit
def _logits(
    x,
    query,
    rows,
    safe_rows,
    in_b,
    target,
    words,
    tile,
    HAS_IDS: tl.constexpr,
    HAS_BITS: tl.constexpr,
    TERMS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Logits [BLOCK_B, BLOCK_V] of a tile's negatives, -inf of all else; target [BLOCK_B] is below 0 where it is
    ignored.

    x is a `Scored`, query as `tiles.score` takes it; x.Dots (B, x.width tiles) holds the products from x.first_tile on,
    where they were computed before. Ids fit 32 bits, which halves what they take of the registers.
    """
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (column >= x.first_column) & (column < x.columns)
    if HAS_IDS:
        ids = tl.load(x.Ids + column, mask=inside, other=-1)
        items = tl.maximum(tl.minimum(ids, x.V), -1).to(tl.int32)  # V for all beyond the catalog
    else:
        items = column
    safe_items = tl.minimum(tl.maximum(items, 0), x.V - 1).to(tl.int64)  # what is none reads others' embeddings
    if FORM.PRODUCT == "ieee":
        dots = tl.load(x.Dots + _places(rows, tile - x.first_tile, x.width, BLOCK_V), mask=in_b[:, None], other=0.0)
    else:
        dots = tiles.score(query, x.Query, x.Catalog, safe_rows, safe_items, x.stride_qb, x.stride_cv, FORM)
    logits = dots * x.scale
    allowed = items < x.V
    if TERMS.HAS_BIAS or TERMS.HAS_LOG_Q or HAS_IDS:
        shift, allowed = shift_of(x.Bias, x.LogQ, safe_items, items < x.V, x.scale, TERMS)
        logits += shift[None, :]
    if TERMS.CHECK:
        scored = (target >= 0)[:, None] & (inside & (items >= 0) & allowed)[None, :]
        report(x.Bad, tl.broadcast_to(rows[:, None], logits.shape), logits, scored)
    logits = tl.where(items[None, :] != target[:, None], logits, float("-inf"))
    if HAS_IDS:
        logits = tl.where((items >= 0)[None, :], logits, float("-inf"))
    elif (tile * BLOCK_V < x.first_column) | (tile * BLOCK_V > x.columns - BLOCK_V):
        logits = tl.where(inside[None, :], logits, float("-inf"))
    if HAS_BITS:
        bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        logits = tl.where(tl.reshape(bits, logits.shape) != 0, logits, float("-inf"))
    return logits


@triton.jit(
    do_not_specialize=[
        *("B", "V", "columns", "first_column", "first_tile", "end", "width"),
        *("scale", "stride_qb", "stride_cv", "stride_bits", "K"),
    ]
)
def _lse_kernel(
    Query,
    Catalog,
    Bias,
    LogQ,
    Ids,
    Bits,
    PosIds,
    Dots,
    Tops,
    Sums,
    Bad,
    B,
    V,
    columns,
    first_column,
    first_tile,
    end,
    width,
    scale,
    Temperature,
    stride_qb,
    stride_cv,
    stride_bits,
    K,
    HAS_IDS: tl.constexpr,
    HAS_BITS: tl.constexpr,
    TERMS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The largest logit of a session's negatives and the sum of exponentials relative to it, over one split's tiles of
    columns from `first_tile` up to `end`; unless that is the first of all, together with what Tops and Sums hold."""
    x = Scored(
        Query, Catalog, Bias, LogQ, Ids, Dots, Bad, V, columns, first_column, first_tile, width,
        scale_of(scale, Temperature), stride_qb, stride_cv,
    )  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    split, splits = tl.program_id(1), tl.num_programs(1)
    in_b, safe_rows = rows < B, tl.minimum(rows, B - 1)
    query = 0.0 if FORM.PRODUCT == "ieee" else tiles.resident_query(Query, safe_rows, stride_qb, FORM)
    target = tl.load(PosIds + rows * K, mask=in_b, other=-1).to(tl.int32)
    at = split.to(tl.int64) * B + rows
    top = tl.where(first_tile > 0, tl.load(Tops + at, mask=in_b, other=float("-inf")), float("-inf"))
    total = tl.where(first_tile > 0, tl.load(Sums + at, mask=in_b, other=0.0), 0.0)
    for tile in range(tl.maximum(first_column // BLOCK_V, first_tile) + split, tl.cdiv(end, BLOCK_V), splits):
        words = _words(Bits, rows, in_b, tile, stride_bits, HAS_BITS, BLOCK_V)
        if TERMS.CHECK or _any_of(words, HAS_BITS):
            logits = _logits(
                x, query, rows, safe_rows, in_b, target, words, tile, HAS_IDS, HAS_BITS, TERMS, FORM, BLOCK_V
            )
            largest = tl.maximum(top, tl.max(logits, 1))
            safe = tl.where(largest == float("-inf"), 0.0, largest)
            total = total * tl.exp(top - safe) + tl.sum(tl.exp(logits - safe[:, None]), 1)
            top = largest
    # Rows whose target is ignored have no negatives.
    tl.store(Tops + at, tl.where(target >= 0, top, float("-inf")), mask=in_b)
    tl.store(Sums + at, tl.where(target >= 0, total, 0.0), mask=in_b)


@triton.jit(
    do_not_specialize=[
        *("B", "V", "columns", "first_column", "first_tile", "end", "width"),
        *("scale", "stride_qb", "stride_cv", "stride_bits", "K"),
    ]
)
def _dlogits_kernel(
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
    Dots,
    Out,
    Sums,
    Bad,
    B,
    V,
    columns,
    first_column,
    first_tile,
    end,
    width,
    scale,
    Temperature,
    stride_qb,
    stride_cv,
    stride_bits,
    K,
    HAS_IDS: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_POS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    TERMS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """d loss / d (q . e) of the columns from `first_tile` up to `end` to Out (B, width tiles), which may be Dots.

    With HAS_POS those of target and positives are among them, where column i is item i. Sums (session blocks, width
    tiles) float32 gets each column's sum, from which the bias's gradient comes without the rounding of what is
    multiplied.
    """
    x = Scored(
        Query, Catalog, Bias, LogQ, Ids, Dots, Bad, V, columns, first_column, first_tile, width,
        scale_of(scale, Temperature), stride_qb, stride_cv,
    )  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_b, safe_rows = rows < B, tl.minimum(rows, B - 1)
    query = 0.0 if FORM.PRODUCT == "ieee" else tiles.resident_query(Query, safe_rows, stride_qb, FORM)
    target = tl.load(PosIds + rows * K, mask=in_b, other=-1).to(tl.int32)
    weight = tl.load(Weights + rows, mask=in_b, other=0.0)
    lse = tl.load(Lse + rows, mask=in_b, other=0.0)
    for tile in range(first_tile + tl.program_id(1), tl.cdiv(end, BLOCK_V), tl.num_programs(1)):
        dlogits = tl.zeros([BLOCK_B, BLOCK_V], tl.float32)
        words = _words(Bits, rows, in_b, tile, stride_bits, HAS_BITS, BLOCK_V)
        if _any_of(words, HAS_BITS):
            logits = _logits(
                x, query, rows, safe_rows, in_b, target, words, tile, HAS_IDS, HAS_BITS, TERMS, FORM, BLOCK_V
            )
            # Rows without weight, as ignored ones are, have dlogits of 0, whatever their logits.
            dlogits = tl.where(weight[:, None] != 0.0, weight[:, None] * tl.exp(logits - lse[:, None]), 0.0)
        if HAS_POS:
            for k in range(K):
                column = tl.load(PosIds + rows * K + k, mask=in_b, other=-1).to(tl.int32) - tile * BLOCK_V
                inside = (column >= 0) & (column < BLOCK_V)
                if tl.max(inside.to(tl.int32), 0) > 0:
                    pos = tl.load(PosDlogits + rows * K + k, mask=inside, other=0.0)
                    dlogits += tl.where(tl.arange(0, BLOCK_V)[None, :] == column[:, None], pos[:, None], 0.0)
        if HAS_SUMS:
            at = (tl.program_id(0) * width + tile - first_tile) * BLOCK_V + tl.arange(0, BLOCK_V)
            tl.store(Sums + at, tl.sum(dlogits, 0))
        at = _places(rows, tile - first_tile, width, BLOCK_V)
        tl.store(Out + at, tiles.operand(dlogits, FORM), mask=in_b[:, None])


def _splits(p: Problem, programs: int, count_tiles: int) -> int:
    """How many programs share the catalog, so that with `programs` beside them every SM has six."""
    return max(1, min(6 * shapes.sm_count(p.query.device) // max(1, programs), count_tiles))


def slice_cross_entropy_fwd(p: Problem, columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
    """-> losses (B,), lse (B,), logits (B, 1 + P) of target and positives; all float32."""
    b, blocks = p.query.shape[0], shapes.loss_blocks(p.precision, p.query, p.catalog)
    sessions = triton.cdiv(b, blocks.b)
    buffer = Buffer.of(p, columns, blocks.v) if p.product == "ieee" else None
    splits = _splits(p, sessions, triton.cdiv(columns.count if buffer is None else buffer.width, blocks.v))
    tops, sums = p.floats(splits, b), p.floats(splits, b)
    for begin, end in [(0, columns.count)] if buffer is None or columns.count == 0 else buffer:
        if buffer is not None:
            with no_autocast(p):
                multiply(p, columns, buffer, begin, end)
        launch(
            _lse_kernel,
            (sessions, splits),
            **p.arguments(blocks.d),
            **columns.arguments(),
            Dots=None if buffer is None else buffer.memory,
            Tops=tops,
            Sums=sums,
            first_tile=begin // blocks.v,
            end=end,
            width=0 if buffer is None else buffer.width // blocks.v,
            **blocks.options(),
            **shapes.loss_registers(p.query, blocks, p.product),
        )
    return losses_fwd(p, tops, sums)


def dense_bwd(
    p: Problem, columns: Columns, x: Dlogits, needs_query: bool, rows: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """Writes the gradient of each column's embedding to rows (columns, d), of its bias to bias (columns,) float32.

    -> that of the queries (B, d) float32 with `needs_query`. Where column i is item i, the gradients of target and
    positives are in all of them; where columns are a list of ids, in none.
    """
    if p.query.shape[0] == 0 or columns.count == 0:
        for out in (rows, bias):
            if out is not None:
                out.zero_()
        return p.query.new_zeros(p.query.shape, dtype=torch.float32) if needs_query else None
    x, unit = x.ranged(p)
    # Ignored rows have dlogits of 0, but may hold NaN, and 0 * NaN is NaN.
    query = p.query.to(dtype_of_products(p)).masked_fill(p.ignored, 0.0) if rows is not None else p.query
    blocks, grad_query = shapes.loss_blocks(p.precision, p.query, p.catalog), None
    sessions = triton.cdiv(p.query.shape[0], blocks.b)
    buffer = Buffer.of(p, columns, blocks.v)
    sums = None if bias is None else p.floats(sessions, buffer.width)
    for begin, end in buffer:
        size = end - begin
        if p.product == "ieee":
            with no_autocast(p):
                multiply(p, columns, buffer, begin, end)
        launch(
            _dlogits_kernel,
            (sessions, _splits(p, sessions, triton.cdiv(size, blocks.v))),
            **p.arguments(blocks.d),
            **columns.arguments(),
            **x.arguments(),
            Dots=buffer.memory,
            Out=buffer.memory,
            Sums=sums,
            first_tile=begin // blocks.v,
            end=end,
            width=buffer.width // blocks.v,
            HAS_POS=columns.ids is None,
            HAS_SUMS=sums is not None,
            **blocks.options(),
            **shapes.loss_registers(p.query, blocks, p.product),
        )
        dlogits = buffer.memory[:, :size]
        with no_autocast(p):
            if needs_query:
                part = product(dlogits, embeddings(p, columns, begin, end).to(dlogits.dtype))
                grad_query = part if grad_query is None else grad_query.add_(part)
            if rows is not None:
                multiply_into(rows[begin:end], dlogits.T, query, unit)
        if bias is not None and sums is not None:
            torch.sum(sums[:, :size], 0, out=bias[begin:end])
    if unit is not None:
        for total in (grad_query, bias):
            if total is not None:
                total.mul_(unit)
    return grad_query


def slice_cross_entropy_bwd(
    p: Problem, columns: Columns, x: Dlogits, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """needs: the gradients of query, catalog and bias, and the query's in float32. -> these, else in their dtypes, the
    bias's in float32; empty where they are not needed."""
    grad_catalog = torch.empty_like(p.catalog, memory_format=torch.contiguous_format) if needs[1] else None
    grad_bias = p.floats(p.catalog.shape[0]) if needs[2] else None
    grad_query = dense_bwd(p, columns, x, needs[0], grad_catalog, grad_bias)
    return (
        p.query.new_empty(0) if grad_query is None else grad_query.to(p.grad_dtype(needs)),
        p.catalog.new_empty(0) if grad_catalog is None else grad_catalog,
        p.floats(0) if grad_bias is None else grad_bias,
    )
