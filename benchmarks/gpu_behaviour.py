"""What an op does beyond being right: the same bits each time, capture in a CUDA graph, and a run for sanitizers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alterrec_fast.ops import RankSlice, rank_slice, sampled_softmax, slice_cross_entropy, top_k
from alterrec_fast.ops.dispatch import why_not_native

from .gpu_checks import SIZES, assert_same
from .gpu_device import Device, FaultError
from .gpu_journal import Journal
from .gpu_loss_checks import Wanted, call, deterministic, loss_is_no_worse, require
from .gpu_rank_checks import Ranking, adversaries, ranges, slice_is_identical, top_is_right
from .gpu_truth import ARITHMETICS, Loss, Source

REPEATS = {"cuda": 20, "cpu": 2}


def in_order(engine: str, query: Tensor, run: Callable[[], Any]) -> Any:
    """One call of sampled_softmax that promises the same bits."""
    require(engine, query)
    with deterministic(True):
        return run()


def repeatable_calls(device: Device, seed: int) -> dict[str, Callable[[], Any]]:
    """Every op that promises the same bits each time, in each form."""
    sizes, source = SIZES[device.kind], Source(seed, device.device)
    b, v, d = sizes.b, sizes.v, sizes.d
    calls: dict[str, Callable[[], Any]] = {}
    for arithmetic in ("bf16", "fp32"):
        r = Ranking.draw(source, arithmetic, "ids", False, b, v, d)
        ties = Ranking.draw(source, arithmetic, "none", True, b, v, 4)  # nearly every row is redone
        for form in ("bits", "ids, deep"):
            ranks = ranges(v, r.first_item)[form]
            start, stop, top = ranks
            calls[f"rank_slice {form}, {arithmetic}"] = partial(
                rank_slice, r.query, r.catalog, start=start, stop=stop, top=top, **r.keywords
            )
        start, stop, top = ranges(v, 0)["bits"]
        calls[f"rank_slice bits, {arithmetic}, ties"] = partial(
            rank_slice, ties.query, ties.catalog, start=start, stop=stop, top=top, **ties.keywords
        )
        for k in (20, v // 8):
            calls[f"top_k {k}, {arithmetic}"] = partial(top_k, r.query, r.catalog, k=k, **r.keywords)
        wanted = Wanted.draw(source, b, 0, v)
        matrices = (source.normal(b, d).to(r.query.dtype) / d**0.5, r.catalog, None)
        mask = torch.rand(b, v, generator=source.generator, device=device.device) < 0.3
        options: dict[str, Any] = {"target": wanted.target, "positives": wanted.positives}
        for form, neg in (("all", None), ("bits", RankSlice.from_mask(mask))):
            calls[f"slice_cross_entropy {form}, {arithmetic}"] = partial(
                call, slice_cross_entropy, *matrices, neg=neg, backend="triton", **options
            )
        options["neg"] = source.ids(0, 1 + v // 50, b, 1 + v // 40)  # every item many times
        for engine in ("native", "triton"):
            run = partial(call, sampled_softmax, *matrices, backend=engine, **options)
            calls[f"sampled_softmax {engine}, {arithmetic}"] = partial(in_order, engine, r.query, run)
    return calls


def check_determinism(device: Device, journal: Journal, seed: int) -> None:
    """Equal bits over repeats, alone and beside another stream."""
    repeats = REPEATS[device.kind]

    def same(run: Callable[[], Any]) -> str:
        first = run()
        for i in range(1, repeats):
            assert_same(first, run(), f"repeat {i}")
        return f"{repeats} calls"

    def beside(run: Callable[[], Any]) -> str:
        first = run()
        with device.busy():
            for i in range(repeats):
                assert_same(first, run(), f"repeat {i} beside another stream")
        return f"{repeats} calls"

    for name, run in repeatable_calls(device, seed).items():
        journal.check(device, f"the same bits: {name}", partial(same, run))
        journal.check(device, f"the same bits beside another stream: {name}", partial(beside, run))


# --- CUDA graphs ---


def check_graphs(device: Device, journal: Journal, seed: int) -> None:
    """Captured on random inputs; replays read others from the same buffers, and must be exact although they miss."""
    sizes = SIZES[device.kind]
    b, v = sizes.b, sizes.v
    for arithmetic in ("bf16", "fp32"):
        for what in ("bits", "ids", 20, v // 8):
            name = f"graph: {f'rank_slice {what}' if isinstance(what, str) else f'top_k {what}'}, {arithmetic}"
            journal.check(device, name, partial(graph_ranks, device, seed, what, arithmetic, b, v))
        for form in ("all", "bits", "ids"):
            name = f"graph: slice_cross_entropy {form}, {arithmetic}"
            journal.check(device, name, partial(graph_loss, device, seed, form, arithmetic))


def graph_ranks(device: Device, seed: int, what: str | int, arithmetic: str, b: int, v: int) -> str:
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
    return f"replays: {', '.join(inputs)}"


def replays(device: Device, source: Source, b: int, v: int, d: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Query (B, d) and catalog (V, d) with dot products exact in bfloat16; those in the middle make brackets miss."""
    query = source.integers(b, d)
    first = torch.zeros(1, d, device=device.device)
    first[:, 0] = 1.0
    cluster, zeros = adversaries(device, v)["one cluster at the boundary"][1], torch.zeros(v, d, device=device.device)
    by_first = torch.cat([cluster, zeros[:, 1:]], 1)
    ascending = torch.cat([(torch.arange(v, device=device.device) * 256 // v).float()[:, None], zeros[:, 1:]], 1)
    return {
        "whole numbers": (query, source.integers(v, d)),
        "equal scores": (query * 0, source.integers(v, d)),
        "one cluster at the boundary": (first.expand(b, d), by_first),
        "an ascending catalog": (first.expand(b, d), ascending),
        "whole numbers again": (source.integers(b, d), source.integers(v, d)),
    }


def graph_loss(device: Device, seed: int, form: str, arithmetic: str) -> str:
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


# --- for the sanitizers ---


def run_small(device: Device, seed: int) -> None:
    """Every kernel once or twice at a small ragged shape, with rows that miss; what they return is not looked at."""
    source, b, v, d = Source(seed, device.device), 5, 1_500, 40
    for arithmetic in ("bf16", "fp32"):
        for exact, extras in ((False, "ids"), (True, "none")):
            r = Ranking.draw(source, arithmetic, extras, exact, b, v, d if extras == "ids" else 2)
            for form in ("bits", "bits, deep", "ids", "ids, deep"):
                start, stop, top = ranges(v, r.first_item)[form]
                rank_slice(r.query, r.catalog, start=start, stop=stop, top=top, **r.keywords)
            for k in (5, v // 4):
                top_k(r.query, r.catalog, k=k, **r.keywords)
        wanted = Wanted.draw(source, b, 0, v)
        query, catalog = (source.normal(n, d).to(ARITHMETICS[arithmetic].query) for n in (b, v))
        options: dict[str, Any] = {"target": wanted.target, "positives": wanted.positives}
        mask = torch.rand(b, v, generator=source.generator, device=device.device) < 0.3
        slices = (None, RankSlice.from_mask(mask), rank_slice(query, catalog, start=3, stop=20, backend="triton"))
        for neg in slices:
            call(slice_cross_entropy, query, catalog, None, neg=neg, backend="triton", **options)
        for negatives in (source.ids(0, v, 70), source.ids(0, v, b, 70)):
            for engine in ("native", "triton"):
                if engine == "native" and why_not_native(query, "sampled_softmax"):
                    continue
                run = partial(call, sampled_softmax, query, catalog, None, neg=negatives, backend=engine)
                run(**options)
                in_order(engine, query, partial(run, **options))
    device.synchronize()
