"""What huge catalogs take on 1, 8 and 64 H100s, on paper: python -m alterrec_fast.benchmarks.cost_model.

The sharded design was never run. The catalog's rows are split over the GPUs, each of which streams its own; sessions
are everybody's (docs/benchmarks.md says more). Two things are counted: `rank_slice`, and a training step against hard
negatives, which is a slice, the loss over it with both gradients, and Adam on the catalog.

Formulas count bytes and operations of one GPU. What holds on any machine, how many items are sampled and how many
candidates that leaves, is the arithmetic of csrc/cpu/bracket.cpp: with `--results FILE`, the results.json of a full run
here, the same formulas are held against what was measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
from alterrec_fast.benchmarks.records import Record, Results

from alterrec_fast.ops.slices import bits_width, uses_bits

DEVIATIONS, SLACK, SETTLE_CYCLES = 4.0, 3.0, 2.5  # as in csrc/cpu/bracket.cpp
BINS = 2048  # of a histogram, by which GPUs agree on a boundary: 4 bytes each
PAIR = 8  # bytes of a candidate: a score and an id
BLOCK = 512  # sessions that meet a catalog tile while it is in cache: a catalog is read once for so many
WHAT_IS_NOT_PRODUCT = 2.7  # compare, ballot and append, and waiting: what an H100 took at 10 million items, d = 128
GIB = 2.0**30


@dataclass(frozen=True)
class Chip:
    """One GPU and its way to the others, in a second."""

    name: str
    products: float  # bfloat16 operations, as measured by the people who wrote the issue that asks for a model
    memory: float  # bytes to and from its own memory, as measured by them
    size: float  # bytes of its memory
    near: float  # bytes to another GPU of its own machine, by the data sheet
    far: float  # to one of another machine
    latency: float  # seconds of a collective's start
    machine: int  # GPUs of one machine


H100 = Chip("H100", 798e12, 3.0e12, 80e9, 450e9, 50e9, 20e-6, 8)


@dataclass(frozen=True)
class Job:
    """B sessions against V items of width d, ranks [start, stop), on G GPUs."""

    items: int
    gpus: int
    sessions: int = 4096
    width: int = 128
    start: int = 20
    stop: int = 20_000

    @property
    def rows(self) -> int:
        """Catalog rows of one GPU."""
        return -(-self.items // self.gpus)


# --- what any machine does ---


def sample_size(items: int, start: int, stop: int, width: int, items_a_cycle: float = 128.0) -> int:
    """Items sampled to bracket the boundaries: as many as make sampling and settling together the cheapest.

    items_a_cycle: multiplications of the product in the time in which a candidate costs SETTLE_CYCLES cycles.
    """
    widest = max(math.sqrt(k / items * (1.0 - k / items)) for k in (start, stop))
    best = (DEVIATIONS * SETTLE_CYCLES * items * widest / (width / items_a_cycle)) ** (2.0 / 3.0)
    least = min(max(items // 64, 256), 1024)
    return int(min(items, math.ceil(max(best, least) / 32) * 32))


def candidates(items: int, start: int, stop: int, sampled: int) -> float:
    """Items of a session whose scores are kept for settling: the bracket of `stop`, and all above that of `start`."""

    def around(rank: int) -> tuple[float, float]:
        share = (rank + 0.5) / items
        mid = share * sampled
        spread = DEVIATIONS * math.sqrt(mid * (1.0 - share)) + SLACK
        return max(mid - spread, 0.0), min(mid + spread, sampled)

    low, high = around(stop - 1)
    zone = around(start)[1]
    return (high - low + zone) * items / sampled


def slice_bytes(sessions: int, items: int, size: float) -> float:
    """Of a slice of `size` ranks over `items` items: bits or int32 ids, whichever is smaller."""
    return sessions * (bits_width(items) if uses_bits(items, math.ceil(size)) else 4.0 * size)


# --- the sharded design ---


def memory(job: Job, training: bool) -> dict[str, float]:
    """Bytes of one GPU: its rows, and what a call needs beside them."""
    sampled = sample_size(job.items, job.start, job.stop, job.width)
    kept = candidates(job.items, job.start, job.stop, sampled) / job.gpus
    found = {
        "teacher's rows, bf16": 2.0 * job.rows * job.width,
        "queries": 2.0 * job.sessions * job.width,
        "slices": slice_bytes(job.sessions, job.rows, (job.stop - job.start) / job.gpus),
        "candidates": PAIR * kept * job.sessions,
        "histograms": 4.0 * BINS * job.sessions,
    }
    if training:
        found |= {
            "student's rows, fp32 and bf16": 6.0 * job.rows * job.width,
            "their gradient, fp32": 4.0 * job.rows * job.width,
            "Adam's moments, fp32": 8.0 * job.rows * job.width,
            "queries' gradient": 4.0 * job.sessions * job.width,
        }
    return found


def seconds(job: Job, training: bool, chip: Chip = H100) -> dict[str, float]:
    """Of one call on every GPU; each part is the larger of its operations' and its bytes' time."""
    once = 2.0 * job.sessions * job.rows * job.width  # operations of one product with its rows
    read = 2.0 * job.rows * job.width * math.ceil(job.sessions / BLOCK)  # bytes of them, bf16
    sampled = sample_size(job.items, job.start, job.stop, job.width)
    kept = candidates(job.items, job.start, job.stop, sampled) / job.gpus
    sample = 2.0 * job.sessions * job.width * sampled / job.gpus

    def roof(operations: float, moved: float) -> float:
        return max(operations / chip.products, moved / chip.memory)

    found = {
        "bracket": roof(sample, 2.0 * sampled / job.gpus * job.width),
        "stream": WHAT_IS_NOT_PRODUCT * roof(once, read),
        "settle": 3.0 * PAIR * kept * job.sessions / chip.memory,  # written, counted, and read by the selection
        "agree": 2.0 * _all_reduce(4.0 * BINS * job.sessions, job, chip),
    }
    if training:
        # Forward; the same product again and one for each gradient. The gradient is written once.
        gradient = 4.0 * job.rows * job.width
        found |= {
            "loss, forward": roof(once, read),
            "loss, backward": roof(3.0 * once, 2.0 * read + gradient),
            "partial sums, queries' gradient": _all_reduce(8.0 * job.sessions, job, chip)
            + _all_reduce(4.0 * job.sessions * job.width, job, chip),
            "Adam": (28.0 + 2.0) * job.rows * job.width / chip.memory,  # seven passes, and the bfloat16 copy
        }
    return found


def _all_reduce(size: float, job: Job, chip: Chip) -> float:
    """By a ring: 2 (G - 1) / G of the bytes leave each GPU, by the slowest way there is."""
    if job.gpus == 1:
        return 0.0
    way = chip.near if job.gpus <= chip.machine else chip.far
    return 2.0 * (job.gpus - 1) / job.gpus * size / way + chip.latency


def table(jobs: Iterable[Job], chip: Chip = H100) -> str:
    """Markdown: memory of a GPU, and time, of both tasks; what does not fit its memory is said not to."""
    lines = [
        "| items | GPUs | rank_slice: GiB a GPU | ms | training step: GiB a GPU | ms | targets/s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for job in jobs:
        cells = [f"{job.items:,}", str(job.gpus)]
        for training in (False, True):
            size, time = sum(memory(job, training).values()), sum(seconds(job, training, chip).values())
            fits = size <= chip.size
            cells += [f"{size / GIB:,.1f}", f"{1e3 * time:,.1f}" if fits else "does not fit"]
            if training:
                cells.append(f"{job.sessions / time:,.0f}" if fits else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- held against what was measured here ---


@dataclass(frozen=True)
class Fit:
    """rank_slice on this machine, the seconds of which are counted whole: its product is its own, not torch's."""

    product: float  # seconds of a multiplication and addition
    score: float  # of what else is done with each score
    candidate: float
    sessions_bytes: float  # memory beside slices and candidates, whatever the catalog


