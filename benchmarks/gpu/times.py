"""Times on a GPU over the tables of bench_*.py: `python -m alterrec_fast.benchmarks.gpu.times GROUP --out DIR`.

By CUDA events with the L2 cache flushed, eagerly and as a captured CUDA graph, which leaves Python's part out. The
implementations of a case take turns on the same inputs, in this process; each result is compared with float64 before
it is timed. Writes results.json and table.md after each case, so that a crash costs nothing that was measured before.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

import torch

from ..harness.machine import Machine
from ..harness.op import Implementation, Op
from ..harness.report import NOT_BEGUN, Record, Results
from ..harness.worker import Case, Tensors, one_line
from ..ops import OPS

GROUPS = {"paper": range(100_000), "1M": range(100_000, 2_000_000), "10M": range(2_000_000, 1 << 40)}  # of V
SAMPLES = 20  # of an implementation, at most
GRAPH_BYTES = 2 << 30  # a graph keeps the memory of its call: none is captured beyond


class Gpu:
    """What is asked of the current CUDA device."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._flushed = torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")

    def seconds(self, call: Callable[[], object]) -> float:
        """Device time of one call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """The most memory that tensors take during one call, beyond what they take before."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """A function that replays the call as a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()  # kernels are compiled and loaded before they can be captured
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def release(self) -> None:
        """Gives cached memory back; raises where the device does not recover from an error."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Taker:
    """One implementation at one case: what is called, and its record."""

    def __init__(self, op: Op, case: Case, implementation: Implementation):
        self.implementation = implementation
        self.record = Record.of(op, case, implementation)
        self.calls: list[Callable[[], object]] = []  # eager, and where it can be captured its graph

    def prepare(self, gpu: Gpu, op: Op, inputs: Tensors, truth: Tensors) -> None:
        """Raises where the implementation can't be called, or is wrong."""
        call, record = self.implementation.prepare(self.record.case, inputs), self.record
        record.error = op.error_of(self.implementation, call.read(call.run(0)), truth)
        if not record.error <= record.allowed:
            raise ValueError(f"wrong: error {record.error:.1e}, allowed {record.allowed:.0e}")

        def eager() -> object:
            return call.run(0)

        self.calls, record.samples = [eager], [[]]
        record.detail |= call.detail
        record.extra_bytes = gpu.peak_bytes(eager)
        if call.graph is not None:
            self.calls.append(partial(call.graph, 0))
        elif record.extra_bytes <= GRAPH_BYTES:
            try:
                graph = gpu.capture(eager)
                graph()
                self.calls.append(graph)
            except RuntimeError:  # something in the call waits for the device: it has no graph, and no time of one
                gpu.release()

    def sample(self, gpu: Gpu) -> None:
        """A warm-up call and a timed one, eager and as a graph."""
        seconds = []
        for call in self.calls:
            call()
            seconds.append(gpu.seconds(call))
        self.record.samples[0].append(seconds[0])
        if len(seconds) > 1:
            self.record.detail["graph"] = min(seconds[1], self.record.detail.get("graph", seconds[1]))


def measure(gpu: Gpu, op: Op, case: Case, deadline: float) -> list[Record]:
    """Times all implementations of one case in turn until the deadline (monotonic), each once at least."""
    inputs = op.make(case)
    truth = op.truth(case, inputs)
    gpu.release()  # what float64 took: no graph can be captured while the allocator must give memory back
    takers = [Taker(op, case, implementation) for implementation in op.implementations if implementation.takes(case)]
    ready: list[Taker] = []
    for taker in takers:
        if ready and time.monotonic() > deadline:
            taker.record.failed = f"{NOT_BEGUN}: out of time"
            continue
        try:
            taker.prepare(gpu, op, inputs, truth)
            ready.append(taker)
        except Exception as error:  # whatever it is, it belongs into this implementation's record
            _give_up(gpu, taker, error)
    for number in range(SAMPLES):
        turn = number % max(1, len(ready))
        for taker in ready[turn:] + ready[:turn]:
            if number and time.monotonic() > deadline:
                break
            try:
                taker.sample(gpu)
            except Exception as error:
                ready.remove(taker)
                _give_up(gpu, taker, error)
    return [taker.record for taker in takers]


def _give_up(gpu: Gpu, taker: Taker, error: Exception) -> None:
    taker.record.failed, taker.record.samples, taker.calls = one_line(error), [], []
    gpu.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--op", default="", help="only ops whose name contains this")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which nothing new is begun")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    command, today = shlex.join(sys.argv), datetime.now().date().isoformat()
    torch.cuda.set_stream(torch.cuda.Stream())  # on the default one no step could capture itself
    gpu, results = Gpu(), Results(command, today, Machine.this(torch.get_num_threads()), 0.0)
    plan = [(op, case) for op in OPS if options.op in op.name for case in op.gpu if case.items in GROUPS[options.group]]
    for number, (op, case) in enumerate(plan):
        now = time.monotonic()
        if now > deadline:
            break
        results.records += measure(gpu, op, case, now + (deadline - now) / (len(plan) - number))
        results.write(options.out)
        gpu.release()


if __name__ == "__main__":
    main()
