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
NOT_BEGUN = "not begun"  # what the reason starts with where there was no time for a contest
PRIOR = 8  # degrees of freedom that the noise of similar contestants counts for
STUDENT = 4.78  # quantile 0.9995 for PRIOR + 1 degrees of freedom
SIMILAR = 4.0  # times as long, or as short, as a call takes whose noise is like one's own
ONCE = 1.5  # times as much as the best of several sittings varies that of a single one
LEAST_NOISE = 0.05  # what runs differ by beyond the sittings of one: other guests of the same host, the clock
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
    stopped: str | None = None  # why it sat no more after sittings that count
    turns: list[list[float]] = field(default_factory=list)  # of each sitting, the median call of each turn
    seconds: float | None = None  # the best of the turns
    ratio: float | None = None  # to the best turn of the floor, in this contest or another that has the same floor
    product: str = ""  # of a floor: what is multiplied
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
    """Fills in what follows from the times of one contest: the best turn, its ratio to the floor's, `products` of which
    can't be done without, and to `streaming`, the seconds in which the bytes that must move can be moved. The floor
    does so many `operations`.

    The best, since what a machine does beside makes a turn longer.
    """
    for record in records:
        record.seconds = min((turn for turns in record.turns for turn in turns), default=None)
        record.ratio = record.share = record.bandwidth_ratio = record.gflops = None
    floor = next((record for record in records if record.contestant == FLOOR), None)
    for record in records:
        if record.seconds is None:
            continue
        record.bandwidth_ratio = record.seconds / streaming
        if floor is None or floor.seconds is None:
            continue
        record.ratio = record.seconds / floor.seconds
        if record.shape.figure != "form":  # a gathered form does fewer products
            record.share = products / record.ratio
    if floor is not None and floor.seconds is not None:
        floor.gflops = operations / floor.seconds / 1e9


def share_floors(records: Sequence[Record]) -> None:
    """Contests with the same product as their floor have its best turn in common: ratios of all are to that."""
    for record, floor in _with_floors(records):
        if record.ratio is not None and record.seconds is not None:
            before, record.ratio = record.ratio, record.seconds / min(_bests(floor))
            record.share = None if record.share is None else record.share * before / record.ratio


def _with_floors(records: Sequence[Record]) -> list[tuple[Record, list[Record]]]:
    """Each record with all floors that are the product of its contest."""
    floors: dict[str, list[Record]] = {}
    product: dict[tuple[str, Shape], str] = {}
    for record in records:
        if record.contestant == FLOOR and record.seconds is not None:
            floors.setdefault(record.product, []).append(record)
            product[record.op, record.shape] = record.product
    known = [record for record in records if (record.op, record.shape) in product]
    return [(record, floors[product[record.op, record.shape]]) for record in known]


def _bests(records: Sequence[Record]) -> list[float]:
    """The best turn of each sitting, the least first."""
    return sorted(min(turns) for record in records for turns in record.turns)


def gap(records: Sequence[Record]) -> float | None:
    """How far the best sitting is from the next, as the logarithm of a ratio; None where there was one."""
    found = _bests(records)
    return math.log(found[1] / found[0]) if len(found) > 1 else None


def assess(records: Sequence[Record]) -> None:
    """Fills in the noise of every ratio of a run, from how far the best sitting of a contestant is from the next.

    The least of some draws varies by about as much as the least two differ: of two to four normal or exponential ones,
    0.7 to 1.2 times the median difference. A contestant's own difference is one number. So its square is averaged, as
    in a moderated t-test, with the square of the median among contestants that take about as long, which counts for
    PRIOR degrees of freedom; who sat once has that median alone, ONCE times. The ratio has the floor's variance as
    well; two runs differ by sqrt(2) times as much, and Student's quantile is that of 999 of 1,000, since a table has
    hundreds of rows. LEAST_NOISE, in quadrature, is what differs between runs but not within one.
    """
    timed = [(record, floors) for record, floors in _with_floors(records) if record.ratio is not None]
    gaps = [gap([record]) for record, _ in timed]

    def variance(record: Record, own: float | None) -> float | None:
        pairs = zip(timed, gaps, strict=True)
        alike = [found for (other, _), found in pairs if found is not None and _similar(record, other)]
        known = alike or [found for found in gaps if found is not None]
        if not known:
            return None  # nobody has sat twice
        common = statistics.median(known) ** 2
        return ONCE**2 * common if own is None else (PRIOR * common + own**2) / (PRIOR + 1)

    for (record, floors), own in zip(timed, gaps, strict=True):
        mine, its = variance(record, own), variance(floors[0], gap(floors))
        if record.contestant == FLOOR:
            record.noise = 0.0
        elif mine is None or its is None:
            record.noise = None
        else:
            record.noise = math.hypot(LEAST_NOISE, STUDENT * math.sqrt(2.0 * (mine + its)))


def both(one: float, other: float) -> float:
    """The noise of the difference of two runs, each of which states what it is between two like itself."""
    return math.sqrt((one**2 + other**2) / 2.0)


def _similar(one: Record, other: Record) -> bool:
    return abs(math.log((one.seconds or 1.0) / (other.seconds or 1.0))) <= math.log(SIMILAR)