@dataclass(frozen=True)
class Checked:
    """A shape as measured and as the fitted formulas have it."""

    items: int
    width: int
    measured_seconds: float
    seconds: float
    measured_bytes: float
    bytes: float


def fit(results: Results) -> tuple[Fit, list[Checked]]:
    """Fits the constants to rank_slice at all shapes. Raises ValueError where a run has fewer than three.

    Shapes of one width do not tell the product from the rest of what is done with a score: their sum is then fitted.
    """
    curve = _curve(results.records)
    if len(curve) < 3:
        raise ValueError(f"expected rank_slice at three sizes at least, got {len(curve)}")
    kept = [_kept(ours) for ours in curve]
    scores = [float(ours.shape.sessions * ours.shape.items) for ours in curve]
    columns = np.array(
        [
            (score * ours.shape.width, score, ours.shape.sessions * one)
            for ours, score, one in zip(curve, scores, kept, strict=True)
        ]
    )
    costs = _nonnegative(columns, np.array([ours.seconds for ours in curve]))
    sizes = [_bytes(ours, one) for ours, one in zip(curve, kept, strict=True)]
    rest = float(np.mean([(ours.extra_bytes or 0) - size for ours, size in zip(curve, sizes, strict=True)]))
    checked = [
        Checked(
            ours.shape.items,
            ours.shape.width,
            ours.seconds or 0.0,
            float(columns[i] @ costs),
            float(ours.extra_bytes or 0),
            sizes[i] + rest,
        )
        for i, ours in enumerate(curve)
    ]
    product, score, candidate = (float(cost) for cost in costs)
    return Fit(product, score, candidate, rest), checked


