"""The same bits over repeats, alone and beside another stream, of every op that promises them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from alterrec_fast.ops import RankSlice, rank_slice, sampled_softmax, slice_cross_entropy, top_k

from .checks import SIZES, assert_same
from .device import Device
from .loss_cases import Positives, call, in_order
from .rank_cases import Ranking, ranges
from .truth import Source

REPEATS = {"cuda": 20, "cpu": 2}
NAMES = (
    "rank_slice bits",
    "rank_slice ids, deep",
    "rank_slice bits, ties",
    "top_k 20",
    "top_k many",
    "slice_cross_entropy all",
    "slice_cross_entropy bits",
    "sampled_softmax native",
    "sampled_softmax triton",
)


def op_call(name: str, arithmetic: str, device: Device, seed: int) -> Callable[[], Any]:
    sizes, source = SIZES[device.kind], Source(seed, device.device)
    b, v, d = sizes.b, sizes.v, sizes.d
    op, form = name.split(" ", 1)
    if op in ("rank_slice", "top_k"):
        if form == "bits, ties":  # nearly every row takes the fallback
            r, form = Ranking.draw(source, arithmetic, "none", True, b, v, 4), "bits"
        else:
            r = Ranking.draw(source, arithmetic, "ids", False, b, v, d)
        if op == "top_k":
            return partial(top_k, r.query, r.catalog, k=20 if form == "20" else v // 8, **r.keywords)
        start, stop, top = ranges(v, r.first_item)[form]
        return partial(rank_slice, r.query, r.catalog, start=start, stop=stop, top=top, **r.keywords)
    drawn = Positives.draw(source, b, 0, v)
    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    matrices = (source.normal(b, d).to(dtype) / d**0.5, source.normal(v, d, dtype=dtype), None)
    options: dict[str, Any] = {"target": drawn.target, "positives": drawn.positives}
    if op == "slice_cross_entropy":
        mask = torch.rand(b, v, generator=source.generator, device=device.device) < 0.3
        neg = None if form == "all" else RankSlice.from_mask(mask)
        return partial(call, slice_cross_entropy, *matrices, neg=neg, backend="triton", **options)
    neg = source.ids(0, 1 + v // 50, b, 1 + v // 40)  # every item many times
    run = partial(call, sampled_softmax, *matrices, neg=neg, backend=form, **options)
    return partial(in_order, form, matrices[0], run)


@pytest.mark.parametrize("arithmetic", ["bf16", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits(name: str, arithmetic: str, device: Device, seed: int) -> None:
    run = op_call(name, arithmetic, device, seed)
    first = run()
    for i in range(1, REPEATS[device.kind]):
        assert_same(first, run(), f"repeat {i}")
    with device.busy():
        for i in range(REPEATS[device.kind]):
            assert_same(first, run(), f"repeat {i} beside another stream")
