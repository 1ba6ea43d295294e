"""The bars of rank_slice and top_k on the native engine: python -m alterrec_fast.benchmarks.native_ops.

Every round takes fresh inputs and times torch.mm into a preallocated output, then each op; `ratio` is to mm. Results
are compared with the reference before anything is timed.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from alterrec_fast.benchmarks.embeddings import KINDS, Trained, embeddings
from alterrec_fast.benchmarks.race import race
from torch import Tensor

from alterrec_fast.ops import rank_slice, top_k
from alterrec_fast.ops.library import EXTENSION


@dataclass(frozen=True)
class Product:
    """Operands of the ops (rows of d values), and of the fastest product (d padded)."""

    query: Tensor
    catalog: Tensor
    padded_query: Tensor
    padded_catalog: Tensor


Op = Callable[[Tensor, Tensor], Any]
Draw = Callable[[], tuple[Tensor, Tensor]]  # fresh queries (B, d) and catalog (V, d)


def teacher(trained: Trained, *shape: Any) -> tuple[Tensor, Tensor]:
    x = trained.draw(*shape)
    return x.teacher_query, x.teacher_catalog


def pad(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The operand of the fastest product: width up to a multiple of 32 in bf16."""
    if dtype == torch.float32:
        return x
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).bfloat16()


def check(title: str, draw: Draw) -> None:
    """Sets must equal the reference's but for items within rounding of a boundary."""
    query, catalog = draw()
    engines = ("native", "reference")
    native, reference = (
        rank_slice(query, catalog, start=20, stop=len(catalog) // 2, top=5, backend=b) for b in engines
    )
    differ = int((native.mask() != reference.mask()).sum())
    if differ > 8:
        raise SystemExit(f"{title}: {differ} items differ from the reference")


def compare(title: str, precision: str, draw: Draw, ops: Mapping[str, Op], rounds: int) -> None:
    """Races mm and all ops and prints a line for each op."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    out = torch.empty(0, dtype=dtype)

    def fresh() -> Product:
        query, catalog = draw()
        out.resize_(len(query), len(catalog))
        return Product(query.to(dtype), catalog.to(dtype), pad(query, dtype), pad(catalog, dtype))

    def mm(x: Product) -> None:
        torch.mm(x.padded_query, x.padded_catalog.T, out=out)

    def run(op: Op) -> Callable[[Product], Any]:
        return lambda x: op(x.query, x.catalog)

    times = race({"mm": mm, **{name: run(op) for name, op in ops.items()}}, fresh, rounds)
    x = fresh()
    shape = f"B={len(x.query)} V={len(x.catalog)} d={x.query.shape[1]}"
    for name in ops:
        wall, cpu = times[name].over(times["mm"])
        label = f"{name} {title} {precision} {shape}"
        print(f"{label:66s} {times['mm'].ms:8.1f} {times[name].ms:8.1f} {wall:7.2f} {cpu:7.2f}", flush=True)


def hard(query: Tensor, catalog: Tensor) -> Any:
    return rank_slice(query, catalog, start=20, stop=20_000, top=5, backend="native")


def best(query: Tensor, catalog: Tensor) -> Any:
    return top_k(query, catalog, k=20, backend="native")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the small catalogs alone")
    parser.add_argument("--run", type=Path, help="a finished run of two networks, for trained embeddings")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    extension = importlib.import_module(EXTENSION)
    generator = torch.Generator().manual_seed(1)

    def draws(sessions: int, items: int, width: int) -> dict[str, Draw]:
        found: dict[str, Draw] = {kind: partial(embeddings, kind, sessions, items, width, generator) for kind in KINDS}
        if trained:
            found["trained"] = partial(teacher, trained, sessions, items, width, generator)
        return found

    trained = Trained(options.run) if options.run else None
    for title, draw in draws(32, 20_011, 300).items():
        check(title, draw)
    print(f"{extension.isa()}, {options.threads} threads")
    print(f"{'':66s} {'mm ms':>8s} {'ms':>8s} {'ratio':>7s} {'of CPU':>7s}")
    both = {"rank_slice 20:20000": hard, "top_k 20": best}
    for precision in ("fp32", "bf16"):
        for title, draw in draws(512, 40_258, 300).items():
            compare(title, precision, draw, both, options.rounds)
    small = {"rank_slice 6:1800": lambda q, e: rank_slice(q, e, start=6, stop=1_800, top=5, backend="native")}
    for title, draw in draws(500, 3_800, 128).items():
        compare(title, "fp32", draw, small, options.rounds)
    if not options.quick:
        for precision in ("fp32", "bf16"):
            for title, draw in draws(512, 400_000, 300).items():
                compare(title, precision, draw, both, max(2, options.rounds // 3))
        for items in (40_000, 100_000, 400_000, 1_000_000, 2_000_000):
            draw = partial(embeddings, "random", 512, items, 128, generator)
            compare("random", "fp32", draw, {"rank_slice 20:20000": hard}, max(2, options.rounds // 4))
    print(extension.counters())


if __name__ == "__main__":
    main()
