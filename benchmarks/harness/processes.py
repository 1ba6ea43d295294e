"""The runner: a process for each implementation, which take turns in an order drawn anew each round.

A case is measured in several repetitions, with other cases in between. Each starts the processes again: two processes
differ, by where their memory lies, by more than the samples of one show, and a machine may be slow for a while. A
process that crashes, runs out of memory or takes too long costs its own record and nothing else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from .op import Implementation, Op
from .report import Record
from .worker import Case, Tensors, limit_memory, one_line, serve

PRELOAD = [__name__.rpartition(".harness")[0] + ".ops"]  # imported once, by the process that the others fork from
LONG = 0.5  # seconds of a call from which on two samples of a repetition are enough, and from four times that one


class ImplementationError(Exception):
    """Why an implementation has no result."""


@dataclass(frozen=True)
class Budget:
    """What a repetition of a case may take."""

    repetitions: int  # of a case, at most
    samples: int  # of an implementation in a repetition
    seconds: float  # of a sample, in which short calls are repeated
    first: float  # seconds that preparing and the first call may take
    memory: int  # bytes of a process, 0 for any

    def samples_of(self, seconds: float) -> int:
        """When a call takes so many seconds."""
        return min(self.samples, self.samples if seconds < LONG else 2 if seconds < 4 * LONG else 1)


class Process:
    """One implementation's process as seen from here: answers or ImplementationError."""

    def __init__(self, connection: Connection, handle: BaseProcess, log: Path):
        self._connection, self._handle, self._log = connection, handle, log

    def ask(self, request: Any, seconds: float) -> Any:
        try:
            self._connection.send(request)
            if not self._connection.poll(seconds):
                self.end()
                raise ImplementationError(f"stopped after {seconds:.0f} s")
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            code = self._wait()
            self.end()
            lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
            raise ImplementationError(how_it_ended(code, lines[-1][:200] if lines else "")) from None
        if kind == "failed":
            self.end()
            raise ImplementationError(value)
        return value

    def end(self) -> None:
        self._handle.kill()
        self._wait()
        self._connection.close()

    def _wait(self) -> int | None:
        """The exit status, or None after five seconds."""
        self._handle.join(5.0)
        return self._handle.exitcode


def how_it_ended(code: int | None, last_line: str) -> str:
    """An exit status as multiprocessing gives it, in words."""
    if code is None:
        ended = "the process does not answer"
    elif code >= 0:
        ended = f"the process ended with status {code}"
    else:
        ended = f"killed by {signal.Signals(-code).name}" + (", out of memory?" if -code == signal.SIGKILL else "")
    return f"{ended}: {last_line}" if last_line else ended


class Measurement:
    """All implementations that take a case, over its repetitions."""

    def __init__(self, op: Op, case: Case, threads: int):
        self.op, self.case = op, replace(case, threads=case.threads or threads)
        self.takers = [_Taker(op, self.case, one) for one in op.implementations if one.takes(case)]
        self.repetitions = 0
        self.cost = 0.0  # seconds that the last repetition took

    @property
    def records(self) -> list[Record]:
        return [taker.record for taker in self.takers]

    @property
    def over(self) -> bool:
        """Whether nothing is left to repeat."""
        return all(record.failed for record in self.records)


class _Taker:
    """One implementation at one case."""

    def __init__(self, op: Op, case: Case, implementation: Implementation):
        self.implementation = implementation
        self.record = Record.of(op, case, implementation)
        self.process: Process | None = None
        self.expected = 0.0  # seconds of a call
        self.complete = 0  # repetitions

    def fail(self, why: str) -> None:
        """It takes part no more; the samples of its complete repetitions stay."""
        if self.process is not None:
            self.process.end()
            self.process = None
        del self.record.samples[self.complete :]
        self.record.failed = f"in repetition {self.complete + 1} {why}" if self.complete else why

    def take(self, number: int, budget: Budget, timed: bool = True) -> None:
        """One sample, or an untimed call."""
        if self.process is None:
            return
        try:
            limit = budget.first + 10 * self.expected
            seconds = self.process.ask((number, budget.seconds if timed else 0.0, self.expected), limit)
        except ImplementationError as failure:
            self.fail(str(failure))
            return
        self.expected = seconds
        if timed:
            self.record.samples[-1].append(seconds)

    def end(self) -> None:
        """The repetition is complete."""
        if self.process is not None:
            self.process.end()
            self.process, self.complete = None, len(self.record.samples)


