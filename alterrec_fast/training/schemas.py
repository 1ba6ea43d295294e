"""What a line of history.jsonl and metrics.json hold, for pydantic to check; records.py reads and writes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from alterrec_fast.training.config import METRICS, VARIANTS

Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Scores = Annotated[
    dict[Annotated[str, Field(pattern=f"^({'|'.join(METRICS)})$")], Share],
    Field(min_length=len(METRICS), max_length=len(METRICS)),
]
Alpha = Annotated[str, Field(pattern=r"^(0|1|0\.\d+|\d(\.\d+)?e-\d+)$")]
Bounds = Annotated[list[Count], Field(min_length=2, max_length=2)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Views(Strict):
    fused: Scores
    id: Scores | None
    text: Scores | None


class Group(Strict):
    targets: Measure  # a mean over seeds need not be whole
    share: Share
    fused: Scores | None
    id: Scores | None
    text: Scores | None


class Sweep(Strict):
    """The fused score's metrics by alpha."""

    validation: dict[Alpha, Scores]
    test: dict[Alpha, Scores]


Groups = Annotated[dict[Annotated[str, Field(pattern=r"^\d+(-\d+|\+)$")], Group], Field(min_length=1)]


class Untrained(Strict):
    """The line of epoch 0. Times are None where history.jsonl was lost."""

    epoch: Count
    validation: Views
    validation_seconds: Measure | None
    peak_memory: Count | None


class Trained(Untrained):
    student: Literal["id", "text", "fused"]
    negatives: Annotated[str, Field(pattern=r"^(full|uniform|ranks \d+:\d+ of (id|text))$")]
    learning_rate: Measure
    loss: Annotated[float, Field(allow_inf_nan=False)]
    loss_id: Annotated[float, Field(allow_inf_nan=False)] | None = None
    loss_text: Annotated[float, Field(allow_inf_nan=False)] | None = None
    seconds: Measure | None
    targets_per_second: Measure | None
    padding: Measure


class Metrics(Strict):
    variant: Annotated[str, Field(pattern=f"^({'|'.join(VARIANTS)})$")]
    items: Annotated[int, Field(ge=1)]
    slice: Bounds
    best_epoch: Measure
    validation: Views
    test: Views
    groups: Groups
    sweep: Sweep | None = None


class OfOne(Metrics):
    seed: Count
    best_epoch: Count


class OfSeveral(Metrics):
    seeds: Annotated[list[Count], Field(min_length=1)]
    validation_std: Views
    test_std: Views
    groups_std: Groups
    sweep_std: Sweep | None = None
