"""The table of all variants on Online Retail: `make results`.

The counting baselines rank the same targets. See `runs` for what is kept of a command that is broken off.
"""

from __future__ import annotations

import argparse
import json
import statistics

from alterrec_fast.data.sessions import Dataset
from alterrec_fast.files import write_text
from alterrec_fast.training.config import METRICS, VARIANTS, Config
from alterrec_fast.training.evaluate import measure, training_counts

from ..harness.report import markdown
from .counting import BASELINES
from .runs import ALTERREC, ALTERREC_AUG, SETTINGS, Metrics, Row, between_marks, cell, minutes, parser, run_all

MARK = "<!-- made by make results -->"

ROWS = [
    ALTERREC,
    Row("alterrec, hard_fraction 0.5", "alterrec", {"hard_fraction": 0.5}),
    ALTERREC_AUG,
    *(Row(variant, variant, {}) for variant in VARIANTS if not variant.startswith("alterrec")),
]


def main() -> None:
    options = parser(__doc__).parse_args()
    runs = run_all(ROWS, options)
    dataset = Dataset.load(options.out / "data")
    table = _page(runs, _count(dataset), dataset, options, minutes(ROWS, options))
    write_text(options.out / "results.md", table)
    print(table)
    if options.table:
        write_text(options.table, between_marks(options.table, MARK, table))
        write_text(options.table.with_suffix(".json"), _raw(runs))


def _raw(runs: dict[str, list[Metrics]]) -> str:
    """The test metrics of every run, one line each, so that other tables can be held against this one."""
    lines = [
        json.dumps({"row": name, "seed": one["seed"], "best_epoch": one["best_epoch"], "test": one["test"]})
        for name, seeds in runs.items()
        for one in seeds
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def _count(dataset: Dataset) -> dict[str, Metrics]:
    """Test metrics of the counting baselines over the targets that the networks are measured on."""
    counts, default = training_counts(dataset.train, dataset.num_items), Config()
    return {
        name: measure(
            make(dataset.train, dataset.num_items), dataset.test, counts, default.group_edges, default.max_length, 1024
        ).metrics()["fused"]
        or {}
        for name, make in BASELINES.items()
    }


def _page(
    runs: dict[str, list[Metrics]],
    counted: dict[str, Metrics],
    dataset: Dataset,
    options: argparse.Namespace,
    spent: float,
) -> str:
    sizes = ", ".join(f"{len(dataset.split(name)):,} {name}" for name in ("train", "validation", "test"))
    shared = ", ".join(f"{name} = {value}" for name, value in SETTINGS.items())
    head = ["test, in %", *METRICS, "ID hits@20", "ID ndcg@20", "text hits@20", "text ndcg@20"]
    rows = [[name, *(f"{100 * metrics[m]:.2f}" for m in METRICS), "", "", "", ""] for name, metrics in counted.items()]
    for name, seeds in runs.items():
        cells = [cell(seeds, "fused", metric) for metric in METRICS]
        parts = [cell(seeds, part, metric) for part in ("id", "text") for metric in ("hits@20", "ndcg@20")]
        rows.append([name, *cells, *parts])
    about = (
        f"Online Retail: {sizes} sessions, {dataset.num_items:,} items; width {options.width}, "
        f"{options.epochs} epochs, {options.seeds} seeds; {shared}. The runs took {spent:.0f} minutes together, "
        f"{options.threads} thread each, {options.jobs} at once."
    )
    return "\n".join([about, "", markdown(head, rows), "", *_orderings(runs, counted), ""])


def _orderings(runs: dict[str, list[Metrics]], counted: dict[str, Metrics]) -> list[str]:
    """Whether AlterRec's fused score is above what it should be above, with the figures."""

    def mean(name: str, view: str, metric: str) -> float:
        return statistics.fmean(100 * one["test"][view][metric] for one in runs[name])

    lines = []
    for name in ("alterrec", "alterrec, hard_fraction 0.5", "alterrec_aug"):
        for metric in ("hits@20", "ndcg@20"):
            ours = mean(name, "fused", metric)
            rivals = {f"its {part} network": mean(name, part, metric) for part in ("id", "text")}
            rivals |= {rival: mean(rival, "fused", metric) for rival in ("id_only", "text_only", "random")}
            rivals |= {rival: 100 * metrics[metric] for rival, metrics in counted.items()}
            against = ", ".join(
                f"{'above' if ours > value else 'BELOW'} {rival} ({value:.2f})" for rival, value in rivals.items()
            )
            lines.append(f"- {name}, {metric} {ours:.2f}: {against}.")
    return lines


if __name__ == "__main__":
    main()
