"""The keys that bound the slice, selected among a row's candidates."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import shapes
from ..tiles import launch
from .keys import FIRST, LAST, item_key, key_score, score_key
from .plan import LIMITS, OPEN, START_HIGH, START_LOW, STOP_HIGH, STOP_LOW, TARGETS, Plan, Ranking, Workspace
from .sample import around


@triton.jit
def _three(vector):
    """The first three of [TARGETS]: comparing a block with each of them leaves it where its threads hold it."""
    column = tl.arange(0, TARGETS)
    first, second = tl.where(column == 0, vector, 0), tl.where(column == 1, vector, 0)
    return tl.sum(first, 0), tl.sum(second, 0), tl.sum(tl.where(column == 2, vector, 0), 0)


@triton.jit
def _sums(first, second, third):
    """The sums of three blocks as [TARGETS], the last of which is 0."""
    column = tl.arange(0, TARGETS)
    later = tl.where(column == 1, tl.sum(second, 0), tl.where(column == 2, tl.sum(third, 0), 0))
    return tl.where(column == 0, tl.sum(first, 0), later)


@triton.jit
def _zones(limits, certain, above, HAS_START: tl.constexpr, HAS_STOP: tl.constexpr):
    """Each target's zone [lowest, highest) of scores, and how many items are above it; all [TARGETS]."""
    column = tl.arange(0, TARGETS)
    lowest = tl.load(limits + OPEN) + tl.zeros([TARGETS], tl.float32)
    highest = tl.full([TARGETS], float("nan"), tl.float32)  # which no score reaches
    over = tl.zeros([TARGETS], tl.int32)
    if HAS_START:
        lowest = tl.where(column == 0, tl.load(limits + START_LOW), lowest)
        highest = tl.where(column == 0, tl.load(limits + START_HIGH), highest)
        over = tl.where(column == 0, above, over)
    if HAS_STOP:
        lowest = tl.where(column == 1, tl.load(limits + STOP_LOW), lowest)
        highest = tl.where(column == 1, tl.load(limits + STOP_HIGH), highest)
        over = tl.where(column == 1, above + certain, over)
    return lowest, highest, over


@triton.jit
def _near(buffer, entries, lowest, highest, place, margin, BLOCK: tl.constexpr):
    """Keys [TARGETS] between which the scores sought probably lie, from BLOCK entries of the buffer; place: the rank
    sought among the items of its zone and below."""
    stride = (entries // BLOCK - 1) | 1  # odd, so that places in the parts differ
    few = tl.load(buffer + tl.arange(0, BLOCK) * stride)
    size = tl.sum((few[None, :] >= lowest[:, None]).to(tl.int32), 1)
    beyond = tl.sum((few[None, :] >= highest[:, None]).to(tl.int32), 1)
    expected = beyond + (place + 0.5) * (BLOCK / entries)
    low, high = around(few, expected, tl.maximum(size, 1), margin, TARGETS)
    near_low = tl.maximum(score_key(lowest), low)
    near_high = tl.where(highest == highest, tl.minimum(high, score_key(highest)), high)
    return near_low, near_high


@triton.jit
def _without_excluded(score, item, Values, begin, end, EXCLUDED: tl.constexpr):
    """Scores of a block, NaN where the item is among Values[begin:end]."""
    for place in range(begin, end, EXCLUDED):
        offs_e = place + tl.arange(0, EXCLUDED)
        value = tl.load(Values + offs_e, mask=offs_e < end, other=-1)
        drop = tl.sum((item[:, None] == value[None, :]).to(tl.int32), 1) > 0
        score = tl.where(drop, float("nan"), score)
    return score


@triton.jit
def _search_scores(source, size, hidden, rank, searched, low, high, at_low, at_high, BLOCK: tl.constexpr):
    """Bisects over scores as integers: the one sought lies in [low, high), which at_low and at_high candidates reach.
    -> these four, as narrow as they become."""
    offs = tl.arange(0, BLOCK)
    going = tl.sum((searched & (at_low - at_high > 1) & (high > low + 1)).to(tl.int32), 0)
    while going > 0:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        pivot_0, pivot_1, pivot_2 = _three(key_score(middle))
        # Every thread counts for itself, and all are added up once.
        reach_0, reach_1 = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
        reach_2 = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, size, BLOCK):
            score = tl.load(source + begin + offs, mask=begin + offs < size, other=float("nan"))
            reach_0 += (score >= pivot_0).to(tl.int32)
            reach_1 += (score >= pivot_1).to(tl.int32)
            reach_2 += (score >= pivot_2).to(tl.int32)
        reached = hidden + _sums(reach_0, reach_1, reach_2)
        enough = reached > rank
        low, at_low = tl.where(enough, middle, low), tl.where(enough, reached, at_low)
        high, at_high = tl.where(enough, high, middle), tl.where(enough, at_high, reached)
        going = tl.sum((searched & (at_low - at_high > 1) & (high > low + 1)).to(tl.int32), 0)
    return low, high, at_low, at_high


