"""What the tests of both losses share: one call with all its gradients, and errors against float64."""

from __future__ import annotations

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
