"""CUDA graphs captured on random inputs: replays on others from the same buffers are exact, although limits miss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from alterrec_fast.ops import RankSlice, rank_slice, slice_cross_entropy, top_k

from .checks import SIZES
from .device import Device, FaultError
from .loss_cases import call, loss_is_no_worse
from .rank_cases import Ranking, adversary, ranges, slice_is_identical, top_is_right
from .truth import ARITHMETICS, Loss, Source


@pytest.mark.parametrize("arithmetic", ["bf16", "fp32"])
@pytest.mark.parametrize("what", ["bits", "ids", "top_k 20", "top_k many"])
def test_ranks(what: str, arithmetic: str, device: Device, seed: int) -> None:
    sizes = SIZES[device.kind]
    form = {"top_k 20": 20, "top_k many": sizes.v // 8}.get(what, what)
    assert_ranks(device, seed, form, arithmetic, sizes.b, sizes.v)


@pytest.mark.parametrize("arithmetic", ["bf16", "fp32"])
@pytest.mark.parametrize("form", ["all", "bits", "ids"])
def test_losses(
    form: str, arithmetic: str, device: Device, seed: int, record_property: Callable[[str, str], None]
) -> None:
    record_property("errors", assert_loss(device, seed, form, arithmetic))


def assert_ranks(device: Device, seed: int, what: str | int, arithmetic: str, b: int, v: int) -> None:
    """what: a form of `ranges` for rank_slice, or the k of top_k."""
    source, how, d = Source(seed, device.device), ARITHMETICS[arithmetic], 32
    r = Ranking.draw(source, arithmetic, "none", False, b, v, d)
    ranks = ranges(v, 0)[what] if isinstance(what, str) else (0, 0, 0)
    inputs = replays(device, source, b, v, d)

    def run() -> Any:
        if isinstance(what, int):
            return top_k(r.query, r.catalog, k=what, **r.keywords)
        start, stop, top = ranks
        return rank_slice(r.query, r.catalog, start=start, stop=stop, top=top, **r.keywords)

    replay = device.capture(run)
    for name, (query, catalog) in inputs.items():
        r.query.copy_(query)
        r.catalog.copy_(catalog)
        found = replay()
        device.synchronize()
        try:
            exact = Ranking(r.query, r.catalog, how, {})
            if isinstance(what, int):
                top_is_right(found, exact, what, True)
            else:
                slice_is_identical(found, exact, *ranks)
        except FaultError as fault:
            raise FaultError(f"replay on {name}: {fault}") from fault


def replays(device: Device, source: Source, b: int, v: int, d: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Query (B, d) and catalog (V, d) with dot products exact in bfloat16; those in the middle make limits miss."""
    query = source.integers(b, d)
    first = torch.zeros(1, d, device=device.device)
    first[:, 0] = 1.0
    _, cluster = adversary("one cluster at the boundary", device.device, v)
    zeros = torch.zeros(v, d, device=device.device)
    by_first = torch.cat([cluster, zeros[:, 1:]], 1)
    ascending = torch.cat([(torch.arange(v, device=device.device) * 256 // v).float()[:, None], zeros[:, 1:]], 1)
    return {
        "whole numbers": (query, source.integers(v, d)),
        "equal scores": (query * 0, source.integers(v, d)),
        "one cluster at the boundary": (first.expand(b, d), by_first),
        "an ascending catalog": (first.expand(b, d), ascending),
        "whole numbers again": (source.integers(b, d), source.integers(v, d)),
    }


def assert_loss(device: Device, seed: int, form: str, arithmetic: str) -> str:
    """Forward and backward in one graph; replayed on other queries, items and targets, and for bits other members."""
    sizes, how = SIZES[device.kind], ARITHMETICS[arithmetic]
    source = Source(seed, device.device)
    b, v, d = sizes.b, sizes.v, sizes.d
    query, catalog = source.normal(b, d).to(how.query) / d**0.5, source.normal(v, d).to(how.catalog)
    target = source.ids(0, v, b)
    neg = None
    if form == "bits":
        neg = RankSlice.from_mask(torch.rand(b, v, generator=source.generator, device=device.device) < 0.3)
    elif form == "ids":
        start, stop, top = ranges(v, 0)["ids"]
        neg = rank_slice(query, catalog, start=start, stop=stop, top=top, backend="triton")
    replay = device.capture(
        partial(call, slice_cross_entropy, query, catalog, None, target=target, neg=neg, backend="triton")
    )
    told = ""
    for _ in range(3):
        query.copy_(source.normal(b, d) / d**0.5)
        catalog.copy_(source.normal(v, d))
        target.copy_(source.ids(0, v, b))
        if neg is not None and neg.bits is not None:
            neg.bits.copy_(neg.bits.flip(0))
        found = replay()
        device.synchronize()
        counted = torch.ones(b, v, device=device.device) if neg is None else neg.indices()
        loss = Loss.of(counted, target, None, 1.0, 1.0)
        told = loss_is_no_worse(found, loss, query, catalog, None, None, how)
    return told