@triton.jit
def _count(source, size, pivot, BLOCK: tl.constexpr):
    """How many of the scores reach each of pivot [TARGETS]."""
    offs = tl.arange(0, BLOCK)
    reached = tl.zeros([TARGETS], tl.int32)
    for begin in range(0, size, BLOCK):
        score = tl.load(source + begin + offs, mask=begin + offs < size, other=float("nan"))
        reached += tl.sum((score[None, :] >= pivot[:, None]).to(tl.int32), 1)
    return reached


@triton.jit
def _load_items(items, places, begin, score, listed, narrow, BLOCK: tl.constexpr):
    """The ids of a block of scores: of the list of places where the search is narrow, else of the buffer itself."""
    offs = begin + tl.arange(0, BLOCK)
    entry = tl.load(places + offs, mask=offs < listed, other=0)
    entry = tl.where(narrow, entry, offs)
    return tl.load(items + entry, mask=score == score, other=0)


@triton.jit
def _search_items(source, size, items, places, listed, narrow, pivot, place, ties, V, BLOCK: tl.constexpr):
    """Bisects over ids where the score, pivot [TARGETS], is tied: the one sought, of rank `place` among those tied,
    lies in [low, high), which is returned."""
    offs = tl.arange(0, BLOCK)
    low = tl.zeros([TARGETS], tl.int32)
    high = tl.zeros([TARGETS], tl.int32) + V
    going = tl.sum((ties & (high - low > 1)).to(tl.int32), 0)
    while going > 0:
        middle = low + (high - low) // 2
        lower = tl.zeros([TARGETS], tl.int32)
        for begin in range(0, size, BLOCK):
            score = tl.load(source + begin + offs, mask=begin + offs < size, other=float("nan"))
            item = _load_items(items, places, begin, score, listed, narrow, BLOCK)
            tied = (score[None, :] == pivot[:, None]) & (item[None, :] < middle[:, None])
            lower += tl.sum(tied.to(tl.int32), 1)
        enough = ties & (lower > place)
        low, high = tl.where(enough, low, middle), tl.where(enough, middle, high)
        low = tl.where(ties, low, 0)
        high = tl.where(ties, high, V)
        going = tl.sum((ties & (high - low > 1)).to(tl.int32), 0)
    return low, high


@triton.jit
def _bounds(source, size, items, places, listed, narrow, pivot, ceiling, low_item, high_item, V, BLOCK: tl.constexpr):
    """The keys [TARGETS] of the items with scores in [pivot, ceiling) and ids in [low_item, high_item)."""
    offs = tl.arange(0, BLOCK)
    bound = tl.full([TARGETS], LAST, tl.int64)
    for begin in range(0, size, BLOCK):
        score = tl.load(source + begin + offs, mask=begin + offs < size, other=float("nan"))
        item = _load_items(items, places, begin, score, listed, narrow, BLOCK)
        sought = (score[None, :] >= pivot[:, None]) & ~(score[None, :] >= ceiling[:, None])
        sought &= (item[None, :] >= low_item[:, None]) & (item[None, :] < high_item[:, None])
        key = item_key(score, item.to(tl.int64), V)
        bound = tl.maximum(bound, tl.max(tl.where(sought, key[None, :], LAST), 1))
    return bound


