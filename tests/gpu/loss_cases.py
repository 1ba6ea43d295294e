"""Cases of both losses, with all gradients, and how they are compared with float64 (`checks.py` has the rules)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from alterrec_fast.ops import RankSlice, sampled_softmax, slice_cross_entropy
from alterrec_fast.ops.dispatch import why_not_native

from . import truth
from .checks import judge, watched
from .device import Device, FaultError
from .truth import ARITHMETICS, Arithmetic, Loss, Source, error_of

ROWS = 1 << 20  # of a gradient that are looked at at a time


def call(
    op: Callable[..., Tensor], query: Tensor, catalog: Tensor, bias: Tensor | None, **options: Any
) -> list[Tensor]:
    """Losses of all rows, and the gradients of query, catalog and bias under uneven weights of the rows."""
    inputs = [x.detach().requires_grad_() for x in (query, catalog, bias) if x is not None]
    losses = op(inputs[0], inputs[1], bias=None if bias is None else inputs[2], reduction="none", **options)
    grads = torch.autograd.grad((losses * truth.row_weights(losses)).sum(), inputs)
    return [losses.detach(), *(g.to_dense() if g.is_sparse else g for g in grads)]


def loss_is_no_worse(
    found: list[Tensor], loss: Loss, query: Tensor, catalog: Tensor, bias: Tensor | None, log_q: Tensor | None,
    how: Arithmetic,
) -> str:  # fmt: skip
    """Raises FaultError where losses or gradients are further from float64 than torch's allow, or where an item that no
    session meets has a gradient."""
    exact = loss.with_gradients(query, catalog, bias, log_q, torch.float64)
    with how.applied():
        theirs = loss.with_gradients(query, catalog, bias, log_q, truth.BF16 if how.bf16 else truth.FP32)
    told = []
    for at, (name, ours) in enumerate(zip(("loss", "grad query", "grad catalog", "grad bias"), found, strict=False)):
        of_items = at >= 2
        error = error_of(ours[loss.columns] if of_items else ours, exact[at])
        least = ARITHMETICS["bf16"].least if ours.dtype == truth.BF16 else how.least  # a gradient has its input's dtype
        told.append(judge(error, error_of(theirs[at].to(ours.dtype), exact[at]), least, name))
        if of_items and loss.columns.numel() < ours.shape[0]:
            untouched = torch.ones(ours.shape[0], dtype=torch.bool, device=ours.device)
            untouched[loss.columns] = False
            moved = torch.cat([(part != 0).reshape(part.shape[0], -1).any(1) for part in ours.split(ROWS)])
            if bool((moved & untouched).any()):
                raise FaultError(f"{name}: an item that no session meets has one")
    return ", ".join(told)


def require(engine: str, tensor: Tensor) -> None:
    """Skips where this engine cannot serve sampled_softmax, with the reason."""
    if engine == "native" and (why := why_not_native(tensor, "sampled_softmax")):
        pytest.skip(why)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within, torch.use_deterministic_algorithms is as wanted."""
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def in_order(engine: str, query: Tensor, run: Callable[[], Any]) -> Any:
    """One call of sampled_softmax that promises the same bits."""
    require(engine, query)
    with deterministic(True):
        return run()


@dataclass(frozen=True)
class Positives:
    """Targets and positives: an ignored row, positives that repeat, equal the target, or are none."""

    target: Tensor  # (B,), -100 for none
    positives: Tensor  # (B, 3)

    @classmethod
    def draw(cls, source: Source, b: int, first: int, v: int) -> Positives:
        target, positives = source.ids(first, v, b), source.ids(first, v, b, 3)
        positives[:, 1] = positives[:, 0]
        positives[::2, 2] = -1
        positives[-1, 0] = target[-1]
        if b > 2:
            target[1] = -100
        return cls(target, positives)

    def spoil(self, query: Tensor) -> Tensor:
        """The queries, with NaN where the target is ignored."""
        return query.masked_fill((self.target < 0)[:, None], torch.nan)

    def assert_ignored(self, grad_query: Tensor) -> None:
        """Raises FaultError where an ignored row has a gradient."""
        if bool((grad_query[self.target < 0] != 0).any()):
            raise FaultError("a row whose target is ignored has a gradient")

    def masked(self, v: int) -> Tensor:
        """(V,) bool: every seventh item, but no target and no positive."""
        items = torch.arange(v, device=self.target.device)
        return (items % 7 == 0) & ~torch.isin(items, torch.cat([self.target, self.positives.flatten()]))


def minus_infinity(bias: Tensor | None, masked: Tensor) -> Tensor | None:
    """The bias, with -inf for masked items, which are then no candidates."""
    return None if bias is None else bias.masked_fill(masked, -torch.inf)


