"""The rows whose limits did not hold, done again in a way that needs no luck.

The three bounds of a row are found digit by digit, eight bits of the key at a time: a pass over the catalog counts the
items that share the digits found so far by their next digit. A last pass writes members and candidates by these bounds.
Every launch reads the number of missed rows on the device and ends at once where it is 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..tiles import launch
from .keys import LAST, score_key

DIGITS = tl.constexpr(256)
TARGETS = tl.constexpr(4)  # the items of rank start, stop - 1 and top - 1, which bound what is wanted; one place unused


@triton.jit(
    do_not_specialize=[
        *("write", "shift", "V", "first_item", "room", "splits"),
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
    Redone,
    Values,
    Offsets,
    write,
    shift,
    V,
    first_item,
    room,
    splits,
    stride_qb,
    stride_cv,
    stride_bias,
    stride_words,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    SKIP_EXCLUDED: tl.constexpr,
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Counts digits, or with `write` writes what the bounds enclose: one binary, so that both see the same scores.

    The redone rows' buffers are filled from their beginning, Redone[row] entries.
    """
    missed = tl.load(MissedCount)
    low_digits = shift < 32  # the part of the key that is the id
    by = tl.where(low_digits, shift, shift - 32)
    for work in range(tl.program_id(0), tl.cdiv(missed, BLOCK_B) * splits, tl.num_programs(0)):
        place = work // splits * BLOCK_B + tl.arange(0, BLOCK_B)
        in_b = place < missed
        rows = tl.load(Missed + tl.minimum(place, missed - 1)).to(tl.int64)
        for tile in range(first_item // BLOCK_V + work % splits, tl.cdiv(V, BLOCK_V), splits):
            items = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
            inside = tl.minimum(items, V - 1)
            scores = tiles.score_tile(
                Query,
                Catalog,
                rows,
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
            real = (scores == scores) & ranked[None, :] & in_b[:, None]
            if SKIP_EXCLUDED:
                begin = tl.load(Offsets + rows)
                length = tl.load(Offsets + rows + 1) - begin
                for i in range(tl.max(length, 0).to(tl.int32)):
                    value = tl.load(Values + begin + i, mask=i < length, other=-1)
                    real &= items[None, :] != value[:, None]
            key = score_key(scores)
            rest = (V - 1 - items).to(tl.int32)[None, :]
            if write:
                bounds = Bounds + rows * TARGETS
                first, last, best = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2)
                wide = (key.to(tl.int64) << 32) + rest
                member = real & (wide <= first[:, None]) & (wide >= last[:, None])
                wanted = real & (wide >= best[:, None])
                if BITS:
                    bit = 1 << (tl.arange(0, BLOCK_V) % 32)
                    words = tl.sum(tl.reshape(tl.where(member, bit, 0), [BLOCK_B, BLOCK_V // 32, 32]), 2)
                    word = tile * (BLOCK_V // 32) + tl.arange(0, BLOCK_V // 32)[None, :]
                    at = Words + rows[:, None] * stride_words + word
                    tl.store(at, words, mask=in_b[:, None] & (word < stride_words))
                else:
                    wanted |= member
                entry = tl.atomic_add(
                    tl.broadcast_to((Redone + rows)[:, None], [BLOCK_B, BLOCK_V]), 1, mask=wanted, sem="relaxed"
                )
                keep = wanted & (entry < room)
                at = rows[:, None] * room + entry
                tl.store(Items + at, tl.broadcast_to(items.to(tl.int32)[None, :], at.shape), mask=keep)
                tl.store(Scores + at, scores, mask=keep)
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
                found = tl.max(tl.where(reach > rank, digit, -1), 0)
                bound = tl.load(Bounds + row * TARGETS + target)
                if found < 0:
                    # Fewer items than ranks, since excluded ones are no items: all are wanted.
                    tl.store(Bounds + row * TARGETS + target, LAST)
                    tl.store(Ranks + row * TARGETS + target, -1)
                else:
                    tl.store(Bounds + row * TARGETS + target, bound | ((found ^ flip).to(tl.int64) << shift))
                    tl.store(Ranks + row * TARGETS + target, rank - tl.sum(tl.where(digit > found, count, 0), 0))


def fallback(
    query: Tensor,
    catalog: Tensor,
    bias: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    words: Tensor | None,
    buffer: tuple[Tensor, Tensor, Tensor],
    exclude: tuple[Tensor, Tensor],
    first_item: int,
    room: int,
    strides: tuple[int, int, int],
    constants: dict[str, Any],
    precision: str,
) -> None:
    """Finds the bounds of the missed rows and writes their members and candidates.

    rows: missed (B,) and its length (1,) int32, bounds (B, 4) int64 that hold 0 in missed rows, and the ranks (B, 4)
    int32 that are sought, negative for none. buffer: scores, items and redone, with `room` entries a row.
    """
    b, v = query.shape[0], catalog.shape[0]
    # Its scores need more registers each.
    blocks = replace(tiles.scoring_blocks(precision, query, catalog), v=32, warps=8)
    missed, missed_count, bounds, rank = rows
    histogram = torch.zeros(b, TARGETS.value, DIGITS.value, dtype=torch.int32, device=query.device)
    programs = 2 * tiles.processors(query.device)
    stride_words = 0 if words is None else words.stride(0)
    splits = min(programs, triton.cdiv(v, blocks.v))
    id_bytes = triton.cdiv(max(v - 1, 1).bit_length(), 8)
    digits = [56, 48, 40, 32, *range(8 * (id_bytes - 1), -1, -8)]
    for shift in [*digits, None]:
        launch(
            _fallback_kernel,
            (programs,),
            query,
            catalog,
            bias,
            missed,
            missed_count,
            bounds,
            rank,
            histogram,
            words,
            *buffer,
            *exclude,
            int(shift is None),
            shift or 0,
            v,
            first_item,
            room,
            splits,
            *strides,
            stride_words,
            **constants,
            **blocks.options(),
        )
        if shift is not None:
            launch(_digit_kernel, (b,), missed, missed_count, bounds, rank, histogram, shift, num_warps=4)
