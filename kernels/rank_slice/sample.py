"""A sample of the catalog's scores, and from it limits that probably enclose the scores at the ranks sought."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import shapes, tiles
from ..tiles import launch
from .keys import key_score, score_key
from .plan import LIMITS, OPEN, START_HIGH, START_LOW, STOP_HIGH, Plan, Ranking, Workspace

_BITS = tl.constexpr(24)  # of a limit's 32 that are searched, the rest are not worth it
_STEP = tl.constexpr(256)  # the weight of the last one
_INFINITE = tl.constexpr(0x7F800000)  # infinity's key


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
    FORM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A tile [BLOCK_B, BLOCK_V] of Sample (B, S): all sessions' scores of the same S items, with WHOLE of every one."""
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
    scores = tiles.score_tile(Query, Catalog, tl.minimum(rows, B - 1), items, stride_qb, stride_cv, FORM)
    if HAS_BIAS:
        bias, _ = tiles.ranking_bias(Bias, items, stride_bias)
        scores += bias[None, :]
    tl.store(Sample + rows[:, None] * S + place[None, :], scores, mask=(rows[:, None] < B) & (place[None, :] < S))


@triton.jit
def around(few, middle, size, margin, COLUMNS: tl.constexpr):
    """Keys [COLUMNS] that probably enclose the scores at places `middle` of a population of which `few` were drawn.

    middle [COLUMNS] float32, in places of the few, of which `size` are in question. Unless the margin is missed, the
    score sought lies in [low, high).
    """
    middle = tl.minimum(tl.maximum(middle, 0.0), size.to(tl.float32))
    width = margin * tl.sqrt(tl.maximum(middle * (1.0 - middle / size), 0.0)) + 3.0
    low = tl.full([COLUMNS], -(2**31), tl.int32)
    high = tl.full([COLUMNS], -(2**31), tl.int32)
    low_place = tl.ceil(middle + width).to(tl.int32)
    high_place = tl.floor(middle - width).to(tl.int32)
    for step in range(_BITS):
        bit = tl.full([COLUMNS], 1, tl.int32) << (31 - step)
        pivot = key_score(low + bit)
        reached = tl.sum((few[None, :] >= pivot[:, None]).to(tl.int32), 1)
        low = tl.where(reached >= low_place, low + bit, low)
        pivot = key_score(high + bit)
        reached = tl.sum((few[None, :] >= pivot[:, None]).to(tl.int32), 1)
        high = tl.where(reached >= high_place, high + bit, high)
    negative = score_key(tl.full([COLUMNS], float("-inf"), tl.float32))
    low = tl.where(low_place > size, negative, tl.maximum(low, negative))
    return low, tl.where(high_place < 1, 0x7FFFFFFF, high + _STEP)


