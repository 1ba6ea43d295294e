"""`alterrec-fast bench`: every contest of the table, and what it leaves: results.json, table.md and figures."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from alterrec_fast.benchmarks import machine
from alterrec_fast.benchmarks.compare import read_baselines, summary
from alterrec_fast.benchmarks.contest import Arena, Budget, Contest
from alterrec_fast.benchmarks.contestants import OPS, Op
from alterrec_fast.benchmarks.figures import draw
from alterrec_fast.benchmarks.records import NOT_BEGUN, Results, assess, share_floors
from alterrec_fast.benchmarks.tables import markdown, table
from alterrec_fast.benchmarks.worker import Shape

from alterrec_fast.training.checkpoint import write_text

QUICK = Budget(sittings=3, rounds=3, long=0.5, turn=0.1, first=45.0, memory=0)
FULL = Budget(sittings=5, rounds=3, long=0.5, turn=0.2, first=100.0, memory=0)
# What all sittings share; contests that have not begun by then are left out, and listed so.
QUICK_MINUTES, FULL_MINUTES = 4.0, 35.0
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
    """Every contest sits once, then all once more, and so on while there is time, so that a machine which is slow for
    a minute spoils one sitting of a contest. Writes the results after each, so that nothing is lost when the run is
    broken off.
    """
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
        others=0.0,
    )
    budget = replace(QUICK if options.quick else FULL, memory=int(MEMORY_SHARE * machine.memory_available()))
    minutes = QUICK_MINUTES if options.quick else FULL_MINUTES
    contests = [Contest(op, shape, threads) for op, shape in plan(options, threads)]
    with tempfile.TemporaryDirectory(prefix="alterrec-bench-") as folder:
        arena = Arena(Path(folder), budget, options.pythons, threads)
        results.bandwidth = arena.bandwidth(threads)
        watch = Watch()
        # First in the order of the plan, since nothing has cost anything; then the short ones first, so that most sit
        # again.
        sittings = (one for _ in range(budget.sittings) for one in sorted(contests, key=lambda one: one.cost))
        for contest in sittings:
            spent = time.monotonic() - begun
            if spent + contest.cost > 60 * minutes or contest.over:
                continue
            tell(f"{spent:5.0f} s  sitting {contest.sittings + 1}  {contest.op.name}: {contest.shape.label}")
            arena.sit(contest)
            results.others, results.load_after = watch.others(), machine.load()
            keep(results, contests, options.out)
            if contest.sittings == 1:
                tell(table(contest.records))
    for record in (record for contest in contests if not contest.sittings for record in contest.records):
        record.failed = f"{NOT_BEGUN} within {minutes:g} minutes"
    keep(results, contests, options.out)
    draw(results, options.out)
    return results


def keep(results: Results, contests: Sequence[Contest], out: Path) -> None:
    """Writes what is known by now; contests that are still to come are not in it."""
    results.records = [r for one in contests for r in one.records if r.turns or r.failed]
    share_floors(results.records)
    assess(results.records)
    write_text(out / "results.json", json.dumps(results.to_json(), indent=1))
    write_text(out / "table.md", markdown(results))


class Watch:
    """How busy the machine is with work other than this run's, since the watch was made."""

    def __init__(self) -> None:
        self._begun, self._busy, self._own = time.monotonic(), machine.busy_seconds(), machine.own_seconds()

    def others(self) -> float:
        """Cores, those that a hypervisor took away among them."""
        busy: float = machine.busy_seconds() - self._busy - (machine.own_seconds() - self._own)
        return max(0.0, busy) / max(time.monotonic() - self._begun, 1e-9)


def comparison(results: Results) -> str:
    """What got slower than the stored baseline, in words."""
    words: str = summary(results, read_baselines())
    return words


def plan(options: Options, threads: int) -> list[tuple[Op, Shape]]:
    """All contests: the quick ones first, then the others of the tables, and last the curves."""
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
