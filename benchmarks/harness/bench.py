"""`alterrec-fast bench`: measures the cases of the tables, and leaves results.json, table.md and figures."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from ..ops import OPS
from .machine import BackgroundLoad, Machine, cores, memory_available
from .op import Op
from .processes import Budget, Measurement, Runner
from .report import NOT_BEGUN, Results, comparison, read_stored, table
from .worker import Case

QUICK = Budget(repetitions=3, samples=3, seconds=0.1, first=45.0, memory=0)
FULL = Budget(repetitions=5, samples=3, seconds=0.2, first=100.0, memory=0)
# What all repetitions share; cases that have not begun by then are left out, and listed so.
QUICK_MINUTES, FULL_MINUTES = 4.0, 35.0
MEMORY_SHARE = 0.6  # of the memory that is free, for one process

__all__ = ["BenchError", "Options", "compare", "run"]


class BenchError(Exception):
    """A request that can't be served."""


@dataclass(frozen=True)
class Options:
    """What `alterrec-fast bench` takes."""

    out: Path
    quick: bool = False
    ops: tuple[str, ...] = ()  # all where empty
    threads: int = 0  # 0 for all cores
    command: str = "alterrec-fast bench"


def run(options: Options, tell: Callable[[str], None] = print) -> Results:
    """Measures every case once, then all once more, and so on while there is time.

    So a machine that is slow for a minute spoils one repetition of a case. Results are written after each, so that
    nothing is lost when the run is broken off.
    """
    unknown = sorted(set(options.ops) - {op.name for op in OPS})
    if unknown:
        raise BenchError(f"--op: expected one of {', '.join(op.name for op in OPS)}, got {', '.join(unknown)}")
    options.out.mkdir(parents=True, exist_ok=True)
    begun, load, threads = time.monotonic(), BackgroundLoad(), options.threads or cores()
    results = Results(options.command, datetime.now().date().isoformat(), Machine.this(threads), 0.0)
    budget = replace(QUICK if options.quick else FULL, memory=int(MEMORY_SHARE * memory_available()))
    minutes = QUICK_MINUTES if options.quick else FULL_MINUTES
    measurements = [Measurement(op, case, threads) for op, case in plan(options, threads)]
    with tempfile.TemporaryDirectory(prefix="alterrec-bench-") as folder:
        runner = Runner(Path(folder), budget, threads)
        for _ in range(budget.repetitions):
            # First in the order of the plan, then the short ones first, so that most cases are repeated.
            for one in sorted(measurements, key=lambda measurement: measurement.cost):
                spent = time.monotonic() - begun
                if spent + one.cost > 60 * minutes or one.over:
                    continue
                tell(f"{spent:5.0f} s  repetition {one.repetitions + 1}  {one.op.name}: {one.case.label}")
                runner.repeat(one)
                _write(results, measurements, load, options.out)
                if one.repetitions == 1:
                    tell(table(one.records, results))
    for record in (record for one in measurements if not one.repetitions for record in one.records):
        record.failed = f"{NOT_BEGUN} within {minutes:g} minutes"
    _write(results, measurements, load, options.out)
    tell(_draw(results, options.out))
    return results


def _write(results: Results, measurements: Sequence[Measurement], load: BackgroundLoad, out: Path) -> None:
    """Writes what is known by now; cases that are still to come are not in it."""
    results.records = [r for one in measurements for r in one.records if r.samples or r.failed]
    results.background = load.cores()
    results.write(out)


def _draw(results: Results, out: Path) -> str:
    """Draws the figures, or says what is missing."""
    try:
        from .plots import draw
    except ImportError as missing:
        return f'no figures: {missing}; they come with `pip install "alterrec-fast[bench]"`'
    return f"figures: {len(draw(results, out))} files in {out}"


def compare(results: Results) -> str:
    """What got slower than the stored baseline, in words."""
    return comparison(results, read_stored())


def plan(options: Options, threads: int) -> list[tuple[Op, Case]]:
    """All cases: the quick ones first, then the others of the tables, and last the points of curves."""
    chosen = [op for op in OPS if not options.ops or op.name in options.ops]
    cases = [(op, case) for op in chosen for case in op.quick]
    cases += [
        (op, replace(op.threads, threads=count))
        for op in chosen
        if op.threads is not None and (not options.quick or op.name == "rank_slice")
        for count in thread_counts(threads)
    ]
    if not options.quick:
        more = [(op, case) for op in chosen for case in op.full]
        cases += sorted(more, key=lambda item: bool(item[1].figure))
    return cases


def thread_counts(most: int) -> list[int]:
    """1, 2, 4 and so on up to `most`, which is among them."""
    return sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most})
