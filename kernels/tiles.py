"""What all kernels share: how a product of queries and catalog is read and computed, and the launch of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shapes

NO_ERROR = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Form:
    """How a kernel reads rows of queries and catalog and multiplies them: one compile-time constant.

    Device functions get it as a whole: Triton 3.6 takes its fields in expressions, but not as arguments.
    """

    D: int  # width; a constant, without which asynchronous copies become scalar loads
    BLOCK_D: int  # how much of it is read at a time
    UNIT_Q: int  # of the queries' row stride, see `_unit`
    UNIT_C: int  # of the catalog's
    PRODUCT: str  # "bf16", "fp16", "tf32" or "ieee"
    UPCAST: bool  # the interpreter holds bf16 as integers and multiplies those

    @classmethod
    def of(cls, precision: str, query: Tensor, catalog: Tensor, block_d: int) -> Form:
        product = shapes.product_of(precision)
        return cls(query.shape[1], block_d, _unit(query), _unit(catalog), product, shapes.INTERPRETED)


def readable(matrix: Tensor) -> Tensor:
    """The matrix, or a copy where kernels cannot read it: they need a row's elements side by side, and offsets within
    a row stride that fit 32 bits. Rows may overlap or be one row."""
    if (matrix.shape[1] > 1 and matrix.stride(1) != 1) or matrix.stride(0) >= 1 << 31:
        return matrix.contiguous()
    return matrix


def _unit(matrix: Tensor) -> int:
    """The largest power of two, up to 16, that divides the row stride. A kernel multiplies by it as a constant, from
    which the compiler sees how far rows are aligned: without that there are no wide, and no asynchronous, copies."""
    stride = matrix.stride(0)
    return min(16, stride & -stride) if stride else 16


def strides(matrix: Tensor) -> int:
    """The row stride in units of `_unit`, as kernels want it."""
    return matrix.stride(0) // _unit(matrix)


def no_error(check: bool, blocks: int, device: torch.device) -> Tensor | None:
    """(blocks, at least 1) int64 for `report`, of each block of rows; None without `check`."""
    return torch.full((max(blocks, 1),), NO_ERROR, dtype=torch.int64, device=device) if check else None


def first_error(errors: Tensor | None, rows: int) -> Tensor | None:
    """What `report` wrote for blocks of `rows` rows, each counted from its own first -> (1,), counted from row 0."""
    if errors is None:
        return None
    offsets = torch.arange(errors.numel(), device=errors.device) * (rows << 32)
    return torch.where(errors == NO_ERROR, errors, errors + offsets).amin(0, keepdim=True)


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    device = next(x for x in (*args, *options.values()) if isinstance(x, Tensor)).device
    with shapes.current(device):
        kernel[grid](*args, **options)


_launcher: Callable[..., None] = _launch


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs `kernel` over `grid` on the device of its first tensor. Every launch goes through here, so that
    the proofs can compile what is launched."""
    if all(grid):
        _launcher(kernel, grid, *args, **options)


def replace_launcher(launcher: Callable[..., None] | None) -> None:
    """For the proofs: `launcher` is called in place of every kernel; None brings the kernels back."""
    global _launcher
    _launcher = launcher or _launch


@triton.jit
def report(Bad, scores, wrong, rows):
    """Writes the first row of those with a wrong score, and that score's bits, to Bad; rows [BLOCK_B] int64."""
    row = rows.to(tl.int32)[:, None]
    first = tl.min(tl.min(tl.where(wrong, row, 0x7FFFFFFF), 1), 0)
    if first < 0x7FFFFFFF:
        bits = tl.where(wrong & (row == first), scores.to(tl.int32, bitcast=True), 0x7FFFFFFF)
        bits = tl.min(tl.min(bits, 1), 0).to(tl.int64) & 0xFFFFFFFF
        tl.atomic_min(Bad, (first.to(tl.int64) << 32) | bits)


@triton.jit
def ranking_bias(Bias, items, stride_bias):
    """float32 biases of items within the catalog, and which items may be candidates: a bias of -inf, for those that may
    not, is returned as NaN, with which nothing compares."""
    bias = tl.load(Bias + items * stride_bias).to(tl.float32)
    allowed = bias != float("-inf")
    return tl.where(allowed, bias, float("nan")), allowed


