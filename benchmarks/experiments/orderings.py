"""Two orderings of the paper on generated shops, whose truth is known.

`python -m alterrec_fast.benchmarks.experiments.orderings`:

- Hard negatives against as many uniform ones, in a catalog that is large beside the slice.
- Extra positives, in a shop where the teacher's first five are as likely as the target and in one where they are not:
  "true share" is the mean probability, by the law that the sessions were drawn from, that the next item is among the
  first five of the text network, which are the ID network's extra positives.

alpha is chosen for each run on its validation split, by NDCG@20; figures are of the test split. Finished runs under
--out are kept, so that the command can be broken off and started again.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alterrec_fast.data.batches import pack
from alterrec_fast.data.shop import Shop, ShopConfig, generate, write_shop
from alterrec_fast.files import write_text
from alterrec_fast.model.packing import Packing
from alterrec_fast.ops import top_k
from alterrec_fast.run import TrainedModel, train
from alterrec_fast.training.config import from_mapping

from ..harness.report import markdown
from .runs import between_marks

SHOPS = {
    "mixed": ShopConfig(num_items=10_000, num_sessions=40_000),
    # Four of five next items are one of the last item's few look-alikes, whom only titles tell apart from the rest.
    "look-alikes": ShopConfig(
        num_items=3_000, num_sessions=12_000, family_size=6, partner=0.0, similar=0.8, theme=0.05
    ),
}
SETTINGS: dict[str, Any] = {
    "text_model": "packaged",
    "width": 64,
    "init": "xavier",
    "temperature_text": 1.0,
    "m_random": 4,
    "m_max": 16,
    "k1": 5,
    "k2": 205,
    "hard_fraction": 0.5,
    "lr_id": 0.002,
    "lr_step_id": 6,
}
MARK = "<!-- made by benchmarks/experiments/orderings.py -->"
ALPHAS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)
METRICS = ("hits@20", "ndcg@20")
SHARE_SESSIONS = 300  # test sessions over which the true share is averaged


@dataclass(frozen=True)
class Row:
    shop: str
    variant: str
    settings: dict[str, Any] = field(default_factory=dict)


ROWS = (
    Row("mixed", "random"),
    Row("mixed", "alterrec"),
    Row("mixed", "alterrec_aug"),
    Row("look-alikes", "alterrec", {"batch_targets": 128}),
    Row("look-alikes", "alterrec_aug", {"batch_targets": 128}),
)


@dataclass(frozen=True)
class Measured:
    """One run's test metrics in %: "fused" at its best alpha, "half" at alpha 0.5, "id", "text"; and the true share."""

    alpha: float
    metrics: dict[str, dict[str, float]]
    true_share: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/orderings"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--table", type=Path, help="Markdown file; the table replaces what stands between its marks")
    options = parser.parse_args()
    for name, config in SHOPS.items():
        if not (options.out / f"data-{name}").exists():
            write_shop(options.out / f"data-{name}", config)
    jobs = [(row, seed, options.out) for seed in range(options.seeds) for row in ROWS]
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        measured = list(pool.map(_run, jobs))
    table = _table(jobs, measured, options.seeds)
    print(table)
    if options.table:
        write_text(options.table, between_marks(options.table, MARK, table))


def _run(job: tuple[Row, int, Path]) -> Measured:
    row, seed, out = job
    torch.set_num_threads(1)
    run = out / f"{row.shop}-{row.variant}-seed-{seed}"
    places = {"data": str(out / f"data-{row.shop}"), "out": str(run), "seed": seed, "variant": row.variant}
    train(from_mapping({**SETTINGS, **row.settings, **places}, "orderings"), resume=run.exists())
    model = TrainedModel(run)
    validation = {alpha: _evaluate(model, alpha, "validation")["fused"]["ndcg@20"] for alpha in ALPHAS}
    alpha = max(validation, key=validation.__getitem__)
    half, best = (_evaluate(model, a, "test") for a in (0.5, alpha))
    metrics = {"fused": best["fused"], "half": half["fused"], "id": best["id"], "text": best["text"]}
    return Measured(alpha, metrics, true_share(model, generate(SHOPS[row.shop])))


def _evaluate(model: TrainedModel, alpha: float, split: str) -> dict[str, dict[str, float]]:
    model.recommender.weights = {"id": alpha, "text": 1.0 - alpha}
    return {view: metrics for view, metrics in model.evaluate(split).metrics().items() if metrics is not None}


def true_share(model: TrainedModel, shop: Shop) -> float:
    """The mean true probability of the text network's first five items, over prefixes of the first test sessions."""
    which = np.arange(min(SHARE_SESSIONS, len(model.dataset.test)))
    batch = pack(model.dataset.test, which, model.config.max_length)
    first = np.repeat(batch.items[np.cumsum(batch.lengths) - batch.lengths], batch.lengths)
    time = shop.time(shop.first_test_session + np.repeat(which, batch.lengths))
    with torch.no_grad():
        catalogs = model.recommender.catalogs()
        queries = model.recommender.queries(catalogs, torch.from_numpy(batch.items), Packing.of(batch.lengths))
        items = top_k(queries["text"], catalogs["text"], k=5)[1].numpy()
    share = np.take_along_axis(shop.next_item_probabilities(batch.items, first, time), items, 1).sum(1)
    return float(share.mean())


def _table(jobs: list[tuple[Row, int, Path]], measured: list[Measured], seeds: int) -> str:
    head = ["shop", "variant", "fused", "alpha", "fused at alpha 0.5", "ID network", "text network", "true share"]
    rows = []
    for row in ROWS:
        seeds_of_row = [one for (job, _, _), one in zip(jobs, measured, strict=True) if job == row]
        views = {
            view: " / ".join(_cell([100 * one.metrics[view][metric] for one in seeds_of_row]) for metric in METRICS)
            for view in ("fused", "half", "id", "text")
        }
        alphas = ", ".join(f"{alpha:g}" for alpha in sorted({one.alpha for one in seeds_of_row}))
        share = _cell([100 * one.true_share for one in seeds_of_row])
        rows.append([row.shop, row.variant, views["fused"], alphas, views["half"], views["id"], views["text"], share])
    about = f"Test split, mean and standard deviation over {seeds} seeds, in %: hits@20 / ndcg@20."
    return f"{about}\n\n{markdown(head, rows)}\n"


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


if __name__ == "__main__":
    main()
