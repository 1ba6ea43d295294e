"""What the report is made of: the files of a run over one seed or several, read and checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alterrec_fast.errors import FileError
from alterrec_fast.systems import SYSTEMS
from alterrec_fast.training.config import METRICS, Config, from_mapping, read_toml
from alterrec_fast.training.evaluate import VIEWS
from alterrec_fast.training.records import HISTORY, METRICS_FILE, read_history, read_metrics

Series = dict[int, float]  # epoch -> value
GONE, FALLING = 0.01, 0.01  # see `Seed.under_trained`


@dataclass(frozen=True)
class Seed:
    """What one run directory holds. config: every setting, as TOML and JSON have it."""

    config: dict[str, Any]
    history: list[dict[str, Any]]
    metrics: dict[str, Any]

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The lines of the history in which something was trained."""
        return [line for line in self.history if line["epoch"] > 0]

    def under_trained(self) -> dict[str, tuple[dict[str, Any], float]]:
        """For each network whose loss still fell when its learning rate was gone: that epoch's line, and the fall.

        The rate is gone from the first epoch at GONE of the network's first rate or less. The loss still fell if in the
        last epoch before it lies by more than the share FALLING below that of the network's epoch before, of the same
        negatives.
        """
        found = {}
        for name in dict.fromkeys(line["student"] for line in self.epochs):
            own = [line for line in self.epochs if line["student"] == name]
            kept = [line for line in own if line["learning_rate"] > GONE * own[0]["learning_rate"] * (1 + 1e-9)]
            if len(kept) == len(own) or len(kept) < 2:
                continue
            before, last = kept[-2:]
            fall = 1 - last["loss"] / before["loss"] if before["loss"] > 0 else 0.0
            if before["negatives"] == last["negatives"] and fall > FALLING:
                found[name] = last, fall
        return found

    @property
    def seconds(self) -> float:
        return float(sum(line.get(name) or 0.0 for line in self.history for name in ("seconds", "validation_seconds")))


@dataclass(frozen=True)
class Results:
    """A run: its metrics, and one or more seeds."""

    metrics: dict[str, Any]
    seeds: list[Seed]

    @property
    def variant(self) -> str:
        return str(self.seeds[0].metrics["variant"])

    @property
    def items(self) -> int:
        return int(self.seeds[0].metrics["items"])

    @property
    def longest(self) -> Seed:
        return max(self.seeds, key=lambda seed: len(seed.epochs))

    @property
    def views(self) -> list[str]:
        """The views to show; where there is only one network, it, and not the fused score that repeats it."""
        parts = SYSTEMS[self.variant].views
        if len(parts) == 1:
            return list(parts)
        return [view for view in VIEWS if self.metrics["test"][view] is not None]

    @property
    def two_networks(self) -> bool:
        return SYSTEMS[self.variant].alternates

    def above_fused(self) -> dict[str, list[str]]:
        """Of two networks, each whose test metrics lie above those of the fused score, and in which."""
        if not self.two_networks:
            return {}
        test = self.metrics["test"]
        above = {view: [m for m in METRICS if test[view][m] > test["fused"][m]] for view in ("id", "text")}
        return {view: metrics for view, metrics in above.items() if metrics}

    @property
    def sweep(self) -> dict[str, Any]:
        """The fused score's metrics by split and alpha; empty for a single network, and where a run did not keep it."""
        return dict(self.metrics.get("sweep") or {})

    def best_alpha(self, metric: str) -> str:
        """The alpha of the sweep that is best by validation, of equal ones the lowest."""
        by_alpha: dict[str, dict[str, float]] = self.sweep["validation"]
        return max(by_alpha, key=lambda alpha: by_alpha[alpha][metric])

    def lines(self, value: Callable[[dict[str, Any]], float | None]) -> list[Series]:
        """For each seed the value of each line of its history, lines without one left out."""
        return [
            {line["epoch"]: number for line in seed.history if (number := value(line)) is not None}
            for seed in self.seeds
        ]


def read_results(run: Path) -> Results:
    metrics = read_metrics(run / METRICS_FILE)
    folders = [run / f"seed-{seed}" for seed in metrics["seeds"]] if "seeds" in metrics else [run]
    results = Results(metrics, [_read_seed(folder) for folder in folders])
    if any(seed.metrics["variant"] != metrics["variant"] for seed in results.seeds):
        raise FileError(f"{run / METRICS_FILE}: the seeds' runs are not all of {metrics['variant']}")
    return results


def _read_seed(folder: Path) -> Seed:
    config = from_mapping(read_toml(folder / "config.toml"), str(folder / "config.toml"))
    history, metrics = read_history(folder / HISTORY), read_metrics(folder / METRICS_FILE)
    if not history or "seeds" in metrics or metrics["best_epoch"] >= len(history):
        raise FileError(f"{folder / HISTORY}: {len(history)} epochs, which do not fit {METRICS_FILE}")
    return Seed(as_json(config), history, metrics)


def as_json(config: Config) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return values
