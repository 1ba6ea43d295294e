"""The process of one contestant: makes it ready, compares its result, and times it when it is told to.

Knows the standard library and torch only, since it also runs under other people's interpreters (`peers.py`). The other
end of the connection is `contest.Process`; each request is answered with ("done", value) or ("failed", message).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BATCHES = 4  # batches of queries that the calls of a contestant go round
SHORT = 0.1  # seconds below which a call is preceded by an untimed one, for caches that the other processes have used


Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What an op is measured at: B sessions, V items, d width, and what the op takes beside them."""

    items: int
    width: int
    sessions: int = 512
    precision: str = "fp32"  # of the inputs
    start: int = 0  # ranks [start, stop)
    stop: int = 0
    negatives: int = 0  # of each session
    shared: bool = False  # whether all sessions share the negatives
    training: bool = False  # whether sessions are those of training data, `sessions` of whose targets make a batch
    threads: int = 0  # 0 stands for what the run is told
    figure: str = ""  # "" where the shape is one of the table, else the figure that it is measured for

    @property
    def label(self) -> str:
        """As the tables call it."""
        parts = [f"V = {self.items:,}", f"d = {self.width}"]
        if self.stop:
            best = not self.start and self.figure != "form"
            parts.append(f"k = {self.stop}" if best else f"ranks {self.start}:{self.stop}")
        if self.negatives:
            parts.append(f"{self.negatives:,} negatives{' shared' if self.shared else ''}")
        if self.training:
            parts.append(f"{self.sessions} targets a batch")
        parts.append(self.precision)
        if self.threads:
            parts.append(f"{self.threads} threads" if self.threads > 1 else "1 thread")
        return ", ".join(parts)


@dataclass(frozen=True)
class Call:
    """A contestant that is ready: its calls are timed, and `read` turns what a call returns into what is compared."""

    run: Callable[[int], Any]  # of batch i % BATCHES
    read: Callable[[Any, Tensor], Tensors] = lambda result, rows: result  # may leave out rows other than these
    detail: Callable[[], dict[str, float]] = dict  # more to record when the timing is over


@dataclass(frozen=True)
class Task:
    """What a worker is asked to make ready."""

    prepare: Callable[[Shape, Tensors], Call]  # from the inputs
    compare: Callable[[Tensors, Tensors], float]  # found, truth -> error; raises ValueError for what is no result
    modules: tuple[str, ...] = ()  # imported before memory is counted
    warm: Callable[[], None] | None = None  # what else is not to be counted, such as a compiler's own memory
    package: str = ""  # whose version under this interpreter is wanted
    tunes: bool = False  # whether `prepare` times settings, so that nobody else may be at work meanwhile


@dataclass(frozen=True)
class Ready:
    """How making ready went; bytes by the operating system's account, those of the inputs among `peak`."""

    error: float
    seconds: float  # of the first call
    peak: int
    extra: int  # beyond what was resident before the contestant was made ready
    version: str  # of the task's package


def limit_memory(size: int) -> None:
    """An allocation beyond `size` bytes fails in this process rather than in another one."""
    if size > 0:
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def serve(connection: Connection, task: Task, shape: Shape, paths: tuple[Path, Path]) -> None:
    """Answers requests until it is told to end; `paths` lead to the inputs and to the truth about them.

    Works in the folder of the inputs, which is gone after the run, for libraries that leave files where they run.
    """
    os.chdir(paths[0].parent)
    torch.set_num_threads(shape.threads)
    call: Call | None = None
    while True:
        request = connection.recv()
        if request == "end":
            return
        try:
            if request == "ready":
                call, ready = _make_ready(task, shape, paths)
                answer: Any = vars(ready)
            elif request == "detail":
                assert call is not None
                answer = call.detail()
            else:
                assert call is not None
                answer = _turn(call, *request)
        except Exception as error:  # whatever it is, it belongs into this contestant's record
            connection.send(("failed", describe(error)))
        else:
            connection.send(("done", answer))


def describe(error: BaseException) -> str:
    """An exception on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")[:300]


def _make_ready(task: Task, shape: Shape, paths: tuple[Path, Path]) -> tuple[Call, Ready]:
    for module in task.modules:
        importlib.import_module(module)
    if task.warm is not None:
        task.warm()
    inputs: Tensors = torch.load(paths[0], mmap=True)
    for tensor in inputs.values():
        tensor.view(torch.uint8).max()  # touches every page, so that it is resident before memory is counted
    before = resident()
    call = task.prepare(shape, inputs)
    forget_peak()  # what was needed for a while to make ready is not the call's; an index that stays is
    begun = time.perf_counter()
    result = call.run(0)
    seconds = time.perf_counter() - begun
    peak = peak_resident()
    truth: Tensors = torch.load(paths[1], mmap=True)
    error = task.compare(call.read(result, truth["rows"]), truth)
    version = f"{task.package} {importlib.metadata.version(task.package)}" if task.package else ""
    return call, Ready(error, seconds, peak, max(0, peak - before), version)


def _turn(call: Call, number: int, budget: float, expected: float) -> dict[str, float]:
    """The median call of one turn: one call, or as many as `budget` seconds have room for."""
    if expected < SHORT:
        call.run(number)
    taken: list[float] = []
    while not taken or sum(taken) + expected < budget:
        begun = time.perf_counter()
        call.run(number + len(taken))
        taken.append(time.perf_counter() - begun)
    return {"seconds": statistics.median(taken)}


def resident() -> int:
    """Bytes of this process in memory; where the system does not tell, the most there ever were."""
    return _status("VmRSS") or _max_rss()


def peak_resident() -> int:
    """The most bytes in memory since forget_peak(); where the system does not tell, since the process started."""
    return _status("VmHWM") or _max_rss()


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # the peak is then that of the whole process, which is never less
        return


def _status(name: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    line = next((line for line in text.splitlines() if line.startswith(name + ":")), None)
    return int(line.split()[1]) * 1024 if line else 0


def _max_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
