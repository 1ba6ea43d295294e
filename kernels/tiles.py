"""What all kernels share: block shapes, how a product is computed, the scoring tile, and the launch of a kernel."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Read when triton itself reads it: as `triton.jit` decorates a kernel.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_PROCESSORS = 2  # as many as let the tests see more than one program on a catalog
ASSUMED_PROCESSORS = 132  # where launches are only compiled; grids do not enter the code


@dataclass(frozen=True)
class Blocks:
    """The fixed shape of a kernel that computes scores: a tile of B sessions x V items, summed over D at a time."""

    b: int
    v: int
    d: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_B": self.b,
            "BLOCK_V": self.v,
            "BLOCK_D": self.d,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def product_of(precision: str) -> str:
    """How products are computed: "bf16", or for "fp32" what torch's setting for matrix products allows, "tf32" or
    "ieee", which does without the matrix unit."""
    if precision == "bf16":
        return "bf16"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def scoring_blocks(precision: str, query: Tensor, catalog: Tensor) -> Blocks:
    """64 x 128 scores on 8 warps, 32 accumulators a thread; 128 bytes of a row at a time, three buffers of them.

    Without the matrix unit 64 x 64 scores on 4 warps: as many a thread, since each operand is read from shared memory
    as often as a thread has none of it; with half of them the stream took twice as long on an H100.
    """
    product, width = product_of(precision), query.shape[1]
    if product == "ieee":
        return Blocks(b=64, v=64, d=16, warps=4, stages=2)
    return Blocks(b=64, v=128, d=step(width, 64 if narrow(precision, query, catalog) else 32), warps=8, stages=3)


def resident_blocks(precision: str, query: Tensor, catalog: Tensor) -> Blocks:
    """As `scoring_blocks`, but where the matrix unit takes operands from shared memory: narrow queries stay there while
    a program goes over the catalog, and for wide ones 4 warps have enough registers, on Hopper. The fastest on an H100.
    """
    blocks = scoring_blocks(precision, query, catalog)
    if not narrow(precision, query, catalog) or not has_wide_matrix_unit(query.device):
        return blocks
    if query.shape[1] > 128:
        return replace(blocks, warps=4) if is_hopper(query.device) else blocks
    return Blocks(b=128, v=64, d=max(16, triton.next_power_of_2(query.shape[1])), warps=8, stages=3)


def narrow(precision: str, query: Tensor, catalog: Tensor) -> bool:
    """Whether rows are read as bfloat16."""
    return product_of(precision) == "bf16" and query.dtype == catalog.dtype == torch.bfloat16


def step(width: int, most: int) -> int:
    """How much of the width is summed at a time: at least two steps, so that one is copied while another is multiplied,
    if the matrix unit, which takes 16 at a time, can have them."""
    return min(most, max(16, triton.next_power_of_2(width) // 2))


def arithmetic(precision: str, query: Tensor, catalog: Tensor) -> dict[str, Any]:
    """The constants of `score_tile` for these inputs: width, alignment, and how products are computed."""
    return {
        "D": query.shape[1],
        "UNIT_Q": _unit(query),
        "UNIT_C": _unit(catalog),
        "PRODUCT": product_of(precision),
        # The interpreter holds bf16 as integers and multiplies those.
        "UPCAST": INTERPRETED,
    }


def _unit(matrix: Tensor) -> int:
    """The largest power of two, up to 16, that divides the row stride. A kernel multiplies by it as a constant, from
    which the compiler sees how far rows are aligned: without that there are no wide, and no asynchronous, copies."""
    stride = matrix.stride(0)
    return min(16, stride & -stride) if stride else 16


def strides(matrix: Tensor) -> int:
    """The row stride in units of `_unit`, as `score_tile` wants it."""
    return matrix.stride(0) // _unit(matrix)


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs can run side by side, one on each streaming multiprocessor."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return INTERPRETED_PROCESSORS if INTERPRETED else ASSUMED_PROCESSORS


def target(device: torch.device) -> tuple[str, int | str]:
    """What kernels are compiled for on this device: "cuda" and the compute capability, 90 for Hopper, or "hip" and
    AMD's name for it; ("", 0) where they are interpreted."""
    return ("", 0) if INTERPRETED else _target_of(triton.runtime.driver.active, device)


@functools.cache
def _target_of(driver: Any, device: torch.device) -> tuple[str, int | str]:
    with _current(device):
        found = driver.get_current_target()
    return found.backend, found.arch


