"""The table of contestants as a pytest-benchmark suite: `pytest benchmarks --benchmark-only`.

Groups are ops and shapes. Results are compared with float64 before they are timed, and a contestant whose library is
not installed is skipped with its own error. All run in this one process: `alterrec-fast bench` gives each its own and
lets them take turns, which is fairer, and measures memory.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from alterrec_fast.benchmarks.contestants import OPS, Contestant, Op
from alterrec_fast.benchmarks.worker import Shape, Task, Tensors


def identifier(*parts: str) -> str:
    """For -k, which takes no commas."""
    return re.sub(r"[^\w.:+-]+", "_", "-".join(parts).replace(" = ", "").replace(", ", "-").replace(",", ""))


CASES = [
    pytest.param(
        op,
        shape,
        contestant,
        id=identifier(op.name, shape.label, contestant.name),
        marks=[
            pytest.mark.skip(f"needs an interpreter of its own: alterrec-fast bench --python {contestant.python}=PATH")
        ]
        if contestant.task is None
        else [],
    )
    for op in OPS
    for shape in op.quick or op.full[:1]
    for contestant in op.contestants
    if contestant.takes(shape)
]


@lru_cache(maxsize=1)
def case(name: str, shape: Shape) -> tuple[Tensors, Tensors]:
    """Inputs and truth; kept for the contestants of one group."""
    op = next(op for op in OPS if op.name == name)
    inputs = op.make(shape)
    return inputs, op.truth(shape, inputs)


@pytest.mark.parametrize(("op", "shape", "contestant"), CASES)
def test_contestant(
    benchmark: Any, op: Op, shape: Shape, contestant: Contestant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a trainer leaves files where it runs
    shape = replace(shape, threads=torch.get_num_threads())
    benchmark.group = f"{op.name}: {shape.label}"
    task = contestant.task
    assert isinstance(task, Task)
    for module in task.modules:
        try:
            importlib.import_module(module)
        except ImportError as missing:
            pytest.skip(f"{type(missing).__name__}: {missing}")
    inputs, truth = case(op.name, shape)
    call = task.prepare(shape, inputs)
    error = task.compare(call.read(call.run(0), truth["rows"]), truth)
    benchmark.extra_info["error"] = error
    assert error <= contestant.allowed(shape)
    benchmark.pedantic(call.run, args=(1,), rounds=5, warmup_rounds=1)
