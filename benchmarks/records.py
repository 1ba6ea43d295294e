"""What a run leaves: a record for each op, shape and contestant, and all of them with the machine they were made on."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alterrec_fast.benchmarks.machine import Machine
from alterrec_fast.benchmarks.worker import Shape

FLOOR = "torch.mm"  # the contestant that every ratio refers to
ENOUGH = 3  # turns that tell something of the noise
STUDENT = (63.7, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25)  # quantile 0.995 for 1, 2, ... degrees of freedom
LEAST_NOISE = 0.05  # what runs differ by beyond the rounds of one: where memory lies, the clock
BUSY = 0.1  # cores that other work may take before a run counts as one on a busy machine


@dataclass
class Record:
    """What is known of one contestant at one shape of one op. Times in seconds, sizes in bytes."""

    op: str
    shape: Shape
    contestant: str
    ours: bool
    version: str
    allowed: float  # the largest error that counts as right
    error: float | None = None  # against float64
    failed: str | None = None
    turns: list[float] = field(default_factory=list)  # the median call of each
    seconds: float | None = None  # the median of the turns
    cpu_seconds: float | None = None
    ratio: float | None = None  # the median over the rounds of a turn's time to the floor's in the same round
    noise: float | None = None  # another run's ratio is expected in ratio / exp(noise) to ratio * exp(noise)
    share: float | None = None  # of the time that is spent in the products that can't be done without
    bandwidth_ratio: float | None = None  # to the time in which the bytes that must move can be moved
    peak_bytes: int | None = None  # the most that the process held
    extra_bytes: int | None = None  # beyond what it held before it was made ready, inputs included
    detail: dict[str, float] = field(default_factory=dict)

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.ratio is None or self.noise is None:
            return None
        return self.ratio / math.exp(self.noise), self.ratio * math.exp(self.noise)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Record:
        return cls(**values | {"shape": Shape(**values["shape"])})


@dataclass
class Results:
    """A run."""

    command: str
    date: str
    machine: Machine
    bandwidth: float  # bytes a second
    load_before: float  # processes that ran or waited, over a minute
    load_after: float
    others: float  # cores that were busy while no contestant ran
    records: list[Record] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        return self.others > BUSY

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Results:
        made = {"machine": Machine(**values["machine"]), "records": [Record.from_json(x) for x in values["records"]]}
        return cls(**values | made)

    @classmethod
    def read(cls, path: Path) -> Results:
        return cls.from_json(json.loads(path.read_text()))


def conclude(records: Sequence[Record], products: int, streaming: float) -> None:
    """Fills in what follows from the times of one contest: ratios to its floor, `products` of which can't be done
    without, and to `streaming`, the seconds in which the bytes that must move can be moved.
    """
    floor = next((record for record in records if record.contestant == FLOOR and record.seconds), None)
    for record in records:
        if record.seconds is None:
            continue
        record.bandwidth_ratio = record.seconds / streaming
        if floor is None or floor.seconds is None:
            continue
        ratios = [mine / its for mine, its in zip(record.turns, floor.turns, strict=False)]
        record.ratio = statistics.median(ratios)
        record.noise = noise_of(ratios)
        record.share = products * floor.seconds / record.seconds


def noise_of(ratios: Sequence[float]) -> float | None:
    """The relative half-width of an interval in which another run's median ratio is expected, or None of too few.

    Ninety-nine of a hundred, by Student's t of the logarithms: the standard deviation of the difference of two medians
    of n is 1.25 sqrt(2 / n) times that of one number. LEAST_NOISE is what differs between runs but not within one.
    """
    if len(ratios) < ENOUGH:
        return None
    spread = statistics.stdev(math.log(ratio) for ratio in ratios)
    quantile = STUDENT[min(len(ratios) - 2, len(STUDENT) - 1)]
    return max(LEAST_NOISE, quantile * 1.25 * math.sqrt(2.0 / len(ratios)) * spread)
