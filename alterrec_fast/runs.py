"""Where runs stand: which there are below a folder, how far each is, and what it has reached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alterrec_fast.errors import AlterRecError, RunError
from alterrec_fast.run import CONFIG, read_config, seed_runs
from alterrec_fast.training.records import HISTORY, METRICS_FILE, read_history, read_metrics

SHOWN = ("hits@20", "ndcg@20")  # of the fused score


@dataclass(frozen=True)
class Status:
    """A run over one seed or several. epochs, of: completed, and as planned. metrics: metrics.json, None before it."""

    variant: str
    seeds: list[int]
    epochs: int
    of: int
    best_epoch: float
    validation: dict[str, Any] | None
    metrics: dict[str, Any] | None

    @property
    def finished(self) -> bool:
        return self.metrics is not None

    def __str__(self) -> str:
        """How far it is, in words."""
        if self.finished:
            return f"finished, best epoch {self.best_epoch:g} of {self.epochs}"
        return f"unfinished, epoch {self.epochs} of {self.of}, best {self.best_epoch:g}"


def status(run: Path) -> Status:
    """Where a run stands; raises FileError, ConfigError for one that cannot be read."""
    metrics = read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).exists() else None
    first = seed_runs(run)[0]
    config = read_config(first)
    history = read_history(first / HISTORY) if (first / HISTORY).exists() else []
    epochs = max(0, len(history) - 1)
    if metrics:
        seeds = metrics.get("seeds") or [metrics["seed"]]
        best, validation = metrics["best_epoch"], metrics["validation"]
        return Status(config.variant, seeds, epochs, config.m_max, best, validation, metrics)
    line = max(history, key=lambda line: line["validation"]["fused"][config.monitor], default=None)
    best, validation = (line["epoch"], line["validation"]) if line else (0, None)
    return Status(config.variant, [config.seed], epochs, config.m_max, best, validation, None)


def find_runs(folder: Path) -> Iterator[Path]:
    """The runs in `folder` and below, in order of their names; of a run over several seeds it alone once it is done."""
    if (folder / CONFIG).exists() or (folder / METRICS_FILE).exists():
        yield folder
        return
    for below in sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
        yield from find_runs(below)


def table(folder: Path) -> str:
    """A row for each run below `folder`, with its metrics in percent; a run that cannot be read has its error there.

    Raises RunError where there is none.
    """
    head = ["run", "system", "seeds", *(f"{split} {name}" for split in ("validation", "test") for name in SHOWN), ""]
    rows = [head]
    for run in find_runs(folder):
        place = str(run.relative_to(folder)) if run != folder else run.name
        try:
            stands = status(run)
        except AlterRecError as error:
            rows.append([place, *[""] * (len(head) - 2), str(error)])
            continue
        splits = (stands.validation, stands.metrics and stands.metrics["test"])
        numbers = [f"{100 * views['fused'][name]:.2f}" if views else "" for views in splits for name in SHOWN]
        rows.append([place, stands.variant, ",".join(map(str, stands.seeds)), *numbers, str(stands)])
    if len(rows) == 1:
        raise RunError(f"{folder} holds no run directory, nor does a folder below it")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
