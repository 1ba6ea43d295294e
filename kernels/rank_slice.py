"""Rank slices of the whole catalog: bracket, stream, settle, and redo what was missed.

Everything is decided on the device, in a fixed sequence of launches: nothing here waits for the device (unless `check`
asks to), so that a call can be captured in a CUDA graph. docs/gpu.md explains the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .ascending import _ascending_kernel
from .bracket import (
    LIMITS,
    OPEN,
    SPREAD,
    START_HIGH,
    START_LOW,
    STOP_HIGH,
    STOP_LOW,
    _limits_kernel,
    _sample_kernel,
    around,
)
from .exact import redo
from .order import FIRST, LAST, item_key, key_score, popcount, score_key, split_keys
from .tiles import launch

TARGETS = tl.constexpr(4)  # the items of rank start, stop - 1 and top - 1, which bound what is wanted; one place unused
ROWS = 1024  # sessions at a time, which bounds the memory beside the result
FEW = 2048  # scores that are looked at first, of which a thread holds a handful
NARROWED = 4  # times as many or more are not searched before the few have narrowed the search
MOST_SORTED = 256  # keys of a row that a program sorts by itself


@triton.jit
def _words(yes, bit):
    """Packs [B, 16, W] booleans, `bit` of the second axis each, into words [B, W]."""
    return tl.sum(tl.where(yes, bit, 0), 1)


@triton.jit
def _of_warp(words, PTX: tl.constexpr):
    """The bits that any thread of a warp has in its word."""
    if PTX:
        return tl.inline_asm_elementwise(
            "redux.sync.or.b32 $0, $1, 0xffffffff;", "=r,r", [words], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return words


@triton.jit
def _store_pairs(Scores, Pairs, before, hits, any_hits, bit, left, right, first, pair, PTX: tl.constexpr):
    """Appends the pairs whose `bit` is set in `hits`, a word of a row's pairs: `before` places after Scores and Pairs,
    and as many more as the word has lower bits. first + pair is a pair's number.

    A scattered tl.store first brings addresses, values and mask into a layout of its own, through shared memory. The
    PTX stores from where values are, and a warp without a hit, the rule in a large catalog, jumps over it: `any_hits`
    are those of the warp.
    """
    if PTX:
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred %hit;
                .reg .b32 %t;
                .reg .b64 %at;
                and.b32 %t, $5, $6;
                setp.eq.s32 %hit, %t, 0;
                @%hit bra NONE;
                and.b32 %t, $4, $6;
                setp.ne.s32 %hit, %t, 0;
                sub.s32 %t, $6, 1;
                and.b32 %t, %t, $4;
                popc.b32 %t, %t;
                add.s32 %t, %t, $3;
                mad.wide.s32 %at, %t, 8, $1;
                @%hit st.global.v2.f32 [%at], {$7, $8};
                mad.wide.s32 %at, %t, 4, $2;
                add.s32 %t, $9, $10;
                @%hit st.global.b32 [%at], %t;
            NONE:
                mov.b32 $0, 0;
            }
            """,
            "=r,l,l,r,r,r,r,f,f,r,r",
            [Scores.to(tl.int64), Pairs.to(tl.int64), before, hits, any_hits, bit, left, right, first, pair],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        place = before + popcount(hits & (bit - 1))
        keep = (hits & bit) != 0
        tl.store(Pairs + place, tl.broadcast_to(first + pair, place.shape), mask=keep)
        tl.store(Scores + 2 * place, left, mask=keep)
        tl.store(Scores + 2 * place + 1, right, mask=keep)


