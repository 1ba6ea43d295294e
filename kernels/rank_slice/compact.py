"""The ids of a row's members in ascending order.

The stream's programs take groups of neighbouring tiles in turn, each meets its items in order, and each has a part of
the row's buffer. So the members of a group stand together already, in order, and only the groups must be: each is moved
as a whole, as many groups at a time as there is memory to count. Where a row was redone, whoever came first was first,
and its members are sorted bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fallback import TARGETS
from .keys import LAST, item_key


@triton.jit(do_not_specialize=["room", "window", "first_group", "groups", "shift", "wanted", "bits"])
def _ascending_kernel(
    Members,
    Memory,
    Found,
    Redone,
    Ids,
    room,
    window,
    first_group,
    groups,
    shift,
    wanted,
    bits,
    BLOCK: tl.constexpr,
):
    """One program for each row writes its ids, ascending and filled up with -1, to Ids (B, wanted) int32.

    Members (B, room) int32 holds Found[row] ids at a row's front. Memory (B, room) int32 is for two numbers a group, of
    `window` groups at a time; item i is in group (i >> shift) - first_group. Redone[row] is negative where the stream's
    order holds. bits: of the largest id, an even number.
    """
    row = tl.program_id(0).to(tl.int64)
    members, memory, ids = Members + row * room, Memory + row * room, Ids + row * wanted
    size = tl.load(Found + row)
    offs = tl.arange(0, BLOCK)
    if tl.load(Redone + row) >= 0:
        for bit in range(bits):
            source, other = members, memory
            if bit % 2 == 1:
                source, other = memory, members
            zeros = tl.zeros([], tl.int32)
            for begin in range(0, size, BLOCK):
                item = tl.load(source + begin + offs, mask=begin + offs < size, other=-1)
                zeros += tl.sum(1 - (item >> bit & 1), 0)
            below = tl.zeros([], tl.int32)  # ids without the bit that have been moved
            for begin in range(0, size, BLOCK):
                there = begin + offs < size
                item = tl.load(source + begin + offs, mask=there, other=-1)
                zero = 1 - (item >> bit & 1)
                upto = below + tl.cumsum(zero, 0)
                place = tl.where(zero == 1, upto - 1, zeros + begin + offs - upto)
                tl.store(other + place, item, mask=there)
                below += tl.sum(zero, 0)
            tl.debug_barrier()  # other threads' ids are read below
        for begin in range(0, size, BLOCK):
            there = begin + offs < size
            tl.store(ids + begin + offs, tl.load(members + begin + offs, mask=there), mask=there)
    else:
        first = memory  # where a group's members begin, and then how far they move
        end = memory + window
        lower = tl.zeros([], tl.int32)  # members of the groups so far
        for opening in range(0, groups, window):
            some = tl.minimum(groups - opening, window)
            for begin in range(0, some, BLOCK):
                tl.store(first + begin + offs, tl.zeros([BLOCK], tl.int32), mask=begin + offs < some)
                tl.store(end + begin + offs, tl.zeros([BLOCK], tl.int32), mask=begin + offs < some)
            tl.debug_barrier()
            for begin in range(0, size + 1, BLOCK):
                place = begin + offs
                group = tl.load(members + place, mask=place < size, other=0)
                group = tl.where(place < size, (group >> shift) - first_group - opening, -1)
                before = tl.load(members + place - 1, mask=(place > 0) & (place <= size), other=0)
                before = tl.where(place > 0, (before >> shift) - first_group - opening, -1)
                changes = (place <= size) & (group != before)
                tl.store(first + group, place, mask=changes & (group >= 0) & (group < some))
                tl.store(end + before, place, mask=changes & (before >= 0) & (before < some))
            tl.debug_barrier()
            for begin in range(0, some, BLOCK):
                there = begin + offs < some
                opened = tl.load(first + begin + offs, mask=there, other=0)
                count = tl.load(end + begin + offs, mask=there, other=0) - opened
                tl.store(first + begin + offs, lower + tl.cumsum(count, 0) - count - opened, mask=there)
                lower += tl.sum(count, 0)
            tl.debug_barrier()
            for begin in range(0, size, BLOCK):
                place = begin + offs
                item = tl.load(members + place, mask=place < size, other=0)
                group = (item >> shift) - first_group - opening
                inside = (place < size) & (group >= 0) & (group < some)
                tl.store(ids + place + tl.load(first + group, mask=inside, other=0), item, mask=inside)
            tl.debug_barrier()  # before the next window clears what is read here
    for begin in range(size, wanted, BLOCK):
        tl.store(ids + begin + offs, tl.full([BLOCK], -1, tl.int32), mask=begin + offs < wanted)


@triton.jit(do_not_specialize=["entries", "V", "top", "stride_words", "wanted"])
def _place_kernel(
    Scores,
    Items,
    Bounds,
    Words,
    Found,
    Best,
    Values,
    Offsets,
    entries,
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
    row_scores, row_best = Scores + row * entries, Best + row * top
    for entry in range(0, entries, BLOCK):
        offs_n = entry + tl.arange(0, BLOCK)
        score = tl.load(row_scores + offs_n, mask=offs_n < entries, other=float("nan"))
        there = score == score
        item = tl.load(Items + row * entries + offs_n, mask=there, other=0).to(tl.int64)
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
