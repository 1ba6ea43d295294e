"""What the tests of the ops share: one call with all its gradients, errors against float64, runs with one instruction
set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alterrec_fast.ops import library

needs_native = pytest.mark.skipif(bool(library.NO_EXTENSION), reason="the extension is not built")


def call(
    op: Callable[..., Tensor], query: Tensor, catalog: Tensor, bias: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """Losses of all rows, and the gradients of query, catalog and bias under uneven weights of the rows."""
    inputs = [x.detach().requires_grad_() for x in (query, catalog, bias) if x is not None]
    losses = op(inputs[0], inputs[1], bias=inputs[2] if bias is not None else None, reduction="none", **options)
    weights = torch.linspace(0.5, 1.5, losses.shape[0], dtype=losses.dtype)
    grads = torch.autograd.grad((losses * weights).sum(), inputs)
    return [losses.detach(), *(g.to_dense() if g.is_sparse else g for g in grads)]


def assert_no_worse(
    got: list[Tensor], torchs: list[Tensor], exact: list[Tensor], factor: float, least: float, term: float = 0.0
) -> None:
    """Errors against float64 are at most `factor` times those of torch in the same dtype, or `least` of the largest.

    Where all terms of a sum cancel the largest is no measure: there the rounding of one float32 `term` is allowed.
    """
    for ours, theirs, truth in zip(got, torchs, exact, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if truth.numel() == 0:
            continue
        scale = truth.abs().max().item() + 1e-30
        error, allowed = ((x.double() - truth).abs().max().item() for x in (ours, theirs))
        assert error <= max(factor * allowed, least * scale, 2.0**-24 * term), (error / scale, allowed / scale)


def widened(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a call in float64."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}


INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")  # each has all that come before it


def run_with_isa(isa: str, *arguments: str) -> None:
    """Runs tests in a process of its own that may use no more than this instruction set; skips where it has less."""
    from alterrec_fast import _C

    if INSTRUCTION_SETS.index(_C.isa()) < INSTRUCTION_SETS.index(isa):
        pytest.skip(f"{isa}: no more than {_C.isa()} is available")
    environment = os.environ | {"ALTERREC_FAST_ISA": isa}
    program = f"from alterrec_fast import _C; assert _C.isa() == {isa!r}, _C.isa()"
    pytest_command = ["-m", "pytest", "-x", "-p", "no:cacheprovider", *arguments]
    for command in (["-c", program], pytest_command):
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