@triton.jit
def _store_words(Words, words, keep, PTX: tl.constexpr):
    """Stores each word from the thread that made it, for the same reason."""
    if PTX:
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred %keep;
                setp.ne.s32 %keep, $3, 0;
                @%keep st.global.b32 [$1], $2;
                mov.b32 $0, 0;
            }
            """,
            "=r,l,r,r",
            [Words.to(tl.int64), words, keep.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(Words, words, mask=keep)


@triton.jit(
    do_not_specialize=[
        *("B", "V", "first_item", "capacity", "dealt"),
        *("stride_qb", "stride_cv", "stride_bias", "stride_words"),
    ]
)
def _stream_kernel(
    Query,
    Catalog,
    Bias,
    Limits,
    Words,
    Scores,
    Pairs,
    Counts,
    Certain,
    Above,
    Bad,
    B,
    V,
    first_item,
    capacity,
    dealt,
    stride_qb,
    stride_cv,
    stride_bias,
    stride_words,
    HAS_BIAS: tl.constexpr,
    HAS_OPEN: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_STOP: tl.constexpr,
    BITS: tl.constexpr,
    CHECK: tl.constexpr,
    PTX: tl.constexpr,
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores every item once. What is certainly a member goes to Words as a bit; what may matter goes to a buffer.

    Items are buffered in pairs of neighbours, as a thread holds them: one place to find and one store for two scores.
    Each program owns a part of every row's buffer and fills it in the order of ids, so there are no atomics and nothing
    to wait for. Groups of 2 ** dealt neighbouring tiles are dealt to the programs in turn, which fills all parts alike.
    Counts may exceed `capacity`: that row is redone.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_b = rows < B
    split, splits = tl.program_id(1), tl.num_programs(1)
    # Nothing compares with NaN, so that rows beyond B have no members and no candidates.
    row_limits = Limits + rows * LIMITS
    open_low = tl.load(row_limits + OPEN, mask=in_b, other=float("nan"))[:, None, None]
    start_high = tl.load(row_limits + START_HIGH, mask=in_b, other=float("nan"))[:, None, None]
    start_low = tl.load(row_limits + START_LOW, mask=in_b, other=float("nan"))[:, None, None]
    stop_high = tl.load(row_limits + STOP_HIGH, mask=in_b, other=float("nan"))[:, None, None]
    stop_low = tl.load(row_limits + STOP_LOW, mask=in_b, other=float("nan"))[:, None, None]

    WHOLE: tl.constexpr = D <= BLOCK_D  # the queries are read once and stay
    # A thread of the matrix unit holds columns 2 q and 2 q + 1 of every 2 WORDS of a row. Items are dealt to columns so
    # that these are the 32 items of word q: no word is put together from several threads.
    WORDS: tl.constexpr = BLOCK_V // 32
    tl.static_assert(WORDS <= 4, "the pairs of a row are counted in the bytes of one number")
    column = tl.arange(0, BLOCK_V)
    offs_v = column // 2 % WORDS * 32 + column // (2 * WORDS) * 2 + column % 2
    word = tl.arange(0, WORDS)[None, :]
    left_bit = (1 << (2 * tl.arange(0, 16)))[None, :, None]
    buffer = ((rows * splits + split) * capacity)[:, None, None]
    filled = tl.zeros([BLOCK_B], tl.int32)  # pairs buffered
    certain = tl.zeros([BLOCK_B, WORDS], tl.int32)  # members by their score alone
    above = tl.zeros([BLOCK_B, WORDS], tl.int32)  # items above all that is wanted
    query = tiles.load_rows(Query, tl.minimum(rows, B - 1), stride_qb, D, UNIT_Q, BLOCK_D) if WHOLE else 0.0
    first_group = first_item // BLOCK_V >> dealt
    groups = (tl.cdiv(V, BLOCK_V) - 1 >> dealt) + 1 - first_group
    for turn in range(tl.cdiv(tl.maximum(groups - split, 0), splits) << dealt):
        tile = (first_group + split + (turn >> dealt) * splits << dealt) + (turn & (1 << dealt) - 1)
        items = (tile * BLOCK_V + offs_v).to(tl.int64)
        inside = tl.minimum(items, V - 1)
        if WHOLE:
            scores = tiles.score_rows(query, Catalog, inside, stride_cv, D, UNIT_C, PRODUCT, UPCAST, BLOCK_D)
        else:
            scores = tiles.score_tile(
                Query,
                Catalog,
                tl.minimum(rows, B - 1),
                inside,
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
            scores += tl.load(Bias + inside * stride_bias).to(tl.float32)[None, :]
        ranked = (items >= first_item) & (items < V)
        if CHECK:
            wrong = ranked[None, :] & in_b[:, None] & ~(tl.abs(scores) < float("inf"))
            tiles.report(Bad, scores, wrong, rows)
        if (tile * BLOCK_V < first_item) | (tile * BLOCK_V > V - BLOCK_V):
            scores = tl.where(ranked[None, :], scores, float("nan"))
        left, right = tl.split(tl.reshape(scores, [BLOCK_B, 16, WORDS, 2]))
        # A bit for each item, first of all: a limit then costs five instructions for two scores, and what follows from
        # several limits is worked out for 32 items at once. A pair's bit is that of its left item.
        hits = tl.zeros([BLOCK_B, WORDS], tl.int32)
        if HAS_STOP:
            over_stop = _words(left >= stop_high, left_bit) | _words(right >= stop_high, 2 * left_bit)
            hits = (_words(left >= stop_low, left_bit) | _words(right >= stop_low, 2 * left_bit)) & ~over_stop
        if HAS_START:
            over_start = _words(left >= start_high, left_bit) | _words(right >= start_high, 2 * left_bit)
            above += popcount(over_start)
            if BITS:
                near_start = _words(left >= start_low, left_bit) | _words(right >= start_low, 2 * left_bit)
                hits |= near_start & ~over_start
        hits |= hits >> 1
        if HAS_OPEN:
            hits |= _words(tl.maximum(left, right, propagate_nan=tl.PropagateNan.NONE) >= open_low, left_bit)
        hits &= 0x55555555
        if BITS:
            members = over_stop & ~over_start if HAS_START else over_stop
            at = Words + rows[:, None] * stride_words + tile * WORDS + word
            _store_words(at, members, in_b[:, None] & (tile * WORDS + word < stride_words), PTX)
            certain += popcount(members)

        count = popcount(hits)
        # A byte for the pairs of each word; the product adds up those of the words before.
        counts = tl.sum(count << (8 * word), 1)
        before = filled[:, None] + ((counts[:, None] * 0x01010100) >> (8 * word) & 0xFF)
        hits = tl.where(before + count <= capacity, hits, 0)  # a row that runs out of room is redone as a whole
        _store_pairs(
            Scores + 2 * buffer,
            Pairs + buffer,
            before[:, None, :],
            hits[:, None, :],
            _of_warp(hits, PTX)[:, None, :],
            left_bit,
            left,
            right,
            ((tile * WORDS + word) * 16)[:, None, :],
            tl.arange(0, 16)[None, :, None],
            PTX,
        )
        filled += (counts * 0x01010101) >> 24
    own = rows * splits + split
    # What stays empty holds no number, so that nobody has to ask how far a part is filled.
    for place in range(tl.min(tl.where(in_b, filled, capacity), 0), capacity):
        at = Scores + 2 * (own * capacity + place)
        tl.store(at, float("nan"), mask=in_b & (place >= filled))
        tl.store(at + 1, float("nan"), mask=in_b & (place >= filled))
    tl.store(Counts + own, filled, mask=in_b)
    tl.store(Certain + own, tl.sum(certain, 1), mask=in_b)
    tl.store(Above + own, tl.sum(above, 1), mask=in_b)


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
    found = tl.where(column == 1, tl.sum(second, 0), tl.where(column == 2, tl.sum(third, 0), 0))
    return tl.where(column == 0, tl.sum(first, 0), found)


@triton.jit(do_not_specialize=["splits", "capacity", "room", "V", "start", "stop", "top"])
def _select_kernel(
    Limits,
    Scores,
    Pairs,
    Counts,
    Certain,
    Above,
    Zone,
    Values,
    Offsets,
    Bounds,
    Ranks,
    Redone,
    Missed,
    MissedCount,
    splits,
    capacity,
    V,
    room,
    start,
    stop,
    top,
    spread,
    HAS_START: tl.constexpr,
    HAS_STOP: tl.constexpr,
    NARROW: tl.constexpr,
    SKIP_EXCLUDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    EXCLUDED: tl.constexpr,
):
    """One program for each row finds the keys of rank start, stop - 1 and top - 1 among its candidates.

    Writes them to Bounds; where counts show that a limit did not hold or a part was full, the row goes to Missed, and
    its buffer is emptied: it holds NaN where there is no candidate. With NARROW a few of the candidates
    say where the scores sought probably lie, and the first pass over the buffer, which is larger than the cache, copies
    what lies there to Zone, (2, room) for each row: scores and their places. The search then needs no other pass,
    unless the few have misled it.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    own = row * splits + part
    filled = tl.load(Counts + own, mask=part < splits, other=0)
    above = tl.sum(tl.load(Above + own, mask=part < splits, other=0), 0)
    certain = tl.sum(tl.load(Certain + own, mask=part < splits, other=0), 0)
    column = tl.arange(0, TARGETS)
    wanted = tl.where(column == 0, start, tl.where(column == 1, stop - 1, tl.where(column == 2, top - 1, -1)))
    unused = (wanted < 0) | ((column < 2) & (start == stop))

    # Each target's zone [lowest, highest), and how many items are above it.
    limits = Limits + row * LIMITS
    open_low = tl.load(limits + OPEN)
    lowest = open_low + tl.zeros([TARGETS], tl.float32)
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

    entries = 2 * splits * capacity
    buffer = Scores + row * entries
    first_pair = Pairs + row * splits * capacity
    zone = Zone + row * 2 * room
    offs = tl.arange(0, BLOCK)
    begin_excluded, end_excluded = tl.load(Offsets + row), tl.load(Offsets + row + 1)
    near_low, near_high = score_key(lowest), tl.full([TARGETS], 0x7FFFFFFF, tl.int32)
    if NARROW:
        stride = (entries // BLOCK - 1) | 1  # odd, so that left and right items are drawn
        few = tl.load(buffer + offs * stride)
        some = tl.sum((few[None, :] >= lowest[:, None]).to(tl.int32), 1)
        beyond = tl.sum((few[None, :] >= highest[:, None]).to(tl.int32), 1)
        expected = beyond + (wanted - over + 0.5) * (BLOCK / entries)
        low, high = around(few, expected, tl.maximum(some, 1), spread, TARGETS)
        near_low = tl.maximum(near_low, low)
        near_high = tl.where(highest == highest, tl.minimum(high, score_key(highest)), high)
    high_pivot = key_score(near_high)
    low_0, low_1, low_2 = _three(tl.where(unused, float("nan"), key_score(near_low)))
    high_0, high_1, high_2 = _three(high_pivot)

    # Every thread counts for itself, and all are added up once: candidates that reach a zone's lower limit, and its
    # upper one, the second number 16 bits higher; in `near_0` to `near_2` the same for what is near each target.
    ZONED: tl.constexpr = HAS_START or HAS_STOP  # otherwise all targets share the open zone
    reach = tl.zeros([TARGETS if ZONED else 1, BLOCK], tl.int32)
    near_0, near_1, near_2 = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    near = tl.zeros([], tl.int32)  # entries near any target
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, entries, BLOCK):
        score = tl.load(buffer + begin + offs, mask=begin + offs < entries, other=float("nan"))
        if SKIP_EXCLUDED:
            item = 2 * tl.load(first_pair + (begin + offs) // 2, mask=score == score, other=0) + offs % 2
            for place in range(begin_excluded, end_excluded, EXCLUDED):
                offs_e = place + tl.arange(0, EXCLUDED)
                value = tl.load(Values + offs_e, mask=offs_e < end_excluded, other=-1)
                drop = tl.sum((item[:, None] == value[None, :]).to(tl.int32), 1) > 0
                score = tl.where(drop, float("nan"), score)
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
    rank = wanted - over + at_high  # among all candidates
    held = (rank >= at_high) & (rank < at_low)
    missed = (tl.sum((~held & ~unused).to(tl.int32), 0) > 0) | (tl.max(filled, 0) > capacity)
    missed |= entries > 0xFFFF * BLOCK  # more than the 16 bits of a count hold

    # Bisection over scores as integers: the one sought lies in [low, high), which at_low and at_high candidates reach.
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
            hidden += over_high
            for begin in range(0, size, BLOCK):
                score = tl.load(source + begin + offs, mask=begin + offs < size, other=float("nan"))
                hidden -= tl.sum((score[None, :] >= high_pivot[:, None]).to(tl.int32), 1)
    going = tl.sum((searched & (at_low - at_high > 1) & (high > low + 1)).to(tl.int32), 0)
    while going > 0:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        pivot_0, pivot_1, pivot_2 = _three(key_score(middle))
        here_0, here_1, here_2 = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
        for begin in range(0, size, BLOCK):
            score = tl.load(source + begin + offs, mask=begin + offs < size, other=float("nan"))
            here_0 += (score >= pivot_0).to(tl.int32)
            here_1 += (score >= pivot_1).to(tl.int32)
            here_2 += (score >= pivot_2).to(tl.int32)
        reached = hidden + _sums(here_0, here_1, here_2)
        enough = reached > rank
        low, at_low = tl.where(enough, middle, low), tl.where(enough, reached, at_low)
        high, at_high = tl.where(enough, high, middle), tl.where(enough, at_high, reached)
        going = tl.sum((searched & (at_low - at_high > 1) & (high > low + 1)).to(tl.int32), 0)

    # Bisection over ids where the score is tied: the one sought lies in [low_item, high_item).
    pivot, ceiling = key_score(low), key_score(high)
    low_item = tl.zeros([TARGETS], tl.int32)
    high_item = tl.zeros([TARGETS], tl.int32) + V
    ties = searched & (at_low - at_high > 1)
    going = tl.sum((ties & (high_item - low_item > 1)).to(tl.int32), 0)
    while going > 0:
        middle = low_item + (high_item - low_item) // 2
        lower = tl.zeros([TARGETS], tl.int32)
        for begin in range(0, size, BLOCK):
            score = tl.load(source + begin + offs, mask=begin + offs < size, other=float("nan"))
            entry = tl.load(zone + room + begin + offs, mask=begin + offs < listed, other=0)
            entry = tl.where(narrow, entry, begin + offs)
            item = 2 * tl.load(first_pair + entry // 2, mask=score == score, other=0) + entry % 2
            tied = (score[None, :] == pivot[:, None]) & (item[None, :] < middle[:, None])
            lower += tl.sum(tied.to(tl.int32), 1)
        enough = ties & (lower > rank - at_high)
        low_item, high_item = tl.where(enough, low_item, middle), tl.where(enough, middle, high_item)
        low_item = tl.where(ties, low_item, 0)
        high_item = tl.where(ties, high_item, V)
        going = tl.sum((ties & (high_item - low_item > 1)).to(tl.int32), 0)

    found = tl.full([TARGETS], LAST, tl.int64)
    for begin in range(0, size, BLOCK):
        score = tl.load(source + begin + offs, mask=begin + offs < size, other=float("nan"))
        entry = tl.load(zone + room + begin + offs, mask=begin + offs < listed, other=0)
        entry = tl.where(narrow, entry, begin + offs)
        item = 2 * tl.load(first_pair + entry // 2, mask=score == score, other=0) + entry % 2
        this = (score[None, :] >= pivot[:, None]) & ~(score[None, :] >= ceiling[:, None])
        this &= (item[None, :] >= low_item[:, None]) & (item[None, :] < high_item[:, None])
        key = item_key(score, item.to(tl.int64), V)
        found = tl.maximum(found, tl.max(tl.where(this, key[None, :], LAST), 1))

    # Where nothing is wanted no key lies between the bounds.
    none = tl.where(column == 0, LAST, FIRST)
    tl.store(Bounds + row * TARGETS + column, tl.where(unused, none, tl.where(missed, 0, found)))
    tl.store(Ranks + row * TARGETS + column, tl.where(unused, -1, wanted))
    tl.store(Redone + row, tl.where(missed, 0, -1))
    if missed:
        for begin in range(0, entries, BLOCK):
            tl.store(buffer + begin + offs, tl.full([BLOCK], float("nan"), tl.float32), mask=begin + offs < entries)
        tl.store(Missed + tl.atomic_add(MissedCount, 1), row.to(tl.int32))


@triton.jit(do_not_specialize=["pairs", "V", "top", "stride_words", "wanted"])
def _place_kernel(
    Scores,
    Pairs,
    Bounds,
    Words,
    Found,
    Best,
    Values,
    Offsets,
    pairs,
    V,
    top,
    stride_words,
    wanted,
    BITS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    TOP: tl.constexpr,
    SORTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXCLUDED: tl.constexpr,
):
    """One program for each row puts its candidates where they belong, now that the bounds are known.

    Members become bits in Words, whose bits above the slice are cleared; or their ids, but for those excluded, move to
    the front of the row's Scores, in the order of the buffer, and Found says how many there are, at most `wanted`. The
    keys of the `top` best items go to Best, filled up with LAST; in order with SORTS, where TOP keys hold them all.
    """
    row = tl.program_id(0).to(tl.int64)
    bounds = Bounds + row * TARGETS
    first, last, best = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2)
    begin, end = tl.load(Offsets + row), tl.load(Offsets + row + 1)
    ids = tl.zeros([], tl.int32)
    tops = tl.zeros([], tl.int32)
    row_scores, row_best = Scores + 2 * row * pairs, Best + row * top
    for entry in range(0, 2 * pairs, BLOCK):
        offs_n = entry + tl.arange(0, BLOCK)
        score = tl.load(row_scores + offs_n, mask=offs_n < 2 * pairs, other=float("nan"))
        there = score == score
        item = 2 * tl.load(Pairs + row * pairs + offs_n // 2, mask=there, other=0).to(tl.int64) + offs_n % 2
        key = item_key(score, item, V)
        member = there & (key <= first) & (key >= last)
        if BITS:
            word = Words + row * stride_words + item // 32
            bit = 1 << (item % 32).to(tl.int32)
            tl.atomic_or(word, bit, mask=member, sem="relaxed")
            tl.atomic_and(word, ~bit, mask=there & (key > first), sem="relaxed")
        if HAS_IDS:
            for place in range(begin, end, EXCLUDED):
                offs = place + tl.arange(0, EXCLUDED)
                value = tl.load(Values + offs, mask=offs < end, other=-1)
                member &= tl.sum((item[:, None] == value[None, :]).to(tl.int32), 1) == 0
        if HAS_IDS or TOP > 0:
            # Members and, 16 bits higher, the best are counted in one number.
            chosen = there & (key >= best)
            one = (member.to(tl.int32) if HAS_IDS else 0) + tl.where(chosen, 1 << 16, 0)
            upto = tl.cumsum(one, 0)
            both = tl.sum(one, 0)
        if HAS_IDS:
            # Behind what is read next, and all of this block has been read: the sum asks every thread.
            rank = ids + (upto & 0xFFFF) - 1
            tl.store(row_scores + rank, item.to(tl.int32).to(tl.float32, bitcast=True), mask=member & (rank < wanted))
            ids += both & 0xFFFF
        if TOP > 0:
            rank = tops + (upto >> 16) - 1
            tl.store(row_best + rank, key, mask=chosen & (rank < top))
            tops += both >> 16
    if HAS_IDS:
        tl.store(Found + row, tl.minimum(ids, wanted))
    if TOP > 0:
        tl.debug_barrier()  # other threads' keys are read below
        offs_t = tl.arange(0, TOP)
        if SORTS:
            keys = tl.load(row_best + offs_t, mask=offs_t < tl.minimum(tops, top), other=LAST)
            tl.store(row_best + offs_t, tl.sort(keys, descending=True), mask=offs_t < top)
        else:
            for place in range(tops, top, TOP):
                tl.store(row_best + place + offs_t, tl.full([TOP], LAST, tl.int64), mask=place + offs_t < top)


@triton.jit(do_not_specialize=["V", "stride_words"])
def _clear_excluded_kernel(Words, Values, Offsets, V, stride_words, EXCLUDED: tl.constexpr):
    """Clears the bits of a row's excluded items."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(Offsets + row), tl.load(Offsets + row + 1)
    for place in range(begin, end, EXCLUDED):
        offs = place + tl.arange(0, EXCLUDED)
        item = tl.load(Values + offs, mask=offs < end, other=-1)
        bit = 1 << (item % 32).to(tl.int32)
        real = (item >= 0) & (item < V)
        tl.atomic_and(Words + row * stride_words + item // 32, ~bit, mask=real, sem="relaxed")


@dataclass(frozen=True)
class Plan:
    """How a call is cut into programs and buffers; from sizes alone, without a look at any value."""

    sampled: int  # S
    splits: int  # programs that share a row block's catalog
    capacity: int  # pairs that a program may buffer for a row
    dealt: int  # log2 of the neighbouring tiles that a program takes at a time
    bits: bool
    has_open: bool  # a zone of all scores above a limit: the top, and where few ranks are skipped also those
    has_start: bool  # limits around rank start
    has_stop: bool  # limits around rank stop - 1

    @property
    def pairs(self) -> int:
        """Pairs that a row's buffer holds."""
        return self.splits * self.capacity

    @property
    def zone(self) -> int:
        """Entries that may be near what is sought: an eighth of all, more than what a few are expected to leave."""
        return self.pairs // 4


def plan(
    rows: int,
    ranked: int,
    start: int,
    stop: int,
    top: int,
    bits: bool,
    left_out: int,
    processors: int,
    slack: float,
    blocks: tiles.Blocks,
) -> Plan:
    """left_out: about how many items of a row are dropped from the top; slack scales the room for candidates."""
    wanted = stop - start
    # Skipped ranks are buffered, too, unless they are many: then they are counted.
    open_start = start <= max(256, wanted // 8)
    has_start = wanted > 0 and not open_start
    has_stop = wanted > 0 and (bits or has_start)
    open_ranks = max(top + left_out, 0 if has_start or not wanted else start + 1 if bits else stop)
    room = 56 << 20  # bytes for the sample, which the buffer for candidates takes over
    sampled = min(ranked, max(2048, min(ranked // 64, (room + 12 * wanted * rows) // (4 * rows))))

    def reach(rank: int) -> float:
        """Items between the middle of a bracket and its limit."""
        share = sampled / ranked
        width = SPREAD * math.sqrt(max(rank * share * (1.0 - rank / ranked) * (1.0 - share), 0.0)) + 3.0
        return (width + 3.0 * math.sqrt(width)) / share

    candidates = 0.0
    if open_ranks:
        candidates += open_ranks + reach(open_ranks)
    if has_start:
        candidates += 2.0 * reach(start)
    if has_stop:
        candidates += 2.0 * reach(stop) if bits else wanted + reach(start) + reach(stop)
    all_tiles = triton.cdiv(ranked, blocks.v) + 1
    splits = max(1, min(triton.cdiv(2 * processors, triton.cdiv(rows, blocks.b)), all_tiles, 1024))
    most = triton.cdiv(all_tiles, splits) * (blocks.v // 2)  # the pairs that a program can meet
    share = candidates * slack / splits
    capacity = min(most, math.ceil(share + SPREAD * math.sqrt(share)) + 8)
    # Brackets deep in a huge catalog may hold more than memory does; such rows are redone.
    budget = (2 * 8 * wanted * rows + (48 << 20)) // (12 * rows) + 2 * open_ranks
    capacity = min(capacity, budget // splits)
    # A redone row's buffer holds exactly what is wanted, one item to a pair.
    exact = top + (0 if bits else wanted)
    capacity = max(capacity, triton.cdiv(exact, splits), 1)
    # Fewer groups of tiles are less to count for `_ascending_kernel`. But one that is all candidates, as catalogs that
    # are sorted by popularity have them, must not take more than a quarter of a program's part.
    dealt = 0
    while wanted and not bits and triton.cdiv(ranked, blocks.v << dealt) > splits * capacity:
        if blocks.v << dealt > capacity // 4:
            break
        dealt += 1
    return Plan(sampled, splits, capacity, dealt, bits, open_ranks > 0, has_start, has_stop)


def stream_blocks(
    p: Plan, rows: int, precision: str, query: Tensor, catalog: Tensor, blocks: tiles.Blocks
) -> tiles.Blocks:
    """The stream kernel's shape on this target.

    On Hopper and data-centre Blackwell the matrix unit takes operands from shared memory. That leaves 4 warps enough
    registers, and two programs share a processor: one compares scores while the matrix unit serves the other. Narrow
    queries then stay in shared memory; where only the open zone is looked for, registers suffice for twice the
    sessions, which halves what the catalog takes of the L2 cache's bandwidth.
    """
    width, narrow = query.shape[1], tiles.narrow(precision, query, catalog)
    same = query.dtype == catalog.dtype and (narrow or precision != "bf16")
    if not tiles.has_wide_matrix_unit(query.device) or blocks.v < 128 or p.has_start or not same:
        return blocks
    if not narrow or width > 128:
        return replace(blocks, warps=4)
    whole = max(16, triton.next_power_of_2(width))
    if p.has_stop or rows <= 64:
        return replace(blocks, warps=4, d=whole)
    return replace(blocks, b=128, d=whole, stages=2)


def ranks(
    query: Tensor,
    catalog: Tensor,
    start: int,
    stop: int,
    top: int,
    exclude: tuple[Tensor, Tensor],
    bias: Tensor | None,
    first_item: int,
    precision: str,
    bad: Tensor | None,
    words: Tensor | None,
    ids: Tensor | None,
    skip_excluded: bool = False,
    spread: float = SPREAD,
    slack: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Bracket, stream, settle and redo for up to ROWS sessions.

    words: (B, W) int32 zeros to set the members' bits in, or None for a list of ids. ids: (B, stop - start) int32 that
    the list is written to, ascending and filled up with -1. skip_excluded: excluded items are no items at all (top_k)
    rather than members that leave the slice. spread and slack decide how often a row must be redone, never what is
    returned.

    Returns the keys (B, top) int64 of the first ranks in order, and the keys (B, 4) int64 of the items at rank start,
    stop - 1 and top - 1.
    """
    (b, _), v, device = query.shape, catalog.shape[0], query.device
    values, offsets = exclude
    ranked = v - first_item
    left_out = triton.cdiv(2 * values.numel(), max(b, 1)) if skip_excluded else 0
    blocks, product = tiles.scoring_blocks(precision, query, catalog), tiles.arithmetic(precision, query, catalog)
    call = (b, ranked, start, stop, top, words is not None, left_out, tiles.processors(device), slack)
    stream = stream_blocks(plan(*call, blocks), b, precision, query, catalog, blocks)
    p = plan(*call, stream)
    matrices = (tiles.strides(query), tiles.strides(catalog), 0 if bias is None else bias.stride(0))
    has_bias = {"HAS_BIAS": bias is not None}
    row_blocks = triton.cdiv(b, blocks.b)
    int32 = {"dtype": torch.int32, "device": device}

    # The sample has been read when the buffer is filled: one memory serves both.
    scores_size, pairs_size = b * p.pairs * 2, b * p.pairs
    memory = torch.empty(max(scores_size + pairs_size, b * p.sampled), **int32)
    sample = memory[: b * p.sampled].view(torch.float32)
    scores = memory[:scores_size].view(torch.float32)
    pairs = memory[scores_size : scores_size + pairs_size]
    limits = torch.empty(b, LIMITS.value, dtype=torch.float32, device=device)
    counts, certain, above = torch.empty(3, b, p.splits, **int32)
    redone = torch.empty(b, **int32)  # entries written by the redo, -1 where there was none
    bounds = torch.empty(b, TARGETS.value, dtype=torch.int64, device=device)
    rank = torch.empty(b, TARGETS.value, **int32)
    missed, missed_count = torch.empty(b, **int32), torch.zeros(1, **int32)

    launch(
        _sample_kernel,
        (row_blocks, triton.cdiv(p.sampled, blocks.v)),
        query,
        catalog,
        bias,
        sample,
        b,
        v,
        p.sampled,
        first_item,
        *matrices,
        WHOLE=p.sampled == ranked,
        **has_bias,
        **product,
        **blocks.options(),
    )
    launch(
        _limits_kernel,
        (b,),
        sample,
        offsets,
        limits,
        p.sampled,
        ranked,
        start,
        stop,
        top,
        spread,
        HAS_OPEN=p.has_open,
        OPEN_START=start < stop and not p.has_start,
        OPEN_STOP=start < stop and not p.has_stop,
        WIDE_STOP=p.has_stop and not p.bits,
        SKIP_EXCLUDED=skip_excluded,
        NARROW=p.sampled >= NARROWED * FEW,
        COLUMNS=LIMITS.value if p.has_start or p.has_stop else 1,
        CHUNK=FEW,
        num_warps=4,
    )
    stride_words = 0 if words is None else words.stride(0)
    backend, generation = tiles.target(device)
    # To have two programs on a processor, NVIDIA's assembler would spill a few of the loop's registers.
    roomy = {"maxnreg": 168} if backend == "cuda" and int(generation) // 10 == 10 and p.has_start else {}
    launch(
        _stream_kernel,
        (triton.cdiv(b, stream.b), p.splits),
        query,
        catalog,
        bias,
        limits,
        words,
        scores,
        pairs,
        counts,
        certain,
        above,
        bad,
        b,
        v,
        first_item,
        p.capacity,
        p.dealt,
        *matrices,
        stride_words,
        **has_bias,
        HAS_OPEN=p.has_open,
        HAS_START=p.has_start,
        HAS_STOP=p.has_stop,
        BITS=p.bits,
        CHECK=bad is not None,
        PTX=backend == "cuda",
        **product,
        **stream.options(),
        **roomy,
    )
    sizes = (p.splits, p.capacity, v)
    skip = skip_excluded and values.numel() > 0
    block = FEW // 2  # entries, as many as leave registers for what each split needs
    room = p.zone if 2 * p.pairs >= NARROWED * block else 0
    # The ids' memory is free until they are placed.
    zone = ids if ids is not None and ids.shape[1] >= 2 * room else torch.empty(b, 2 * room, **int32)
    launch(
        _select_kernel,
        (b,),
        limits,
        scores,
        pairs,
        counts,
        certain,
        above,
        zone,
        values,
        offsets,
        bounds,
        rank,
        redone,
        missed,
        missed_count,
        *sizes,
        room,
        start,
        stop,
        top,
        spread,
        HAS_START=p.has_start,
        HAS_STOP=p.has_stop,
        NARROW=room > 0,
        SKIP_EXCLUDED=skip,
        BLOCK=block,
        EXCLUDED=4,
        PARTS=triton.next_power_of_2(p.splits),
        num_warps=8,
        # For more programs on a processor, too, it would spill.
        **({"maxnreg": 128} if backend == "cuda" else {}),
    )
    redo(
        query,
        catalog,
        bias,
        (missed, missed_count, bounds, rank),
        words,
        (scores, pairs, redone),
        exclude,
        first_item,
        p.pairs,
        matrices,
        product | has_bias | {"BITS": p.bits, "SKIP_EXCLUDED": skip},
        precision,
    )
    has_ids = ids is not None and stop > start
    found = torch.empty(b, **int32)
    best = torch.empty(b, top, dtype=torch.int64, device=device)
    sorts = top <= MOST_SORTED
    launch(
        _place_kernel,
        (b,),
        scores,
        pairs,
        bounds,
        words,
        found,
        best,
        values,
        offsets,
        p.pairs,
        v,
        top,
        stride_words,
        stop - start,
        BITS=p.bits,
        HAS_IDS=has_ids,
        TOP=min(MOST_SORTED, max(16, triton.next_power_of_2(top))) if top else 0,
        SORTS=sorts,
        BLOCK=1024,
        EXCLUDED=8,
        num_warps=4,
    )
    if words is not None and values.numel():
        launch(_clear_excluded_kernel, (b,), words, values, offsets, v, stride_words, EXCLUDED=128, num_warps=4)
    if has_ids:
        shift = (stream.v << p.dealt).bit_length() - 1
        launch(
            _ascending_kernel,
            (b,),
            memory,
            pairs,
            found,
            redone,
            ids,
            p.pairs,
            p.pairs,
            first_item >> shift,
            (v - 1 >> shift) + 1 - (first_item >> shift),
            shift,
            stop - start,
            triton.cdiv((v - 1).bit_length(), 2) * 2,
            BLOCK=1024,
            num_warps=4,
        )
    return best if sorts else best.sort(dim=1, descending=True).values, bounds


def rank_slice_fwd(
    query: Tensor,
    catalog: Tensor,
    start: int,
    stop: int,
    top: int,
    exclude_values: Tensor,
    exclude_offsets: Tensor,
    bias: Tensor | None,
    first_item: int,
    precision: str,
    check: bool,
    as_bits: bool,
    width: int,
    **luck: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """query (B, d), catalog (V, d), exclude as values (E,) and offsets (B + 1,) int64, bias (V,).

    Returns members, top (B, top) int64, thresholds (B, 2) float32, and what was found amiss. Members are bits
    (B, width) uint8 with `as_bits`, else ids (B, stop - start) int32. What was found amiss, with `check`, is an int64:
    row << 32 | the score's bits, for the first row with a score that is not finite, or FIRST. luck: `spread` and
    `slack` of `ranks`.
    """
    (b, _), v, device = query.shape, catalog.shape[0], query.device
    bad = torch.full((1,), FIRST.value, dtype=torch.int64, device=device) if check else None
    if as_bits:
        members = torch.zeros(b, width, dtype=torch.uint8, device=device)
    else:
        members = torch.empty(b, stop - start, dtype=torch.int32, device=device)
    best = torch.empty(b, top, dtype=torch.int64, device=device)
    thresholds = torch.empty(b, 2, dtype=torch.float32, device=device)
    for begin in range(0, b, ROWS):
        some = slice(begin, min(begin + ROWS, b))
        words = members[some].view(torch.int32) if as_bits else None
        offsets = exclude_offsets[some.start : some.stop + 1]
        keys, bounds = ranks(
            query[some],
            catalog,
            start,
            stop,
            top,
            (exclude_values, offsets),
            bias,
            first_item,
            precision,
            bad,
            words,
            None if as_bits else members[some],
            **luck,
        )
        split_keys(keys, v, None, best[some])
        split_keys(bounds[:, :2], v, thresholds[some], None)
    if start == stop:
        thresholds[:, 0], thresholds[:, 1] = math.inf, -math.inf
    return members, best, thresholds, bad
