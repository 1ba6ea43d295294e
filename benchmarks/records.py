"""What a run leaves: a record for each op, shape and contestant, and all of them with the machine they were made on."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from alterrec_fast.benchmarks.machine import Machine
from alterrec_fast.benchmarks.worker import Shape

FLOOR = "torch.mm"  # the contestant that every ratio refers to
NOT_BEGUN = "not begun"  # what the reason starts with where there was no time for a contest
PRIOR = 8  # degrees of freedom that the noise of similar contestants counts for
STUDENT = (5.04, 4.78, 4.59, 4.44, 4.32, 4.22, 4.14)  # quantile 0.9995 for PRIOR, PRIOR + 1, ... degrees of freedom
SIMILAR = 4.0  # times as long, or as short, as a call takes whose noise is like one's own
LEAST_NOISE = 0.05  # what runs differ by beyond the processes of one: other guests of the same host, the clock
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
    turns: list[list[float]] = field(default_factory=list)  # of each process, the median call of each of its turns
    seconds: float | None = None  # the median of the turns
    cpu_seconds: float | None = None
    ratios: list[list[float]] = field(default_factory=list)  # each turn's to the floor's in the same round
    ratio: float | None = None  # the median over the processes of the median of their ratios
    noise: float | None = None  # another run's ratio is expected in ratio / exp(noise) to ratio * exp(noise)
    gflops: float | None = None  # of the floor: operations a second, in 1e9
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
    others: float  # cores that work other than this run's took during the contests
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


def conclude(records: Sequence[Record], products: int, streaming: float, operations: float) -> None:
    """Fills in what follows from the times of one contest: ratios to its floor, `products` of which can't be done
    without, and to `streaming`, the seconds in which the bytes that must move can be moved. The floor does so many
    `operations`.
    """
    floor = next((record for record in records if record.contestant == FLOOR and record.seconds), None)
    for record in records:
        if record.seconds is None:
            continue
        record.bandwidth_ratio = record.seconds / streaming
        if floor is None or floor.seconds is None:
            continue
        pairs = zip(record.turns, floor.turns, strict=False)
        record.ratios = [[mine / its for mine, its in zip(a, b, strict=False)] for a, b in pairs]
        # Of an even number of processes the middle two's geometric mean.
        record.ratio = math.exp(statistics.median(middles(record)))
        if record.shape.figure != "form":  # a gathered form does fewer products
            record.share = products * floor.seconds / record.seconds
    if floor is not None and floor.seconds is not None:
        floor.gflops = operations / floor.seconds / 1e9


def middles(record: Record) -> list[float]:
    """For each process the logarithm of its median ratio."""
    return [math.log(statistics.median(ratios)) for ratios in record.ratios if ratios]


def assess(records: Sequence[Record]) -> None:
    """Fills in the noise of every ratio of a run, from its own turns and those of contestants that take about as long.

    The variance of a run's ratio is that of the processes' medians over their number, and that of turns within a
    process over theirs (pi / 2 for a median). Both are known from few numbers only, so that each is averaged, as in a
    moderated t-test, with what is common among similar contestants, which counts for PRIOR degrees of freedom. Two
    runs differ by sqrt(2) times as much, and Student's quantile is that of 999 of 1,000, since a table has hundreds of
    rows. LEAST_NOISE, in quadrature, is what differs between runs but not within one.
    """
    timed = [r for r in records if r.ratio is not None and r.seconds is not None and r.contestant != FLOOR]
    within, between = {}, {}  # differences, by the place in `timed`
    for i, record in enumerate(timed):
        within[i] = [gap for ratios in record.ratios for gap in gaps([math.log(ratio) for ratio in ratios])]
        between[i] = gaps(middles(record))
    for i, record in enumerate(timed):
        alike = [j for j, other in enumerate(timed) if _similar(record, other)]
        turns, processes = sum(map(len, record.ratios)), len(middles(record))
        common_within, common_between = _common(within, alike), _common(between, alike)
        if common_within is None or common_between is None:
            record.noise = None  # nobody has taken a second turn, or none has been started again
            continue
        inside = _moderated(common_within, spread(within[i]), turns - processes)
        own = statistics.stdev(middles(record)) if processes > 1 else None
        outside = _moderated(common_between, own, processes - 1)
        deviation = math.sqrt(outside / processes + math.pi / 2 * inside / turns)
        quantile = STUDENT[min(processes, len(STUDENT)) - 1]
        record.noise = math.hypot(LEAST_NOISE, quantile * math.sqrt(2.0) * deviation)
    for record in records:
        if record.contestant == FLOOR and record.ratio is not None:
            record.noise = 0.0


def both(one: float, other: float) -> float:
    """The noise of the difference of two runs, each of which states what it is between two like itself."""
    return math.sqrt((one**2 + other**2) / 2.0)


def gaps(numbers: Sequence[float]) -> list[float]:
    """The distances between any two."""
    return [abs(a - b) for a, b in combinations(numbers, 2)]


def spread(distances: Sequence[float]) -> float | None:
    """The standard deviation of normal numbers with such distances, by their median: a few that are far off do not
    matter, and unlike deviations from a median it is not too small for two or three numbers."""
    return statistics.median(distances) / (0.6745 * math.sqrt(2.0)) if distances else None


def _common(distances: dict[int, list[float]], alike: list[int]) -> float | None:
    """The spread that similar contestants have in common; of all where none of the similar ones knows it."""
    own = [gap for j in alike for gap in distances[j]]
    return spread(own or [gap for gaps_of_one in distances.values() for gap in gaps_of_one])


def _similar(one: Record, other: Record) -> bool:
    return abs(math.log((one.seconds or 1.0) / (other.seconds or 1.0))) <= math.log(SIMILAR)


def _moderated(common: float, own: float | None, freedom: int) -> float:
    """A variance."""
    if own is None:
        return common**2
    return (PRIOR * common**2 + freedom * own**2) / (PRIOR + freedom)
