"""history.jsonl, a line an epoch, and metrics.json of a run: what they hold, and the loaders that check it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alterrec_fast import files
from alterrec_fast.errors import FileError
from alterrec_fast.training.config import METRICS, Variant

HISTORY, METRICS_FILE = "history.jsonl", "metrics.json"
TIMES = ("seconds", "targets_per_second", "validation_seconds", "peak_memory")  # of the machine, not of the result
_log = logging.getLogger(__name__)

Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Scores = Annotated[
    dict[Annotated[str, Field(pattern=f"^({'|'.join(METRICS)})$")], Share],
    Field(min_length=len(METRICS), max_length=len(METRICS)),
]
Bounds = Annotated[list[Count], Field(min_length=2, max_length=2)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Views(_Strict):
    fused: Scores
    id: Scores | None
    text: Scores | None


class _Group(_Strict):
    targets: Measure  # a mean over seeds need not be whole
    share: Share
    fused: Scores | None
    id: Scores | None
    text: Scores | None


Groups = Annotated[dict[Annotated[str, Field(pattern=r"^\d+(-\d+|\+)$")], _Group], Field(min_length=1)]


class _Untrained(_Strict):
    """The line of epoch 0. Times are None where history.jsonl was lost."""

    epoch: Count
    validation: _Views
    validation_seconds: Measure | None
    peak_memory: Count | None


class _Trained(_Untrained):
    student: Literal["id", "text", "fused"]
    negatives: Annotated[str, Field(pattern=r"^(uniform|ranks \d+:\d+ of (id|text))$")]
    learning_rate: Measure
    loss: Annotated[float, Field(allow_inf_nan=False)]
    loss_id: Annotated[float, Field(allow_inf_nan=False)] | None = None
    loss_text: Annotated[float, Field(allow_inf_nan=False)] | None = None
    seconds: Measure | None
    targets_per_second: Measure | None
    padding: Measure


class _Metrics(_Strict):
    variant: Variant
    items: Annotated[int, Field(ge=1)]
    slice: Bounds
    best_epoch: Measure
    validation: _Views
    test: _Views
    groups: Groups


class _OfOne(_Metrics):
    seed: Count
    best_epoch: Count


class _OfSeveral(_Metrics):
    seeds: Annotated[list[Count], Field(min_length=1)]
    validation_std: _Views
    test_std: _Views
    groups_std: Groups


def check_history(lines: Sequence[Any], where: str) -> None:
    """Raises FileError unless `lines` are those of epochs 0, 1, ... as a run writes them; they may be none."""
    for number, line in enumerate(lines):
        _check(_Trained if number else _Untrained, line, f"{where}, line {number + 1}")
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
    metrics = files.read_sealed(path)
    _check(_OfSeveral if "seeds" in metrics else _OfOne, metrics, str(path))
    variant, test = metrics["variant"], metrics["test"]
    need = {"id_only": ("id",), "text_only": ("text",), "nfrec_sum": ()}.get(variant, ("id", "text"))
    if any((test[view] is not None) != (view in need) for view in ("id", "text")):
        raise FileError(f"{path}: the test metrics are not those of {variant}")
    if "seeds" in metrics and metrics["groups"].keys() != metrics["groups_std"].keys():
        raise FileError(f"{path}: groups and groups_std differ in their names")
    return metrics


def _check(model: type[BaseModel], values: Any, where: str) -> None:
    try:
        model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        raise FileError(f"{where}: {name or 'value'}: {problem['msg']}, got {str(problem['input'])[:80]!r}") from None
