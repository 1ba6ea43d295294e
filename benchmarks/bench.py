"""`alterrec-fast bench`: every contest of the table, and what it leaves: results.json, table.md and figures."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from alterrec_fast.benchmarks import machine
from alterrec_fast.benchmarks.compare import read_baselines, summary
from alterrec_fast.benchmarks.contest import Arena, Budget
from alterrec_fast.benchmarks.contestants import OPS, Op
from alterrec_fast.benchmarks.figures import draw
from alterrec_fast.benchmarks.records import Record, Results
from alterrec_fast.benchmarks.tables import markdown, table
from alterrec_fast.benchmarks.worker import Shape

from alterrec_fast.training.checkpoint import write_text

QUICK = Budget(rounds=5, least=1, seconds=0.6, turn=0.1, first=30.0, memory=0)
FULL = Budget(rounds=9, least=2, seconds=4.0, turn=0.2, first=60.0, memory=0)
QUICK_MINUTES, FULL_MINUTES = 4.0, 36.0  # contests that have not begun by then are left out, and listed so
PEERS = ("recbole", "rectools", "replay")  # names of interpreters
MEMORY_SHARE = 0.6  # of the memory that is free, for one process


class BenchError(Exception):
    """A request that can't be served."""


@dataclass(frozen=True)
class Options:
    """What `alterrec-fast bench` takes."""

    out: Path
    quick: bool = False
    ops: tuple[str, ...] = ()  # all where empty
    pythons: dict[str, str] = field(default_factory=dict)  # interpreters of other people's libraries
    threads: int = 0  # 0 for all cores
    command: str = "alterrec-fast bench"


def run(options: Options, tell: Callable[[str], None] = print) -> Results:
    """Holds the contests; writes the results after each, so that nothing is lost when the run is broken off."""
    unknown = sorted(set(options.ops) - {op.name for op in OPS})
    if unknown:
        raise BenchError(f"--op: expected one of {', '.join(op.name for op in OPS)}, got {', '.join(unknown)}")
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    threads = options.threads or machine.cores()
    results = Results(
        command=options.command,
        date=datetime.now().date().isoformat(),
        machine=machine.look(threads),
        bandwidth=0.0,
        load_before=machine.load(),
        load_after=machine.load(),
        others=machine.others(),
    )
    budget = replace(QUICK if options.quick else FULL, memory=int(MEMORY_SHARE * machine.memory_available()))
    minutes = QUICK_MINUTES if options.quick else FULL_MINUTES
    quiet = [results.others]
    with tempfile.TemporaryDirectory(prefix="alterrec-bench-") as folder:
        arena = Arena(Path(folder), budget, options.pythons, threads)
        results.bandwidth = arena.bandwidth
        for op, shape in plan(options, threads):
            tell(f"{time.monotonic() - begun:5.0f} s  {op.name}: {shape.label}")
            if time.monotonic() - begun > 60 * minutes:
                records = left_out(op, shape, f"not begun within {minutes:g} minutes")
            else:
                records = arena.hold(op, shape)
                quiet.append(machine.others())
            results.records += records
            results.others = sum(quiet) / len(quiet)
            results.load_after = machine.load()
            write_text(options.out / "results.json", json.dumps(results.to_json(), indent=1))
            tell(table(records))
    write_text(options.out / "table.md", markdown(results))
    draw(results, options.out)
    return results


def comparison(results: Results) -> str:
    """What got slower than the stored baseline, in words."""
    words: str = summary(results, read_baselines())
    return words


def plan(options: Options, threads: int) -> list[tuple[Op, Shape]]:
    """All contests: the quick ones first, then the others of the tables, and last the curves, which take longest."""
    chosen = [op for op in OPS if not options.ops or op.name in options.ops]
    contests = [(op, shape) for op in chosen for shape in op.quick]
    contests += [
        (op, replace(op.scaled, threads=count))
        for op in chosen
        if op.scaled is not None and (not options.quick or op.name == "rank_slice")
        for count in thread_counts(threads)
    ]
    if not options.quick:
        more = [(op, shape) for op in chosen for shape in op.full]
        contests += sorted(more, key=lambda contest: bool(contest[1].figure))
    return contests


def thread_counts(most: int) -> list[int]:
    """1, 2, 4 and so on up to `most`, which is among them."""
    return sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most})


def left_out(op: Op, shape: Shape, why: str) -> list[Record]:
    return [
        Record(
            op.name, shape, contestant.name, contestant.ours, contestant.package, contestant.allowed(shape), failed=why
        )
        for contestant in op.contestants
        if contestant.takes(shape)
    ]
