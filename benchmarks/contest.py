"""Contests: one process a contestant, turns taken in an order that is drawn anew each round, and a record for each.

A contest has several sittings, with other contests in between. Each starts the processes again: two processes differ,
by where their memory lies, by more than the turns of one of them show, and a machine may be slow for a while.
A process that crashes, runs out of memory or takes too long costs its own record and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from alterrec_fast.benchmarks.contestants import Contestant, Op
from alterrec_fast.benchmarks.machine import measure_bandwidth, version_of
from alterrec_fast.benchmarks.records import FLOOR, Record, conclude
from alterrec_fast.benchmarks.worker import Shape, Tensors, describe, limit_memory, serve

PRELOAD = ["alterrec_fast.benchmarks.contestants"]


class ContestantError(Exception):
    """Why a contestant has no result."""


@dataclass(frozen=True)
class Budget:
    """How long a sitting may take, and how many a contest may have."""

    sittings: int  # at most
    rounds: int  # turns of a contestant in a sitting
    long: float  # seconds of a call from which two turns are enough
    turn: float  # seconds of one turn, in which short calls are repeated
    first: float  # seconds that making ready and the first call may take
    memory: int  # bytes of a process, 0 for any

    def turns(self, seconds: float) -> int:
        """Of a contestant in a sitting, when a call takes so many seconds.

        A call that lasts lives through what several turns of a short one do.
        """
        if seconds < self.long:
            return self.rounds
        return min(self.rounds, 2 if seconds < 4.0 * self.long else 1)

    def warms(self, seconds: float) -> bool:
        """Whether an untimed turn comes first, when the first call, beside others made ready, took so many seconds."""
        return seconds < 8.0 * self.long


class Process:
    """One contestant's process, as it looks from here: requests go in, answers or ContestantError come out."""

    def __init__(
        self, connection: Connection, wait: Callable[[float], int | None], kill: Callable[[], None], log: Path
    ):
        self._connection, self._wait, self._kill, self._log = connection, wait, kill, log

    def ask(self, request: Any, seconds: float) -> Any:
        try:
            self._connection.send(request)
            if not self._connection.poll(seconds):
                self.end(kill=True)
                raise ContestantError(f"stopped after {seconds:.0f} s")
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            code = self._wait(5.0)
            self.end(kill=True)
            raise ContestantError(how_it_ended(code, self._last_words())) from None
        if kind == "failed":
            self.end()
            raise ContestantError(value)
        return value

    def end(self, kill: bool = False) -> None:
        if not kill:
            try:
                self._connection.send("end")
                kill = self._wait(5.0) is None
            except OSError:
                kill = True
        if kill:
            self._kill()
            self._wait(5.0)
        self._connection.close()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return lines[-1][:200] if lines else ""


def how_it_ended(code: int | None, last_words: str) -> str:
    """An exit status as subprocess and multiprocessing give it, in words."""
    if code is None:
        ended = "the process does not answer"
    elif code >= 0:
        ended = f"the process ended with status {code}"
    else:
        ended = f"killed by {signal.Signals(-code).name}" + (", out of memory?" if -code == signal.SIGKILL else "")
    return f"{ended}: {last_words}" if last_words else ended


class Arena:
    """Where contests are held: a scratch folder, the interpreters of others, and what a contest may take."""

    def __init__(self, folder: Path, budget: Budget, pythons: dict[str, str], threads: int):
        self.folder, self.budget, self.pythons, self.threads = folder, budget, pythons, threads
        self._bandwidths: dict[int, float] = {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def bandwidth(self, threads: int) -> float:
        """Bytes a second that so many threads move."""
        if threads not in self._bandwidths:
            meter = self._fork(measure_bandwidth, (threads,))
            self._bandwidths[threads] = meter.ask("bandwidth", 60.0)
            meter.end()
        return self._bandwidths[threads]

    def sit(self, contest: Contest) -> None:
        """One sitting of all that have not failed, after which their records tell what is known."""
        begun = time.monotonic()
        op, shape = contest.op, contest.shape
        bandwidth = self.bandwidth(shape.threads)
        there = [runner for runner in contest.runners if runner.record.failed is None and not runner.record.stopped]
        paths = self.folder / "inputs.pt", self.folder / "truth.pt"
        try:
            maker = self._fork(_make_case, (op.make, op.truth, shape, paths))
            maker.ask("make", 10 * self.budget.first)
            maker.end()
        except ContestantError as failure:
            for runner in there:
                runner.fail(f"no inputs: {failure}")
            there = []
        tuners = [runner for runner in there if runner.contestant.task is not None and runner.contestant.task.tunes]
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(lambda runner: self._make_ready(runner, paths), [r for r in there if r not in tuners]))
        for runner in tuners:
            self._make_ready(runner, paths)
        self._take_turns(there, random.Random(f"{op.name} {shape} {contest.sittings}"))
        for runner in there:
            runner.end()
        for path in paths:
            path.unlink(missing_ok=True)
        contest.sittings += 1
        contest.cost = time.monotonic() - begun
        conclude(contest.records, op.products, op.traffic(shape) / bandwidth, op.operations(shape))

    def _make_ready(self, runner: _Runner, paths: tuple[Path, Path]) -> None:
        contestant, record = runner.contestant, runner.record
        try:
            if contestant.python:
                runner.process = self._spawn(contestant, record.shape, paths)
            else:
                runner.process = self._fork(serve, (contestant.task, record.shape, paths))
            ready = runner.process.ask("ready", self.budget.first)
        except ContestantError as failure:
            runner.fail(str(failure))
            return
        record.error = max(ready["error"], record.error or 0.0)
        record.peak_bytes = max(ready["peak"], record.peak_bytes or 0)
        record.extra_bytes = max(ready["extra"], record.extra_bytes or 0)
        runner.expected, record.version = ready["seconds"], ready["version"] or record.version
        record.turns.append([])
        if not ready["error"] <= record.allowed:
            runner.whole = 0  # what it did before is not to be trusted either
            runner.fail(f"wrong: error {ready['error']:.1e}, allowed {record.allowed:.0e}")

    def _take_turns(self, runners: list[_Runner], rng: random.Random) -> None:
        """An untimed turn of everyone whose calls are not very long, then the rounds, each in an order of its own."""
        for runner in runners:
            if self.budget.warms(runner.expected):
                runner.take_turn(0, self.budget, timed=False)
        turns = [self.budget.turns(runner.expected) for runner in runners]
        for i in range(self.budget.rounds):
            for place in rng.sample(range(len(runners)), len(runners)):
                if i < turns[place]:
                    runners[place].take_turn(i, self.budget)

    def _fork(self, target: Callable[..., None], arguments: tuple[Any, ...]) -> Process:
        here, there = self._context.Pipe()
        log = self.folder / f"log-{time.monotonic_ns()}.txt"
        entry = (target, there, arguments, log, self.budget.memory)
        process = self._context.Process(target=_enter, args=entry, daemon=True)
        process.start()
        there.close()

        def wait(seconds: float) -> int | None:
            process.join(seconds)
            return process.exitcode

        return Process(here, wait, process.kill, log)

    def _spawn(self, contestant: Contestant, shape: Shape, paths: tuple[Path, Path]) -> Process:
        """Under another interpreter, which runs peers.py."""
        interpreter = self.pythons.get(contestant.python, sys.executable)
        here, there = multiprocessing.Pipe()
        log = self.folder / f"log-{time.monotonic_ns()}.txt"
        command = [interpreter, str(Path(__file__).with_name("peers.py")), str(there.fileno())]
        try:
            with log.open("wb") as file:
                child = subprocess.Popen(command, stdout=file, stderr=file, pass_fds=[there.fileno()])
        except OSError as error:
            raise ContestantError(f"--python {contestant.python}: {error}") from None
        finally:
            there.close()

        def wait(seconds: float) -> int | None:
            try:
                return child.wait(seconds)
            except subprocess.TimeoutExpired:
                return None

        here.send((contestant.name, asdict(shape), [str(path) for path in paths], self.budget.memory))
        return Process(here, wait, child.kill, log)


