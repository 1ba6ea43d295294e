"""Times on a GPU over the tables of bench_*.py: `python -m alterrec_fast.benchmarks.gpu.times GROUP --out FILE`.

By CUDA events with the L2 cache flushed, eagerly and as a captured CUDA graph, which leaves Python's part out. The
implementations of a case take turns on the same inputs, in this process; each result is compared with float64 before
it is timed. Writes a JSON line for each, so that a crash costs nothing that was measured before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..harness.op import Implementation, Op
from ..harness.worker import Case, Tensors, one_line
from ..ops import OPS

GROUPS = {"paper": range(100_000), "1M": range(100_000, 2_000_000), "10M": range(2_000_000, 1 << 40)}  # of V
SAMPLES = 20  # of an implementation, at most
GRAPH_BYTES = 2 << 30  # a graph keeps the memory of its call: none is captured beyond

Write = Callable[[dict[str, Any]], None]


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


def ceilings(gpu: Gpu) -> dict[str, float]:
    """The best of several: bytes a second of a copy, operations a second of square products in each dtype."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = {"copy": 2.0 * source.numel() / min(gpu.seconds(lambda: target.copy_(source)) for _ in range(10))}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a = torch.randn(8_192, 8_192, device="cuda").to(dtype)
        torch.mm(a, a)
        best[name] = 2.0 * len(a) ** 3 / min(gpu.seconds(lambda a=a: torch.mm(a, a)) for _ in range(8))  # type: ignore[misc]
    return best


class Timed:
    """One implementation at one case: what is called, and what is known."""

    def __init__(self, op: Op, case: Case, implementation: Implementation):
        self.implementation = implementation
        self.record: dict[str, Any] = {
            "op": op.name, "case": case.label, "implementation": implementation.name, "ours": implementation.ours,
            "dtype": case.dtype, "bytes": op.traffic(case), "operations": op.products * op.operations(case),
        }  # fmt: skip
        self.calls: dict[str, Callable[[], object]] = {}  # "eager", and "graph" where there is one
        self.samples: dict[str, list[float]] = {}

    def prepare(self, gpu: Gpu, op: Op, case: Case, inputs: Tensors, truth: Tensors) -> None:
        """Raises where the implementation can't be called, or is wrong."""
        call = self.implementation.job().prepare(case, inputs)
        error = op.error_of(self.implementation, call.read(call.run(0)), truth)
        self.record["error"] = error
        if not error <= op.allowed(self.implementation, case):
            raise ValueError(f"wrong: error {error:.1e}, allowed {op.allowed(self.implementation, case):.0e}")
        self.calls["eager"] = lambda: call.run(0)
        self.record["peak_bytes"] = gpu.peak_bytes(self.calls["eager"])
        if self.record["peak_bytes"] > GRAPH_BYTES:
            self.record["no_graph"] = "too large"
        else:
            try:
                self.calls["graph"] = gpu.capture(self.calls["eager"])
                self.calls["graph"]()
            except RuntimeError as error_of_capture:
                self.calls.pop("graph", None)
                self.record["no_graph"] = one_line(error_of_capture)
        self.samples = {kind: [] for kind in self.calls}

    def sample(self, gpu: Gpu) -> None:
        """A warm-up call and a timed one of each kind."""
        for kind, call in self.calls.items():
            call()
            self.samples[kind].append(gpu.seconds(call))

    def summary(self) -> dict[str, Any]:
        """The record, with {"least", "quartiles"} of each kind of call."""
        for kind, seconds in self.samples.items():
            quartiles = statistics.quantiles(seconds * 2 if len(seconds) == 1 else seconds, method="inclusive")
            self.record[kind] = {"least": min(seconds), "quartiles": quartiles, "samples": len(seconds)}
        return self.record


def measure(gpu: Gpu, op: Op, case: Case, deadline: float, write: Write) -> None:
    """Times all implementations of one case in turn until the deadline (monotonic), each once at least."""
    inputs = op.make(case)
    truth = op.truth(case, inputs)
    ready: list[Timed] = []

    def give_up(one: Timed, error: Exception) -> None:
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        write({**one.record, "failed": one_line(error), "out_of_memory": out_of_memory})
        one.calls = {}
        gpu.release()

    for implementation in op.implementations:
        if not implementation.takes(case):
            continue
        one = Timed(op, case, implementation)
        if ready and time.monotonic() > deadline:
            write({**one.record, "failed": "not begun: out of time", "out_of_memory": True})
            continue
        try:
            one.prepare(gpu, op, case, inputs, truth)
            ready.append(one)
        except Exception as error:  # whatever it is, it belongs into this implementation's record
            give_up(one, error)
    for number in range(SAMPLES):
        for one in list(ready[number % max(1, len(ready)) :] + ready[: number % max(1, len(ready))]):
            if number and time.monotonic() > deadline:
                break
            try:
                one.sample(gpu)
            except Exception as error:
                ready.remove(one)
                give_up(one, error)
    for one in ready:
        write(one.summary())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=[*GROUPS, "ceilings"])
    parser.add_argument("--op", default="", help="only ops whose name contains this")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which nothing new is begun")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds

    def write(record: dict[str, Any]) -> None:
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")

    gpu = Gpu()
    if options.group == "ceilings":
        write({"ceilings": ceilings(gpu)})
        return
    cases = [
        (op, case) for op in OPS for case in op.gpu if case.items in GROUPS[options.group] and options.op in op.name
    ]
    for number, (op, case) in enumerate(cases):
        now = time.monotonic()
        if now > deadline:
            write({"op": op.name, "case": case.label, "implementation": "all", "failed": "not begun: out of time"})
            continue
        measure(gpu, op, case, now + (deadline - now) / (len(cases) - number), write)
        gpu.release()


if __name__ == "__main__":
    main()
