"""The native item table against the pieces in plain PyTorch, and as ops of the dispatcher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alterrec_fast.ops.item_table import (
    LookedUp,
    Registered,
    Table,
    TableLoss,
    query_gradient,
    step_table,
    table_loss,
)
from alterrec_fast.ops.layer_norm import NO_NORM, RowNorm
from alterrec_fast.ops.library import flattened
from alterrec_fast.ops.slice_cross_entropy import SliceLoss
from alterrec_fast.ops.slices import RankSlice
from alterrec_fast.ops.table_rules import Rule
from tests.ops.loss_helpers import needs_native

pytestmark = needs_native
B, V, D = 37, 1100, 20


def loss(form: str, normed: bool, precision: str = "fp32", dtype: torch.dtype = torch.float32) -> TableLoss:
    generator = torch.Generator().manual_seed(5)
    table, query = (torch.randn(n, D, generator=generator) / 3 for n in (V, B))
    target = torch.randint(2, V, (B,), generator=generator)
    positives = torch.randint(2, V, (B, 2), generator=generator)
    mask = torch.rand(B, V, generator=generator) < (0.03 if form == "few" else 0.4)
    mask[:, :2] = mask[:, 400:1000] = False  # there is a tile without members
    mask[3] = False
    target[4], positives[5, 1] = -100, -1
    bias = torch.randn(V, generator=generator)
    bias[torch.arange(7, V, 90)] = -torch.inf
    bias[torch.cat([target[target >= 0], positives[positives >= 0]])] = 0.5
    ids = torch.where(mask, torch.arange(V), -1).sort(1, descending=True).values
    ids = torch.where(ids >= 0, ids, V).sort(1).values
    ids = ids[:, : int((ids < V).sum(1).max())]
    if form == "few":
        assert ids.shape[1] * 16 <= V
    neg = RankSlice.from_mask(mask, 2)
    members = {"all": None, "bits": neg.bits}.get(form, ids.masked_fill(ids == V, -1).int())
    norm = RowNorm(torch.linspace(0.5, 1.5, D), torch.linspace(-0.2, 0.3, D)) if normed else NO_NORM
    return TableLoss(
        SliceLoss(query, table.to(dtype), target, members, positives, 0.5, 0.7, None, bias, 2, -100, precision), norm
    )


def rule(kind: str) -> Rule:
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01, "clip_value": 0.5}
    return Rule.of(kind, group, torch.tensor(3), torch.tensor(1), 2.0, True)


def step(x: TableLoss, kind: str, native: bool, saved_size: int, only_touched: bool = False) -> list[Tensor]:
    """Losses, the queries' gradient, table and moments after the step, the gradients of the norm."""
    done = table_loss(x, native, saved_size if native else 0, True)
    grad = torch.linspace(0.5, 1.5, B)
    of_query = query_gradient(x, native, done, grad)
    shape = {"rowwise_adagrad": (V,), "sgd": (0,)}.get(kind, (V, D))
    first, second = torch.full(shape, 0.1), torch.full(shape if "adam" in kind else (0,), 0.2)
    items = torch.tensor([0, 5, 5, 5, 700, V - 1])
    looked_up = LookedUp(items, torch.randn(6, D, generator=torch.Generator().manual_seed(0)))
    rows = x.problem.catalog.clone()
    losses = [] if only_touched else [Registered(x, done.lse, done.saved, grad)] * 2
    of_norm = step_table(Table(rows, first, second, x.norm), losses, looked_up, rule(kind), only_touched, native)
    return [done.losses, of_query, rows.float(), first, second, *of_norm]


@pytest.mark.parametrize("saved_size", [0, 60_000, 10_000_000])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("form", ["all", "bits", "many", "few"])
def test_losses_and_step_are_those_of_the_pieces(form: str, normed: bool, saved_size: int) -> None:
    x = loss(form, normed)
    for ours, theirs in zip(step(x, "adam", True, saved_size), step(x, "adam", False, 0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("only_touched", [False, True])
@pytest.mark.parametrize("kind", ["adam", "sparse_adam", "rowwise_adagrad", "sgd"])
def test_rules(kind: str, only_touched: bool) -> None:
    x = loss("few", True)
    for ours, theirs in zip(step(x, kind, True, 0, only_touched), step(x, kind, False, 0, only_touched), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("form", ["all", "few"])
def test_bfloat16(form: str) -> None:
    x = loss(form, True, precision="bf16", dtype=torch.bfloat16)
    for ours, theirs in zip(step(x, "sgd", True, 60_000), step(x, "sgd", False, 0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_opcheck() -> None:
    x = loss("bits", True)
    ops = torch.ops.alterrec_fast
    torch.library.opcheck(ops.native_item_table_loss.default, (*flattened(x), 0, True))
    done = table_loss(x, True, 0, True)
    p, grad = x.problem, torch.ones(B)
    arguments = flattened(x._replace(problem=p._replace(members=None)))
    del arguments[3]
    torch.library.opcheck(ops.native_item_table_query_gradient.default, (grad, done.lse, done.mean, *arguments))
    torch.library.opcheck(
        ops.native_item_table_step.default,
        (
            p.catalog, torch.zeros(V, D), torch.zeros(V, D), *x.norm, [p.query], [p.target], [p.members],
            [p.positives], [p.bias], [grad], [done.lse], [done.saved], [0.5], [0.7], [2], [-100], [0],
            torch.tensor([1, 2]), torch.ones(2, D), 0, 0.1, 1.0, 0.9, 0.99, 1e-8, 0.0, 1.0, 1.0, False, 7,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rows", torch.zeros(V, D).T, "table must be"),
        ("first", torch.zeros(3), "first moments must be"),
        ("items", torch.tensor([2, 1]), "items must ascend"),
        ("items", torch.tensor([0, V]), "items must ascend"),
    ],
)
def test_a_step_with_other_shapes_raises(name: str, value: Tensor, message: str) -> None:
    table = Table(torch.zeros(V, D), torch.zeros(V, D), torch.zeros(V, D), NO_NORM)
    looked_up = LookedUp(torch.tensor([0, 1]), torch.ones(2, D))
    if name == "items":
        looked_up = looked_up._replace(items=value)
    else:
        table = table._replace(**{name: value})
    with pytest.raises(ValueError, match=message):
        step_table(table, [], looked_up, rule("adam"), False, True)
