"""The order of items, score descending and ties by lower id, as integers: a larger key comes first.

A key is 64 bits: the score, mapped to a signed integer of the same order, over V - 1 - id. No two items share one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import shapes
from ..tiles import launch

FIRST = tl.constexpr(2**63 - 1)  # comes before every item
LAST = tl.constexpr(-(2**63))  # comes after every item


@triton.jit
def score_key(score):
    """float32 -> int32 of the same order; both zeros are one."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_score(key):
    """The inverse of score_key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_key(score):
    """The lowest key of an item of this score; int64."""
    return score_key(score).to(tl.int64) << 32


@triton.jit
def item_key(score, item, V):
    """The key of item `item` int64; int64."""
    return first_key(score) + (V - 1 - item)


@triton.jit
def popcount(words):
    """Bits set in each int32; LLVM turns this into the machine's instruction."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["size", "columns", "stride", "V"])
def _split_keys_kernel(
    Keys,
    Scores,
    Items,
    size,
    columns,
    stride,
    V,
    HAS_SCORES: tl.constexpr,
    HAS_ITEMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK keys apart into scores and ids."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    key = tl.load(Keys + place // columns * stride + place % columns, mask=inside, other=LAST)
    none = key == LAST
    if HAS_SCORES:
        score = tl.where(none, float("-inf"), key_score((key >> 32).to(tl.int32)))
        tl.store(Scores + place, score, mask=inside)
    if HAS_ITEMS:
        tl.store(Items + place, tl.where(none, -1, V - 1 - (key & 0xFFFFFFFF)), mask=inside)


def split_keys(keys: Tensor, num_items: int, scores: Tensor | None, items: Tensor | None) -> None:
    """Writes the parts of keys (B, n), contiguous in a row, to scores float32 and items int64, contiguous, where they
    are given; LAST, which no item has, gives -inf and -1."""
    rows, columns = keys.shape
    launch(
        _split_keys_kernel,
        (triton.cdiv(rows * columns, shapes.SPLIT_KEYS["BLOCK"]),),
        Keys=keys,
        Scores=scores,
        Items=items,
        size=rows * columns,
        columns=columns,
        stride=keys.stride(0),
        V=num_items,
        HAS_SCORES=scores is not None,
        HAS_ITEMS=items is not None,
        **shapes.SPLIT_KEYS,
    )
