"""All variants on Online Retail, in a table: `make results`; with --engines or --precisions, the quality by these.

Every run is a run directory under --out; finished ones are skipped and a killed one is resumed, so that a command can
be broken off and started again. The counting baselines rank the same targets.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alterrec_fast.data.batches import Batch
from alterrec_fast.data.prepare import prepare
from alterrec_fast.data.sessions import Dataset, Sessions
from alterrec_fast.files import write_text
from alterrec_fast.model.packing import Packing
from alterrec_fast.run import train
from alterrec_fast.training.config import METRICS, Config, from_mapping
from alterrec_fast.training.evaluate import DEPTH, Ranker, measure, training_counts

from ..harness.report import between_marks, markdown, mean_and_deviation

# What the paper leaves open, chosen on validation data alone; docs/results.md tells how.
SETTINGS: dict[str, Any] = {
    "text_model": "packaged", "k1": 0, "k2": 2500, "alpha": 0.7, "lr_step_id": 4, "lr_step_text": 3,
}  # fmt: skip
SHORT = {"m_random": 1, "m_gap": 1}  # changes the student after every epoch: 4 epochs hold every stage
MARKS = ("<!-- made by make results -->", "<!-- made by benchmarks/experiments/online_retail.py --engines -->")

Metrics = dict[str, Any]
Runs = dict[str, list[Metrics]]  # of each row, one for each seed


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
        short = SHORT if options.short else {}
        return from_mapping({**SETTINGS, **sizes, **self.settings, **short, **places}, self.name)


ALTERREC = Row("alterrec", "alterrec", {"hard_fraction": 1.0})
# Ranks [0, 5) are its positives and, as in the paper (p < k1), no negatives as well.
ALTERREC_AUG = Row("alterrec_aug", "alterrec_aug", {"k1": 5})
ROWS = [
    ALTERREC,
    Row("alterrec, hard_fraction 0.5", "alterrec", {"hard_fraction": 0.5}),
    ALTERREC_AUG,
    *(Row(name, name, {}) for name in ("random", "id_only", "text_only", "nfrec_sum", "nfrec_concat")),
]
ENGINES = {
    "": {"backend": "native"},  # of this name the rows of the results are as well
    ", bf16": {"backend": "native", "precision": "bf16"},
    ", reference": {"backend": "reference"},
}
ENGINE_ROWS = [
    replace(row, name=row.name + name, settings=row.settings | settings)
    for row in (ALTERREC, ALTERREC_AUG)
    for name, settings in ENGINES.items()
]
PRECISION_ROWS = [
    replace(
        ALTERREC, name=f"alterrec, CUDA, {name}", settings=ALTERREC.settings | {"device": "cuda", "precision": name}
    )
    for name in ("fp32", "tf32", "bf16")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="folder in the generic layout")
    parser.add_argument("--out", type=Path, required=True, help="where data and runs go")
    parser.add_argument("--table", type=Path, help="Markdown file; the table replaces what stands between its marks")
    parser.add_argument("--engines", action="store_true", help="native fp32, native bf16, reference")
    parser.add_argument("--precisions", action="store_true", help="fp32, tf32 and bf16 on a GPU; printed alone")
    parser.add_argument("--short", action="store_true", help="m_random = m_gap = 1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    options = parser.parse_args()
    rows = ENGINE_ROWS if options.engines else PRECISION_ROWS if options.precisions else ROWS
    runs, dataset = run_all(rows, options), Dataset.load(options.out / "data")
    if options.engines or options.precisions:
        text = compared_page(runs, options)
    else:
        text = results_page(runs, count(dataset), dataset, options, minutes(rows, options))
    print(text)
    if options.table and not options.precisions:
        write_text(options.table, between_marks(options.table, MARKS[options.engines], text))
        if not options.engines:
            write_text(options.table.with_suffix(".json"), raw(runs))


def run_all(rows: Sequence[Row], options: argparse.Namespace) -> Runs:
    """Prepares the data, trains what is not finished yet, and returns the metrics."""
    if not (options.out / "data").exists():
        print(prepare("generic", options.raw, options.out / "data"))
    jobs = [(row.config(seed, options), options.threads) for seed in range(options.seeds) for row in rows]
    # Spawned, not forked: torch's thread pool does not survive a fork.
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        for (config, _), metrics in zip(jobs, pool.map(_train, jobs), strict=True):
            fused = metrics["test"]["fused"]
            print(
                f"{Path(config.out).name:40s} {100 * fused['hits@20']:6.2f} {100 * fused['ndcg@20']:6.2f}", flush=True
            )
    files = {
        row.name: [row.folder(seed, options.out) / "metrics.json" for seed in range(options.seeds)] for row in rows
    }
    return {name: [json.loads(path.read_text(encoding="utf-8")) for path in paths] for name, paths in files.items()}


def _train(job: tuple[Config, int]) -> Metrics:
    config, threads = job
    torch.set_num_threads(threads)
    return train(config, resume=Path(config.out).exists()).metrics


def minutes(rows: Sequence[Row], options: argparse.Namespace) -> float:
    """Training and validation of these runs, whenever they were made."""
    histories = [row.folder(seed, options.out) / "history.jsonl" for row in rows for seed in range(options.seeds)]
    lines = [json.loads(line) for path in histories for line in path.read_text(encoding="utf-8").splitlines()]
    return float(sum(line.get("seconds", 0.0) + line["validation_seconds"] for line in lines)) / 60


def raw(runs: Runs) -> str:
    """The test metrics of every run, one line each, so that other tables can be compared with this one."""
    names = ("seed", "best_epoch", "test")
    lines = [json.dumps({"row": row} | {name: run[name] for name in names}) for row in runs for run in runs[row]]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def count(dataset: Dataset) -> dict[str, Metrics]:
    """Test metrics of the counting baselines over the targets that the networks are measured on."""
    counts, default = training_counts(dataset.train, dataset.num_items), Config()
    sizes = (default.group_edges, default.max_length, 1024)
    rankers = {name: make(dataset.train, dataset.num_items) for name, make in BASELINES.items()}
    measured = {name: measure(rank, dataset.test, counts, *sizes).metrics() for name, rank in rankers.items()}
    return {name: metrics["fused"] or {} for name, metrics in measured.items()}


# --- counting baselines: what item-to-item counts reach without any training ---

# Ties in the counts are broken by popularity: it is scaled to less than one count.
TIE = 0.5
# Of 0, 0.5, 0.8 and 1, and of raw counts, conditional probabilities and cosines, the best on validation data.
DECAY = 0.5


def markov(train: Sessions, num_items: int) -> Ranker:
    """Ranks the items by how often they directly followed the prefix's last item in training. A (V, V) matrix."""
    items, v = np.asarray(train.items, np.int64), num_items
    follows = np.ones(len(items), bool)
    follows[np.asarray(train.offsets[1:]) - 1] = False  # a session's last item has no successor
    pairs = items[:-1][follows[:-1]] * v + items[1:][follows[:-1]]
    counts = torch.from_numpy(np.bincount(pairs, minlength=v * v).reshape(v, v)).float()
    scores = counts + _popularity(train, v)

    def rank(batch: Batch) -> dict[str, Tensor]:
        return {"fused": _best(scores[torch.from_numpy(batch.items)])}

    return rank


