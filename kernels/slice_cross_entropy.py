"""Cross-entropy against a dense set of negatives: tiles of scores are computed where they are needed, never all stored.

Forward leaves one log-partition a session. Backward computes the tiles again, some columns of all sessions at a time:
what each score pulls, its slope, goes to a buffer of bounded size, whose products with catalog and queries are the
gradients. Each item's gradient is one product over all sessions: nothing is added by atomics, and every sum has one
order. float32 that the matrix unit may not take for TF32 is multiplied by torch into the same buffer: its library's
plain multiply-adds are more than twice as fast as Triton's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .losses import Problem, Slopes, losses_fwd, report, shift_of
from .tiles import launch

BUFFER_BYTES = 256 << 20  # of slopes at a time; as many again of embeddings, and of their gradient, where dtypes differ


@dataclass(frozen=True)
class Columns:
    """The items that are scored, and which of them are negatives."""

    count: int  # columns of the score matrix
    first: int  # columns before it are no negatives
    ids: Tensor | None  # (count,): the item of each column, below 0 for none; None: column i is item i
    bits: Tensor | None  # (B, W) int32: column i is a negative of a row if bit i % 32 of word i // 32 is set; None: all

    @classmethod
    def of(cls, p: Problem, first_item: int, bits: Tensor | None) -> Columns:
        """All items from first_item on, of which bits (B, W) uint8 are negatives; None: all of them."""
        words = None if bits is None else bits.contiguous().view(torch.int32)
        return cls(p.catalog.shape[0], first_item, None, words)

    def arguments(self) -> dict[str, Any]:
        return {
            "Ids": self.ids,
            "Bits": self.bits,
            "columns": self.count,
            "first_column": self.first,
            "stride_bits": 0 if self.bits is None else self.bits.stride(0),
            "HAS_IDS": self.ids is not None,
            "HAS_BITS": self.bits is not None,
        }


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
def _logits(
    query,
    Query,
    Catalog,
    Bias,
    LogQ,
    Ids,
    Dots,
    Bad,
    rows,
    in_b,
    target,
    words,
    tile,
    B,
    V,
    columns,
    first_column,
    first_tile,
    width,
    scale,
    stride_qb,
    stride_cv,
    HAS_BIAS: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BITS: tl.constexpr,
    CHECK: tl.constexpr,
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits of a tile's negatives, -inf of all else; ids fit 32 bits, which halves what they take of the registers.

    query as `tiles.score` takes it; Dots (B, width tiles) holds the products from `first_tile` on, if they are there.
    """
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (column >= first_column) & (column < columns)
    if HAS_IDS:
        ids = tl.load(Ids + column, mask=inside, other=-1)
        items = tl.maximum(tl.minimum(ids, V), -1).to(tl.int32)  # V for all beyond the catalog
    else:
        items = column
    safe_items = tl.minimum(tl.maximum(items, 0), V - 1).to(tl.int64)  # what is none reads others' embeddings
    if PRODUCT == "ieee":
        dots = tl.load(Dots + _places(rows, tile - first_tile, width, BLOCK_V), mask=in_b[:, None], other=0.0)
    else:
        dots = tiles.score(
            query,
            Query,
            Catalog,
            rows,
            safe_items,
            B,
            stride_qb,
            stride_cv,
            D,
            UNIT_Q,
            UNIT_C,
            PRODUCT,
            UPCAST,
            BLOCK_B,
            BLOCK_V,
            BLOCK_D,
        )
    logits = dots * scale
    if HAS_BIAS or HAS_LOG_Q or HAS_IDS:
        logits += shift_of(Bias, LogQ, safe_items, items < V, scale, HAS_BIAS, HAS_LOG_Q)[None, :]
    if CHECK:
        scored = in_b[:, None] & (inside & (items >= 0) & (items < V))[None, :]
        report(Bad, tl.broadcast_to(rows[:, None], logits.shape), logits, scored)
    logits = tl.where(items[None, :] != target[:, None], logits, float("-inf"))
    if HAS_IDS:
        logits = tl.where((items >= 0)[None, :], logits, float("-inf"))
    elif (tile * BLOCK_V < first_column) | (tile * BLOCK_V > columns - BLOCK_V):
        logits = tl.where(inside[None, :], logits, float("-inf"))
    if HAS_BITS:
        bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        logits = tl.where(tl.reshape(bits, [BLOCK_B, BLOCK_V]) != 0, logits, float("-inf"))
    return logits


