"""Training runs on Online Retail that several experiments share: settings, run directories, tables between marks.

Every run is a run directory of its own under --out; finished ones are skipped and a killed one is resumed, so that a
command can be broken off and started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from alterrec_fast.data.prepare import prepare
from alterrec_fast.run import train
from alterrec_fast.training.config import Config, from_mapping

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
END = "<!-- end -->"


@dataclass(frozen=True)
class Row:
    """One line of a table: a variant under settings of its own."""

    name: str
    variant: str
    settings: dict[str, Any]

    def folder(self, seed: int, out: Path) -> Path:
        return out / f"{self.name.replace(', hard_fraction ', '-').replace(', ', '-')}-seed-{seed}"

    def config(self, seed: int, options: argparse.Namespace) -> Config:
        places = {"data": str(options.out / "data"), "out": str(self.folder(seed, options.out)), "seed": seed}
        sizes = {"variant": self.variant, "width": options.width, "m_max": options.epochs}
        return from_mapping({**SETTINGS, **sizes, **self.settings, **places}, self.name)


ALTERREC = Row("alterrec", "alterrec", {"hard_fraction": 1.0})
# Ranks [0, 5) are its positives and, as in the paper (p < k1), no negatives as well.
ALTERREC_AUG = Row("alterrec_aug", "alterrec_aug", {"k1": 5})


def parser(description: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--raw", type=Path, required=True, help="folder in the generic layout")
    options.add_argument("--out", type=Path, required=True, help="where data and runs go")
    options.add_argument("--table", type=Path, help="Markdown file; the table replaces what stands between its marks")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--width", type=int, default=128)
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--jobs", type=int, default=2, help="runs at once")
    options.add_argument("--threads", type=int, default=1, help="threads of each run")
    return options


def run_all(rows: Sequence[Row], options: argparse.Namespace) -> dict[str, list[Metrics]]:
    """Prepares the data, trains what is not finished yet, and returns each row's metrics, one for each seed."""
    if not (options.out / "data").exists():
        print(prepare("generic", options.raw, options.out / "data"))
    jobs = [(row.config(seed, options), options.threads) for seed in range(options.seeds) for row in rows]
    # Spawned, not forked: torch's thread pool does not survive a fork.
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        for config, metrics in zip((job[0] for job in jobs), pool.map(_train, jobs), strict=True):
            fused = metrics["test"]["fused"]
            print(
                f"{Path(config.out).name:40s} {100 * fused['hits@20']:6.2f} {100 * fused['ndcg@20']:6.2f}", flush=True
            )
    return {row.name: [_finished(row, seed, options.out) for seed in range(options.seeds)] for row in rows}


def _train(job: tuple[Config, int]) -> Metrics:
    config, threads = job
    torch.set_num_threads(threads)
    return train(config, resume=Path(config.out).exists()).metrics


def _finished(row: Row, seed: int, out: Path) -> Metrics:
    metrics: Metrics = json.loads((row.folder(seed, out) / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def minutes(rows: Sequence[Row], options: argparse.Namespace) -> float:
    """Training and validation of these runs, whenever they were made."""
    histories = [row.folder(seed, options.out) / "history.jsonl" for row in rows for seed in range(options.seeds)]
    lines = [json.loads(line) for path in histories for line in path.read_text(encoding="utf-8").splitlines()]
    return float(sum(line.get("seconds", 0.0) + line["validation_seconds"] for line in lines)) / 60


def cell(seeds: list[Metrics], view: str, metric: str) -> str:
    """Mean and standard deviation in percent; empty for a part that the variant does not have."""
    values = [100 * one["test"][view][metric] for one in seeds if one["test"][view] is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def between_marks(page: Path, mark: str, table: str) -> str:
    """The page with the table between `mark` and the next END."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(mark)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page}: the marks {mark} and {END} are missing")
    return f"{before}{begin}\n\n{table}\n{end}{after}"