def cooccurrence(train: Sessions, num_items: int) -> Ranker:
    """Ranks the items by their cosine similarity to the prefix's items over the training sessions (item-based nearest
    neighbours), an item counting DECAY times what its successor does. A (V, V) matrix.
    """
    v = num_items
    together = torch.zeros(v, v)
    for begin in range(0, len(train), 1024):
        end = min(begin + 1024, len(train))
        bounds = np.asarray(train.offsets[begin : end + 1])
        held = torch.zeros(end - begin, v)
        row = np.repeat(np.arange(end - begin), np.diff(bounds))
        held[torch.from_numpy(row), torch.from_numpy(np.asarray(train.items[bounds[0] : bounds[-1]], np.int64))] = 1.0
        together += held.T @ held
    size = together.diagonal().clamp(min=1.0).sqrt()
    together /= size[:, None] * size
    together.fill_diagonal_(0.0)
    popularity = _popularity(train, v) * together[together > 0].min()

    def rank(batch: Batch) -> dict[str, Tensor]:
        packing = Packing.of(batch.lengths)
        rows = together[torch.from_numpy(batch.items)]  # (T, V)
        scores = packing.gather([_decayed_sums(part) for part in packing.spread(rows)])
        return {"fused": _best(scores + popularity)}

    return rank


def _decayed_sums(x: Tensor) -> Tensor:
    """(b, L, V) -> (b, L, V), at each place the sum of x up to it, each step back weighing DECAY times less."""
    sums = [x[:, 0]]
    for place in range(1, x.shape[1]):
        sums.append(sums[-1] * DECAY + x[:, place])
    return torch.stack(sums, 1)


def _popularity(train: Sessions, num_items: int) -> Tensor:
    counts = torch.from_numpy(np.bincount(np.asarray(train.items, np.int64), minlength=num_items)).float()
    return TIE * counts / counts.max().clamp(min=1.0)


