"""slice_cross_entropy: the native engine against the specification, and the specification against autograd's rules."""

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

from alterrec_fast.ops import RankSlice, slice_cross_entropy
from tests.ops.loss_helpers import assert_no_worse, call, needs_native, widened

BF16_LEAST = 2.0**-7  # what rounding to bfloat16, twice, may cost in a gradient
native = partial(call, slice_cross_entropy, backend="native")
reference = partial(call, slice_cross_entropy, backend="reference")


def problem(b: int, v: int, d: int, form: str, density: float = 0.3, first_item: int = 1, seed: int = 0) -> Any:
    """query, catalog, and the options of a call with ignored, empty and repeated things in it."""
    g = torch.Generator().manual_seed(seed)
    query, catalog = torch.randn(b, d, generator=g), torch.randn(v, d, generator=g)
    target = torch.randint(first_item, v, (b,), generator=g)
    positives = torch.randint(first_item, v, (b, 3), generator=g)
    mask = torch.rand(b, v, generator=g) < density
    mask[:, :first_item] = False
    mask[:, v // 2 : v // 2 + 1024] = False  # a tile without members
    if b > 3:
        target[1] = -100
        mask[2] = False
        positives[3, :2] = torch.stack([target[3], torch.tensor(-1)])
    neg = {"bits": RankSlice.from_mask(mask, first_item), "all": None}.get(form)
    if form == "ids":
        ids = torch.where(mask, torch.arange(v), -1)
        neg = RankSlice.from_indices(ids, v, first_item)
    return query, catalog, {"target": target, "neg": neg, "positives": positives, "first_item": first_item}


def compare(query: Tensor, catalog: Tensor, options: dict[str, Any], **more: Any) -> None:
    bf16 = torch.bfloat16 in (query.dtype, catalog.dtype) or more.get("precision") == "bf16"
    exact = reference(query.double(), catalog.double(), **widened(options | more | {"precision": None}))
    theirs = reference(query, catalog, **options, **more)
    ours = native(query, catalog, **options, **more)
    temperature = more.get("temperature", 1.0)
    fp32_least = 2e-6 / min(1.0, temperature)  # the rounding of a logit, which is that much larger
    # Each dlogit of target and positives is 1.5 / temperature at most, and those of the negatives sum up to that.
    largest = max(float(x.abs().max()) for x in (query, catalog))
    term = (1 + options["positives"].shape[1]) * 1.5 / temperature * largest
    assert_no_worse(ours, theirs, exact, 2.0, BF16_LEAST if bf16 else fp32_least, term)


@needs_native
@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("form", ["bits", "ids", "all"])
@pytest.mark.parametrize(("b", "v", "d"), [(255, 507, 123), (3, 2_000, 32), (517, 1_030, 64), (1, 64, 1)])
def test_matches_the_reference(b: int, v: int, d: int, form: str, precision: str | None) -> None:
    query, catalog, options = problem(b, v, d, form)
    compare(query, catalog, options, precision=precision, positive_weight=0.7)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 40),
    v=st.integers(2, 1_300),
    d=st.integers(1, 70),
    form=st.sampled_from(["bits", "ids", "all"]),
    density=st.sampled_from([0.0, 0.002, 0.02, 0.5, 1.0]),
    max_saved_bytes=st.sampled_from([0, 50_000, 1 << 28]),
    temperature=st.sampled_from([0.07, 1.0, 3.0]),
    with_bias=st.booleans(),
    seed=st.integers(0, 1_000),
)
def test_any_shape_and_option(
    b: int,
    v: int,
    d: int,
    form: str,
    density: float,
    max_saved_bytes: int,
    temperature: float,
    with_bias: bool,
    seed: int,
) -> None:
    query, catalog, options = problem(b, v, d, form, density, first_item=min(1, v - 1), seed=seed)
    bias = torch.randn(v, generator=torch.Generator().manual_seed(seed)) if with_bias else None
    # Logits are scaled back, since gradients of a saturated softmax are zero in any arithmetic.
    compare(query / math.sqrt(d), catalog, options, bias=bias, max_saved_bytes=max_saved_bytes, temperature=temperature)


@needs_native
@pytest.mark.parametrize("max_saved_bytes", [0, 2_000_000, 1 << 28])
def test_what_is_saved_changes_rounding_only(max_saved_bytes: int) -> None:
    query, catalog, options = problem(120, 2_500, 48, "bits")
    compare(query, catalog, options, max_saved_bytes=max_saved_bytes)
    compare(query, catalog, options, max_saved_bytes=max_saved_bytes, precision="bf16")


@needs_native
@pytest.mark.parametrize("form", ["bits", "ids", "all"])
def test_bfloat16_inputs_and_gradients(form: str) -> None:
    query, catalog, options = problem(61, 1_400, 96, form)
    compare(query.bfloat16(), catalog.bfloat16(), options)
    compare(query, catalog.bfloat16(), options)
    compare(query.bfloat16(), catalog, options, precision="fp32")


