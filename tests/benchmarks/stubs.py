"""Contestants of a made-up op, doubling a vector, for the tests of `alterrec-fast bench`: good ones and bad ones."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from alterrec_fast.benchmarks.contestants import Contestant, Op
from alterrec_fast.benchmarks.records import FLOOR
from alterrec_fast.benchmarks.worker import Call, Shape, Task, Tensors

SHAPE = Shape(items=64, width=4, sessions=8)
HOG = 64 << 30  # bytes that no limit in these tests allows


def make(shape: Shape) -> Tensors:
    return {"x": torch.arange(shape.items, dtype=torch.float32)}


def make_nothing(shape: Shape) -> Tensors:
    raise MemoryError("no room for the inputs")


def truth(shape: Shape, inputs: Tensors) -> Tensors:
    return {"rows": torch.arange(2), "double": inputs["x"].double() * 2}


def compare(found: Tensors, true: Tensors) -> float:
    return float((found["y"].double() - true["double"]).abs().max())


def doubles(shape: Shape, inputs: Tensors) -> Call:
    return Call(lambda i: {"y": inputs["x"] * 2}, detail=lambda: {"answer": 42.0})


def sleeps(shape: Shape, inputs: Tensors) -> Call:
    def run(i: int) -> Tensors:
        time.sleep(0.02)
        return {"y": inputs["x"] * 2}

    return Call(run)


def warms(shape: Shape, inputs: Tensors, slow: int) -> Call:
    """Slow in its first calls."""
    calls: list[int] = []

    def run(i: int) -> Tensors:
        calls.append(i)
        time.sleep(0.3 if len(calls) <= slow else 0.0)
        return {"y": inputs["x"] * 2}

    return Call(run)


def spins(shape: Shape, inputs: Tensors) -> Call:
    """Keeps a core busy for a fifth of a second."""

    def run(i: int) -> Tensors:
        begun = time.process_time()
        while time.process_time() - begun < 0.2:
            pass
        return {"y": inputs["x"] * 2}

    return Call(run)


def lingers(shape: Shape, inputs: Tensors) -> Call:
    """Takes a while to make ready, and leaves a file that says from when to when."""
    begun = time.monotonic()
    time.sleep(0.2)
    Path(f"ready-{os.getpid()}").write_text(f"{begun} {time.monotonic()}")
    return doubles(shape, inputs)


def triples(shape: Shape, inputs: Tensors) -> Call:
    return Call(lambda i: {"y": inputs["x"] * 3})


def gives_no_number(shape: Shape, inputs: Tensors) -> Call:
    return Call(lambda i: {"y": inputs["x"] * float("nan")})


def raises(shape: Shape, inputs: Tensors) -> Call:
    raise RuntimeError("cannot do this\non this machine")


def dies(shape: Shape, inputs: Tensors) -> Call:
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def dies_later(shape: Shape, inputs: Tensors) -> Call:
    calls = []

    def run(i: int) -> Tensors:
        calls.append(i)
        if len(calls) > 2:
            os._exit(3)
        return {"y": inputs["x"] * 2}

    return Call(run)


def _been_here(name: str) -> bool:
    """Whether a process before this one has been told the same; the folder is the arena's."""
    path = Path(f"been-here-{name}")
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def dies_the_second_time(shape: Shape, inputs: Tensors) -> Call:
    if _been_here("dies"):
        os._exit(3)
    return doubles(shape, inputs)


def wrong_the_second_time(shape: Shape, inputs: Tensors) -> Call:
    return triples(shape, inputs) if _been_here("wrong") else doubles(shape, inputs)


def eats(shape: Shape, inputs: Tensors) -> Call:
    return Call(lambda i: {"y": torch.zeros(HOG // 4)})


def hangs(shape: Shape, inputs: Tensors) -> Call:
    time.sleep(600)
    raise AssertionError


def holds(shape: Shape, inputs: Tensors) -> Call:
    """Holds 64 MiB while it runs."""

    def run(i: int) -> Tensors:
        held = torch.ones(16 << 20)
        return {"y": inputs["x"] * 2 * held[0]}

    return Call(run)


def _contestant(name: str, task: Task, **more: object) -> Contestant:
    return Contestant(name, "torch", task, 1e-6, **more)  # type: ignore[arg-type]


GOOD = (
    _contestant(FLOOR, Task(doubles, compare)),
    _contestant("sleeps", Task(sleeps, compare), ours=True),
    _contestant("holds", Task(holds, compare)),
)
BAD = (
    _contestant("triples", Task(triples, compare), ours=True),
    _contestant("not a number", Task(gives_no_number, compare)),
    _contestant("raises", Task(raises, compare)),
    _contestant("dies", Task(dies, compare)),
    _contestant("dies later", Task(dies_later, compare)),
    _contestant("eats", Task(eats, compare)),
    _contestant("hangs", Task(hangs, compare)),
    _contestant("is not installed", Task(doubles, compare, ("no_such_library",))),
)


def traffic(shape: Shape) -> float:
    return 8.0 * shape.items


def op(*contestants: Contestant, without_inputs: bool = False) -> Op:
    maker = make_nothing if without_inputs else make
    return Op("double", "Twice a vector", 2, maker, truth, traffic, contestants, (SHAPE,), ())
