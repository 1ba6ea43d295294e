"""Implementations of a made-up op, doubling a vector, for the tests of `alterrec-fast bench`."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from alterrec_fast.benchmarks.harness.op import BASELINE, Implementation, Op
from alterrec_fast.benchmarks.harness.worker import Call, Case, Tensors

CASE = Case(items=64, width=4, sessions=8)
HUGE = 64 << 30  # bytes that no limit in these tests allows


def make(case: Case) -> Tensors:
    return {"x": torch.arange(case.items, dtype=torch.float32)}


def make_nothing(case: Case) -> Tensors:
    raise MemoryError("no memory for the inputs")


def truth(case: Case, inputs: Tensors) -> Tensors:
    return {"double": inputs["x"].double() * 2}


def error(result: Tensors, truth: Tensors) -> float:
    return float((result["y"].double() - truth["double"]).abs().max())


def doubles(case: Case, inputs: Tensors) -> Call:
    return Call(lambda i: {"y": inputs["x"] * 2}, detail={"answer": 42.0})


def sleeps(case: Case, inputs: Tensors) -> Call:
    def run(i: int) -> Tensors:
        time.sleep(0.02)
        return {"y": inputs["x"] * 2}

    return Call(run)


def holds(case: Case, inputs: Tensors) -> Call:
    """Holds 64 MiB while it runs."""
    return Call(lambda i: {"y": inputs["x"] * 2 * torch.ones(16 << 20)[0]})


def slow_at_first(case: Case, inputs: Tensors) -> Call:
    calls: list[int] = []

    def run(i: int) -> Tensors:
        calls.append(i)
        time.sleep(0.3 if len(calls) <= 2 else 0.0)
        return {"y": inputs["x"] * 2}

    return Call(run)


def triples(case: Case, inputs: Tensors) -> Call:
    return Call(lambda i: {"y": inputs["x"] * 3})


def not_a_number(case: Case, inputs: Tensors) -> Call:
    return Call(lambda i: {"y": inputs["x"] * float("nan")})


def raises(case: Case, inputs: Tensors) -> Call:
    raise RuntimeError("cannot do this\non this machine")


def dies(case: Case, inputs: Tensors) -> Call:
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def dies_later(case: Case, inputs: Tensors) -> Call:
    calls = []

    def run(i: int) -> Tensors:
        calls.append(i)
        if len(calls) > 2:
            os._exit(3)
        return {"y": inputs["x"] * 2}

    return Call(run)


def _second_process(name: str) -> bool:
    """Whether a process before this one has asked; the folder is the runner's."""
    path = Path(f"first-process-of-{name}")
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def dies_the_second_time(case: Case, inputs: Tensors) -> Call:
    if _second_process("dies"):
        os._exit(3)
    return doubles(case, inputs)


def wrong_the_second_time(case: Case, inputs: Tensors) -> Call:
    return triples(case, inputs) if _second_process("wrong") else doubles(case, inputs)


def allocates(case: Case, inputs: Tensors) -> Call:
    return Call(lambda i: {"y": torch.zeros(HUGE // 4)})


def hangs(case: Case, inputs: Tensors) -> Call:
    time.sleep(600)
    raise AssertionError


BASE = Implementation(BASELINE, doubles)
GOOD = (BASE, Implementation("sleeps", sleeps, ours=True), Implementation("holds", holds))
BAD = (
    Implementation("triples", triples, ours=True),
    Implementation("not a number", not_a_number),
    Implementation("raises", raises),
    Implementation("dies", dies),
    Implementation("dies later", dies_later),
    Implementation("allocates", allocates),
    Implementation("hangs", hangs),
    Implementation("is not installed", doubles, modules=("no_such_library",)),
)


def op(*implementations: Implementation, without_inputs: bool = False) -> Op:
    maker = make_nothing if without_inputs else make
    return Op("double", "Twice a vector", 2, maker, truth, error, (1e-6, 1e-6), implementations, (CASE,))
