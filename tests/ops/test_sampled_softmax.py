"""sampled_softmax: the native engine against the specification, with negatives of each row and shared ones."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alterrec_fast.ops import sampled_softmax
from tests.ops.loss_helpers import assert_no_worse, call, needs_native, widened

BF16_LEAST = 2.0**-7  # what rounding to bfloat16, twice, may cost in a gradient
native = partial(call, sampled_softmax, backend="native")
reference = partial(call, sampled_softmax, backend="reference")


def problem(b: int, v: int, d: int, n: int, shared: bool, seed: int = 0) -> Any:
    """query, catalog, and options with an ignored row, a row without negatives, repeats and targets among them."""
    g = torch.Generator().manual_seed(seed)
    query, catalog = torch.randn(b, d, generator=g), torch.randn(v, d, generator=g)
    target = torch.randint(0, v, (b,), generator=g)
    positives = torch.randint(-1, v, (b, 2), generator=g)
    negatives = torch.randint(-1, v, (n,) if shared else (b, n), generator=g)
    if b > 3:
        target[1] = -100
        positives[3, 0] = target[3]
    if shared:
        negatives[: n // 4] = negatives[n // 4 : n // 4 * 2]
        negatives[n // 2 :][:3] = target[0]
    elif b > 3:
        negatives[2] = -1
        negatives[0, : n // 2] = target[0]
    return query, catalog, {"target": target, "neg": negatives, "positives": positives}


def compare(query: Tensor, catalog: Tensor, options: dict[str, Any], **more: Any) -> None:
    bf16 = torch.bfloat16 in (query.dtype, catalog.dtype) or more.get("precision") == "bf16"
    exact = reference(query.double(), catalog.double(), **widened(options | more | {"precision": None}))
    theirs = reference(query, catalog, **options, **more)
    ours = native(query, catalog, **options, **more)
    sharp = 1.0 / min(1.0, more.get("temperature", 1.0))
    fp32_least = 2e-6 * sharp  # the rounding of a logit, which is that much larger
    term = sharp * max(float(x.abs().max()) for x in (query, catalog))
    assert_no_worse(ours, theirs, exact, 2.0, BF16_LEAST if bf16 else fp32_least, term)


@needs_native
def test_terms_that_cancel() -> None:
    """Found by hypothesis: the only negative is the positive as well, and the query's gradient is zero."""
    query, catalog, options = problem(1, 2, 75, 2, False, 22)
    compare(query / math.sqrt(75), catalog, options, temperature=0.07)


@needs_native
@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("b", "v", "d", "n"), [(255, 507, 123, 90), (3, 20_000, 128, 700), (600, 90, 16, 65)])
def test_matches_the_reference(b: int, v: int, d: int, n: int, shared: bool, precision: str | None) -> None:
    query, catalog, options = problem(b, v, d, n, shared)
    compare(query, catalog, options, precision=precision, positive_weight=0.7)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 40),
    v=st.integers(1, 1_300),
    d=st.integers(1, 150),
    n=st.integers(0, 200),
    shared=st.booleans(),
    sparse_grad=st.booleans(),
    temperature=st.sampled_from([0.07, 1.0, 3.0]),
    with_bias=st.booleans(),
    with_log_q=st.booleans(),
    seed=st.integers(0, 1_000),
)
def test_any_shape_and_option(
    b: int,
    v: int,
    d: int,
    n: int,
    shared: bool,
    sparse_grad: bool,
    temperature: float,
    with_bias: bool,
    with_log_q: bool,
    seed: int,
) -> None:
    query, catalog, options = problem(b, v, d, n, shared, seed)
    g = torch.Generator().manual_seed(seed)
    options["bias"] = torch.randn(v, generator=g) if with_bias else None
    options["log_q"] = torch.randn(v, generator=g) if with_log_q else None
    compare(query / math.sqrt(d), catalog, options, sparse_grad=sparse_grad, temperature=temperature)


@needs_native
@pytest.mark.parametrize("shared", [False, True])
def test_bfloat16_inputs_and_gradients(shared: bool) -> None:
    query, catalog, options = problem(61, 1_400, 96, 130, shared)
    for sparse_grad in (False, True):
        compare(query.bfloat16(), catalog.bfloat16(), options, sparse_grad=sparse_grad)
    compare(query, catalog.bfloat16(), options)
    compare(query.bfloat16(), catalog, options, precision="fp32")


