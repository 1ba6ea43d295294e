"""The fallback: rows whose limits did not hold, ranked again in a way that always succeeds.

The three bounds of a row are found digit by digit, eight bits of the key at a time: a pass over the catalog counts the
items that share the digits found so far by their next digit. A last pass writes members and candidates by these bounds.
Every launch reads the number of missed rows on the device and ends at once where it is 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import shapes, tiles
from ..tiles import launch
from .keys import LAST, score_key
from .plan import DIGITS, TARGETS, Plan, Ranking, Workspace


class Output(NamedTuple):
    """Where `_write` writes what lies within the bounds of a row."""

    Bounds: Any
    Words: Any
    Scores: Any
    Items: Any
    Rewritten: Any
    stride_words: Any
    entries: Any


@triton.jit
def _drop_excluded(real, Values, Offsets, rows, items):
    """real [rows, items] without the items that are excluded in the row."""
    begin = tl.load(Offsets + rows)
    length = tl.load(Offsets + rows + 1) - begin
    for i in range(tl.max(length, 0).to(tl.int32)):
        value = tl.load(Values + begin + i, mask=i < length, other=-1)
        real &= items[None, :] != value[:, None]
    return real


@triton.jit
def _write(out, rows, in_b, tile, items, rest, scores, key, real, BITS: tl.constexpr):
    """Writes what the bounds enclose of a tile: members as bits, or with the top to the rows' buffers."""
    BLOCK_B: tl.constexpr = scores.shape[0]
    BLOCK_V: tl.constexpr = scores.shape[1]
    bounds = out.Bounds + rows * TARGETS
    first, last, best = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2)
    wide = (key.to(tl.int64) << 32) + rest
    member = real & (wide <= first[:, None]) & (wide >= last[:, None])
    buffered = real & (wide >= best[:, None])
    if BITS:
        bit = 1 << (tl.arange(0, BLOCK_V) % 32)
        words = tl.sum(tl.reshape(tl.where(member, bit, 0), [BLOCK_B, BLOCK_V // 32, 32]), 2)
        word = tile * (BLOCK_V // 32) + tl.arange(0, BLOCK_V // 32)[None, :]
        at = out.Words + rows[:, None] * out.stride_words + word
        tl.store(at, words, mask=in_b[:, None] & (word < out.stride_words))
    else:
        buffered |= member
    entry = tl.atomic_add(
        tl.broadcast_to((out.Rewritten + rows)[:, None], [BLOCK_B, BLOCK_V]), 1, mask=buffered, sem="relaxed"
    )
    keep = buffered & (entry < out.entries)
    at = rows[:, None] * out.entries + entry
    tl.store(out.Items + at, tl.broadcast_to(items.to(tl.int32)[None, :], at.shape), mask=keep)
    tl.store(out.Scores + at, scores, mask=keep)


@triton.jit(
    do_not_specialize=[
        *("write", "shift", "V", "first_item", "entries", "splits"),
        *("stride_qb", "stride_cv", "stride_bias", "stride_words"),
    ]
)
def _fallback_kernel(
    Query,
    Catalog,
    Bias,
    Missed,
    MissedCount,
    Bounds,
    Ranks,
    Histogram,
    Words,
    Scores,
    Items,
    Rewritten,
    Values,
    Offsets,
    write,
    shift,
    V,
    first_item,
    entries,
    splits,
    stride_qb,
    stride_cv,
    stride_bias,
    stride_words,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    SKIP_EXCLUDED: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Counts digits, or with `write` writes what the bounds enclose: one binary, so that both see the same scores.

    The buffers of rows that fall back are filled from their beginning, Rewritten[row] entries.
    """
    out = Output(Bounds, Words, Scores, Items, Rewritten, stride_words, entries)
    missed = tl.load(MissedCount)
    low_digits = shift < 32  # the part of the key that is the id
    by = tl.where(low_digits, shift, shift - 32)
    for job in range(tl.program_id(0), tl.cdiv(missed, BLOCK_B) * splits, tl.num_programs(0)):
        place = job // splits * BLOCK_B + tl.arange(0, BLOCK_B)
        in_b = place < missed
        rows = tl.load(Missed + tl.minimum(place, missed - 1)).to(tl.int64)
        for tile in range(first_item // BLOCK_V + job % splits, tl.cdiv(V, BLOCK_V), splits):
            items = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
            inside = tl.minimum(items, V - 1)
            scores = tiles.score_tile(Query, Catalog, rows, inside, stride_qb, stride_cv, FORM)
            if HAS_BIAS:
                bias, _ = tiles.ranking_bias(Bias, inside, stride_bias)
                scores += bias[None, :]
            ranked = (items >= first_item) & (items < V)
            real = (scores == scores) & ranked[None, :] & in_b[:, None]
            if SKIP_EXCLUDED:
                real = _drop_excluded(real, Values, Offsets, rows, items)
            key = score_key(scores)
            rest = (V - 1 - items).to(tl.int32)[None, :]
            if write:
                _write(out, rows, in_b, tile, items, rest, scores, key, real, BITS)
            else:
                digit = tl.where(low_digits, rest, key) >> by
                for target in range(3):
                    bound = tl.load(Bounds + rows * TARGETS + target)[:, None]
                    rank = tl.load(Ranks + rows * TARGETS + target)[:, None]
                    known = (bound >> 32).to(tl.int32)
                    near = tl.where(low_digits, key == known, True)
                    # The digits above this one; two shifts, since there may be 32 bits of them to drop.
                    above = tl.where(low_digits, bound.to(tl.int32), known) >> by >> 8
                    same = real & (rank >= 0) & near & ((digit >> 8) == above)
                    same = tl.where(shift == 56, real & (rank >= 0), same)
                    bins = Histogram + (place[:, None].to(tl.int64) * TARGETS + target) * DIGITS + (digit & 255)
                    tl.atomic_add(bins, 1, mask=same, sem="relaxed")


@triton.jit(do_not_specialize=["shift"])
def _digit_kernel(Missed, MissedCount, Bounds, Ranks, Histogram, shift):
    """Reads a row's next digits off the counts, and clears these."""
    place = tl.program_id(0)
    if place < tl.load(MissedCount):
        row = tl.load(Missed + place).to(tl.int64)
        digit = tl.arange(0, DIGITS)
        flip = tl.where(shift == 56, 128, 0)  # the sign is in the first digit
        for target in tl.static_range(3):
            at = Histogram + (place.to(tl.int64) * TARGETS + target) * DIGITS + (digit ^ flip)
            count = tl.load(at)
            tl.store(at, tl.zeros([DIGITS], tl.int32))
            rank = tl.load(Ranks + row * TARGETS + target)
            if rank >= 0:
                reach = tl.sum(count, 0) - tl.cumsum(count, 0) + count  # items of this digit or a higher one
                chosen = tl.max(tl.where(reach > rank, digit, -1), 0)
                bound = tl.load(Bounds + row * TARGETS + target)
                if chosen < 0:
                    # Fewer candidates than ranks: whatever is a candidate comes before this rank.
                    tl.store(Bounds + row * TARGETS + target, LAST)
                    tl.store(Ranks + row * TARGETS + target, -1)
                else:
                    tl.store(Bounds + row * TARGETS + target, bound | ((chosen ^ flip).to(tl.int64) << shift))
                    tl.store(Ranks + row * TARGETS + target, rank - tl.sum(tl.where(digit > chosen, count, 0), 0))


def fallback(r: Ranking, p: Plan, w: Workspace) -> None:
    """Finds the bounds of the missed rows and writes their members and candidates."""
    blocks = shapes.fallback_blocks(r.precision, r.query, r.catalog)
    programs = 2 * shapes.sm_count(r.query.device)
    arguments = {
        **r.scores(blocks.d),
        **r.excluded(),
        **r.member_words(),
        **w.candidates(),
        **w.search(),
        "Histogram": w.histogram,
        "Rewritten": w.rewritten,
        "entries": p.entries,
        "splits": min(programs, triton.cdiv(r.num_items, blocks.v)),
        "BITS": p.bits,
        "SKIP_EXCLUDED": r.drops_excluded,
        **blocks.options(),
    }
    id_bytes = triton.cdiv(max(r.num_items - 1, 1).bit_length(), 8)
    for shift in [56, 48, 40, 32, *range(8 * (id_bytes - 1), -1, -8)]:
        launch(_fallback_kernel, (programs,), **arguments, write=0, shift=shift)
        launch(_digit_kernel, (r.rows,), **w.search(), Histogram=w.histogram, shift=shift, **shapes.DIGIT)
    launch(_fallback_kernel, (programs,), **arguments, write=1, shift=0)
