"""The ids of a row's members in ascending order.

The stream's programs take groups of neighbouring tiles in turn, each meets its items in order, and each has a part of
the row's buffer. So the members of a group stand together already, in order, and only the groups must be: each is moved
as a whole, as many groups at a time as there is memory to count. Where a row was redone, whoever came first was first,
and its members are sorted bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
