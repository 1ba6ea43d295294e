"""history.jsonl, a line an epoch, and metrics.json of a run: what they hold, and the loaders that check it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alterrec_fast import files
from alterrec_fast.errors import FileError
from alterrec_fast.systems import SYSTEMS

if TYPE_CHECKING:  # schemas.py needs pydantic, of the extra "train"; writing a history does not
    from pydantic import BaseModel

HISTORY, METRICS_FILE = "history.jsonl", "metrics.json"
TIMES = ("seconds", "targets_per_second", "validation_seconds", "peak_memory")  # of the machine, not of the result
_log = logging.getLogger(__name__)


def check_history(lines: Sequence[Any], where: str) -> None:
    """Raises FileError unless `lines` are those of epochs 0, 1, ... as a run writes them; they may be none."""
    from alterrec_fast.training.schemas import Trained, Untrained

    for number, line in enumerate(lines):
        _check(Trained if number else Untrained, line, f"{where}, line {number + 1}")
        if line["epoch"] != number:
            raise FileError(f"{where}, line {number + 1}: epoch {line['epoch']}, expected {number}")


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of history.jsonl; raises FileError where it is missing or holds anything else."""
    texts = [line for line in files.read_text(path).split("\n") if line]
    lines = [files.parse_json(line, f"{path}, line {number}") for number, line in enumerate(texts, 1)]
    check_history(lines, str(path))
    return lines


def write_history(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    files.write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def without_times(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What of the history is the same in two equal runs; it goes into the checkpoint."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def with_times(recorded: Sequence[Mapping[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The lines of a checkpoint, with the times that history.jsonl has for them.

    Raises FileError where the file says something else than the checkpoint. Where it is missing the times are None.
    """
    if path.exists():
        lines = read_history(path)[: len(recorded)]  # a kill may have left the line of an epoch that is trained again
        if without_times(lines) != list(recorded):
            raise FileError(f"{path}: not the history of this run; remove it to go on without the times of its epochs")
        return lines
    if recorded:
        _log.warning("%s is missing: the times of its epochs are lost", path)
    empty = dict.fromkeys(("validation_seconds", "peak_memory"))
    return [{**line, **empty, **(dict.fromkeys(TIMES) if line.get("epoch") else {})} for line in recorded]


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    files.write_sealed(path, metrics)


def read_metrics(path: Path) -> dict[str, Any]:
    """metrics.json of a run over one seed or several; raises FileError where it is missing, or holds anything else."""
    from alterrec_fast.training.schemas import OfOne, OfSeveral

    metrics = files.read_sealed(path)
    _check(OfSeveral if "seeds" in metrics else OfOne, metrics, str(path))
    variant, test = metrics["variant"], metrics["test"]
    if any((test[view] is not None) != (view in SYSTEMS[variant].views) for view in ("id", "text")):
        raise FileError(f"{path}: the test metrics are not those of {variant}")
    if "seeds" in metrics and metrics["groups"].keys() != metrics["groups_std"].keys():
        raise FileError(f"{path}: groups and groups_std differ in their names")
    sweeps = [metrics[name] for name in ("sweep", "sweep_std") if metrics.get(name) is not None]
    if len({tuple(by_alpha) for sweep in sweeps for by_alpha in sweep.values()}) > 1:
        raise FileError(f"{path}: the alphas of sweep and sweep_std differ between splits")
    return metrics


def _check(model: type[BaseModel], values: Any, where: str) -> None:
    from pydantic import ValidationError

    try:
        model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        raise FileError(f"{where}: {name or 'value'}: {problem['msg']}, got {str(problem['input'])[:80]!r}") from None
