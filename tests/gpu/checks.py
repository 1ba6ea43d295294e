"""What the tests on a GPU share: shapes, poisoned memory and sentinels around a call, and how an error is judged.

On whole numbers, whose dot products are exact in any arithmetic, ranks must be identical. On normal numbers an error
may be twice that of plain torch in the same arithmetic, or `Arithmetic.least` of the largest value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alterrec_fast.ops import RankSlice

from .device import PATTERNS, Device, FaultError, guarded

FACTOR = 2.0  # of torch's error
PART = 1 << 28  # bytes that are compared at a time


@dataclass(frozen=True)
class Sizes:
    """Ragged in every dimension."""

    b: int
    v: int
    d: int
    inputs: int  # fresh inputs for each case
    many: tuple[int, int, int]  # more sessions than are taken at a time


SIZES = {
    "cuda": Sizes(67, 40_258, 300, 2, (1_100, 5_003, 32)),
    "cpu": Sizes(3, 1_500, 20, 1, (66, 130, 8)),
}
HUGE = (2, 8_400_001, 256)  # B, V, d of a catalog of more than 2^31 numbers


def tensors_of(found: Any) -> list[Tensor]:
    """All tensors of what an op returned."""
    if isinstance(found, RankSlice):
        members = found.ids if found.bits is None else found.bits
        assert members is not None
        return [members, found.top, found.thresholds]
    return list(found)


def assert_same(found: Any, again: Any, what: str) -> None:
    """Raises FaultError unless two results are the same, bit for bit."""
    for i, (a, b) in enumerate(zip(tensors_of(found), tensors_of(again), strict=True)):
        if a.shape != b.shape:
            raise FaultError(f"{what}: result {i} differs in shape, {tuple(a.shape)} and {tuple(b.shape)}")
        parts = (x.contiguous().flatten().view(torch.uint8).split(PART) for x in (a, b))
        wrong = sum(int((x != y).sum()) for x, y in zip(*parts, strict=True))
        if wrong:
            raise FaultError(f"{what}: result {i} differs in {wrong} bytes")


def watched(device: Device, call: Callable[[], Any], repeatable: bool = True) -> Any:
    """What `call` returns, with memory poisoned before; and again with another poison between sentinels.

    Raises FaultError where a sentinel was overwritten, or where the results differ although the op is `repeatable`.
    """
    device.poison(PATTERNS[0])
    found = call()
    device.poison(PATTERNS[1])
    with guarded(PATTERNS[1]):
        again = call()
    if repeatable:
        assert_same(found, again, "memory held something else before")
    return found


def judge(found: float, torchs: float, least: float, what: str) -> str:
    """Raises FaultError where an error, a part of the largest value, is more than is allowed beside torch's."""
    text = f"{what} {found:.1e} (torch {torchs:.1e})"
    if not found <= max(FACTOR * torchs, least):
        raise FaultError(f"{text}, allowed {max(FACTOR * torchs, least):.1e}")
    return text