@needs_native
@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("form", ["bits", "ids", "all"])
def test_any_number_of_threads_gives_the_same_bits(form: str, precision: str | None) -> None:
    query, catalog, options = problem(300, 3_800, 40, form, density=0.01 if form == "ids" else 0.5)
    bias = torch.randn(3_800)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(native(query, catalog, bias=bias, precision=precision, **options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_full_softmax_is_cross_entropy() -> None:
    query, catalog = torch.randn(65, 30), torch.randn(700, 30)
    target = torch.randint(0, 700, (65,))
    ours = slice_cross_entropy(query, catalog, target, backend="native", reduction="none")
    torch.testing.assert_close(ours, F.cross_entropy(query @ catalog.T, target, reduction="none"))


@needs_native
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_extreme_logits(precision: str | None) -> None:
    """Logits of thousands, one far above all others, and a spread that a float cannot exponentiate."""
    query, catalog = torch.full((4, 2), 50.0), torch.zeros(1_500, 2)
    catalog[:, 0] = torch.linspace(-40, 40, 1_500).round()
    catalog[7] = 60.0
    target = torch.tensor([7, 700, 1_499, 0])
    got = native(query, catalog, target=target, precision=precision, temperature=0.07)
    exact = reference(query.double(), catalog.double(), target=target, temperature=0.07)
    assert all(torch.isfinite(x).all() for x in got)
    for ours, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-2 if precision else 1e-4, atol=1e-4)


@needs_native
def test_one_negative_or_none() -> None:
    query, catalog = torch.randn(3, 5), torch.randn(9, 5)
    target = torch.tensor([2, 2, -100])
    ids = torch.tensor([[4], [2], [4]])  # the second row's only member is its target
    for neg in (RankSlice.from_indices(ids, 9), RankSlice.from_mask(RankSlice.from_indices(ids, 9).mask())):
        losses, grad_query, grad_catalog = native(query, catalog, target=target, neg=neg)
        y = query @ catalog.T
        torch.testing.assert_close(losses, torch.stack([F.softplus(y[0, 4] - y[0, 2]), *torch.zeros(2)]))
        assert not grad_query[1:].any() and grad_query[0].any()
        assert not grad_catalog[[0, 1, 3, 5, 6, 7, 8]].any()


@needs_native
def test_no_rows() -> None:
    for backend in ("native", "reference"):
        query = torch.empty(0, 4, requires_grad=True)
        catalog = torch.randn(10, 4, requires_grad=True)
        loss = slice_cross_entropy(query, catalog, torch.empty(0, dtype=torch.int64), backend=backend)
        loss.backward()
        assert loss == 0 and query.grad is not None and query.grad.shape == (0, 4)
        assert catalog.grad is None or not catalog.grad.any()


@needs_native
def test_reductions_and_ignored_rows() -> None:
    query, catalog, options = problem(20, 200, 8, "bits")
    for reduction in ("mean", "sum", "none"):
        ours, theirs = (
            slice_cross_entropy(query, catalog, reduction=reduction, backend=b, **options)
            for b in ("native", "reference")
        )
        torch.testing.assert_close(ours, theirs)


@needs_native
def test_rows_that_are_not_contiguous() -> None:
    query, catalog, options = problem(40, 900, 24, "bits")
    wide_query, wide_catalog = torch.zeros(40, 60), torch.zeros(900, 31)
    wide_query[:, 3:27], wide_catalog[:, :24] = query, catalog
    apart = native(wide_query[:, 3:27], wide_catalog[:, :24], **options)
    for ours, theirs in zip(apart, native(query, catalog, **options), strict=True):
        torch.testing.assert_close(ours, theirs)
    flipped = dict(options, target=options["target"].int().repeat_interleave(2)[::2], positives=None)
    native(query, catalog, **flipped)


@needs_native
def test_only_what_needs_a_gradient_gets_one() -> None:
    query, catalog, options = problem(30, 700, 16, "bits")
    _, grad_query, grad_catalog = native(query, catalog, **options)
    weights = torch.linspace(0.5, 1.5, 30)
    for needed, grad in (("query", grad_query), ("catalog", grad_catalog)):
        inputs = {"query": query.clone(), "catalog": catalog.clone()}
        inputs[needed].requires_grad_()
        losses = slice_cross_entropy(**inputs, **options, reduction="none", backend="native")
        (losses * weights).sum().backward()
        torch.testing.assert_close(inputs[needed].grad, grad)


@needs_native
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 50}, r"target: row 4 holds 50, expected -100 or an id in \[1, 50\)"),
        ({"target": 0}, r"target: row 4 holds 0, "),
        ({"positives": -2}, r"positives: row 4 holds -2, expected -1 or an id in \[1, 50\)"),
        ({"query": math.inf}, r"scores: row 4 has a score of (-?inf|nan), expected a finite one"),
        ({"query": 3e38}, r"scores: row 4 has a score of (-?inf|nan), expected a finite one"),
        ({"catalog": math.nan}, r"scores: row 0 has a score of nan, expected a finite one"),
    ],
)
def test_wrong_values(backend: str, change: dict[str, float], message: str) -> None:
    query, catalog, options = problem(6, 50, 8, "bits")
    options["target"][1] = 3
    tensors = {"query": query, "catalog": catalog, **options}
    for name, value in change.items():
        tensors[name][4] = value
    with pytest.raises(ValueError, match=message):
        slice_cross_entropy(query, catalog, **options, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"positive_weight": -1.0}, ValueError, "positive_weight must be at least 0"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"max_saved_bytes": -1}, ValueError, "max_saved_bytes must be at least 0"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, r"target must be \(6\), got \(5,\)"),
        ({"target": torch.zeros(6)}, TypeError, "target must be int32 or int64"),
        ({"query": torch.zeros(6, 8, dtype=torch.int32)}, TypeError, "query must be float32, bfloat16 or float16"),
        ({"query": torch.zeros(6, 9)}, ValueError, "query and catalog must have one width d, got 9 and 8"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    query, catalog, options = problem(6, 50, 8, "bits")
    with pytest.raises(error, match=message):
        slice_cross_entropy(**({"query": query, "catalog": catalog} | options | change))


@needs_native
def test_unchecked_scores_pass() -> None:
    query, catalog, options = problem(6, 50, 8, "bits")
    query[4] = math.nan
    losses = slice_cross_entropy(query, catalog, **options, backend="native", check=False, reduction="none")
    assert losses[4].isnan() and losses[[0, 3, 5]].isfinite().all()


@pytest.mark.parametrize("form", ["bits", "ids", "all"])
def test_gradients_of_the_reference(form: str) -> None:
    query, catalog, options = problem(5, 30, 4, form)
    bias = torch.randn(30, dtype=torch.float64)

    def losses(q: Tensor, e: Tensor, b: Tensor) -> Tensor:
        return slice_cross_entropy(q, e, bias=b, **options, temperature=0.7, reduction="none", backend="reference")

    assert torch.autograd.gradcheck(losses, [x.double().requires_grad_() for x in (query, catalog, bias)])


@needs_native
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("form", ["bits", "ids", "all"])
def test_opcheck(form: str, learned: bool) -> None:
    query, catalog, options = problem(9, 600, 8, form, density=0.02)
    temperature = torch.tensor(0.7, requires_grad=True) if learned else None
    query, precision = (query.half(), "fp16") if learned else (query, "fp32")
    neg = options["neg"]
    members = None if neg is None else neg.ids if neg.bits is None else neg.bits
    bias = torch.randn(600, requires_grad=True)
    inputs = (query.requires_grad_(), catalog.requires_grad_(), options["target"], members, options["positives"])
    forward = torch.ops.alterrec_fast.slice_cross_entropy
    # Nothing is saved: what has not been filled differs from call to call.
    terms = (bias, 1, -100, precision)
    torch.library.opcheck(forward.default, (*inputs, 0.5, 0.7, temperature, *terms, 0, True, "native"))
    native = torch.ops.alterrec_fast.native_slice_cross_entropy.default
    torch.library.opcheck(native, (*inputs, 0.5, 0.7, temperature, *terms, 0, True))
    detached = [x.detach() if isinstance(x, Tensor) else x for x in (*inputs, 0.5, 0.7, temperature, *terms)]
    _, lse, saved = forward(*detached, 100_000, True, "native")
    torch.library.opcheck(
        torch.ops.alterrec_fast.slice_cross_entropy_backward.default,
        (torch.ones(9), *detached, lse, saved, [True] * 3 + [learned], "native"),
    )


@needs_native
def test_compiles_into_one_graph() -> None:
    query, catalog, options = problem(12, 300, 16, "bits")

    def loss(q: Tensor, e: Tensor) -> Tensor:
        return slice_cross_entropy(2 * q, e, **options, backend="native")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        q, e = query.clone().requires_grad_(), catalog.clone().requires_grad_()
        value = function(q, e)
        results.append([value.detach(), *torch.autograd.grad(value, (q, e))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_native
@pytest.mark.parametrize("max_saved_bytes", [0, 1 << 28])
def test_bias_gradient_in_bf16_is_no_worse_than_torchs(max_saved_bytes: int) -> None:
    """Against the same loss written in torch with bfloat16 products; both are compared with float64."""
    g = torch.Generator().manual_seed(4)
    query, catalog = torch.randn(200, 64, generator=g) / 8, torch.randn(900, 64, generator=g)
    bias, target = torch.randn(900, generator=g), torch.randint(900, (200,), generator=g)

    def plain(q: Tensor, e: Tensor, bias: Tensor, target: Tensor, reduction: str) -> Tensor:
        return F.cross_entropy((q.to(kind) @ e.to(kind).T).to(bias.dtype) + bias, target, reduction=reduction)

    kind = torch.float64
    exact = call(plain, query.double(), catalog.double(), bias.double(), target=target)
    kind = torch.bfloat16
    theirs = call(plain, query, catalog, bias, target=target)
    ours = native(query, catalog, bias, target=target, precision="bf16", max_saved_bytes=max_saved_bytes)
    error, allowed = (float((x[3].double() - exact[3]).norm() / exact[3].norm()) for x in (ours, theirs))
    assert error <= allowed
