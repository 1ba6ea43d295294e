"""Contests: one process a contestant, turns taken in an order that is drawn anew each round, and a record for each.

A contest has several sittings. Each starts the processes again, since two processes differ, by where their memory lies,
by more than the turns of one of them show.
A process that crashes, runs out of memory or takes too long costs its own record and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import statistics
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

SHORT_FLOOR = 0.03  # seconds of a call: what comes and goes with a process is then a large part of it
PRELOAD = ["alterrec_fast.benchmarks.contestants"]


class ContestantError(Exception):
    """Why a contestant has no result."""


@dataclass(frozen=True)
class Budget:
    """How long a contest may take."""

    least: int  # sittings, of ours and the floor at least; the others are in the first at least
    sittings: int  # at most
    rounds: int  # turns of a contestant in a sitting
    long: float  # seconds of a call from which two rounds are enough, and the first call has been warm-up enough
    turn: float  # seconds of one turn, in which short calls are repeated
    first: float  # seconds that making ready and the first call may take
    memory: int  # bytes of a process, 0 for any
    floors: int = 1  # processes of a floor that is short


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

    def hold(self, op: Op, shape: Shape, seconds: float) -> list[Record]:
        """A record for each contestant that takes the shape; in so many `seconds` if the least sittings fit them."""
        begun = time.monotonic()
        shape = replace(shape, threads=shape.threads or self.threads)
        bandwidth = self.bandwidth(shape.threads)
        runners = [_Runner(op, shape, contestant) for contestant in op.contestants if contestant.takes(shape)]
        paths = self.folder / "inputs.pt", self.folder / "truth.pt"
        try:
            maker = self._fork(_make_case, (op.make, op.truth, shape, paths))
            maker.ask("make", 10 * self.budget.first)
            maker.end()
        except ContestantError as failure:
            for runner in runners:
                runner.record.failed = f"no inputs: {failure}"
            return [runner.record for runner in runners]
        for sitting in range(self.budget.sittings):
            # Ours and the floor sit down again in any case, those of the others for whom there is time.
            left = seconds - (time.monotonic() - begun)
            there = self._seated(runners, left) if sitting else runners
            if not there or (sitting >= self.budget.least and sum(runner.cost for runner in there) > left):
                break
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(lambda runner: self._make_ready(runner, paths), there))
            twins = self._twins(there, op, shape, paths)
            self._take_turns([*there, *twins], random.Random(f"{op.name} {shape} {sitting}"))
            for runner in [*there, *twins]:
                runner.end()
            for runner in there:
                if runner.contestant.name == FLOOR:
                    runner.join(twins)
        for runner in runners:
            runner.finish()
        records = [runner.record for runner in runners]
        conclude(records, op.products, op.traffic(shape) / bandwidth, op.operations(shape))
        for path in paths:
            path.unlink()
        return records

    def _seated(self, runners: list[_Runner], seconds: float) -> list[_Runner]:
        """Who sits down again when so many `seconds` are left: the quickest of the others share half of them."""
        there = [runner for runner in runners if runner.record.failed is None]
        chosen = [runner for runner in there if runner.always]
        spent, limit = sum(runner.cost for runner in chosen), seconds / 2
        for runner in sorted(there, key=lambda runner: runner.cost):
            if not runner.always and spent + runner.cost <= limit:
                chosen.append(runner)
                spent += runner.cost
        return chosen

    def _twins(self, there: list[_Runner], op: Op, shape: Shape, paths: tuple[Path, Path]) -> list[_Runner]:
        """More processes of a short floor: every ratio of the sitting hangs on it."""
        floors = [runner for runner in there if runner.contestant.name == FLOOR and runner.record.failed is None]
        short = [runner for runner in floors if runner.expected < SHORT_FLOOR]
        twins = [_Runner(op, shape, runner.contestant) for runner in short for _ in range(self.budget.floors - 1)]
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(lambda runner: self._make_ready(runner, paths), twins))
        return twins

    def _make_ready(self, runner: _Runner, paths: tuple[Path, Path]) -> None:
        contestant, record = runner.contestant, runner.record
        begun = time.monotonic()
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
        runner.cost = (time.monotonic() - begun) / self.threads  # so many make ready at once
        record.turns.append([])
        if not ready["error"] <= record.allowed:
            runner.fail(f"wrong: error {ready['error']:.1e}, allowed {record.allowed:.0e}")

    def _take_turns(self, runners: list[_Runner], rng: random.Random) -> None:
        """An untimed turn of everyone, then the rounds, each in an order of its own."""
        for runner in runners:
            if runner.expected < self.budget.long:
                runner.take_turn(0, self.budget, timed=False)
        for i in range(self.budget.rounds):
            for runner in rng.sample(runners, len(runners)):
                if i < 2 or runner.expected < self.budget.long:
                    runner.take_turn(i, self.budget)

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
        )
        self.process: Process | None = None
        self.expected = 0.0  # seconds of a call
        self.cost = 0.0  # seconds of its last sitting: making ready, and turns
        self.cpu: list[float] = []

    def fail(self, why: str) -> None:
        self.record.failed = why
        if self.process is not None:
            self.process.end(kill=True)

    @property
    def always(self) -> bool:
        """Whether it is in every sitting."""
        return bool(self.contestant.ours or self.contestant.name == FLOOR)

    def take_turn(self, number: int, budget: Budget, timed: bool = True) -> None:
        if self.record.failed is not None or self.process is None:
            return
        begun = time.monotonic()
        try:
            seconds = budget.turn if timed else 0.0
            turn = self.process.ask((number, seconds, self.expected), budget.first + 10 * self.expected)
        except ContestantError as failure:
            self.fail(str(failure))
            return
        self.cost += time.monotonic() - begun
        self.expected = turn["seconds"]
        if timed:
            self.record.turns[-1].append(turn["seconds"])
            self.cpu.append(turn["cpu_seconds"])

    def join(self, twins: list[_Runner]) -> None:
        """Each turn of the sitting becomes the middle one of its own and the twins' in the same round."""
        others = [twin for twin in twins if twin.record.failed is None]
        self.cost += sum(twin.cost for twin in others)
        if self.record.failed is None and others:
            rounds = zip(self.record.turns[-1], *(twin.record.turns[-1] for twin in others), strict=True)
            self.record.turns[-1] = [statistics.median(turns) for turns in rounds]

    def end(self) -> None:
        """Ends the process, and takes what it has to tell beside its times."""
        if self.record.failed is not None or self.process is None:
            return
        try:
            self.record.detail = self.process.ask("detail", 10.0)
            self.process.end()
        except ContestantError as failure:
            self.fail(str(failure))

    def finish(self) -> None:
        if self.record.failed is None:
            self.record.seconds = statistics.median(turn for turns in self.record.turns for turn in turns)
            self.record.cpu_seconds = statistics.median(self.cpu)


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