def is_hopper(device: torch.device) -> bool:
    backend, generation = target(device)
    return backend == "cuda" and int(generation) // 10 == 9


def is_blackwell(device: torch.device) -> bool:
    """Of data centres."""
    backend, generation = target(device)
    return backend == "cuda" and int(generation) // 10 == 10


def has_wide_matrix_unit(device: torch.device) -> bool:
    """Whether the matrix unit takes operands from shared memory: Hopper's and data-centre Blackwell's do."""
    return is_hopper(device) or is_blackwell(device)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton asks and launches on the current device, which need not be the tensors': within, it is."""
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        return torch.cuda.device(device)
    return nullcontext()


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    on = next(x for x in (*args, *options.values()) if isinstance(x, Tensor)).device
    with _current(on):
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
def operand(x, PRODUCT: tl.constexpr, UPCAST: tl.constexpr):
    """A loaded block as the product takes it."""
    if PRODUCT == "bf16":
        if UPCAST:
            return round_bf16(x)
        else:
            return x.to(tl.bfloat16)
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
def score_tile(
    Query,
    Catalog,
    rows,
    items,
    stride_qb,
    stride_cv,
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Query[rows] @ Catalog[items].T -> [BLOCK_B, BLOCK_V] float32.

    rows [BLOCK_B] and items [BLOCK_V] int64 must lie within the tensors: callers clamp them and drop what is too much,
    since masked rows cost more than rows read twice. stride_qb, stride_cv as `strides` gives them.
    """
    offs_d = tl.arange(0, BLOCK_D)
    q_rows = Query + rows[:, None] * (stride_qb * UNIT_Q)
    c_rows = Catalog + items[None, :] * (stride_cv * UNIT_C)
    precision: tl.constexpr = "tf32" if PRODUCT == "tf32" else "ieee"
    scores = tl.zeros([BLOCK_B, BLOCK_V], tl.float32)
    for begin in range(0, D, BLOCK_D):
        offs = begin + offs_d
        if D % BLOCK_D == 0:
            q = tl.load(q_rows + offs[None, :])
            c = tl.load(c_rows + offs[:, None])
        else:
            q = tl.load(q_rows + offs[None, :], mask=offs[None, :] < D, other=0.0)
            c = tl.load(c_rows + offs[:, None], mask=offs[:, None] < D, other=0.0)
        q, c = operand(q, PRODUCT, UPCAST), operand(c, PRODUCT, UPCAST)
        scores = tl.dot(q, c, scores, input_precision=precision)
    return scores


@triton.jit
def load_rows(X, rows, stride, D: tl.constexpr, UNIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """X[rows] -> [rows, BLOCK_D], zero beyond D; rows int64 within X, stride as `strides` gives it."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    at = X + row_offsets(rows, stride, UNIT)[:, None] + offs_d
    if D == BLOCK_D:
        return tl.load(at)
    else:
        return tl.load(at, mask=offs_d < D, other=0.0)


@triton.jit
def score_rows(
    query,
    Catalog,
    items,
    stride_cv,
    D: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """query [BLOCK_B, BLOCK_D] @ Catalog[items].T, as `score_tile` does it, for a width that is one step."""
    rows = load_rows(Catalog, items, stride_cv, D, UNIT_C, BLOCK_D)
    precision: tl.constexpr = "tf32" if PRODUCT == "tf32" else "ieee"
    left, right = operand(query, PRODUCT, UPCAST), operand(rows, PRODUCT, UPCAST)
    return tl.dot(left, tl.trans(right), input_precision=precision)


@triton.jit
def resident_query(Query, rows, B, stride_qb, D: tl.constexpr, UNIT_Q: tl.constexpr, BLOCK_D: tl.constexpr):
    """The queries of rows, for `score`, where they are one step and so stay with the program; else nothing."""
    if D <= BLOCK_D:
        return load_rows(Query, tl.minimum(rows, B - 1), stride_qb, D, UNIT_Q, BLOCK_D)
    else:
        return 0.0


@triton.jit
def score(
    query,
    Query,
    Catalog,
    rows,
    items,
    B,
    stride_qb,
    stride_cv,
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """As `score_tile`, with queries that stay where they can, `query` as `resident_query` has it; rows at or beyond B
    are scored as row B - 1."""
    if D <= BLOCK_D:
        return score_rows(query, Catalog, items, stride_cv, D, UNIT_C, PRODUCT, UPCAST, BLOCK_D)
    else:
        return score_tile(
            Query,
            Catalog,
            tl.minimum(rows, B - 1),
            items,
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
