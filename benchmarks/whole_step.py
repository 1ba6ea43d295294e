"""The kernel part of a training step, slice, loss and gradients, against plain torch.

python -m alterrec_fast.benchmarks.whole_step

`published` and `strong` are the baselines of the original code and of the best that plain torch does. Losses and
gradients are compared before anything is timed; every round takes fresh inputs, and the contestants take turns. Last, a
process of its own measures the peak memory of our step at V = 1,000,000, d = 128.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from alterrec_fast.benchmarks.embeddings import KINDS, Trained, Vectors, made_up
from alterrec_fast.benchmarks.memory import peak_growth
from alterrec_fast.benchmarks.race import race
from torch import Tensor

from alterrec_fast.ops import rank_slice, slice_cross_entropy

B = 512
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


def published(qt: Tensor, ht: Tensor, q: Tensor, e: Tensor, target: Tensor, k1: int, k2: int) -> Tensor:
    """The original code's: topk, sorted, and advanced indexing. All losses here are means over B sessions.

    qt, q (B, d): the teacher's and the student's queries; ht, e (V, d): their catalogs; target (B,) int64.
    """
    neg = (qt @ ht.T).topk(k2)[1][:, k1:]
    ids = torch.cat([target[:, None], neg], 1)
    hit = torch.cat([torch.zeros_like(target[:, None], dtype=torch.bool), neg == target[:, None]], 1)
    rows = torch.arange(len(q))[:, None]
    return F.cross_entropy((q @ e.T)[rows.expand_as(ids), ids].masked_fill(hit, -1e5), torch.zeros_like(target))


def strong(qt: Tensor, ht: Tensor, q: Tensor, e: Tensor, target: Tensor, k1: int, k2: int) -> Tensor:
    """The best of plain torch: topk, unsorted, and gather. Keeps the k1 top items as negatives, too."""
    neg = (qt @ ht.T).topk(k2, sorted=False)[1]
    y = q @ e.T
    negatives = y.gather(1, neg).masked_fill(neg == target[:, None], -1e5)
    return F.cross_entropy(torch.cat([y.gather(1, target[:, None]), negatives], 1), torch.zeros_like(target))


def ours(
    qt: Tensor, ht: Tensor, q: Tensor, e: Tensor, target: Tensor, k1: int, k2: int, precision: str = "fp32"
) -> Tensor:
    neg = rank_slice(qt, ht, start=k1, stop=k2, precision=precision)
    return slice_cross_entropy(q, e, target, neg, precision=precision)


CONTESTANTS: dict[str, Loss] = {
    "published": published,
    "strong": strong,
    "ours fp32": ours,
    "ours bf16": partial(ours, precision="bf16"),
}


def step(loss: Loss, bounds: tuple[int, int], x: Vectors) -> list[Tensor]:
    """The loss with the gradients of the student's queries and catalog."""
    q, e = x.query.requires_grad_(), x.catalog.requires_grad_()
    value = loss(x.teacher_query, x.teacher_catalog, q, e, x.target, *bounds)
    return [value.detach(), *torch.autograd.grad(value, (q, e))]


def check(x: Vectors, bounds: tuple[int, int]) -> str:
    """Raises SystemExit where our losses or gradients differ from those of `published`; returns the differences.

    Scores within rounding of a boundary rank may fall to either side: in bf16 of every k1:k2 some, in fp32 hardly any.
    """
    truth = step(published, bounds, x)
    differences = []
    for name, tolerance in (("ours fp32", 1e-3), ("ours bf16", 0.05)):
        found = step(CONTESTANTS[name], bounds, x)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
        if max(errors) > tolerance:
            raise SystemExit(f"{name}: loss, query and catalog gradient differ by {errors}, relative")
        differences.append(f"{name} {max(errors):.1e}")
    return ", ".join(differences)


def compare(title: str, fresh: Callable[[], Vectors], bounds: tuple[int, int], rounds: int) -> None:
    """Checks, races and prints a line for each contestant."""
    x = fresh()
    items, width = x.catalog.shape
    print(f"\n{title}, B = {len(x.query)}, V = {items}, d = {width}, {bounds[0]}:{bounds[1]}")
    print(f"largest relative error of loss and gradients against published: {check(x, bounds)}")
    times = race({name: partial(step, loss, bounds) for name, loss in CONTESTANTS.items()}, fresh, rounds)
    print(f"{'':12s} {'ms':>8s} {'CPU ms':>8s} {'published /':>12s} {'of CPU':>7s} {'strong /':>9s} {'of CPU':>7s}")
    for name, mine in times.items():
        a, b = (times[rival].over(mine) for rival in ("published", "strong"))
        print(
            f"{name:12s} {mine.ms:8.1f} {mine.cpu_ms:8.1f} {a[0]:12.2f} {a[1]:7.2f} {b[0]:9.2f} {b[1]:7.2f}", flush=True
        )


def one_step(items: int, width: int, bounds: tuple[int, int], precision: str) -> Callable[[], object]:
    """For `peak_growth`."""
    x = Vectors(*(torch.randn(n, width) for n in (B, items, B, items)), target=torch.randint(items, (B,)))
    return partial(step, partial(ours, precision=precision), bounds, x)


def measure_peaks(items: int, width: int, bounds: tuple[int, int]) -> None:
    print(f"\npeak memory of one step beyond its inputs, B = {B}, V = {items}, d = {width}, {bounds[0]}:{bounds[1]}")
    for precision in ("fp32", "bf16"):
        grown = peak_growth(partial(one_step, items, width, bounds, precision))
        print(
            f"ours {precision}: {grown / 1e9:.2f} GB, the catalog's gradient of {4e-9 * items * width:.2f} GB included"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", type=Path, help="a finished run of two networks, for trained embeddings")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    for kind in KINDS:
        compare(kind, partial(made_up, kind, B, 40_258, 300, generator), (20, 20_000), options.rounds)
    if options.run:
        trained = Trained(options.run)
        compare("trained", partial(trained.draw, B, 40_258, 300, generator), (20, 20_000), options.rounds)
        own = trained.shape
        bounds = trained.model.config.slice_bounds(own[0])
        compare("trained, as it is", partial(trained.draw, B, *own, generator), bounds, options.rounds)
    measure_peaks(1_000_000, 128, (20, 20_000))


if __name__ == "__main__":
    main()