@needs_native
@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_any_number_of_threads_gives_the_same_bits(shared: bool, sparse_grad: bool) -> None:
    query, catalog, options = problem(300, 500, 40, 900, shared)
    bias = torch.randn(500)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(native(query, catalog, bias=bias, sparse_grad=sparse_grad, **options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_more_pairs_than_are_sorted_at_once() -> None:
    """The backward pass then goes through the catalog in several turns."""
    query, catalog, options = problem(700, 3_000, 4, 4_000, False)
    compare(query, catalog, options)


@needs_native
@pytest.mark.parametrize("shared", [False, True])
def test_sparse_gradient_is_coalesced(shared: bool) -> None:
    query, catalog, options = problem(9, 4_000, 8, 30, shared)
    catalog.requires_grad_()
    loss = sampled_softmax(query, catalog, sparse_grad=True, backend="native", **options)
    (grad,) = torch.autograd.grad(loss, catalog)
    assert grad.is_sparse and grad.is_coalesced()
    ids = grad.indices()[0]
    assert (ids.diff() > 0).all() and ids.numel() < 400
    (dense,) = torch.autograd.grad(sampled_softmax(query, catalog, backend="native", **options), catalog)
    torch.testing.assert_close(grad.to_dense(), dense)


@needs_native
@pytest.mark.parametrize("shared", [False, True])
def test_every_item_once_is_the_full_softmax(shared: bool) -> None:
    query, catalog = torch.randn(20, 30), torch.randn(150, 30)
    target = torch.randint(0, 150, (20,))
    negatives = torch.arange(150) if shared else torch.arange(150, dtype=torch.int32).repeat(20, 1)
    ours = sampled_softmax(query, catalog, target, negatives, backend="native", reduction="none")
    torch.testing.assert_close(ours, F.cross_entropy(query @ catalog.T, target, reduction="none"))


@needs_native
@pytest.mark.parametrize("shared", [False, True])
def test_extreme_logits(shared: bool) -> None:
    query, catalog = torch.full((4, 2), 50.0), torch.zeros(300, 2)
    catalog[:, 0] = torch.linspace(-40, 40, 300)
    negatives = torch.randint(0, 300, (90,) if shared else (4, 90))
    options = {"target": torch.tensor([7, 70, 299, 0]), "neg": negatives, "temperature": 0.07}
    got = native(query, catalog, **options)
    for ours, truth in zip(got, reference(query.double(), catalog.double(), **options), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), truth, rtol=1e-3, atol=1e-4)


@needs_native
def test_no_rows_and_no_negatives() -> None:
    catalog = torch.randn(10, 4, requires_grad=True)
    for b, shape in ((0, (0, 5)), (0, (5,)), (3, (3, 0)), (3, (0,))):
        query = torch.randn(b, 4, requires_grad=True)
        target, negatives = torch.zeros(b, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        loss = sampled_softmax(query, catalog, target, negatives, backend="native")
        grads = torch.autograd.grad(loss, (query, catalog))
        assert loss == 0 and not any(g.any() for g in grads)


@needs_native
def test_rows_that_are_not_contiguous() -> None:
    query, catalog, options = problem(40, 900, 24, 50, False)
    wide_query, wide_catalog = torch.zeros(40, 60), torch.zeros(900, 31)
    wide_query[:, 3:27], wide_catalog[:, :24] = query, catalog
    flipped = dict(options, neg=options["neg"].T.contiguous().T)
    apart = native(wide_query[:, 3:27], wide_catalog[:, :24], **flipped)
    for ours, theirs in zip(apart, native(query, catalog, **options), strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_native
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 50}, r"target: row 4 holds 50, expected -100 or an id in \[0, 50\)"),
        ({"neg": 50}, r"neg: row 4 holds 50, expected -1 or an id in \[0, 50\)"),
        ({"neg": -2}, r"neg: row 4 holds -2, expected -1 or an id in \[0, 50\)"),
        ({"positives": -2}, r"positives: row 4 holds -2, expected -1 or an id in \[0, 50\)"),
        ({"query": math.inf}, r"scores: row 4 has a score of (-?inf|nan), expected a finite one"),
    ],
)
def test_wrong_values(shared: bool, backend: str, change: dict[str, float], message: str) -> None:
    query, catalog, options = problem(6, 50, 8, 20, shared)
    tensors = {"query": query, "catalog": catalog, **options}
    for name, value in change.items():
        tensors[name][4] = value
    with pytest.raises(ValueError, match=message):
        sampled_softmax(query, catalog, **options, backend=backend)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_the_reference(shared: bool) -> None:
    query, catalog, options = problem(5, 30, 4, 12, shared)
    bias = torch.randn(30, dtype=torch.float64)

    def losses(q: Tensor, e: Tensor, b: Tensor) -> Tensor:
        return sampled_softmax(q, e, bias=b, **options, temperature=0.7, reduction="none", backend="reference")

    assert torch.autograd.gradcheck(losses, [x.double().requires_grad_() for x in (query, catalog, bias)])


@needs_native
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared: bool, learned: bool) -> None:
    query, catalog, options = problem(9, 60, 8, 20, shared)
    temperature = torch.tensor(0.7, requires_grad=True) if learned else None
    catalog, precision = (catalog.half(), "fp16") if learned else (catalog, "fp32")
    ids = [options[name] for name in ("target", "neg")]
    bias, log_q = torch.randn(60, requires_grad=True), torch.randn(60)
    forward = torch.ops.alterrec_fast.sampled_softmax
    rest = (*ids, log_q, options["positives"], 0.5, 0.7, temperature)
    saved = 0 if shared else 9 * (20 + 8) * 4  # of shared negatives not all that is saved is filled
    torch.library.opcheck(
        forward.default,
        (query.requires_grad_(), catalog.requires_grad_(), *rest, bias, -100, False, precision, saved, True, "native"),
    )
    query, catalog, bias = query.detach(), catalog.detach(), bias.detach()
    rest = tuple(x.detach() if isinstance(x, Tensor) else x for x in rest)
    _, lse, saved = forward(query, catalog, *rest, bias, -100, False, precision, saved, True, "native")
    for sparse_grad in (False, True):
        torch.library.opcheck(
            torch.ops.alterrec_fast.sampled_softmax_backward.default,
            (
                *(torch.ones(9), query, catalog, *rest, bias, -100, sparse_grad, precision, lse, saved),
                *([True] * 3 + [learned], "native"),
            ),
        )


@needs_native
@pytest.mark.parametrize("shared", [False, True])
def test_compiles_into_one_graph(shared: bool) -> None:
    query, catalog, options = problem(12, 300, 16, 40, shared)

    def loss(q: Tensor, e: Tensor) -> Tensor:
        return sampled_softmax(2 * q, e, **options, backend="native")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        q, e = query.clone().requires_grad_(), catalog.clone().requires_grad_()
        value = function(q, e)
        results.append([value.detach(), *torch.autograd.grad(value, (q, e))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
