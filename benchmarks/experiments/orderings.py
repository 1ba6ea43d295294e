"""Two orderings of the paper on generated shops, whose truth is known.

- Hard negatives against as many uniform ones, in a catalog that is large beside the slice.
- Extra positives, in a shop where the teacher's first five are as likely as the target and in one where they are not:
  "true share" is the mean probability, by the law that the sessions were drawn from, that the next item is among the
  first five of the text network, which are the ID network's extra positives.

`python -m alterrec_fast.benchmarks.experiments.orderings`. alpha is chosen for each run on its validation split, by
NDCG@20; figures are of the test split. Finished runs under --out are kept: the command can be broken off.
"""

from __future__ import annotations

import argparse
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
from alterrec_fast.run import train
from alterrec_fast.trained import TrainedModel
from alterrec_fast.training.config import from_mapping

from ..harness.report import between_marks, markdown, mean_and_deviation

SHOPS = {
    "mixed": ShopConfig(num_items=10_000, num_sessions=40_000),
    # Four of five next items are one of the last item's few look-alikes, whom only titles tell apart from the rest.
    "look-alikes": ShopConfig(
        num_items=3_000, num_sessions=12_000, family_size=6, partner=0.0, similar=0.8, theme=0.05
    ),
}
SETTINGS: dict[str, Any] = {
    "text_model": "packaged", "width": 64, "init": "xavier", "temperature_text": 1.0, "m_random": 4, "m_max": 16,
    "k1": 5, "k2": 205, "hard_fraction": 0.5, "lr_id": 0.002, "lr_step_id": 6,
}  # fmt: skip
MARK = "<!-- made by benchmarks/experiments/orderings.py -->"
ALPHAS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/orderings"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--table", type=Path, help="Markdown file; the table replaces what stands between its marks")
    options = parser.parse_args()
    for name, config in SHOPS.items():
        if not (options.out / f"data-{name}").exists():
            write_shop(options.out / f"data-{name}", config)
    jobs = [(row, seed, options.out) for row in ROWS for seed in range(options.seeds)]
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        measured = list(pool.map(run, jobs))
    table = page([measured[i * options.seeds :][: options.seeds] for i in range(len(ROWS))])
    print(table)
    if options.table:
        write_text(options.table, between_marks(options.table, MARK, table))


def run(job: tuple[Row, int, Path]) -> Measured:
    row, seed, out = job
    torch.set_num_threads(1)
    folder = out / f"{row.shop}-{row.variant}-seed-{seed}"
    places = {"data": str(out / f"data-{row.shop}"), "out": str(folder), "seed": seed, "variant": row.variant}
    train(from_mapping({**SETTINGS, **row.settings, **places}, "orderings"), resume=folder.exists())
    model = TrainedModel(folder)

    def evaluate(alpha: float, split: str) -> dict[str, dict[str, float]]:
        return {
            view: metrics
            for view, metrics in model.evaluate(split, alpha=alpha).metrics().items()
            if metrics is not None
        }

    alpha = max(ALPHAS, key=lambda alpha: evaluate(alpha, "validation")["fused"]["ndcg@20"])
    half = evaluate(0.5, "test")["fused"]
    return Measured(alpha, evaluate(alpha, "test") | {"half": half}, true_share(model, generate(SHOPS[row.shop])))


def true_share(model: TrainedModel, shop: Shop) -> float:
    """The mean true probability of the text network's first five items, over prefixes of the first test sessions."""
    which = np.arange(min(SHARE_SESSIONS, len(model.dataset.test)))
    batch = pack(model.dataset.test, which, model.config.max_length)
    first = np.repeat(batch.items[np.cumsum(batch.lengths) - batch.lengths], batch.lengths)
    time = shop.time(shop.first_test_session + np.repeat(which, batch.lengths))
    with torch.no_grad():
        vectors = model.recommender.vectors()
        queries = model.recommender.queries(vectors, torch.from_numpy(batch.items), Packing.of(batch.lengths))
        items = top_k(queries["text"], vectors["text"].catalog, k=5).indices.numpy()
    share = np.take_along_axis(shop.next_item_probabilities(batch.items, first, time), items, 1).sum(1)
    return float(share.mean())


def page(runs: list[list[Measured]]) -> str:
    head = ["shop", "variant", "fused", "alpha", "fused at alpha 0.5", "ID network", "text network", "true share"]
    rows = []
    for row, seeds in zip(ROWS, runs, strict=True):
        fused, half, by_id, by_text = (
            " / ".join(
                mean_and_deviation([100 * one.metrics[view][m] for one in seeds]) for m in ("hits@20", "ndcg@20")
            )
            for view in ("fused", "half", "id", "text")
        )
        alphas = ", ".join(f"{alpha:g}" for alpha in sorted({one.alpha for one in seeds}))
        share = mean_and_deviation([100 * one.true_share for one in seeds])
        rows.append([row.shop, row.variant, fused, alphas, half, by_id, by_text, share])
    about = f"Test split, mean and standard deviation over {len(runs[0])} seeds, in %: hits@20 / ndcg@20."
    return f"{about}\n\n{markdown(head, rows)}\n"


if __name__ == "__main__":
    main()