@triton.jit
def operand(x, FORM: tl.constexpr):
    """A loaded block as the product takes it."""
    if FORM.PRODUCT == "bf16":
        if FORM.UPCAST:
            return round_bf16(x)
        else:
            return x.to(tl.bfloat16)
    elif FORM.PRODUCT == "fp16":
        return x.to(tl.float16)
    else:
        return x.to(tl.float32)


@triton.jit
def round_bf16(x):
    """x as float32, rounded to the nearest bfloat16, ties to even: the interpreter's own conversion cuts bits off."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def row_offsets(rows, stride, UNIT: tl.constexpr):
    """Where rows >= 0 begin, in elements, int64; stride as `strides` gives it.

    Rows fit 32 bits and so do strides but for the oddest: their product is one instruction, one of 64 bits is six.
    """
    if stride.dtype == tl.int64:
        return rows.to(tl.int64) * stride * UNIT
    else:
        return rows.to(tl.uint32).to(tl.int64) * stride.to(tl.uint32).to(tl.int64) * UNIT


@triton.jit
def load_rows(X, rows, stride, UNIT: tl.constexpr, FORM: tl.constexpr):
    """X[rows] -> [rows, BLOCK_D], zero beyond D; rows int64 within X, stride as `strides` gives it."""
    offs_d = tl.arange(0, FORM.BLOCK_D)[None, :]
    at = X + row_offsets(rows, stride, UNIT)[:, None] + offs_d
    if FORM.D == FORM.BLOCK_D:
        return tl.load(at)
    else:
        return tl.load(at, mask=offs_d < FORM.D, other=0.0)


@triton.jit
def resident_query(Query, rows, stride_qb, FORM: tl.constexpr):
    """The queries of rows, for `score`, where they are one step and so stay with the program; else nothing."""
    if FORM.D <= FORM.BLOCK_D:
        UNIT: tl.constexpr = FORM.UNIT_Q
        return load_rows(Query, rows, stride_qb, UNIT, FORM)
    else:
        return 0.0


@triton.jit
def score(query, Query, Catalog, rows, items, stride_qb, stride_cv, FORM: tl.constexpr):
    """Query[rows] @ Catalog[items].T -> [BLOCK_B, BLOCK_V] float32, with `query` as `resident_query` has it.

    rows [BLOCK_B] and items [BLOCK_V] int64 must lie within the tensors: callers clamp them and drop what is too much,
    since masked rows cost more than rows read twice. Strides as `strides` gives them.
    """
    if FORM.D <= FORM.BLOCK_D:
        return _score_resident(query, Catalog, items, stride_cv, FORM)
    else:
        return score_tile(Query, Catalog, rows, items, stride_qb, stride_cv, FORM)


@triton.jit
def _score_resident(query, Catalog, items, stride_cv, FORM: tl.constexpr):
    """query [BLOCK_B, BLOCK_D] @ Catalog[items].T, for a width that is one step."""
    UNIT: tl.constexpr = FORM.UNIT_C
    rows = load_rows(Catalog, items, stride_cv, UNIT, FORM)
    precision: tl.constexpr = "tf32" if FORM.PRODUCT == "tf32" else "ieee"
    left, right = operand(query, FORM), operand(rows, FORM)
    return tl.dot(left, tl.trans(right), input_precision=precision)


@triton.jit
def score_tile(Query, Catalog, rows, items, stride_qb, stride_cv, FORM: tl.constexpr):
    """As `score`, with queries read for this tile alone."""
    D: tl.constexpr = FORM.D
    BLOCK_D: tl.constexpr = FORM.BLOCK_D
    offs_d = tl.arange(0, BLOCK_D)
    q_rows = Query + rows[:, None] * (stride_qb * FORM.UNIT_Q)
    c_rows = Catalog + items[None, :] * (stride_cv * FORM.UNIT_C)
    precision: tl.constexpr = "tf32" if FORM.PRODUCT == "tf32" else "ieee"
    scores = tl.zeros([rows.shape[0], items.shape[0]], tl.float32)
    for begin in range(0, D, BLOCK_D):
        offs = begin + offs_d
        if D % BLOCK_D == 0:
            q = tl.load(q_rows + offs[None, :])
            c = tl.load(c_rows + offs[:, None])
        else:
            q = tl.load(q_rows + offs[None, :], mask=offs[None, :] < D, other=0.0)
            c = tl.load(c_rows + offs[:, None], mask=offs[:, None] < D, other=0.0)
        q, c = operand(q, FORM), operand(c, FORM)
        scores = tl.dot(q, c, scores, input_precision=precision)
    return scores