@triton.jit
def _ranks_of_limits(
    Offsets,
    row,
    ranked,
    start,
    stop,
    top,
    OPEN_START: tl.constexpr,
    OPEN_STOP: tl.constexpr,
    WIDE_STOP: tl.constexpr,
    SKIP_EXCLUDED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The rank [COLUMNS] that each limit is about; flags as `_limits_kernel` has them."""
    column = tl.arange(0, COLUMNS)
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
    return rank


@triton.jit
def _narrow(sample, S, place, margin, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """Moves the scores among which those at places [COLUMNS] probably lie to the front of a row's sample (S,).

    -> keys low and high [COLUMNS] that probably enclose each, how many scores were moved, and for each place how many
    scores above its zone were not.
    """
    offs = tl.arange(0, CHUNK)
    few = tl.load(sample + offs * (S // CHUNK))
    drawn = tl.full([COLUMNS], CHUNK, tl.int32)
    low, high = around(few, place.to(tl.float32) * (CHUNK / S), drawn, margin, COLUMNS)
    low_pivot, high_pivot = key_score(low), key_score(high)
    hidden = tl.zeros([COLUMNS], tl.int32)
    size = tl.zeros([], tl.int32)
    for begin in range(0, S, CHUNK):
        score = tl.load(sample + begin + offs, mask=begin + offs < S, other=float("nan"))
        reach_high = score[None, :] >= high_pivot[:, None]
        hidden += tl.sum(reach_high.to(tl.int32), 1)
        keep = tl.sum(((score[None, :] >= low_pivot[:, None]) & ~reach_high).to(tl.int32), 0) > 0
        # Behind what is read next, and all of this chunk has been read: the sum asks every thread.
        at = size + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(sample + at, score, mask=keep)
        size += tl.sum(keep.to(tl.int32), 0)
    tl.debug_barrier()  # other threads' scores are read below
    for begin in range(0, size, CHUNK):
        score = tl.load(sample + begin + offs, mask=begin + offs < size, other=float("nan"))
        hidden -= tl.sum((score[None, :] >= high_pivot[:, None]).to(tl.int32), 1)
    return low, high, size, hidden


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
    margin,
    HAS_OPEN: tl.constexpr,
    OPEN_START: tl.constexpr,
    OPEN_STOP: tl.constexpr,
    WIDE_STOP: tl.constexpr,
    SKIP_EXCLUDED: tl.constexpr,
    NARROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program for each row finds five order statistics of its sample, or the first alone, all bit by bit at once.

    Limits[row]: the open zone's lower limit, then upper and lower limits around the ranks start and stop - 1. With
    WIDE_STOP the second zone reaches up to the first one's upper limit. With NARROW, for samples larger than the cache,
    a few scores say where the statistics probably lie, and one pass moves what lies there to the beginning of the
    sample; where they misled it a limit does not hold, and the row falls back.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    rank = _ranks_of_limits(
        Offsets, row, ranked, start, stop, top, OPEN_START, OPEN_STOP, WIDE_STOP, SKIP_EXCLUDED, COLUMNS
    )
    upper = (column == START_HIGH) | (column == STOP_HIGH)
    share = S / ranked
    middle = (rank.to(tl.float32) + 0.5) * share
    # The sample has no repeats, which narrows its deviation by the part of the catalog that it leaves out.
    width = margin * tl.sqrt(tl.maximum(middle * (1.0 - middle / S) * (1.0 - share), 0.0)) + 2.0
    # The limit is the largest key that `place` sampled scores reach.
    place = tl.where(upper, tl.floor(middle - width), tl.ceil(middle + width) + 1.0).to(tl.int32)
    sample = Sample + row * S
    offs = tl.arange(0, CHUNK)
    size = S
    low, high = tl.full([COLUMNS], -(2**31), tl.int32), tl.full([COLUMNS], 0x7FFFFFFF, tl.int32)
    hidden = tl.zeros([COLUMNS], tl.int32)  # scores above a zone that were not moved
    if NARROW:
        low, high, size, hidden = _narrow(sample, S, place, margin, COLUMNS, CHUNK)
    key = tl.full([COLUMNS], -(2**31), tl.int32)
    for step in range(_BITS):
        higher = key + (tl.full([COLUMNS], 1, tl.int32) << (31 - step))
        pivot = key_score(higher)
        reached = hidden
        for begin in range(0, size, CHUNK):
            score = tl.load(sample + begin + offs, mask=begin + offs < size, other=float("nan"))
            reached += tl.sum((score[None, :] >= pivot[:, None]).to(tl.int32), 1)
        key = tl.where((higher <= low) | ((higher < high) & (reached >= place)), higher, key)
    key = tl.where(upper, key + _STEP, key)
    none = tl.where(upper, place < 1, place > S)
    infinite = tl.where(upper, float("inf"), float("-inf"))
    key = tl.minimum(tl.maximum(key, score_key(tl.full([COLUMNS], float("-inf"), tl.float32))), _INFINITE)
    limit = tl.where(none, infinite, key_score(key))
    if not HAS_OPEN:
        limit = tl.where(column == OPEN, float("inf"), limit)
    tl.store(Limits + row * LIMITS + column, limit)


def sample(r: Ranking, p: Plan, w: Workspace, margin: float) -> None:
    """Scores one item out of each of S equal parts of the catalog, and writes limits around the ranks sought."""
    blocks = shapes.scoring_blocks(r.precision, r.query, r.catalog)
    launch(
        _sample_kernel,
        (triton.cdiv(r.rows, blocks.b), triton.cdiv(p.sampled, blocks.v)),
        **r.scores(blocks.d),
        Sample=w.sample,
        B=r.rows,
        S=p.sampled,
        WHOLE=p.sampled == r.ranked,
        **blocks.options(),
        **shapes.sample_registers(r.precision, r.query.device),
    )
    launch(
        _limits_kernel,
        (r.rows,),
        Sample=w.sample,
        Offsets=r.offsets,
        Limits=w.limits,
        S=p.sampled,
        ranked=r.ranked,
        **r.ranks(),
        margin=margin,
        HAS_OPEN=p.has_open,
        OPEN_START=r.size > 0 and not p.has_start,
        OPEN_STOP=r.size > 0 and not p.has_stop,
        WIDE_STOP=p.has_stop and not p.bits,
        SKIP_EXCLUDED=r.skip_excluded,
        NARROW=p.sampled >= shapes.NARROWED * shapes.FEW,
        COLUMNS=LIMITS.value if p.has_start or p.has_stop else 1,
        CHUNK=shapes.FEW,
        **shapes.LIMITS,
    )