@triton.jit(do_not_specialize=["splits", "capacity", "room", "V", "start", "stop", "top"])
def _select_kernel(
    Limits,
    Scores,
    Items,
    Counts,
    Certain,
    Above,
    Zone,
    Values,
    Offsets,
    Bounds,
    Ranks,
    Rewritten,
    Missed,
    MissedCount,
    splits,
    capacity,
    V,
    room,
    start,
    stop,
    top,
    margin,
    HAS_START: tl.constexpr,
    HAS_STOP: tl.constexpr,
    NARROW: tl.constexpr,
    SKIP_EXCLUDED: tl.constexpr,
    MAY_BE_FEW: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    EXCLUDED: tl.constexpr,
):
    """One program for each row finds the keys of rank start, stop - 1 and top - 1 among its candidates.

    Writes them to Bounds; where counts show that a limit did not hold or a part was full, the row goes to Missed, and
    its buffer is emptied: it holds NaN where there is no candidate. With NARROW a few of the candidates say where the
    scores sought probably lie, and the first pass over the buffer, which is larger than the cache, copies what lies
    there to Zone, (2, room) for each row: scores and their places. The search then needs no other pass, unless the few
    have misled it. With MAY_BE_FEW a row may hold fewer candidates than ranks: a rank beyond them gets the key LAST.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    row_parts = row * splits + part
    filled = tl.load(Counts + row_parts, mask=part < splits, other=0)
    above = tl.sum(tl.load(Above + row_parts, mask=part < splits, other=0), 0)
    certain = tl.sum(tl.load(Certain + row_parts, mask=part < splits, other=0), 0)
    column = tl.arange(0, TARGETS)
    target = tl.where(column == 0, start, tl.where(column == 1, stop - 1, tl.where(column == 2, top - 1, -1)))
    unused = (target < 0) | ((column < 2) & (start == stop))
    limits = Limits + row * LIMITS
    lowest, highest, over = _zones(limits, certain, above, HAS_START, HAS_STOP)

    entries = splits * capacity
    buffer, items = Scores + row * entries, Items + row * entries
    zone = Zone + row * 2 * room
    offs = tl.arange(0, BLOCK)
    begin_excluded, end_excluded = tl.load(Offsets + row), tl.load(Offsets + row + 1)
    near_low, near_high = score_key(lowest), tl.full([TARGETS], 0x7FFFFFFF, tl.int32)
    if NARROW:
        near_low, near_high = _near(buffer, entries, lowest, highest, target - over, margin, BLOCK)
    high_pivot = key_score(near_high)
    low_0, low_1, low_2 = _three(tl.where(unused, float("nan"), key_score(near_low)))
    high_0, high_1, high_2 = _three(high_pivot)

    # Every thread counts for itself, and all are added up once: candidates that reach a zone's lower limit, and its
    # upper one, the second number 16 bits higher; in `near_0` to `near_2` the same for what is near each target.
    ZONED: tl.constexpr = HAS_START or HAS_STOP  # otherwise all targets share the open zone
    open_low = tl.load(limits + OPEN)
    reach = tl.zeros([TARGETS if ZONED else 1, BLOCK], tl.int32)
    near_0, near_1, near_2 = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    near = tl.zeros([], tl.int32)  # entries near any target
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, entries, BLOCK):
        score = tl.load(buffer + begin + offs, mask=begin + offs < entries, other=float("nan"))
        if SKIP_EXCLUDED:
            item = tl.load(items + begin + offs, mask=score == score, other=0)
            score = _without_excluded(score, item, Values, begin_excluded, end_excluded, EXCLUDED)
            tl.store(buffer + begin + offs, score, mask=(begin + offs < entries) & (score != score))
        if ZONED:
            reach += (score[None, :] >= lowest[:, None]).to(tl.int32)
            reach += tl.where(score[None, :] >= highest[:, None], 1 << 16, 0)
        else:
            reach += (score >= open_low).to(tl.int32)[None, :]
        best = tl.maximum(best, score)  # never NaN
        if NARROW:
            near_0 += (score >= low_0).to(tl.int32) + tl.where(score >= high_0, 1 << 16, 0)
            near_1 += (score >= low_1).to(tl.int32) + tl.where(score >= high_1, 1 << 16, 0)
            near_2 += (score >= low_2).to(tl.int32) + tl.where(score >= high_2, 1 << 16, 0)
            keep = (score >= low_0) & ~(score >= high_0) | (score >= low_1) & ~(score >= high_1)
            keep |= (score >= low_2) & ~(score >= high_2)
            at = near + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(zone + at, score.to(tl.int32, bitcast=True), mask=keep & (at < room))
            tl.store(zone + room + at, begin + offs, mask=keep & (at < room))
            near += tl.sum(keep.to(tl.int32), 0)
    tl.debug_barrier()  # what other threads have written is read below
    at_low = tl.zeros([TARGETS], tl.int32) + tl.sum(reach & 0xFFFF, 1)
    at_high = tl.zeros([TARGETS], tl.int32) + tl.sum(reach >> 16, 1)
    over_low = _sums(near_0 & 0xFFFF, near_1 & 0xFFFF, near_2 & 0xFFFF)
    over_high = _sums(near_0 >> 16, near_1 >> 16, near_2 >> 16)
    rank = target - over + at_high  # among all candidates
    held = (rank >= at_high) & (rank < at_low)
    if MAY_BE_FEW:
        beyond = ~unused & (rank >= at_low) & (lowest == float("-inf"))  # of all that can be ranked
        unused |= beyond
    missed = (tl.sum((~held & ~unused).to(tl.int32), 0) > 0) | (tl.max(filled, 0) > capacity)
    missed |= entries > 0xFFFF * BLOCK  # more than the 16 bits of a count hold

    low = score_key(lowest)
    high = tl.where(highest == highest, score_key(highest), score_key(tl.max(best, 0)) + 1)
    searched = held & ~unused & ~missed
    narrow = tl.zeros([], tl.int32) > 0
    source, size = buffer, entries  # of the scores that are searched
    listed = tl.zeros([], tl.int32)  # of these, those whose places are in a list
    hidden = tl.zeros([TARGETS], tl.int32)  # candidates above a target's zone that Zone does not hold
    if NARROW:
        inside = (rank >= over_high) & (rank < over_low)
        narrow = (near <= room) & (tl.sum((searched & ~inside).to(tl.int32), 0) == 0)
        source = tl.where(narrow, zone.to(Scores.dtype, bitcast=True), buffer)
        size = tl.where(narrow, near, entries)
        listed = tl.where(narrow, near, 0)
        low, at_low = tl.where(narrow, near_low, low), tl.where(narrow, over_low, at_low)
        high = tl.where(narrow, tl.minimum(near_high, high), high)
        at_high = tl.where(narrow, over_high, at_high)
        if narrow:
            hidden = over_high - _count(source, size, high_pivot, BLOCK)
    low, high, at_low, at_high = _search_scores(source, size, hidden, rank, searched, low, high, at_low, at_high, BLOCK)
    pivot, ceiling = key_score(low), key_score(high)
    ties = searched & (at_low - at_high > 1)
    places = zone + room
    low_item, high_item = _search_items(
        source, size, items, places, listed, narrow, pivot, rank - at_high, ties, V, BLOCK
    )
    bound = _bounds(source, size, items, places, listed, narrow, pivot, ceiling, low_item, high_item, V, BLOCK)

    # For an unused target no key lies between the bounds.
    none = tl.where(column == 0, LAST, FIRST)
    if MAY_BE_FEW:
        none = tl.where(beyond, LAST, none)
    tl.store(Bounds + row * TARGETS + column, tl.where(unused, none, tl.where(missed, 0, bound)))
    tl.store(Ranks + row * TARGETS + column, tl.where(unused, -1, target))
    tl.store(Rewritten + row, tl.where(missed, 0, -1))
    if missed:
        for begin in range(0, entries, BLOCK):
            tl.store(buffer + begin + offs, tl.full([BLOCK], float("nan"), tl.float32), mask=begin + offs < entries)
        tl.store(Missed + tl.atomic_add(MissedCount, 1), row.to(tl.int32))


def select(r: Ranking, p: Plan, w: Workspace, margin: float) -> None:
    """Finds the keys at the ranks sought among each row's candidates, or lists the row as one that falls back."""
    launch(
        _select_kernel,
        (r.rows,),
        Limits=w.limits,
        **w.candidates(),
        **w.counters(),
        **w.search(),
        **r.excluded(),
        **r.ranks(),
        Zone=w.zone,
        Rewritten=w.rewritten,
        splits=p.splits,
        capacity=p.capacity,
        V=r.num_items,
        room=p.room,
        margin=margin,
        **p.zones(),
        NARROW=p.room > 0,
        SKIP_EXCLUDED=r.drops_excluded,
        MAY_BE_FEW=r.drops_excluded or r.bias is not None,
        PARTS=triton.next_power_of_2(p.splits),
        **shapes.select_options(p.has_stop or r.drops_excluded, r.query.device),
    )