def without(ids: Tensor, masked: Tensor) -> Tensor:
    """ids (B, n), with -1 in place of masked items."""
    return ids.masked_fill(masked[ids.clamp(min=0)], -1)


def slice_of(mask: Tensor, form: str, first_item: int) -> RankSlice:
    """mask (B, V) as bits or as ids, whichever is smaller."""
    found = RankSlice.from_mask(mask, first_item)
    if form == "bits":
        return found
    return replace(found, bits=None, ids=found.indices().int())


def slice_loss_case(
    device: Device, seed: int, form: str, arithmetic: str, extras: bool, b: int, v: int, d: int, part: float
) -> str:
    source, how = Source(seed, device.device), ARITHMETICS[arithmetic]
    query = source.matrix(b, d, how.query, False, extras) / d**0.5
    catalog = source.matrix(v, d, how.catalog, False, extras)
    first = 3 if extras else 0
    drawn = Positives.draw(source, b, first, v)
    mask = torch.rand(b, v, generator=source.generator, device=device.device) < part
    mask[:, :first] = False
    mask[:, v // 3 : v // 2] = False  # tiles without a member
    mask[0] = False  # a row without negatives
    if form == "all":
        mask[:, first:] = True
    neg = None if form == "all" else slice_of(mask, form, first)
    positives = drawn.positives if extras else None
    weight, temperature = (0.3, 0.5) if extras else (1.0, 1.0)
    bias = source.normal(v) if extras else None
    masked = drawn.masked(v) if extras else torch.zeros(v, dtype=torch.bool, device=device.device)
    counted = mask.float().masked_fill(masked, 0.0) if neg is None else without(neg.indices(), masked)
    loss = Loss.of(counted, drawn.target, positives, weight, temperature)
    with how.applied():
        run = partial(
            call, slice_cross_entropy, drawn.spoil(query), catalog, minus_infinity(bias, masked), target=drawn.target,
            neg=neg, positives=positives,
            positive_weight=weight, temperature=temperature, first_item=first, precision=how.precision,
            backend="triton",
        )  # fmt: skip
        found = watched(device, run)
    drawn.assert_ignored(found[1])
    return loss_is_no_worse(found, loss, query, catalog, bias, None, how)


def sampled_case(
    device: Device, seed: int, engine: str, shared: bool, arithmetic: str, extras: bool, repeatable: bool,
    b: int, v: int, d: int,
) -> str:  # fmt: skip
    source, how = Source(seed, device.device), ARITHMETICS[arithmetic]
    query = source.matrix(b, d, how.query, False, extras) / d**0.5
    catalog = source.matrix(v, d, how.catalog, False, extras)
    require(engine, query)
    drawn = Positives.draw(source, b, 0, v)
    n = 1 + v // 40
    negatives = source.ids(-1, v, n) if shared else source.ids(-1, v, b, n)
    negatives[..., : n // 2] = (negatives[..., n - n // 2 :] // 9 * 9).clamp(min=-1)  # repeats
    positives = drawn.positives if extras else None
    weight, temperature = (0.3, 0.5) if extras else (1.0, 1.0)
    bias, log_q = (source.normal(v), source.normal(v)) if extras else (None, None)
    masked = drawn.masked(v) if extras else torch.zeros(v, dtype=torch.bool, device=device.device)
    counted = without(negatives.expand(b, -1), masked)
    loss = Loss.of(counted, drawn.target, positives, weight, temperature)

    def run() -> list[Tensor]:
        with deterministic(repeatable):
            return call(
                sampled_softmax, drawn.spoil(query), catalog, minus_infinity(bias, masked), target=drawn.target,
                neg=negatives, log_q=log_q, positives=positives, positive_weight=weight, temperature=temperature,
                sparse_grad=extras, precision=how.precision, backend=engine,
            )  # fmt: skip

    with how.applied():
        found = watched(device, run, repeatable=repeatable or engine == "triton")
    drawn.assert_ignored(found[1])
    return loss_is_no_worse(found, loss, query, catalog, bias, log_q, how)


SLICE_CASES = (
    ("bits", "bf16", True),
    ("bits", "fp32", False),
    ("all", "bf16", False),
    ("all", "fp32", True),
    ("ids", "bf16", True),
    ("ids", "fp32", False),
    ("bits", "tf32", True),
    ("all", "tf32", False),
    ("bits", "mixed", False),
    ("all", "rounded", True),
    ("bits", "widened", False),
)
SAMPLED_CASES = (  # shared, arithmetic, extras, deterministic
    (False, "fp32", True, False),
    (False, "bf16", False, False),
    (True, "fp32", False, False),
    (True, "bf16", True, False),
    (False, "fp32", False, True),
    (False, "bf16", True, True),
    (True, "bf16", False, True),
    (False, "mixed", True, False),
    (False, "rounded", False, False),
    (True, "widened", True, False),
)