def _curve(records: Sequence[Record]) -> list[Record]:
    """Our rank_slice in float32, the shapes of the table and those of the curve over V, smaller catalogs first."""
    ours = [r for r in records if r.op == "rank_slice" and r.contestant == "alterrec-fast" and r.seconds is not None]
    wanted = [
        r for r in ours if r.shape.figure in ("", "V") and r.shape.precision == "fp32" and r.extra_bytes is not None
    ]
    return sorted(wanted, key=lambda r: (r.shape.items, r.shape.width))


def _kept(record: Record) -> float:
    """Candidates of a session, on a CPU, whose float32 product takes 32 multiplications a cycle."""
    shape = record.shape
    sampled = sample_size(shape.items, shape.start, shape.stop, shape.width, 32.0)
    return candidates(shape.items, shape.start, shape.stop, sampled)


def _bytes(record: Record, kept: float) -> float:
    """The slice, and for each thread candidates of all sessions at once."""
    shape = record.shape
    return slice_bytes(shape.sessions, shape.items, shape.stop - shape.start) + float(PAIR * kept * shape.sessions)


def _nonnegative(columns: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares of the relative errors with coefficients that are not negative: the best of all choices of which
    are zero, the fewest coefficients first where that is as good.
    """
    weighted = columns / wanted[:, None]
    weighted, sizes = weighted / np.linalg.norm(weighted, axis=0), np.linalg.norm(weighted, axis=0)
    best, least = np.zeros(columns.shape[1]), float(len(wanted))
    for count in range(1, columns.shape[1] + 1):
        for chosen in combinations(range(columns.shape[1]), count):
            costs = np.zeros(columns.shape[1])
            costs[list(chosen)] = np.linalg.lstsq(weighted[:, chosen], np.ones(len(wanted)), rcond=None)[0]
            error = float(((weighted @ costs - 1.0) ** 2).sum())
            if costs.min() >= 0.0 and error < least - 1e-12:
                best, least = costs, error
    return np.asarray(best / sizes)


def checks(checked: Sequence[Checked]) -> str:
    """Markdown."""
    lines = [
        "| items | d | ms, measured | by the formula | MiB, measured | by the formula |",
        "| ---: |" + " ---: |" * 5,
    ]
    lines += [
        f"| {one.items:,} | {one.width} | {1e3 * one.measured_seconds:.1f} | {1e3 * one.seconds:.1f} "
        f"| {one.measured_bytes / 2**20:.0f} | {one.bytes / 2**20:.0f} |"
        for one in checked
    ]
    return "\n".join(lines)


JOBS = [Job(items, gpus) for items, gpus in product((10_000_000, 100_000_000, 1_000_000_000), (1, 8, 64))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="results.json of a full run on this machine")
    options = parser.parse_args()
    print(table(JOBS))
    if options.results:
        found, checked = fit(Results.read(options.results))
        rate = f"{2e-9 / found.product:.0f} GFLOP/s" if found.product else "not told apart"
        score, candidate = f"{1e12 * found.score:.1f} ps a score", f"{1e9 * found.candidate:.2f} ns a candidate"
        print(f"\nIts product: {rate}; beside it {score}, {candidate}.\n\n{checks(checked)}")


if __name__ == "__main__":
    main()