class Runner:
    """Measures cases in a scratch folder."""

    def __init__(self, folder: Path, budget: Budget, threads: int):
        self.folder, self.budget, self.threads = folder, budget, threads
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def repeat(self, measurement: Measurement) -> None:
        """One repetition with all implementations that have not failed."""
        begun = time.monotonic()
        op, case = measurement.op, measurement.case
        takers = [taker for taker in measurement.takers if not taker.record.failed]
        inputs, truth = self.folder / "inputs.pt", Tensors()
        try:
            torch.set_num_threads(case.threads)
            with contextlib.chdir(self.folder):  # a trainer leaves files where it runs
                tensors = op.make(case)
                truth = op.truth(case, tensors)
            torch.save(tensors, inputs)
            del tensors
        except Exception as error:  # out of memory, mostly: every record tells it
            for taker in takers:
                taker.fail(f"no inputs: {one_line(error)}")
            takers = []
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(lambda taker: self._start(op, taker, inputs), takers))
        for taker in takers:
            self._check(op, taker, truth)
        self._interleave(takers, random.Random(f"{op.name} {case} {measurement.repetitions}"))
        for taker in takers:
            taker.end()
        inputs.unlink(missing_ok=True)
        measurement.repetitions += 1
        measurement.cost = time.monotonic() - begun

    def _start(self, op: Op, taker: _Taker, inputs: Path) -> None:
        """Starts the process and has it prepare and call the implementation once."""
        implementation, record = taker.implementation, taker.record
        output = self._output(taker)
        try:
            taker.process = self._fork((implementation.load, implementation.prepare, record.case, inputs, output))
            first = taker.process.ask("first", self.budget.first)
        except ImplementationError as failure:
            taker.fail(str(failure))
            return
        record.peak_bytes = max(first["peak"], record.peak_bytes or 0)
        record.extra_bytes = max(first["extra"], record.extra_bytes or 0)
        record.detail, taker.expected = first["detail"], first["seconds"]
        record.samples.append([])

    def _check(self, op: Op, taker: _Taker, truth: Tensors) -> None:
        """Nothing is timed before its result was compared with the truth."""
        if taker.process is None:
            return
        output, record = self._output(taker), taker.record
        try:
            error = op.error_of(taker.implementation, torch.load(output), truth)
            why = "" if error <= record.allowed else f"wrong: error {error:.1e}, allowed {record.allowed:.0e}"
            record.error = max(error, record.error or 0.0)
        except ValueError as wrong:
            why = str(wrong)
        output.unlink()
        if why:
            taker.complete = 0  # what it did before is not to be trusted either
            taker.fail(why)

    def _interleave(self, takers: Sequence[_Taker], rng: random.Random) -> None:
        """An untimed call of all but the slowest, then the rounds, each in an order of its own."""
        for taker in takers:
            if taker.expected < 8 * LONG:
                taker.take(0, self.budget, timed=False)
        samples = [self.budget.samples_of(taker.expected) for taker in takers]
        for number in range(self.budget.samples):
            for place in rng.sample(range(len(takers)), len(takers)):
                if number < samples[place]:
                    takers[place].take(number, self.budget)

    def _output(self, taker: _Taker) -> Path:
        return self.folder / f"output-{id(taker)}.pt"

    def _fork(self, arguments: tuple[Any, ...]) -> Process:
        here, there = self._context.Pipe()
        log = self.folder / f"log-{time.monotonic_ns()}.txt"
        entry = (there, arguments, log, self.budget.memory)
        process = self._context.Process(target=_enter, args=entry, daemon=True)
        process.start()
        there.close()
        return Process(here, process, log)


def _enter(connection: Connection, arguments: tuple[Any, ...], log: Path, memory: int) -> None:
    """What an implementation's process begins with."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    limit_memory(memory)
    serve(connection, *arguments)
