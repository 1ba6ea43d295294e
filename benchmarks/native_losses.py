"""The losses on the native engine against what people use instead: python -m alterrec_fast.benchmarks.native_losses.

B = 512 sessions, 2 threads, contestants interleaved in every round with fresh queries, medians over the rounds. `ratio`
is the median of each round's ratio to the baseline named; it is of CPU time as well, which neighbours disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from alterrec_fast.ops import RankSlice, sampled_softmax, slice_cross_entropy

B = 512
Step = Callable[[Tensor], object]


def race(title: str, steps: dict[str, Step], width: int, rounds: int) -> None:
    """Times all steps in turn; the first is the baseline of the ratios."""
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 2):  # two rounds warm up
        for name, step in steps.items():
            query = torch.randn(B, width, requires_grad=True)
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            step(query)
            if i >= 2:
                wall[name].append(time.perf_counter() - wall_start)
                cpu[name].append(time.process_time() - cpu_start)
    baseline = next(iter(steps))
    print(f"\n{title}\n{'':34s} {'ms':>8s} {'CPU ms':>8s} {'ratio':>7s} {'of CPU':>7s}")
    for name in steps:
        ratios = [
            statistics.median(a / b for a, b in zip(times[name], times[baseline], strict=True)) for times in (wall, cpu)
        ]
        print(
            f"{name:34s} {statistics.median(wall[name]) * 1e3:8.1f} {statistics.median(cpu[name]) * 1e3:8.1f} "
            f"{ratios[0]:7.3f} {ratios[1]:7.3f}"
        )


def streamed(items: int, width: int, negatives: int, positives: int, rounds: int) -> None:
    catalog = torch.nn.Parameter(torch.randn(items, width) * 0.05)
    plain = catalog.detach()
    target = torch.randint(0, items, (B,))
    extra = torch.randint(0, items, (B, positives)) if positives else None
    neg = RankSlice.from_mask(torch.rand(B, items) < negatives / items)
    scores, weights = torch.empty(B, items), torch.rand(B, items)
    grad_query, grad_catalog = torch.empty(B, width), torch.empty(items, width)

    def products(query: Tensor) -> None:
        q = query.detach()
        torch.mm(q, plain.T, out=scores)
        torch.mm(weights, plain, out=grad_query)
        torch.mm(weights.T, q, out=grad_catalog)

    def step(loss: Callable[[Tensor], Tensor]) -> Step:
        def run(query: Tensor) -> None:
            catalog.grad = None
            loss(query).backward()

        return run

    def ours(neg: RankSlice | None, **options: object) -> Step:
        return step(lambda q: slice_cross_entropy(q, catalog, target, neg, extra, backend="native", **options))  # type: ignore[arg-type]

    steps: dict[str, Step] = {
        "three products": products,
        "slice": ours(neg),
        "slice, keep_bytes=0": ours(neg, keep_bytes=0),
        "slice, bf16": ours(neg, precision="bf16"),
    }
    race(f"slice_cross_entropy, V = {items}, d = {width}, n = {negatives}", steps, width, rounds)
    if positives:
        return
    full: dict[str, Step] = {
        "F.cross_entropy(q @ e.T)": step(lambda q: F.cross_entropy(q @ catalog.T, target)),
        "full softmax": ours(None),
        "full softmax, keep_bytes=0": ours(None, keep_bytes=0),
    }
    race(f"full softmax, V = {items}, d = {width}", full, width, rounds)


def sampled(items: int, width: int, count: int, rounds: int) -> None:
    catalog = torch.nn.Parameter(torch.randn(items, width) * 0.05)

    def gathered(query: Tensor, target: Tensor, negatives: Tensor) -> Tensor:
        ids = torch.cat([target[:, None], negatives], 1)
        hit = F.pad(negatives == target[:, None], (1, 0))
        logits = torch.einsum("bd,bnd->bn", query, catalog[ids]).masked_fill(hit, -1e5)
        return F.cross_entropy(logits, torch.zeros(B, dtype=torch.int64))

    def step(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
        def run(query: Tensor) -> None:
            catalog.grad = None
            loss(query, torch.randint(0, items, (B,)), torch.randint(0, items, (B, count))).backward()

        return run

    steps: dict[str, Step] = {
        "gather and einsum": step(gathered),
        "sampled": step(lambda q, t, n: sampled_softmax(q, catalog, t, n, backend="native")),
        "sampled, sparse_grad": step(lambda q, t, n: sampled_softmax(q, catalog, t, n, sparse_grad=True)),
        "sampled, bf16": step(lambda q, t, n: sampled_softmax(q, catalog, t, n, precision="bf16")),
        "sampled, shared negatives": step(lambda q, t, n: sampled_softmax(q, catalog, t, n[0])),
    }
    race(f"sampled_softmax, V = {items}, d = {width}, n = {count}", steps, width, rounds)


def crossover(items: int, width: int, rounds: int) -> None:
    """The gathered form of a slice's ids against the streamed one, by the share of items in the slice."""
    catalog = torch.nn.Parameter(torch.randn(items, width) * 0.05)
    target = torch.randint(0, items, (B,))
    for share in (8, 16, 32, 64, 128):
        ids = torch.randint(0, items, (B, items // share), dtype=torch.int32).sort(1).values
        neg = RankSlice.from_indices(ids, items)

        bits = RankSlice.from_mask(neg.mask())

        def streamed_form(query: Tensor, bits: RankSlice = bits) -> None:
            catalog.grad = None
            slice_cross_entropy(query, catalog, target, bits, backend="native").backward()

        def gathered_form(query: Tensor, ids: Tensor = ids) -> None:
            catalog.grad = None
            sampled_softmax(query, catalog, target, ids, backend="native").backward()

        race(
            f"one item in {share}, V = {items}, d = {width}",
            {"streamed": streamed_form, "gathered": gathered_form},
            width,
            rounds,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    torch.set_num_threads(2)
    streamed(40_258, 300, 20_000, 0, rounds)
    streamed(3_800, 128, 1_800, 5, rounds)
    crossover(40_258, 128, max(3, rounds // 3))
    sampled(1_000_000, 128, 2_000, max(3, rounds // 2))


if __name__ == "__main__":
    main()
