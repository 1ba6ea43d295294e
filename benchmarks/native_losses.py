"""The losses on the native engine against what people use instead: python -m alterrec_fast.benchmarks.native_losses.

B = 512 sessions, 2 threads; `ratio` is to the first contestant of each table. Losses and gradients are compared before
anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from alterrec_fast.benchmarks.memory import peak_growth
from alterrec_fast.benchmarks.race import race
from torch import Tensor, nn

from alterrec_fast.ops import RankSlice, sampled_softmax, slice_cross_entropy

B = 512
Loss = Callable[..., Tensor]  # of the queries (B, d), the catalog (V, d), and what a round draws
Draw = Callable[[], tuple[Any, ...]]


def table(items: int, width: int) -> nn.Parameter:
    """A catalog whose logits with standard normal queries are of order one."""
    return nn.Parameter(torch.randn(items, width).mul_(0.05))


def step(loss: Loss, catalog: nn.Parameter, inputs: tuple[Tensor, ...]) -> None:
    catalog.grad = None
    loss(inputs[0], catalog, *inputs[1:]).backward()


def agree(losses: dict[str, Loss], catalog: nn.Parameter, inputs: tuple[Tensor, ...]) -> None:
    """Raises SystemExit where a loss or its gradients differ from those of the first."""
    expected: list[Tensor] = []
    for name, loss in losses.items():
        value = loss(inputs[0], catalog, *inputs[1:])
        found = [value.detach(), *(g.to_dense() for g in torch.autograd.grad(value, (inputs[0], catalog)))]
        expected = expected or found
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
        if not max(errors) < (0.02 if "bf16" in name else 1e-4):
            raise SystemExit(f"{name}: loss, query and catalog gradient differ by {errors}, relative")


def compare(title: str, steps: Mapping[str, Callable[[Any], object]], draw: Draw, rounds: int) -> None:
    """Races all steps; the first is the baseline of the ratios."""
    times = race(steps, draw, rounds, warmup=2)
    baseline = next(iter(times.values()))
    print(f"\n{title}\n{'':34s} {'ms':>8s} {'CPU ms':>8s} {'ratio':>7s} {'of CPU':>7s}")
    for name, found in times.items():
        wall, cpu = found.over(baseline)
        print(f"{name:34s} {found.ms:8.1f} {found.cpu_ms:8.1f} {wall:7.3f} {cpu:7.3f}", flush=True)


def queries(width: int) -> Tensor:
    return torch.randn(B, width, requires_grad=True)


def streamed(items: int, width: int, negatives: int, positives: int, rounds: int) -> None:
    """A slice of random items, against the three products that its loss cannot do without."""
    catalog = table(items, width)
    plain = catalog.detach()
    scores, weights = torch.empty(B, items), torch.rand(B, items)
    grad_query, grad_catalog = torch.empty(B, width), torch.empty(items, width)
    mask = torch.rand(B, items) < negatives / items
    extra = torch.randint(items, (B, positives)) if positives else None

    def products(inputs: tuple[Tensor, ...]) -> None:
        q = inputs[0].detach()
        torch.mm(q, plain.T, out=scores)
        torch.mm(weights, plain, out=grad_query)
        torch.mm(weights.T, q, out=grad_catalog)

    def draw() -> tuple[Any, ...]:
        return queries(width), torch.randint(items, (B,)), RankSlice.from_mask(mask.roll(int(torch.randint(B, ())), 0))

    def loss(query: Tensor, e: Tensor, target: Tensor, neg: RankSlice, **options: Any) -> Tensor:
        return slice_cross_entropy(query, e, target, neg, positives=extra, **options)

    ours: dict[str, Loss] = {
        "slice": partial(loss, backend="native"),
        "slice, max_saved_bytes=0": partial(loss, max_saved_bytes=0, backend="native"),
        "slice, bf16": partial(loss, precision="bf16", backend="native"),
    }
    agree({"reference": partial(loss, backend="reference"), **ours}, catalog, draw())
    steps: dict[str, Callable[[Any], object]] = {
        "three products": products,
        **{name: partial(step, one, catalog) for name, one in ours.items()},
    }
    compare(f"slice_cross_entropy, V = {items}, d = {width}, n = {negatives}", steps, draw, rounds)


def full(items: int, width: int, rounds: int) -> None:
    """The full softmax."""
    catalog = table(items, width)
    losses: dict[str, Loss] = {
        "F.cross_entropy(q @ e.T)": lambda query, e, target: F.cross_entropy(query @ e.T, target),
        "full softmax": partial(slice_cross_entropy, backend="native"),
        "full softmax, max_saved_bytes=0": partial(slice_cross_entropy, max_saved_bytes=0, backend="native"),
    }

    def draw() -> tuple[Tensor, ...]:
        return queries(width), torch.randint(items, (B,))

    agree(losses, catalog, draw())
    steps = {name: partial(step, loss, catalog) for name, loss in losses.items()}
    compare(f"full softmax, V = {items}, d = {width}", steps, draw, rounds)


def gathered(query: Tensor, catalog: Tensor, target: Tensor, negatives: Tensor) -> Tensor:
    """Sampled softmax of plain torch."""
    ids = torch.cat([target[:, None], negatives], 1)
    hit = F.pad(negatives == target[:, None], (1, 0))
    logits = torch.einsum("bd,bnd->bn", query, catalog[ids]).masked_fill(hit, -1e5)
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))


SAMPLED: dict[str, Loss] = {
    "gather and einsum": gathered,
    "sampled": partial(sampled_softmax, backend="native"),
    "sampled, sparse_grad": partial(sampled_softmax, sparse_grad=True, backend="native"),
    "sampled, bf16": partial(sampled_softmax, precision="bf16", backend="native"),
}


def shared(query: Tensor, catalog: Tensor, target: Tensor, negatives: Tensor) -> Tensor:
    """The first row's negatives for all rows."""
    return sampled_softmax(query, catalog, target, negatives[0], backend="native")


