"""The tables as a pytest-benchmark suite: `pytest benchmarks --benchmark-only`.

Groups are ops and cases. Results are compared with float64 before they are timed, and an implementation whose library
is not installed is skipped with its own error. All run in this one process: `alterrec-fast bench` gives each a process
and lets them take turns, which is fairer, and measures memory.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from alterrec_fast.benchmarks.harness.op import Implementation, Op
from alterrec_fast.benchmarks.harness.worker import Case, Tensors
from alterrec_fast.benchmarks.ops import OPS

CASES = [
    pytest.param(op, case, one, id=re.sub(r"[^\w.:+]+", "_", f"{op.name} {case.label} {one.name}"))
    for op in OPS
    for case in op.quick or op.full[:1]
    for one in op.implementations
    if one.takes(case)
]


@lru_cache(maxsize=1)
def inputs_of(name: str, case: Case) -> tuple[Tensors, Tensors]:
    """Inputs and truth; kept for the implementations of one group."""
    op = next(op for op in OPS if op.name == name)
    inputs = op.make(case)
    return inputs, op.truth(case, inputs)


@pytest.mark.parametrize(("op", "case", "implementation"), CASES)
def test_implementation(
    benchmark: Any, op: Op, case: Case, implementation: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a trainer leaves files where it runs
    case = replace(case, threads=torch.get_num_threads())
    benchmark.group = f"{op.name}: {case.label}"
    for module in implementation.modules:
        pytest.importorskip(module, exc_type=ImportError)
    inputs, truth = inputs_of(op.name, case)
    call = implementation.prepare(case, inputs)
    error = op.error_of(implementation, call.read(call.run(0)), truth)
    benchmark.extra_info["error"] = error
    assert error <= op.allowed(implementation, case)
    benchmark.pedantic(call.run, args=(1,), rounds=5, warmup_rounds=1)