@triton.jit
def _places(rows, tile, width, BLOCK_V: tl.constexpr):
    """Of a tile in a buffer (B, width tiles), which is small enough for 32 bits. From products with a constant the
    compiler sees how far they are aligned: without that there are no wide loads and stores, and a register for each."""
    return (rows.to(tl.int32) * width * BLOCK_V)[:, None] + tile * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]


@triton.jit
def _any_of(words, HAS_BITS: tl.constexpr):
    """Whether a tile has a negative; without bits nothing is asked, since its loads can then be begun early."""
    if HAS_BITS:
        return tl.max(tl.ravel((words != 0).to(tl.int32)), 0) > 0
    else:
        return True


@triton.jit(
    do_not_specialize=[
        *("B", "V", "columns", "first_column", "first_tile", "end", "width"),
        *("scale", "stride_qb", "stride_cv", "stride_bits", "K"),
    ]
)
def _partition_kernel(
    Query,
    Catalog,
    Bias,
    LogQ,
    Ids,
    Bits,
    Wanted,
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
    stride_qb,
    stride_cv,
    stride_bits,
    K,
    HAS_BIAS: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BITS: tl.constexpr,
    CHECK: tl.constexpr,
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The largest logit of a session's negatives and the sum of exponentials relative to it, over one split's tiles of
    columns from `first_tile` up to `end`; unless that is the first of all, together with what Tops and Sums hold."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    split, splits = tl.program_id(1), tl.num_programs(1)
    in_b = rows < B
    query = 0.0 if PRODUCT == "ieee" else tiles.resident_query(Query, rows, B, stride_qb, D, UNIT_Q, BLOCK_D)
    target = tl.load(Wanted + rows * K, mask=in_b, other=-1).to(tl.int32)
    at = split.to(tl.int64) * B + rows
    top = tl.where(first_tile > 0, tl.load(Tops + at, mask=in_b, other=float("-inf")), float("-inf"))
    total = tl.where(first_tile > 0, tl.load(Sums + at, mask=in_b, other=0.0), 0.0)
    for tile in range(tl.maximum(first_column // BLOCK_V, first_tile) + split, tl.cdiv(end, BLOCK_V), splits):
        words = _words(Bits, rows, in_b, tile, stride_bits, HAS_BITS, BLOCK_V)
        if CHECK or _any_of(words, HAS_BITS):
            logits = _logits(
                query, Query, Catalog, Bias, LogQ, Ids, Dots, Bad, rows, in_b, target, words, tile, B, V, columns,
                first_column, first_tile, width, scale, stride_qb, stride_cv, HAS_BIAS, HAS_LOG_Q, HAS_IDS, HAS_BITS,
                CHECK, D, UNIT_Q, UNIT_C, PRODUCT, UPCAST, BLOCK_B, BLOCK_V, BLOCK_D,
            )  # fmt: skip
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
def _slopes_kernel(
    Query,
    Catalog,
    Bias,
    LogQ,
    Ids,
    Bits,
    Wanted,
    Weights,
    LogPartition,
    Pulls,
    Dots,
    Slopes,
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
    stride_qb,
    stride_cv,
    stride_bits,
    K,
    HAS_BIAS: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_PULLS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    CHECK: tl.constexpr,
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d loss / d (q . e) of the columns from `first_tile` up to `end` to Slopes (B, width tiles), which may be Dots.

    With HAS_PULLS those of wanted items are among them, where column i is item i. Sums (session blocks, width tiles)
    float32 gets each column's sum, from which the bias's gradient comes without the rounding of what is multiplied.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_b = rows < B
    query = 0.0 if PRODUCT == "ieee" else tiles.resident_query(Query, rows, B, stride_qb, D, UNIT_Q, BLOCK_D)
    target = tl.load(Wanted + rows * K, mask=in_b, other=-1).to(tl.int32)
    weight = tl.load(Weights + rows, mask=in_b, other=0.0)
    partition = tl.load(LogPartition + rows, mask=in_b, other=0.0)
    for tile in range(first_tile + tl.program_id(1), tl.cdiv(end, BLOCK_V), tl.num_programs(1)):
        slopes = tl.zeros([BLOCK_B, BLOCK_V], tl.float32)
        words = _words(Bits, rows, in_b, tile, stride_bits, HAS_BITS, BLOCK_V)
        if _any_of(words, HAS_BITS):
            logits = _logits(
                query, Query, Catalog, Bias, LogQ, Ids, Dots, Bad, rows, in_b, target, words, tile, B, V, columns,
                first_column, first_tile, width, scale, stride_qb, stride_cv, HAS_BIAS, HAS_LOG_Q, HAS_IDS, HAS_BITS,
                CHECK, D, UNIT_Q, UNIT_C, PRODUCT, UPCAST, BLOCK_B, BLOCK_V, BLOCK_D,
            )  # fmt: skip
            # Rows that pull at nothing have slopes of 0, whatever their logits.
            slopes = tl.where(weight[:, None] != 0.0, weight[:, None] * tl.exp(logits - partition[:, None]), 0.0)
        if HAS_PULLS:
            for k in range(K):
                wanted = tl.load(Wanted + rows * K + k, mask=in_b, other=-1).to(tl.int32) - tile * BLOCK_V
                here = (wanted >= 0) & (wanted < BLOCK_V)
                if tl.max(here.to(tl.int32), 0) > 0:
                    pull = tl.load(Pulls + rows * K + k, mask=here, other=0.0)
                    slopes += tl.where(tl.arange(0, BLOCK_V)[None, :] == wanted[:, None], pull[:, None], 0.0)
        if HAS_SUMS:
            at = (tl.program_id(0) * width + tile - first_tile) * BLOCK_V + tl.arange(0, BLOCK_V)
            tl.store(Sums + at, tl.sum(slopes, 0))
        at = _places(rows, tile - first_tile, width, BLOCK_V)
        tl.store(Slopes + at, tiles.operand(slopes, PRODUCT, UPCAST), mask=in_b[:, None])


def _blocks(p: Problem, product: str) -> tiles.Blocks:
    """Where products were computed before, as many logits a thread as the shapes that compute them have."""
    if product == "ieee":
        return tiles.Blocks(b=32, v=128, d=16, warps=4, stages=1)
    return tiles.resident_blocks(p.precision, p.query, p.catalog)


def _options(p: Problem, blocks: tiles.Blocks, product: str) -> dict[str, int]:
    """The options of a launch. To have more programs on a processor, NVIDIA's assembler spills a few of the loop's
    registers where it is short, and on Blackwell elsewhere; it is told not to."""
    tight = (product != "ieee" and triton.cdiv(p.query.shape[1], blocks.d) == 2) or tiles.is_blackwell(p.query.device)
    return blocks.options() | ({"maxnreg": 255} if tight and tiles.target(p.query.device)[0] == "cuda" else {})


def _splits(p: Problem, programs: int, tiles_in_all: int) -> int:
    """How many programs share the catalog, so that with `programs` beside them every processor has six."""
    return max(1, min(6 * tiles.processors(p.query.device) // max(1, programs), tiles_in_all))


def _dtype_of_products(p: Problem) -> torch.dtype:
    return torch.bfloat16 if p.precision == "bf16" else torch.float32


@dataclass(frozen=True)
class Parts:
    """The columns in parts, and memory for a number of each session and column of one part."""

    memory: Tensor  # (B, width)
    count: int  # columns in all

    @classmethod
    def of(cls, p: Problem, columns: Columns, block: int) -> Parts:
        """As many whole blocks of columns as BUFFER_BYTES hold, of numbers and of their embeddings in float32, which
        are copied where dtypes differ."""
        (b, d), dtype = p.query.shape, _dtype_of_products(p)
        fitting = max(1, BUFFER_BYTES // max(1, dtype.itemsize * b, 4 * d) // block)
        width = block * min(fitting, triton.cdiv(columns.count, block))
        if b * width >= 1 << 31:
            raise ValueError(f"query must have fewer than {(1 << 31) // block:,} rows, got {b:,}")
        return cls(torch.empty(b, width, dtype=dtype, device=p.query.device), columns.count)

    @property
    def width(self) -> int:
        return self.memory.shape[1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Columns [begin, end) of each part."""
        for begin in range(0, self.count, max(1, self.width)):
            yield begin, min(begin + self.width, self.count)


def _multiply(p: Problem, columns: Columns, parts: Parts, begin: int, end: int) -> None:
    """The products of all queries with the embeddings of columns [begin, end), float32, to the parts' memory."""
    embeddings = _embeddings(p, columns, begin, end).float()
    torch.mm(p.query.float(), embeddings.T, out=parts.memory[:, : end - begin])


def slice_cross_entropy_fwd(p: Problem, columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
    """-> losses (B,), log_partition (B,), logits (B, 1 + P) of the wanted items; all float32."""
    b, arguments = p.query.shape[0], p.arguments()
    product = arguments["PRODUCT"]
    blocks = _blocks(p, product)
    sessions = triton.cdiv(b, blocks.b)
    parts = Parts.of(p, columns, blocks.v) if product == "ieee" else None
    splits = _splits(p, sessions, triton.cdiv(columns.count if parts is None else parts.width, blocks.v))
    tops, sums = p.floats(splits, b), p.floats(splits, b)
    for begin, end in [(0, columns.count)] if parts is None or columns.count == 0 else parts:
        if parts is not None:
            with _no_autocast(p):
                _multiply(p, columns, parts, begin, end)
        launch(
            _partition_kernel,
            (sessions, splits),
            **arguments,
            **columns.arguments(),
            Dots=None if parts is None else parts.memory,
            Tops=tops,
            Sums=sums,
            first_tile=begin // blocks.v,
            end=end,
            width=0 if parts is None else parts.width // blocks.v,
            **_options(p, blocks, product),
        )
    return losses_fwd(p, tops, sums)


def dense_bwd(
    p: Problem, columns: Columns, x: Slopes, needs_query: bool, rows: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """Writes the gradient of each column's embedding to rows (columns, d), of its bias to bias (columns,) float32.

    -> that of the queries (B, d) float32 with `needs_query`. Where column i is item i, the pulls of wanted items are in
    all of them; where columns are a list of ids, in none.
    """
    grad_query = None
    if p.query.shape[0] == 0 or columns.count == 0:
        for out in (rows, bias):
            if out is not None:
                out.zero_()
        return p.query.new_zeros(p.query.shape, dtype=torch.float32) if needs_query else None
    query, arguments = p.query.to(_dtype_of_products(p)), p.arguments()
    product = arguments["PRODUCT"]
    blocks = _blocks(p, product)
    sessions = triton.cdiv(p.query.shape[0], blocks.b)
    parts = Parts.of(p, columns, blocks.v)
    sums = None if bias is None else p.floats(sessions, parts.width)
    for begin, end in parts:
        size = end - begin
        if product == "ieee":
            with _no_autocast(p):
                _multiply(p, columns, parts, begin, end)
        launch(
            _slopes_kernel,
            (sessions, _splits(p, sessions, triton.cdiv(size, blocks.v))),
            **arguments,
            **columns.arguments(),
            Weights=x.weights,
            LogPartition=x.log_partition,
            Pulls=x.pulls,
            Dots=parts.memory,
            Slopes=parts.memory,
            Sums=sums,
            first_tile=begin // blocks.v,
            end=end,
            width=parts.width // blocks.v,
            HAS_PULLS=columns.ids is None,
            HAS_SUMS=sums is not None,
            **_options(p, blocks, product),
        )
        slopes = parts.memory[:, :size]
        with _no_autocast(p):
            if needs_query:
                part = _product(slopes, _embeddings(p, columns, begin, end).to(slopes.dtype))
                grad_query = part if grad_query is None else grad_query.add_(part)
            if rows is not None:
                _multiply_into(rows[begin:end], slopes.T, query)
        if bias is not None and sums is not None:
            torch.sum(sums[:, :size], 0, out=bias[begin:end])
    return grad_query


def _no_autocast(p: Problem) -> AbstractContextManager[object]:
    """Products are taken in the dtypes that they are given, as the kernels take theirs."""
    kind = p.query.device.type
    enabled = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()


def _embeddings(p: Problem, columns: Columns, begin: int, end: int) -> Tensor:
    """(end - begin, d): the catalog's rows of these columns; slopes of columns that are none are 0."""
    if columns.ids is None:
        return p.catalog[begin:end]
    return p.catalog.index_select(0, columns.ids[begin:end].clamp(0, p.catalog.shape[0] - 1))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, of two matrices in float32 or two in bfloat16, which no sum is rounded to."""
    if left.dtype == torch.bfloat16 and left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def _multiply_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """As `_product`, without a copy where the matrix unit writes what is wanted."""
    if left.is_cuda and out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(_product(left, right))


def slice_cross_entropy_bwd(
    p: Problem, columns: Columns, x: Slopes, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of query and catalog in their dtypes, of bias in float32; empty where they are not needed."""
    grad_catalog = torch.empty_like(p.catalog, memory_format=torch.contiguous_format) if needs[1] else None
    grad_bias = p.floats(p.catalog.shape[0]) if needs[2] else None
    grad_query = dense_bwd(p, columns, x, needs[0], grad_catalog, grad_bias)
    return (
        p.query.new_empty(0) if grad_query is None else grad_query.to(p.query.dtype),
        p.catalog.new_empty(0) if grad_catalog is None else grad_catalog,
        p.floats(0) if grad_bias is None else grad_bias,
    )