def draw_sampled(items: int, width: int, count: int) -> tuple[Tensor, ...]:
    return queries(width), torch.randint(items, (B,)), torch.randint(items, (B, count))


def one_sampled(name: str, items: int, width: int, count: int) -> Callable[[], object]:
    """One step for `peak_growth`."""
    return partial(step, SAMPLED[name], table(items, width), draw_sampled(items, width, count))


def sampled(items: int, width: int, count: int, rounds: int) -> None:
    """Negatives of each session: time, and memory beyond the dense or sparse gradient."""
    catalog = table(items, width)
    draw = partial(draw_sampled, items, width, count)
    agree(SAMPLED, catalog, draw())
    steps = {name: partial(step, loss, catalog) for name, loss in (SAMPLED | {"shared negatives": shared}).items()}
    compare(f"sampled_softmax, V = {items}, d = {width}, n = {count}", steps, draw, rounds)
    print("\npeak memory beyond inputs and the dense gradient")
    for name in ("gather and einsum", "sampled"):
        grown = peak_growth(partial(one_sampled, name, items, width, count))
        print(f"{name:34s} {(grown - catalog.nbytes) / 2**20:8.0f} MiB", flush=True)


def crossover(items: int, width: int, rounds: int) -> None:
    """The gathered form of a slice's ids against the streamed one, by the share of items in the slice."""
    catalog = table(items, width)
    for share in (8, 16, 32, 64, 128):
        ids = torch.randint(0, items, (B, items // share), dtype=torch.int32).sort(1).values
        bits = RankSlice.from_mask(RankSlice.from_indices(ids, items).mask())
        losses: dict[str, Loss] = {
            "streamed": partial(slice_cross_entropy, neg=bits, backend="native"),
            "gathered": partial(sampled_softmax, neg=ids, backend="native"),
        }
        steps = {name: partial(step, loss, catalog) for name, loss in losses.items()}
        title = f"one item in {share}, V = {items}, d = {width}"
        compare(title, steps, lambda: (queries(width), torch.randint(items, (B,))), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    streamed(40_258, 300, 20_000, 0, options.rounds)
    streamed(3_800, 128, 1_800, 5, options.rounds)
    full(40_258, 300, options.rounds)
    crossover(40_258, 128, max(3, options.rounds // 3))
    sampled(1_000_000, 128, 2_000, max(3, options.rounds // 2))


if __name__ == "__main__":
    main()
