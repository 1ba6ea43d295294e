"""The order of items, score descending and ties by lower id, as integers: a larger key comes first.

A key is 64 bits: the score, mapped to a signed integer of the same order, over V - 1 - id. No two items share one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    return first_key(score) + (V - 1 - item)


@triton.jit
def popcount(words):
    """Bits set in each int32; LLVM turns this into the machine's instruction."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


def scores_and_items(keys: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """Keys of any shape -> scores float32 and items int64; LAST, which no item has, gives -inf and -1."""
    high = (keys >> 32).int()
    scores = (high ^ ((high >> 31) & 0x7FFFFFFF)).view(torch.float32)
    none = keys == LAST.value
    return scores.masked_fill(none, -torch.inf), (num_items - 1 - (keys & 0xFFFFFFFF)).masked_fill(none, -1)
