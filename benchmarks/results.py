"""The table of all variants on Online Retail: `python -m alterrec_fast.benchmarks.results`, or `make results`.

Every run is a run directory of its own under --out; finished ones are skipped and a killed one is resumed, so that the
command can be broken off and started again. The counting baselines rank the same targets.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from alterrec_fast.benchmarks.count_baselines import BASELINES

from alterrec_fast.data.prepare import prepare
from alterrec_fast.data.sessions import Dataset
from alterrec_fast.run import train
from alterrec_fast.training.checkpoint import write_text
from alterrec_fast.training.config import METRICS, VARIANTS, Config, from_mapping
from alterrec_fast.training.evaluate import measure, training_counts

# What the paper leaves open, chosen on validation data alone; docs/results.md tells how.
SETTINGS: dict[str, Any] = {
    "text_model": "packaged",
    "k1": 0,
    "k2": 2500,
    "alpha": 0.7,
    "lr_step_id": 4,
    "lr_step_text": 3,
}

Metrics = dict[str, Any]
MARKS = ("<!-- made by make results -->", "<!-- end -->")


@dataclass(frozen=True)
class Row:
    """One line of the table: a variant under settings of its own."""

    name: str
    variant: str
    settings: dict[str, Any]


ROWS = [
    Row("alterrec", "alterrec", {"hard_fraction": 1.0}),
    Row("alterrec, hard_fraction 0.5", "alterrec", {"hard_fraction": 0.5}),
    # Ranks [0, 5) are its positives and, as in the paper (p < k1), no negatives as well.
    Row("alterrec_aug", "alterrec_aug", {"k1": 5}),
    *(Row(variant, variant, {}) for variant in VARIANTS if not variant.startswith("alterrec")),
]


def main() -> None:
    options = _options()
    data = options.out / "data"
    if not data.exists():
        print(prepare("generic", options.raw, data))
    jobs = [(_config(row, seed, data, options), options.threads) for seed in range(options.seeds) for row in ROWS]
    # Spawned, not forked: torch's thread pool does not survive a fork.
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        for config, metrics in zip((job[0] for job in jobs), pool.map(_train, jobs), strict=True):
            fused = metrics["test"]["fused"]
            print(
                f"{Path(config.out).name:40s} {100 * fused['hits@20']:6.2f} {100 * fused['ndcg@20']:6.2f}", flush=True
            )
    runs = {row.name: [_finished(row, seed, options.out) for seed in range(options.seeds)] for row in ROWS}
    dataset = Dataset.load(data)
    folders = [_folder(row, seed, options.out) for row in ROWS for seed in range(options.seeds)]
    table = _page(runs, _count(dataset), dataset, options, sum(map(_minutes, folders)))
    write_text(options.out / "results.md", table)
    print(table)
    if options.table:
        write_text(options.table, _between_marks(options.table, table))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--raw", type=Path, required=True, help="folder in the generic layout")
    parser.add_argument("--out", type=Path, required=True, help="where data and runs go")
    parser.add_argument("--table", type=Path, help=f"Markdown file; the table replaces what stands between {MARKS}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    return parser.parse_args()


def _folder(row: Row, seed: int, out: Path) -> Path:
    return out / f"{row.name.replace(', hard_fraction ', '-')}-seed-{seed}"


def _config(row: Row, seed: int, data: Path, options: argparse.Namespace) -> Config:
    places = {"data": str(data), "out": str(_folder(row, seed, options.out)), "seed": seed}
    sizes = {"variant": row.variant, "width": options.width, "m_max": options.epochs}
    return from_mapping({**SETTINGS, **sizes, **row.settings, **places}, "results")


def _train(job: tuple[Config, int]) -> Metrics:
    config, threads = job
    torch.set_num_threads(threads)
    return train(config, resume=Path(config.out).exists()).metrics


def _finished(row: Row, seed: int, out: Path) -> Metrics:
    metrics: Metrics = json.loads((_folder(row, seed, out) / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def _minutes(run: Path) -> float:
    """Training and validation of one run, whenever and in however many sittings it was made."""
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    return float(sum(line.get("seconds", 0.0) + line["validation_seconds"] for line in lines)) / 60


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
    minutes: float,
) -> str:
    sizes = ", ".join(f"{len(dataset.split(name)):,} {name}" for name in ("train", "validation", "test"))
    shared = ", ".join(f"{name} = {value}" for name, value in SETTINGS.items())
    lines = [
        f"Online Retail: {sizes} sessions, {dataset.num_items:,} items; width {options.width}, "
        f"{options.epochs} epochs, {options.seeds} seeds; {shared}. The runs took {minutes:.0f} minutes together, "
        f"{options.threads} thread each, {options.jobs} at once.",
        "",
        "| test, in % | " + " | ".join(METRICS) + " | ID hits@20 | ID ndcg@20 | text hits@20 | text ndcg@20 |",
        "| --- |" + " --- |" * (len(METRICS) + 4),
    ]
    for name, found in counted.items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * found[m]:.2f}" for m in METRICS) + " | | | | |")
    for name, seeds in runs.items():
        cells = [_cell(seeds, "fused", metric) for metric in METRICS]
        cells += [_cell(seeds, part, metric) for part in ("id", "text") for metric in ("hits@20", "ndcg@20")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_orderings(runs, counted), ""])


def _between_marks(page: Path, table: str) -> str:
    """The page with the table between its two marks."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise SystemExit(f"{page}: the marks {MARKS[0]} and {MARKS[1]} are missing")
    return f"{before}{begin}\n\n{table}\n{end}{after}"


def _cell(seeds: list[Metrics], view: str, metric: str) -> str:
    """Mean and standard deviation in percent; empty for a part that the variant does not have."""
    values = [100 * one["test"][view][metric] for one in seeds if one["test"][view] is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


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
            rivals |= {rival: 100 * found[metric] for rival, found in counted.items()}
            against = ", ".join(
                f"{'above' if ours > value else 'BELOW'} {rival} ({value:.2f})" for rival, value in rivals.items()
            )
            lines.append(f"- {name}, {metric} {ours:.2f}: {against}.")
    return lines


if __name__ == "__main__":
    main()
