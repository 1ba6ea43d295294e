"""Cross-entropy against a dense set of negatives: every tile of scores is computed where it is needed, never stored.

Forward leaves one log-partition a session. Backward computes the tiles again, once with sessions in the rows for the
query's gradient and once with items in the rows for the catalog's, where one program owns a tile of items and goes over
the sessions: nothing is added by atomics, and every sum has one order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .losses import Problem, Slopes, losses_fwd, query_bwd, report, shift_of
from .tiles import launch


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
def _down(x, SWAP: tl.constexpr):
    """Along the sessions of a tile: [BLOCK_B, BLOCK_V], or with SWAP [BLOCK_V, BLOCK_B]."""
    if SWAP:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def _across(x, SWAP: tl.constexpr):
    """Along the items of a tile."""
    if SWAP:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def _words(Bits, rows, in_b, tile, stride_bits, HAS_BITS: tl.constexpr, BLOCK_V: tl.constexpr, SWAP: tl.constexpr):
    """The tile's bits, [BLOCK_B, BLOCK_V // 32], or swapped; without bits all are set."""
    word = tile * (BLOCK_V // 32) + tl.arange(0, BLOCK_V // 32)
    inside = _down(in_b, SWAP) & _across(word < stride_bits, SWAP)
    if HAS_BITS:
        return tl.load(Bits + _down(rows * stride_bits, SWAP) + _across(word, SWAP), mask=inside, other=0)
    else:
        return tl.where(_down(in_b, SWAP) & _across(word >= 0, SWAP), -1, 0)


@triton.jit
def _items(Ids, columns, first_column, column, HAS_IDS: tl.constexpr):
    """The items of these columns; -1 for none."""
    inside = (column >= first_column) & (column < columns)
    if HAS_IDS:
        return tl.load(Ids + column, mask=inside, other=-1).to(tl.int64)
    else:
        return tl.where(inside, column, -1)


@triton.jit
def _tile(
    Query,
    Catalog,
    Bias,
    LogQ,
    Bad,
    rows,
    in_b,
    target,
    items,
    words,
    B,
    V,
    scale,
    stride_qb,
    stride_cv,
    HAS_BIAS: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    CHECK: tl.constexpr,
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Logits, and whether they are of negatives. Rows and items that are none read others' embeddings."""
    safe_rows, safe_items = tl.minimum(rows, B - 1), tl.minimum(tl.maximum(items, 0), V - 1)
    if SWAP:
        dots = tiles.score_tile(
            Catalog,
            Query,
            safe_items,
            safe_rows,
            stride_cv,
            stride_qb,
            D,
            UNIT_C,
            UNIT_Q,
            PRODUCT,
            UPCAST,
            BLOCK_V,
            BLOCK_B,
            BLOCK_D,
        )
        bits = (words[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1
        member = tl.reshape(bits, [BLOCK_V, BLOCK_B]) != 0
    else:
        dots = tiles.score_tile(
            Query,
            Catalog,
            safe_rows,
            safe_items,
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
        bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        member = tl.reshape(bits, [BLOCK_B, BLOCK_V]) != 0
    shift = shift_of(Bias, LogQ, safe_items, items < V, scale, HAS_BIAS, HAS_LOG_Q)
    logits = dots * scale + _across(shift, SWAP)
    if CHECK:
        scored = _down(in_b, SWAP) & _across((items >= 0) & (items < V), SWAP)
        report(Bad, tl.broadcast_to(_down(rows, SWAP), logits.shape), logits, scored)
    others = _across(items.to(tl.int32), SWAP) != _down(target, SWAP)  # 32 bits: half the work on every score
    member &= _across(items >= 0, SWAP) & _down(target >= 0, SWAP) & others
    return logits, member


@triton.jit(
    do_not_specialize=[
        "B", "V", "columns", "first_column", "scale", "stride_qb", "stride_cv", "stride_bits", "K",
    ]
)  # fmt: skip
def _partition_kernel(
    Query,
    Catalog,
    Bias,
    LogQ,
    Ids,
    Bits,
    Wanted,
    Tops,
    Sums,
    Bad,
    B,
    V,
    columns,
    first_column,
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
    """The largest logit of a session's negatives and the sum of exponentials relative to it, over one split's tiles."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    split, splits = tl.program_id(1), tl.num_programs(1)
    in_b = rows < B
    target = tl.load(Wanted + rows * K, mask=in_b, other=-1).to(tl.int32)
    top = tl.full([BLOCK_B], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    for tile in range(first_column // BLOCK_V + split, tl.cdiv(columns, BLOCK_V), splits):
        column = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
        words = _words(Bits, rows, in_b, tile, stride_bits, HAS_BITS, BLOCK_V, False)
        if CHECK or tl.max(tl.ravel((words != 0).to(tl.int32)), 0) > 0:
            items = _items(Ids, columns, first_column, column, HAS_IDS)
            logits, member = _tile(
                Query, Catalog, Bias, LogQ, Bad, rows, in_b, target, items, words, B, V, scale, stride_qb, stride_cv,
                HAS_BIAS, HAS_LOG_Q, CHECK, D, UNIT_Q, UNIT_C, PRODUCT, UPCAST, BLOCK_B, BLOCK_V, BLOCK_D, False,
            )  # fmt: skip
            logits = tl.where(member, logits, float("-inf"))
            largest = tl.maximum(top, tl.max(logits, 1))
            safe = tl.where(largest == float("-inf"), 0.0, largest)
            total = total * tl.exp(top - safe) + tl.sum(tl.exp(logits - safe[:, None]), 1)
            top = largest
    at = split.to(tl.int64) * B + rows
    tl.store(Tops + at, top, mask=in_b)
    tl.store(Sums + at, total, mask=in_b)


@triton.jit
def _slopes(Weights, LogPartition, rows, in_b, logits, member, SWAP: tl.constexpr):
    weight = tl.load(Weights + rows, mask=in_b, other=0.0)
    partition = tl.load(LogPartition + rows, mask=in_b, other=0.0)
    return tl.where(member, _down(weight, SWAP) * tl.exp(logits - _down(partition, SWAP)), 0.0)


@triton.jit
def _rows(X, rows, offs_d, stride, D: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Columns offs_d of these rows, which must lie within X; zero beyond D."""
    at = X + rows[:, None] * (stride * UNIT) + offs_d[None, :]
    if D % BLOCK == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=offs_d[None, :] < D, other=0.0)


@triton.jit(
    do_not_specialize=[
        "B", "V", "columns", "first_column", "scale", "stride_qb", "stride_cv", "stride_bits", "K",
    ]
)  # fmt: skip
def _query_grad_kernel(
    Query,
    Catalog,
    Bias,
    LogQ,
    Ids,
    Bits,
    Wanted,
    Weights,
    LogPartition,
    Parts,
    Bad,
    B,
    V,
    columns,
    first_column,
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
    BLOCK_C: tl.constexpr,
):
    """BLOCK_C columns of the sessions' gradient, over one split's tiles."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    split, splits = tl.program_id(1), tl.num_programs(1)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_b = rows < B
    target = tl.load(Wanted + rows * K, mask=in_b, other=-1).to(tl.int32)
    grad = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    precision: tl.constexpr = "tf32" if PRODUCT == "tf32" else "ieee"
    for tile in range(first_column // BLOCK_V + split, tl.cdiv(columns, BLOCK_V), splits):
        column = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
        words = _words(Bits, rows, in_b, tile, stride_bits, HAS_BITS, BLOCK_V, False)
        if tl.max(tl.ravel((words != 0).to(tl.int32)), 0) > 0:
            items = _items(Ids, columns, first_column, column, HAS_IDS)
            logits, member = _tile(
                Query, Catalog, Bias, LogQ, Bad, rows, in_b, target, items, words, B, V, scale, stride_qb, stride_cv,
                HAS_BIAS, HAS_LOG_Q, False, D, UNIT_Q, UNIT_C, PRODUCT, UPCAST, BLOCK_B, BLOCK_V, BLOCK_D, False,
            )  # fmt: skip
            slopes = tiles.operand(_slopes(Weights, LogPartition, rows, in_b, logits, member, False), PRODUCT, UPCAST)
            e = _rows(Catalog, tl.minimum(tl.maximum(items, 0), V - 1), offs_c, stride_cv, D, UNIT_C, BLOCK_C)
            grad = tl.dot(slopes, tiles.operand(e, PRODUCT, UPCAST), grad, input_precision=precision)
    at = Parts + (split.to(tl.int64) * B + rows)[:, None] * D + offs_c[None, :]
    tl.store(at, grad, mask=in_b[:, None] & (offs_c < D)[None, :])


@triton.jit(
    do_not_specialize=[
        "B", "V", "columns", "first_column", "scale", "stride_qb", "stride_cv", "stride_bits", "K",
    ]
)  # fmt: skip
def _catalog_grad_kernel(
    Query,
    Catalog,
    Bias,
    LogQ,
    Ids,
    Bits,
    Wanted,
    Weights,
    LogPartition,
    PullItems,
    PullRows,
    Pulls,
    Begins,
    Grad,
    GradBias,
    Bad,
    B,
    V,
    columns,
    first_column,
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
    HAS_GRAD: tl.constexpr,
    HAS_GRAD_BIAS: tl.constexpr,
    CHECK: tl.constexpr,
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_C columns of one tile of items' gradient, over all sessions. The pulls of wanted items come sorted by item;
    Begins says where those of each tile begin. A block of them is a product as well: a matrix with a pull in each
    column, times the queries that pull."""
    tile = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_b = tl.arange(0, BLOCK_B)
    column = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    items = _items(Ids, columns, first_column, column, HAS_IDS)
    grad = tl.zeros([BLOCK_V, BLOCK_C], tl.float32)
    grad_bias = tl.zeros([BLOCK_V], tl.float32)
    precision: tl.constexpr = "tf32" if PRODUCT == "tf32" else "ieee"
    for begin in range(0, B, BLOCK_B):
        rows = (begin + offs_b).to(tl.int64)
        in_b = rows < B
        words = _words(Bits, rows, in_b, tile, stride_bits, HAS_BITS, BLOCK_V, True)
        if tl.max(tl.ravel((words != 0).to(tl.int32)), 0) > 0:
            target = tl.load(Wanted + rows * K, mask=in_b, other=-1).to(tl.int32)
            logits, member = _tile(
                Query, Catalog, Bias, LogQ, Bad, rows, in_b, target, items, words, B, V, scale, stride_qb, stride_cv,
                HAS_BIAS, HAS_LOG_Q, False, D, UNIT_Q, UNIT_C, PRODUCT, UPCAST, BLOCK_B, BLOCK_V, BLOCK_D, True,
            )  # fmt: skip
            slopes = _slopes(Weights, LogPartition, rows, in_b, logits, member, True)
            grad_bias += tl.sum(slopes, 1)
            if HAS_GRAD:
                q = _rows(Query, tl.minimum(rows, B - 1), offs_c, stride_qb, D, UNIT_Q, BLOCK_C)
                left, right = tiles.operand(slopes, PRODUCT, UPCAST), tiles.operand(q, PRODUCT, UPCAST)
                grad = tl.dot(left, right, grad, input_precision=precision)
    if HAS_PULLS:
        stop = tl.load(Begins + tile + 1)
        for begin in range(tl.load(Begins + tile), stop, BLOCK_B):
            place = begin + offs_b
            pull_item = tl.load(PullItems + place, mask=place < stop, other=-1)
            pull_row = tl.load(PullRows + place, mask=place < stop, other=0)
            pull = tl.load(Pulls + place, mask=place < stop, other=0.0)
            slopes = tl.where(column[:, None] == pull_item[None, :], pull[None, :], 0.0)
            grad_bias += tl.sum(slopes, 1)
            if HAS_GRAD:
                q = _rows(Query, pull_row, offs_c, stride_qb, D, UNIT_Q, BLOCK_C)
                left, right = tiles.operand(slopes, PRODUCT, UPCAST), tiles.operand(q, PRODUCT, UPCAST)
                grad = tl.dot(left, right, grad, input_precision=precision)
    inside = column < columns
    if HAS_GRAD:
        tl.store(Grad + column[:, None] * D + offs_c[None, :], grad, mask=inside[:, None] & (offs_c < D)[None, :])
    if HAS_GRAD_BIAS and tl.program_id(1) == 0:
        tl.store(GradBias + column, grad_bias, mask=inside)


@dataclass(frozen=True)
class Sorted:
    """The wanted items' pulls, sorted by item."""

    items: Tensor  # (B (1 + P),) int64, V where there is none
    rows: Tensor  # the session that pulls
    pulls: Tensor

    @classmethod
    def of(cls, p: Problem, x: Slopes) -> Sorted:
        v = p.catalog.shape[0]
        items, order = torch.where((p.wanted < 0) | (p.wanted >= v), v, p.wanted).flatten().sort(stable=True)
        return cls(items, order // p.wanted.shape[1], x.pulls.flatten()[order])


def _score_options(p: Problem, blocks: tiles.Blocks, product: str) -> dict[str, int]:
    """The options of a launch. To have two programs on a processor, NVIDIA's assembler spills a few of the loop's
    registers where it is short or does without the matrix unit; it is told not to."""
    tight = product == "ieee" or triton.cdiv(p.query.shape[1], blocks.d) == 2
    return blocks.options() | ({"maxnreg": 168} if tight and tiles.target(p.query.device)[0] == "cuda" else {})


def _score_blocks(p: Problem, product: str) -> tiles.Blocks:
    """Smaller where plain multiply-adds take the registers that a matrix unit leaves free."""
    blocks = tiles.scoring_blocks(p.precision, p.query, p.catalog)
    return replace(blocks, b=32, v=64) if product == "ieee" else blocks


def _gradient_blocks(p: Problem, product: str, columns: Columns) -> dict[str, int]:
    """Scores beside columns of a gradient, each recomputing the scores: what the registers of 8 warps hold. Lists of
    ids take some of them."""
    width = p.query.shape[1]
    rows, most, step = {"bf16": (64, 128, 64), "tf32": (64, 64, 32), "ieee": (32, 64, 64)}[product]
    if product == "bf16" and columns.ids is not None:
        most, step = 64, 32
    if product != "ieee":
        step = tiles.step(width, step if product == "tf32" or tiles.narrow(p.precision, p.query, p.catalog) else 32)
    block, stages = min(most, max(16, triton.next_power_of_2(width))), 2 if product == "ieee" else 3
    backend, generation = tiles.target(p.query.device)
    # As in _score_options.
    roomy = {"maxnreg": 255} if backend == "cuda" and int(generation) // 10 == 10 else {}
    return roomy | {
        "BLOCK_B": rows, "BLOCK_V": rows, "BLOCK_D": step, "BLOCK_C": block, "num_warps": 8, "num_stages": stages
    }  # fmt: skip


def _splits(p: Problem, programs: int, tiles_in_all: int) -> int:
    """How many programs share the catalog, so that with `programs` beside them every processor has two."""
    return max(1, min(2 * tiles.processors(p.query.device) // max(1, programs), tiles_in_all))


def slice_cross_entropy_fwd(p: Problem, columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
    """-> losses (B,), log_partition (B,), logits (B, 1 + P) of the wanted items; all float32."""
    b, arguments = p.query.shape[0], p.arguments()
    blocks = _score_blocks(p, arguments["PRODUCT"])
    sessions = triton.cdiv(b, blocks.b)
    splits = _splits(p, sessions, triton.cdiv(columns.count, blocks.v))
    tops, sums = p.floats(splits, b), p.floats(splits, b)
    launch(
        _partition_kernel,
        (sessions, splits),
        **arguments,
        **columns.arguments(),
        Tops=tops,
        Sums=sums,
        **_score_options(p, blocks, arguments["PRODUCT"]),
    )
    return losses_fwd(p, tops, sums)


def query_grad(p: Problem, columns: Columns, x: Slopes) -> Tensor:
    """-> (B, d) in the query's dtype."""
    (b, d), arguments = p.query.shape, p.arguments()
    blocks = _gradient_blocks(p, arguments["PRODUCT"], columns)
    sessions, widths = triton.cdiv(b, blocks["BLOCK_B"]), triton.cdiv(d, blocks["BLOCK_C"])
    splits = _splits(p, sessions * widths, triton.cdiv(columns.count, blocks["BLOCK_V"]))
    parts = p.floats(splits, b, d)
    launch(
        _query_grad_kernel,
        (sessions, splits, widths),
        **arguments,
        **columns.arguments(),
        Weights=x.weights,
        LogPartition=x.log_partition,
        Parts=parts,
        **blocks,
    )
    return query_bwd(p, x, parts)


def column_grads(
    p: Problem, columns: Columns, x: Slopes, pulls: Sorted | None, out: Tensor | None, bias: Tensor | None
) -> None:
    """Writes the gradient of each column's embedding to out (columns, d), and of its bias to bias (columns,) float32.

    pulls: those of the wanted items, where column i is item i.
    """
    d, arguments = p.query.shape[1], p.arguments()
    blocks = _gradient_blocks(p, arguments["PRODUCT"], columns)
    count = triton.cdiv(columns.count, blocks["BLOCK_V"])
    begins = None
    if pulls is not None:
        edges = torch.arange(count + 1, device=p.query.device) * blocks["BLOCK_V"]
        begins = torch.searchsorted(pulls.items, edges.clamp(max=columns.count))
    launch(
        _catalog_grad_kernel,
        (count, triton.cdiv(d, blocks["BLOCK_C"]) if out is not None else 1),
        **arguments,
        **columns.arguments(),
        Weights=x.weights,
        LogPartition=x.log_partition,
        PullItems=None if pulls is None else pulls.items,
        PullRows=None if pulls is None else pulls.rows,
        Pulls=None if pulls is None else pulls.pulls,
        Begins=begins,
        Grad=out,
        GradBias=bias,
        HAS_PULLS=pulls is not None,
        HAS_GRAD=out is not None,
        HAS_GRAD_BIAS=bias is not None,
        **blocks,
    )


def slice_cross_entropy_bwd(
    p: Problem, columns: Columns, x: Slopes, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of query and catalog in their dtypes, of bias in float32; empty where they are not needed."""
    v, d = p.catalog.shape
    grad_query = query_grad(p, columns, x) if needs[0] else p.query.new_empty(0)
    grad_catalog = torch.empty(v, d, dtype=p.catalog.dtype, device=p.catalog.device) if needs[1] else None
    grad_bias = p.floats(v) if needs[2] else None
    if needs[1] or needs[2]:
        column_grads(p, columns, x, Sorted.of(p, x), grad_catalog, grad_bias)
    return (
        grad_query,
        p.catalog.new_empty(0) if grad_catalog is None else grad_catalog,
        p.floats(0) if grad_bias is None else grad_bias,
    )
