"""sampled_softmax in Triton against the specification, losses and all gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from alterrec_fast.ops import sampled_softmax
from tests.ops.loss_helpers import assert_no_worse, call, widened
from tests.ops.test_sampled_softmax import problem


def compare(query: Tensor, catalog: Tensor, options: dict[str, Any]) -> None:
    bf16 = torch.bfloat16 in (query.dtype, catalog.dtype) or options.get("precision") == "bf16"
    wide = widened(options | {"precision": None})
    exact = call(sampled_softmax, query.double(), catalog.double(), backend="reference", **wide)
    theirs = call(sampled_softmax, query, catalog, backend="reference", **options)
    ours = call(sampled_softmax, query, catalog, backend="triton", **options)
    assert_no_worse(ours, theirs, exact, 2.0, 2.0**-7 if bf16 else 4e-6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_matches_the_reference(guarded: list[Tensor], shared: bool, bf16: bool) -> None:
    query, catalog, options = problem(5, 40, 70, 75, shared)
    g = torch.Generator().manual_seed(3)
    options |= {"bias": torch.randn(40, generator=g), "log_q": torch.randn(40, generator=g), "temperature": 0.7}
    if bf16:
        query, catalog = query.bfloat16(), catalog.bfloat16()
    compare(query / math.sqrt(70), catalog, options | {"positive_weight": 0.3})


@pytest.mark.parametrize("shared", [False, True])
def test_ids_beyond_the_catalog_are_never_another_item(shared: bool) -> None:
    """Not even those beyond 32 bits: without a check the loss is NaN."""
    query, catalog, target = torch.randn(3, 8), torch.randn(20, 8), torch.tensor([0, 3, 4])
    ids = torch.tensor([1, 2, (1 << 32) + 5])
    negatives = ids if shared else ids.expand(3, 3)
    options = {"reduction": "none", "backend": "triton", "check": False}
    assert sampled_softmax(query, catalog, target, negatives, **options).isnan().all()


@pytest.mark.parametrize("shared", [False, True])
def test_sparse_gradients_int32_ids_strided_rows_no_positives(shared: bool) -> None:
    query, catalog, options = problem(4, 30, 9, 12, shared)
    del options["positives"]
    options = {name: ids.int() for name, ids in options.items()}
    wide_query, wide_catalog = torch.zeros(4, 20), torch.zeros(30, 11)
    wide_query[:, 3:12], wide_catalog[:, :9] = query, catalog
    options |= {"sparse_grad": True, "bias": torch.randn(30).bfloat16()}
    compare(wide_query[:, 3:12], wide_catalog[:, :9], options)
    catalog.requires_grad_()
    loss = sampled_softmax(query, catalog, backend="triton", **options)
    (grad,) = torch.autograd.grad(loss, catalog)
    assert grad.is_sparse and grad.is_coalesced() and (grad.indices()[0].diff() > 0).all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_ignored_rows_may_hold_anything_and_masked_items_are_no_negatives(shared: bool, sparse: bool) -> None:
    """The gradient of an ignored row is zero, and every other one is what it is without it."""
    query, catalog, options = problem(5, 40, 12, 20, shared)
    del options["positives"]
    options["target"] = torch.tensor([30, -100, 31, 32, 33])
    masked = torch.arange(40) < 10
    neg = options["neg"]
    options |= {"sparse_grad": sparse, "bias": torch.linspace(-1.0, 1.0, 40)}
    wanted = options | {"neg": torch.where((neg >= 0) & (neg < 10), -1, neg)}
    want = call(sampled_softmax, query, catalog, backend="triton", **wanted)
    query[1] = math.nan
    options["bias"] = options["bias"].masked_fill(masked, -math.inf)
    given = call(sampled_softmax, query, catalog, backend="triton", check=True, **options)
    assert not given[1][1].any()
    for a, b in zip(given, want, strict=True):
        a, b = (x.to_dense() if x.is_sparse else x for x in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_rows_and_no_negatives() -> None:
    catalog = torch.randn(10, 4, requires_grad=True)
    for b, shape in ((0, (0, 5)), (0, (5,)), (3, (3, 0)), (3, (0,))):
        query = torch.randn(b, 4, requires_grad=True)
        target, negatives = torch.zeros(b, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        loss = sampled_softmax(query, catalog, target, negatives, backend="triton")
        grads = torch.autograd.grad(loss, (query, catalog))
        assert loss == 0 and not any(g.any() for g in grads)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neg": 50}, r"neg: row 4 holds 50, expected -1 or an id in \[0, 50\)"),
        ({"query": math.inf}, r"scores: row 4 has a score of (-?inf|nan), expected a finite one"),
    ],
)
def test_wrong_values(shared: bool, change: dict[str, float], message: str) -> None:
    query, catalog, options = problem(6, 50, 8, 20, shared)
    tensors = {"query": query, "catalog": catalog, **options}
    for name, value in change.items():
        tensors[name][4] = value
    with pytest.raises(ValueError, match=message):
        sampled_softmax(query, catalog, **options, backend="triton")


@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared: bool) -> None:
    query, catalog, options = problem(4, 30, 8, 12, shared)
    temperature = torch.tensor(0.7, requires_grad=True)
    rest = (options["target"], options["neg"], torch.randn(30), options["positives"], 0.5, 1.0, temperature)
    kept = 4 * (12 + 3) * 4 if not shared else 4 * 3 * 4
    torch.library.opcheck(
        torch.ops.alterrec_fast.sampled_softmax.default,
        (
            query.requires_grad_(),
            catalog.requires_grad_(),
            *rest,
            torch.randn(30),
            -100,
            False,
            "fp32",
            kept,
            True,
            "triton",
        ),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
