"""Limits that probably enclose the score at a rank, from the scores of a sample of the catalog."""

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles
from .order import key_score, score_key

SPREAD = 4.5  # standard deviations of a sample's order statistic to either side: 3e-6 of all limits do not hold
LIMITS = tl.constexpr(8)  # columns of the limits: 5 are used, a power of two for the kernels
OPEN, START_HIGH, START_LOW, STOP_HIGH, STOP_LOW = (tl.constexpr(i) for i in range(5))
_BITS = tl.constexpr(24)  # of a limit's 32 that are found, the rest are not worth it
_STEP = tl.constexpr(256)  # the weight of the last one


@triton.jit(do_not_specialize=["B", "V", "S", "first_item", "stride_qb", "stride_cv", "stride_bias"])
def _sample_kernel(
    Query,
    Catalog,
    Bias,
    Sample,
    B,
    V,
    S,
    first_item,
    stride_qb,
    stride_cv,
    stride_bias,
    WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    place = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    # One item from each of S equal parts of the catalog, at a place that a hash decides.
    ranked = V - first_item
    noise = (place * 2654435761) & 0xFFFFFFFF
    noise = ((noise ^ (noise >> 15)) * 1540483477) & 0xFFFFFFFF
    inside = (noise * ranked) >> 32
    if WHOLE:
        inside = tl.zeros([BLOCK_V], tl.int64)
    items = first_item + tl.minimum((place * ranked + inside) // S, ranked - 1)
    scores = tiles.score_tile(
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
    if HAS_BIAS:
        scores += tl.load(Bias + items * stride_bias).to(tl.float32)[None, :]
    tl.store(Sample + rows[:, None] * S + place[None, :], scores, mask=(rows[:, None] < B) & (place[None, :] < S))


@triton.jit(do_not_specialize=["S", "ranked", "start", "stop", "top"])
def _limits_kernel(
    Sample,
    Offsets,
    Limits,
    S,
    ranked,
    start,
    stop,
    top,
    spread,
    HAS_OPEN: tl.constexpr,
    OPEN_START: tl.constexpr,
    OPEN_STOP: tl.constexpr,
    WIDE_STOP: tl.constexpr,
    SKIP_EXCLUDED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program for each row finds five order statistics of its sample, all bit by bit at once.

    Limits[row]: the open zone's lower limit, then upper and lower limits around the ranks start and stop - 1. With
    WIDE_STOP the second zone reaches up to the first one's upper limit.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, LIMITS)
    last = top - 1  # the last rank that the open zone must hold
    if SKIP_EXCLUDED:
        last += (tl.load(Offsets + row + 1) - tl.load(Offsets + row)).to(tl.int32)
    if OPEN_START:
        last = tl.maximum(last, start)
    if OPEN_STOP:
        last = tl.maximum(last, stop - 1)
    last = tl.minimum(last, ranked - 1)
    rank = tl.where(column == OPEN, last, tl.where(column <= START_LOW, start, stop - 1))
    if WIDE_STOP:
        rank = tl.where(column == STOP_HIGH, start, rank)
    upper = (column == START_HIGH) | (column == STOP_HIGH)
    share = S / ranked
    middle = (rank.to(tl.float32) + 0.5) * share
    left = 1.0 - share  # of a sample without repeats, the part that is left to luck
    width = spread * tl.sqrt(tl.maximum(middle * (1.0 - middle / S) * left, 0.0)) + 2.0
    # The limit is the largest key that `wanted` sampled scores reach.
    wanted = tl.where(upper, tl.floor(middle - width), tl.ceil(middle + width) + 1.0).to(tl.int32)
    key = tl.full([LIMITS], -(2**31), tl.int32)
    offs = tl.arange(0, CHUNK)
    for step in range(_BITS):
        higher = key + (tl.full([LIMITS], 1, tl.int32) << (31 - step))
        pivot = key_score(higher)
        reached = tl.zeros([LIMITS], tl.int32)
        for begin in range(0, S, CHUNK):
            score = tl.load(Sample + row * S + begin + offs, mask=begin + offs < S, other=float("nan"))
            reached += tl.sum((score[None, :] >= pivot[:, None]).to(tl.int32), 1)
        key = tl.where(reached >= wanted, higher, key)
    key = tl.where(upper, key + _STEP, key)
    none = tl.where(upper, wanted < 1, wanted > S)
    infinite = tl.where(upper, float("inf"), float("-inf"))
    key = tl.minimum(tl.maximum(key, score_key(tl.full([LIMITS], float("-inf"), tl.float32))), 0x7F800000)
    limit = tl.where(none, infinite, key_score(key))
    if not HAS_OPEN:
        limit = tl.where(column == OPEN, float("inf"), limit)
    tl.store(Limits + row * LIMITS + column, limit)