class Contest:
    """The contestants that take a shape, over all sittings."""

    def __init__(self, op: Op, shape: Shape, threads: int):
        self.op, self.shape = op, replace(shape, threads=shape.threads or threads)
        self.runners = [_Runner(op, self.shape, one) for one in op.contestants if one.takes(shape)]
        self.sittings = 0
        self.cost = 0.0  # seconds that the last sitting took

    @property
    def records(self) -> list[Record]:
        return [runner.record for runner in self.runners]

    @property
    def over(self) -> bool:
        """Whether nobody is left who could sit again."""
        return all(record.failed or record.stopped for record in self.records)


class _Runner:
    """One contestant at one shape while the contest lasts."""

    def __init__(self, op: Op, shape: Shape, contestant: Contestant):
        self.contestant = contestant
        self.record = Record(
            op=op.name,
            shape=shape,
            contestant=contestant.name,
            ours=contestant.ours,
            version=version_of(contestant.package),
            allowed=contestant.allowed(shape),
            product=op.product(shape) if contestant.name == FLOOR else "",
        )
        self.process: Process | None = None
        self.expected = 0.0  # seconds of a call
        self.whole = 0  # sittings that it has got through

    def fail(self, why: str) -> None:
        """It takes part no more. The sittings that it has got through stay."""
        if self.process is not None:
            self.process.end(kill=True)
            self.process = None
        del self.record.turns[self.whole :]
        if self.whole:
            self.record.stopped = f"in sitting {self.whole + 1} {why}"
        else:
            self.record.failed = why

    def take_turn(self, number: int, budget: Budget, timed: bool = True) -> None:
        if self.process is None:
            return
        try:
            seconds = budget.turn if timed else 0.0
            turn = self.process.ask((number, seconds, self.expected), budget.first + 10 * self.expected)
        except ContestantError as failure:
            self.fail(str(failure))
            return
        self.expected = turn["seconds"]
        if timed:
            self.record.turns[-1].append(turn["seconds"])

    def end(self) -> None:
        """Ends the process, and takes what it has to tell beside its times, if these are its best."""
        if self.process is None:
            return
        try:
            detail = self.process.ask("detail", 10.0)
            self.process.end()
        except ContestantError as failure:
            self.fail(str(failure))
            return
        self.process = None
        self.whole = len(self.record.turns)
        if min(map(min, self.record.turns)) == min(self.record.turns[-1]):
            self.record.detail = detail


def _enter(
    target: Callable[..., None], connection: Connection, arguments: tuple[Any, ...], log: Path, memory: int
) -> None:
    """The first thing that a process of this package's interpreter does."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    limit_memory(memory)
    target(connection, *arguments)


def _make_case(
    connection: Connection,
    make: Callable[[Shape], Tensors],
    truth: Callable[[Shape, Tensors], Tensors],
    shape: Shape,
    paths: tuple[Path, Path],
) -> None:
    """A process that writes the inputs and what is true of them."""
    connection.recv()
    torch.set_num_threads(shape.threads)
    try:
        inputs = make(shape)
        torch.save(inputs, paths[0])
        torch.save(truth(shape, inputs), paths[1])
    except Exception as error:  # out of memory, mostly: every contestant's record tells it
        connection.send(("failed", describe(error)))
    else:
        connection.send(("done", None))
        connection.recv()
