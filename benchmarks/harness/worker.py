"""The process of one implementation: prepares it, calls it once to be checked, and times it on request.

The other end of the connection is processes.Process; each request is answered with ("done", value) or ("failed", why).
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BATCHES = 4  # batches of queries that successive calls go round
SHORT = 0.1  # seconds of a call below which a warm-up call precedes each sample: other processes used the caches

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One setting of an op: B sessions, V items, width d, and what the op takes beside them."""

    items: int
    width: int
    sessions: int = 512
    dtype: str = "fp32"  # of the inputs, or "bf16"
    start: int = 0  # ranks [start, stop)
    stop: int = 0
    negatives: int = 0  # of each session
    shared: bool = False  # whether all sessions share the negatives
    data: str = "random"  # or "clustered", "popular": how embeddings are drawn
    training: bool = False  # whether `sessions` is the number of targets of a training batch
    threads: int = 0  # 0: as many as the run is told to use
    device: str = "cpu"
    figure: str = ""  # the figure that this case is a point of; "" for the cases of the tables

    @property
    def label(self) -> str:
        """As tables and the stored baseline call it."""
        words = [f"V = {self.items:,}", f"d = {self.width}"]
        if self.stop:
            words.append(f"ranks {self.start}:{self.stop}" if self.start else f"k = {self.stop}")
        if self.negatives:
            words.append(f"{self.negatives:,} negatives{' shared' if self.shared else ''}")
        if self.training:
            words.append(f"{self.sessions} targets a batch")
        words += [self.dtype] if self.data == "random" else [self.dtype, self.data]
        if self.threads:
            words.append(f"{self.threads} threads" if self.threads > 1 else "1 thread")
        return ", ".join(words)

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


@dataclass(frozen=True)
class Call:
    """An implementation that is ready to be timed."""

    run: Callable[[int], Any]  # on batch i % BATCHES
    read: Callable[[Any], Tensors] = lambda result: result  # what is compared with the truth, from what a call returns
    detail: dict[str, float] = field(default_factory=dict)  # more to record, such as the targets of a call
    graph: Callable[[int], Any] | None = None  # as `run`; captures itself as a CUDA graph


Prepare = Callable[[Case, Tensors], Call]


class Memory:
    """Resident memory of this process: `held` when this was made, and the most since then (Linux).

    Where the system does not tell, the most is that of the whole process, which is never less.
    """

    def __init__(self) -> None:
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # else what imports freed would be used again and seem to cost nothing
        self.held = _status("VmRSS") or _max_rss()
        self.restart()

    def restart(self) -> None:
        """Count the peak from here."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return

    def peak(self) -> int:
        """Bytes resident at the peak, `held` included."""
        return _status("VmHWM") or _max_rss()

    def peak_mib(self) -> float:
        """MiB at the peak beyond `held`."""
        return (self.peak() - self.held) / 2**20


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)


def _max_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def limit_memory(size: int) -> None:
    """An allocation beyond `size` bytes fails in this process rather than in another one; 0 for no limit."""
    if size:
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def serve(
    connection: Connection, load: Callable[[], None], prepare: Prepare, case: Case, inputs: Path, output: Path
) -> None:
    """Answers requests until it is killed. `load` does what is not to be measured, such as imports.

    Works in the folder of the inputs, which is gone after the run, for libraries that leave files where they run.
    """
    os.chdir(inputs.parent)
    torch.set_num_threads(case.threads)
    call = Call(lambda i: None)
    while True:
        request = connection.recv()
        try:
            if request == "first":
                load()
                call, answer = _first_call(prepare, case, inputs, output)
            else:
                answer = sample(call, *request)
        except Exception as error:  # whatever it is, it belongs into this implementation's record
            connection.send(("failed", one_line(error)))
        else:
            connection.send(("done", answer))


def _first_call(prepare: Prepare, case: Case, inputs: Path, output: Path) -> tuple[Call, Any]:
    """Prepares the implementation, calls it, and leaves what is compared with the truth in `output`."""
    tensors: Tensors = torch.load(inputs, mmap=True)
    for tensor in tensors.values():
        tensor.view(torch.uint8).max()  # touches every page, so that inputs are resident before memory is measured
    memory = Memory()
    call = prepare(case, tensors)
    memory.restart()  # what preparing needed for a while is not the call's; an index that stays is
    begun = time.perf_counter()
    result = call.run(0)
    seconds, peak = time.perf_counter() - begun, memory.peak()
    torch.save(call.read(result), output)
    sizes = {"peak": peak, "extra": max(0, peak - memory.held)}
    return call, {"seconds": seconds, "detail": call.detail, **sizes}


def sample(call: Call, number: int, budget: float, expected: float) -> float:
    """Seconds of the median of as many calls as fit into `budget` seconds, one at least."""
    if expected < SHORT:
        call.run(number)
    taken: list[float] = []
    while not taken or sum(taken) + expected < budget:
        begun = time.perf_counter()
        call.run(number + len(taken))
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def one_line(error: BaseException) -> str:
    """An exception on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")[:300]
