"""Members and top put where they belong, once the bounds are known, and ids put in ascending order.

Ids need no sort: the scan's programs take groups of neighbouring tiles in turn, each meets its items in order, and each
has a part of the row's buffer. So the members of a group stand together already, in order, and only the groups must be:
each is moved as a whole, as many groups at a time as there is memory to count. A row that fell back has no such order,
and its members are sorted bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import shapes
from ..tiles import launch
from .keys import LAST, item_key
from .plan import TARGETS, Plan, Ranking, Workspace

MOST_SORTED = 256  # keys of a row that a program sorts by itself


@triton.jit(do_not_specialize=["entries", "V", "top", "stride_words", "size"])
def _place_kernel(
    Scores,
    Items,
    Bounds,
    Words,
    MemberCounts,
    TopKeys,
    Values,
    Offsets,
    entries,
    V,
    top,
    stride_words,
    size,
    BITS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    TOP: tl.constexpr,
    SORTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXCLUDED: tl.constexpr,
):
    """One program for each row puts its candidates where they belong, now that the bounds are known.

    Members become bits in Words, whose bits above the slice are cleared; or their ids, but for those excluded, move to
    the front of the row's Scores, in the order of the buffer, and MemberCounts says how many there are, at most `size`.
    The keys of the `top` best items go to TopKeys, filled up with LAST; in order with SORTS, where TOP keys hold them
    all.
    """
    row = tl.program_id(0).to(tl.int64)
    bounds = Bounds + row * TARGETS
    first, last, best = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2)
    begin, end = tl.load(Offsets + row), tl.load(Offsets + row + 1)
    ids = tl.zeros([], tl.int32)
    tops = tl.zeros([], tl.int32)
    row_scores, row_top = Scores + row * entries, TopKeys + row * top
    for entry in range(0, entries, BLOCK):
        offs_n = entry + tl.arange(0, BLOCK)
        score = tl.load(row_scores + offs_n, mask=offs_n < entries, other=float("nan"))
        real = score == score
        item = tl.load(Items + row * entries + offs_n, mask=real, other=0).to(tl.int64)
        key = item_key(score, item, V)
        member = real & (key <= first) & (key >= last)
        if BITS:
            word = Words + row * stride_words + item // 32
            bit = 1 << (item % 32).to(tl.int32)
            tl.atomic_or(word, bit, mask=member, sem="relaxed")
            tl.atomic_and(word, ~bit, mask=real & (key > first), sem="relaxed")
        if HAS_IDS:
            for place in range(begin, end, EXCLUDED):
                offs = place + tl.arange(0, EXCLUDED)
                value = tl.load(Values + offs, mask=offs < end, other=-1)
                member &= tl.sum((item[:, None] == value[None, :]).to(tl.int32), 1) == 0
        if HAS_IDS or TOP > 0:
            # Members and, 16 bits higher, the best are counted in one number.
            chosen = real & (key >= best)
            one = (member.to(tl.int32) if HAS_IDS else 0) + tl.where(chosen, 1 << 16, 0)
            upto = tl.cumsum(one, 0)
            both = tl.sum(one, 0)
        if HAS_IDS:
            # Behind what is read next, and all of this block has been read: the sum asks every thread.
            rank = ids + (upto & 0xFFFF) - 1
            tl.store(row_scores + rank, item.to(tl.int32).to(tl.float32, bitcast=True), mask=member & (rank < size))
            ids += both & 0xFFFF
        if TOP > 0:
            rank = tops + (upto >> 16) - 1
            tl.store(row_top + rank, key, mask=chosen & (rank < top))
            tops += both >> 16
    if HAS_IDS:
        tl.store(MemberCounts + row, tl.minimum(ids, size))
    if TOP > 0:
        tl.debug_barrier()  # other threads' keys are read below
        offs_t = tl.arange(0, TOP)
        if SORTS:
            keys = tl.load(row_top + offs_t, mask=offs_t < tl.minimum(tops, top), other=LAST)
            tl.store(row_top + offs_t, tl.sort(keys, descending=True), mask=offs_t < top)
        else:
            for place in range(tops, top, TOP):
                tl.store(row_top + place + offs_t, tl.full([TOP], LAST, tl.int64), mask=place + offs_t < top)


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


@triton.jit
def _sort(members, memory, ids, size, bits, BLOCK: tl.constexpr):
    """Writes members (size,) int32 to ids in order, one bit at a time, as many as the even number `bits`."""
    offs = tl.arange(0, BLOCK)
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
            inside = begin + offs < size
            item = tl.load(source + begin + offs, mask=inside, other=-1)
            zero = 1 - (item >> bit & 1)
            upto = below + tl.cumsum(zero, 0)
            place = tl.where(zero == 1, upto - 1, zeros + begin + offs - upto)
            tl.store(other + place, item, mask=inside)
            below += tl.sum(zero, 0)
        tl.debug_barrier()  # other threads' ids are read below
    for begin in range(0, size, BLOCK):
        inside = begin + offs < size
        tl.store(ids + begin + offs, tl.load(members + begin + offs, mask=inside), mask=inside)


@triton.jit
def _move_groups(members, memory, ids, size, window, first_group, groups, shift, BLOCK: tl.constexpr):
    """Writes members (size,) int32, of which those of a group stand together in order, to ids in order. memory holds
    two numbers a group, of `window` groups at a time."""
    offs = tl.arange(0, BLOCK)
    first = memory  # where a group's members begin, and then how far they move
    end = memory + window
    lower = tl.zeros([], tl.int32)  # members of the groups so far
    for opening in range(0, groups, window):
        count_groups = tl.minimum(groups - opening, window)
        for begin in range(0, count_groups, BLOCK):
            tl.store(first + begin + offs, tl.zeros([BLOCK], tl.int32), mask=begin + offs < count_groups)
            tl.store(end + begin + offs, tl.zeros([BLOCK], tl.int32), mask=begin + offs < count_groups)
        tl.debug_barrier()
        for begin in range(0, size + 1, BLOCK):
            place = begin + offs
            group = tl.load(members + place, mask=place < size, other=0)
            group = tl.where(place < size, (group >> shift) - first_group - opening, -1)
            before = tl.load(members + place - 1, mask=(place > 0) & (place <= size), other=0)
            before = tl.where(place > 0, (before >> shift) - first_group - opening, -1)
            changes = (place <= size) & (group != before)
            tl.store(first + group, place, mask=changes & (group >= 0) & (group < count_groups))
            tl.store(end + before, place, mask=changes & (before >= 0) & (before < count_groups))
        tl.debug_barrier()
        for begin in range(0, count_groups, BLOCK):
            inside = begin + offs < count_groups
            opened = tl.load(first + begin + offs, mask=inside, other=0)
            count = tl.load(end + begin + offs, mask=inside, other=0) - opened
            tl.store(first + begin + offs, lower + tl.cumsum(count, 0) - count - opened, mask=inside)
            lower += tl.sum(count, 0)
        tl.debug_barrier()
        for begin in range(0, size, BLOCK):
            place = begin + offs
            item = tl.load(members + place, mask=place < size, other=0)
            group = (item >> shift) - first_group - opening
            inside = (place < size) & (group >= 0) & (group < count_groups)
            tl.store(ids + place + tl.load(first + group, mask=inside, other=0), item, mask=inside)
        tl.debug_barrier()  # before the next window clears what is read here


@triton.jit(do_not_specialize=["entries", "window", "first_group", "groups", "shift", "size", "bits"])
def _ascending_kernel(
    Members,
    Memory,
    MemberCounts,
    Rewritten,
    Ids,
    entries,
    window,
    first_group,
    groups,
    shift,
    size,
    bits,
    BLOCK: tl.constexpr,
):
    """One program for each row writes its ids, ascending and filled up with -1, to Ids (B, size) int32.

    Members (B, entries) int32 holds MemberCounts[row] ids at a row's front. Memory (B, entries) int32 is for two
    numbers a group, of `window` groups at a time; item i is in group (i >> shift) - first_group. Rewritten[row] is
    negative where the scan's order holds. bits: of the largest id, an even number.
    """
    row = tl.program_id(0).to(tl.int64)
    members, memory, ids = Members + row * entries, Memory + row * entries, Ids + row * size
    count = tl.load(MemberCounts + row)
    if tl.load(Rewritten + row) >= 0:
        _sort(members, memory, ids, count, bits, BLOCK)
    else:
        _move_groups(members, memory, ids, count, window, first_group, groups, shift, BLOCK)
    offs = tl.arange(0, BLOCK)
    for begin in range(count, size, BLOCK):
        tl.store(ids + begin + offs, tl.full([BLOCK], -1, tl.int32), mask=begin + offs < size)


def compact(r: Ranking, p: Plan, w: Workspace, blocks: shapes.Blocks) -> None:
    """Members to r.words or r.ids, and the keys of the top to the workspace."""
    has_ids = r.ids is not None and r.size > 0
    launch(
        _place_kernel,
        (r.rows,),
        **w.candidates(),
        **r.member_words(),
        **r.excluded(),
        Bounds=w.bounds,
        MemberCounts=w.member_counts,
        TopKeys=w.top_keys,
        entries=p.entries,
        V=r.num_items,
        top=r.top,
        size=r.size,
        BITS=p.bits,
        HAS_IDS=has_ids,
        TOP=min(MOST_SORTED, max(16, triton.next_power_of_2(r.top))) if r.top else 0,
        SORTS=r.top <= MOST_SORTED,
        **(shapes.PLACE_IDS if has_ids else shapes.PLACE_BITS),
    )
    if r.words is not None and r.values.numel():
        launch(
            _clear_excluded_kernel,
            (r.rows,),
            **r.member_words(),
            **r.excluded(),
            V=r.num_items,
            **shapes.CLEAR_EXCLUDED,
        )
    if has_ids:
        shift = (blocks.v << p.dealt).bit_length() - 1
        first_group = r.first_item >> shift
        launch(
            _ascending_kernel,
            (r.rows,),
            Members=w.member_ids,
            Memory=w.items,
            MemberCounts=w.member_counts,
            Rewritten=w.rewritten,
            Ids=r.ids,
            entries=p.entries,
            window=p.entries // 2,
            first_group=first_group,
            groups=(r.num_items - 1 >> shift) + 1 - first_group,
            shift=shift,
            size=r.size,
            bits=triton.cdiv((r.num_items - 1).bit_length(), 2) * 2,
            **(shapes.ORDER_MANY if p.entries >= shapes.MANY else shapes.ORDER_FEW),
        )


def sorted_top(r: Ranking, w: Workspace) -> Tensor:
    """The keys (B, top) int64 of the first ranks in order."""
    return w.top_keys if r.top <= MOST_SORTED else w.top_keys.sort(dim=1, descending=True).values