def _best(scores: Tensor) -> Tensor:
    """(T, V) scores -> (T, 20) items, best first."""
    return scores.topk(min(DEPTH, scores.shape[1]), dim=1).indices


BASELINES = {"markov": markov, "co-occurrence": cooccurrence}


# --- tables ---


def cell(seeds: list[Metrics], view: str, metric: str) -> str:
    """Mean and standard deviation in percent; empty for a view that the variant does not have."""
    return mean_and_deviation([100 * one["test"][view][metric] for one in seeds if one["test"][view] is not None])


def results_page(
    runs: Runs, counted: dict[str, Metrics], dataset: Dataset, options: argparse.Namespace, spent: float
) -> str:
    sizes = ", ".join(f"{len(dataset.split(name)):,} {name}" for name in ("train", "validation", "test"))
    shared = ", ".join(f"{name} = {value}" for name, value in SETTINGS.items())
    head = ["test, in %", *METRICS, "ID hits@20", "ID ndcg@20", "text hits@20", "text ndcg@20"]
    rows = [[name, *(f"{100 * metrics[m]:.2f}" for m in METRICS), "", "", "", ""] for name, metrics in counted.items()]
    for name, seeds in runs.items():
        cells = [cell(seeds, "fused", metric) for metric in METRICS]
        rows.append([name, *cells, *(cell(seeds, v, m) for v in ("id", "text") for m in ("hits@20", "ndcg@20"))])
    about = (
        f"Online Retail: {sizes} sessions, {dataset.num_items:,} items; width {options.width}, "
        f"{options.epochs} epochs, {options.seeds} seeds; {shared}. The runs took {spent:.0f} minutes together, "
        f"{options.threads} thread each, {options.jobs} at once."
    )
    return "\n".join([about, "", markdown(head, rows), "", *_orderings(runs, counted), ""])


def _orderings(runs: Runs, counted: dict[str, Metrics]) -> list[str]:
    """Whether AlterRec's fused score is above what it should be above, with the figures."""

    def mean(name: str, view: str, metric: str) -> float:
        return statistics.fmean(100 * one["test"][view][metric] for one in runs[name])

    lines = []
    for name in ("alterrec", "alterrec, hard_fraction 0.5", "alterrec_aug"):
        for metric in ("hits@20", "ndcg@20"):
            fused = mean(name, "fused", metric)
            rivals = {f"its {part} network": mean(name, part, metric) for part in ("id", "text")}
            rivals |= {rival: mean(rival, "fused", metric) for rival in ("id_only", "text_only", "random")}
            rivals |= {rival: 100 * metrics[metric] for rival, metrics in counted.items()}
            against = ", ".join(
                f"{'above' if fused > value else 'BELOW'} {rival} ({value:.2f})" for rival, value in rivals.items()
            )
            lines.append(f"- {name}, {metric} {fused:.2f}: {against}.")
    return lines


def compared_page(runs: Runs, options: argparse.Namespace) -> str:
    """Every row's metrics, and with --engines how far apart they are."""
    schedule = ", m_random = m_gap = 1" if options.short else ""
    rows = [[name, *(cell(seeds, "fused", metric) for metric in METRICS)] for name, seeds in runs.items()]
    lines = [
        f"Online Retail, width {options.width}, {options.epochs} epochs{schedule}, {options.seeds} seeds; rows "
        "without a word on the engine are native, fp32.",
        "", markdown(["test, in %", *METRICS], rows), "",
    ]  # fmt: skip
    for variant in (ALTERREC.name, ALTERREC_AUG.name) if options.engines else ():
        for engine, title in (("", "fp32"), (", bf16", "bf16")):
            apart = {metric: _deviations(runs, variant, engine, metric) for metric in METRICS}
            most = max(apart, key=lambda metric: apart[metric])
            where = "within" if apart[most] <= 1.0 else "BEYOND"
            words = f"{where} one standard deviation of the reference; at most {apart[most]:.2f}, in {most}"
            lines.append(f"- {variant}, native {title}: {words}.")
    return "\n".join([*lines, ""])


def _deviations(runs: Runs, variant: str, engine: str, metric: str) -> float:
    """Between the means of an engine and of the reference, in standard deviations over seeds, pooled over all engines.

    Pooled, since that of three seeds is itself uncertain by half.
    """
    values = {name: [one["test"]["fused"][metric] for one in runs[variant + name]] for name in ENGINES}
    spread = statistics.fmean(statistics.variance(v) for v in values.values()) ** 0.5
    difference = abs(statistics.fmean(values[engine]) - statistics.fmean(values[", reference"]))
    if difference == 0.0:
        return 0.0
    return difference / spread if spread > 0.0 else math.inf


if __name__ == "__main__":
    main()
