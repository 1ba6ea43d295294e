"""The bars of rank_slice and top_k on the native engine: python -m alterrec_fast.benchmarks.native_ops.

Every round takes fresh inputs and times torch.mm into a preallocated output, then each op, one after the other; the
ratio is the median of each round's ratio to mm, of wall-clock and of CPU time, which neighbours disturb less. Results
are compared with the reference before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alterrec_fast.ops import rank_slice, top_k
from alterrec_fast.ops.register import EXTENSION

KINDS = ("random", "clustered", "trained")


def embeddings(kind: str, sessions: int, items: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Queries (B, d) and catalog (V, d); clusters, and popularity in trained ones, follow the order of the catalog."""
    query = torch.randn(sessions, width, generator=generator)
    catalog = torch.randn(items, width, generator=generator)
    if kind == "clustered":
        centers = torch.randn(100, width, generator=generator)
        catalog = 0.5 * catalog + centers[torch.arange(items) * 100 // items]
        query = 0.5 * query + centers[torch.randint(100, (sessions,), generator=generator)]
    if kind == "trained":
        common = torch.randn(1, width, generator=generator)
        popularity = -torch.arange(1, items + 1).log()[:, None]  # Zipf's law: a logarithm of the rank
        catalog = catalog * 0.3 + 0.1 * (popularity - popularity.mean()) * common
        query = query + 0.5 * common
    return query, catalog


def pad(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The operand of the fastest product: width up to a multiple of 32 in bf16."""
    if dtype == torch.float32:
        return x
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).bfloat16()


def check(kind: str, width: int) -> None:
    """Sets must equal the reference's but for items within rounding of a boundary."""
    query, catalog = embeddings(kind, 32, 20_011, width, torch.Generator().manual_seed(9))
    native, reference = (rank_slice(query, catalog, 20, 10_000, 5, backend=b) for b in ("native", "reference"))
    differ = (native.mask() != reference.mask()).sum().item()
    if differ > 8:
        raise SystemExit(f"{kind}: {differ} items differ from the reference")


def race(
    kind: str, precision: str, shape: tuple[int, int, int], ops: dict[str, Callable[..., Any]], rounds: int
) -> None:
    """Times mm and all ops in turn and prints a line for each op."""
    sessions, items, width = shape
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    generator = torch.Generator().manual_seed(1)
    out = torch.empty(sessions, items, dtype=dtype)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("mm", *ops)}
    for i in range(rounds + 1):  # one warms up
        query, catalog = embeddings(kind, sessions, items, width, generator)
        padded = pad(query, dtype), pad(catalog, dtype).T
        query, catalog = query.to(dtype), catalog.to(dtype)
        calls: dict[str, Callable[[], Any]] = {"mm": partial(torch.mm, *padded, out=out)}
        calls |= {name: partial(op, query, catalog) for name, op in ops.items()}
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if i > 0:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    mm = statistics.median(wall for wall, _ in times["mm"])
    for name in ops:
        ms = statistics.median(wall for wall, _ in times[name])
        ratios = [statistics.median(a[j] / b[j] for a, b in zip(times[name], times["mm"], strict=True)) for j in (0, 1)]
        label = f"{name} {kind} {precision} B={sessions} V={items} d={width}"
        print(f"{label:60s} {mm * 1e3:8.1f} {ms * 1e3:8.1f} {ratios[0]:7.2f} {ratios[1]:7.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the small catalogs alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    extension = __import__(EXTENSION, fromlist=["isa"])
    for kind in KINDS:
        check(kind, 300)
    print(
        f"{extension.isa()}, {options.threads} threads\n{'':60s} {'mm ms':>8s} {'ms':>8s} {'ratio':>7s} {'of CPU':>7s}"
    )

    def hard(query: Tensor, catalog: Tensor) -> Any:
        return rank_slice(query, catalog, 20, 20_000, 5, backend="native")

    def best(query: Tensor, catalog: Tensor) -> Any:
        return top_k(query, catalog, 20, backend="native")

    both = {"rank_slice 20:20000": hard, "top_k 20": best}
    for precision in ("fp32", "bf16"):
        for kind in KINDS:
            race(kind, precision, (512, 40_258, 300), both, options.rounds)
    small = {"rank_slice 6:1800": lambda q, e: rank_slice(q, e, 6, 1_800, 5, backend="native")}
    race("trained", "fp32", (500, 3_800, 128), small, options.rounds)
    if not options.quick:
        for precision in ("fp32", "bf16"):
            for kind in KINDS:
                race(kind, precision, (512, 400_000, 300), both, max(2, options.rounds // 3))
        for items in (40_000, 100_000, 400_000, 1_000_000, 2_000_000):
            race("random", "fp32", (512, items, 128), {"rank_slice 20:20000": hard}, max(2, options.rounds // 4))
    print(extension.counters())


if __name__ == "__main__":
    main()
