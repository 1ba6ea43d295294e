"""slice_cross_entropy in Triton against the specification, losses and all gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from alterrec_fast.kernels import columns
from alterrec_fast.kernels.losses import Problem
from torch import Tensor

from alterrec_fast.ops import RankSlice, slice_cross_entropy
from alterrec_fast.ops.slices import pack_bits
from tests.ops.loss_helpers import assert_no_worse, call, widened


def problem(b: int, v: int, d: int, first: int, form: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """query, catalog, and options with an ignored row, a row without negatives, tiles without any, positives
    that repeat, equal the target or are none."""
    g = torch.Generator().manual_seed(b * v + d)
    query, catalog = torch.randn(b, d, generator=g) / math.sqrt(d), torch.randn(v, d, generator=g)
    target = torch.randint(first, v, (b,), generator=g)
    positives = torch.randint(first - 1, v, (b, 3), generator=g)
    positives[positives < first] = -1
    positives[:, 1] = positives[:, 0]
    if b > 3:
        target[1], target[3] = -100, positives[3, 0].clamp(min=first)
    mask = torch.rand(b, v, generator=g) < 0.3
    mask[:, :first] = False
    mask[:, : v - 70] = False
    mask[2:3] = False
    neg = slice_of(mask, form, first)
    return query, catalog, {"target": target, "neg": neg, "positives": positives, "first_item": first}


def slice_of(mask: Tensor, form: str, first: int = 0) -> RankSlice | None:
    """mask (B, V) as the form asked for, whichever is smaller; None for all items."""
    if form == "all":
        return None
    found = RankSlice.from_mask(mask, first)
    if form == "bits":
        return replace(found, bits=pack_bits(mask), ids=None)
    return replace(found, bits=None, ids=found.indices().int())


def compare(query: Tensor, catalog: Tensor, options: dict[str, Any]) -> None:
    bf16 = torch.bfloat16 in (query.dtype, catalog.dtype) or options.get("precision") == "bf16"
    exact = call(
        slice_cross_entropy,
        query.double(),
        catalog.double(),
        backend="reference",
        **widened(options | {"precision": None}),
    )
    theirs = call(slice_cross_entropy, query, catalog, backend="reference", **options)
    ours = call(slice_cross_entropy, query, catalog, backend="triton", **options)
    assert_no_worse(ours, theirs, exact, 2.0, 2.0**-7 if bf16 else 4e-6)


@pytest.mark.parametrize(
    ("b", "v", "d", "first", "form"),
    [
        (5, 230, 20, 0, "bits"),  # an edge in every dimension, and tiles that are skipped
        (70, 128, 33, 3, "all"),  # two blocks of sessions
        (4, 70, 1024, 1, "bits"),  # several blocks of gradient columns
        (6, 90, 16, 2, "ids"),
    ],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_matches_the_reference(
    guarded: list[Tensor], b: int, v: int, d: int, first: int, form: str, bf16: bool
) -> None:
    query, catalog, options = problem(b, v, d, first, form)
    if bf16:
        query, catalog = query.bfloat16(), catalog.bfloat16()
    bias = torch.randn(v, generator=torch.Generator().manual_seed(1))
    compare(query, catalog, options | {"bias": bias, "temperature": 0.5, "positive_weight": 0.7})


@pytest.mark.parametrize("form", ["bits", "all"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_catalog_in_many_parts(monkeypatch: pytest.MonkeyPatch, form: str, bf16: bool) -> None:
    monkeypatch.setattr(columns, "BUFFER_BYTES", 1)  # a block of columns at a time
    query, catalog, options = problem(5, 530, 20, 3, form)
    if bf16:
        query, catalog = query.bfloat16(), catalog.bfloat16()
    compare(query, catalog, options | {"bias": torch.linspace(-1.0, 1.0, 530), "positive_weight": 0.7})


@pytest.mark.parametrize("bad", [math.nan, 1e38])
def test_without_a_check_a_bad_row_shows_in_its_gradient(bad: float) -> None:
    """Whoever looks at gradients must see it."""
    query, catalog, options = problem(5, 70, 8, 0, "all")
    query[0] = bad
    loss, grad_query, *_ = call(slice_cross_entropy, query, 100 * catalog, backend="triton", check=False, **options)
    assert not loss[0].isfinite()
    assert not grad_query[0].isfinite().all()
    assert grad_query[2].isfinite().all()


def test_gradients_are_exact_within_autocast() -> None:
    query, catalog, options = problem(5, 70, 8, 0, "bits")
    outside = call(slice_cross_entropy, query, catalog, backend="triton", precision="fp32", **options)
    with torch.autocast("cpu", torch.bfloat16):
        within = call(slice_cross_entropy, query, catalog, backend="triton", precision="fp32", **options)
    assert all(torch.equal(a, b) for a, b in zip(outside, within, strict=True))


def test_mixed_dtypes_strided_rows_and_no_positives() -> None:
    query, catalog, options = problem(5, 70, 9, 0, "bits")
    del options["positives"]
    options["target"] = options["target"].int()
    wide_query, wide_catalog = torch.zeros(5, 20), torch.zeros(70, 11)
    wide_query[:, 3:12], wide_catalog[:, :9] = query, catalog
    compare(wide_query[:, 3:12], wide_catalog[:, :9], options)
    compare(query, catalog.bfloat16(), options)
    compare(query, catalog, options | {"precision": "bf16"})


@pytest.mark.parametrize("form", ["bits", "all", "ids"])
def test_empty_slices_and_no_rows(form: str) -> None:
    """Without a slice an empty one needs that all items are padding, so that there are no targets either."""
    for b in (0, 3):
        query, catalog, options = problem(b, 70, 8, 0, form)
        options["neg"] = slice_of(torch.zeros(b, 70, dtype=torch.bool), form)
        if form == "all":
            options |= {"first_item": 70, "positives": None, "target": torch.full((b,), -100)}
        found = call(slice_cross_entropy, query, catalog, backend="triton", **options)
        assert not any(x.any() for x in found)


def test_only_some_gradients() -> None:
    query, catalog, options = problem(4, 70, 8, 0, "all")
    bias = torch.randn(70)
    every = call(slice_cross_entropy, query, catalog, bias=bias, backend="triton", **options)
    weights = torch.linspace(0.5, 1.5, 4)
    for at, tensor in enumerate((query, catalog, bias), 1):
        tensor.requires_grad_()
        losses = slice_cross_entropy(query, catalog, bias=bias, reduction="none", backend="triton", **options)
        (grad,) = torch.autograd.grad((losses * weights).sum(), tensor)
        tensor.requires_grad_(False)
        assert torch.equal(grad, every[at])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 70}, r"target: row 4 holds 70, expected -100 or an id in \[0, 70\)"),
        ({"positives": -2}, r"positives: row 4 holds -2, expected -1 or an id in \[0, 70\)"),
        ({"query": math.inf}, r"scores: row 4 has a score of (-?inf|nan), expected a finite one"),
    ],
)
def test_wrong_values(change: dict[str, float], message: str) -> None:
    query, catalog, options = problem(6, 70, 8, 0, "bits")
    tensors = {"query": query, "catalog": catalog, **options}
    for name, value in change.items():
        tensors[name][4] = value
    with pytest.raises(ValueError, match=message):
        slice_cross_entropy(query, catalog, **options, backend="triton")


def test_opcheck() -> None:
    query, catalog, options = problem(4, 70, 8, 0, "bits")
    bits = options["neg"].bits
    rest = (options["target"], bits, options["positives"], 0.5, 1.0, torch.tensor(0.7, requires_grad=True))
    bias, kept = torch.randn(70), 4 * 4 * 4
    inputs = [x.requires_grad_() for x in (query, catalog, bias)]
    torch.library.opcheck(
        torch.ops.alterrec_fast.slice_cross_entropy.default,
        (inputs[0], inputs[1], *rest, inputs[2], 0, -100, "fp32", kept, True, "triton"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("form", ["bits", "all", "ids"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_ignored_rows_may_hold_anything(form: str, bad: float) -> None:
    """Their gradient is zero, and every other one is what it is without them."""
    query, catalog, options = problem(5, 70, 8, 0, form)
    options |= {"bias": torch.linspace(-1.0, 1.0, 70), "check": True}
    want = call(slice_cross_entropy, query, catalog, backend="triton", **options)
    query[1] = bad  # whose target is ignored
    given = call(slice_cross_entropy, query, catalog, backend="triton", **options)
    assert not given[1][1].any()
    assert all(torch.equal(a, b) for a, b in zip(given, want, strict=True))


@pytest.mark.parametrize("form", ["bits", "all", "ids"])
def test_items_masked_by_a_bias_are_no_negatives(form: str) -> None:
    """As in a slice without them; a row without others has no loss."""
    query, catalog, options = problem(5, 70, 8, 0, form)
    del options["positives"]
    options["target"] = torch.tensor([65, -100, 66, 67, 68])
    masked = torch.arange(70) % 3 == 0
    masked[65:69] = False
    bias = torch.linspace(-1.0, 1.0, 70)
    neg = torch.ones(5, 70, dtype=torch.bool) if form == "all" else options["neg"].mask()
    want = call(
        slice_cross_entropy,
        query,
        catalog,
        backend="reference",
        **options | {"neg": slice_of(neg & ~masked, "bits"), "bias": bias},
    )
    options["bias"] = bias.masked_fill(masked, -math.inf)
    given = call(slice_cross_entropy, query, catalog, backend="triton", check=True, **options)
    for a, b in zip(given, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not given[2][masked].any()
    options["bias"] = torch.full((70,), -math.inf)
    nothing = call(slice_cross_entropy, query, catalog, backend="triton", check=False, **options)
    assert not any(x.any() for x in nothing)


def test_bits_that_are_too_short_are_refused() -> None:
    query, catalog, options = problem(5, 70, 8, 0, "bits")
    p = Problem.of(query, catalog, options["target"], None, 1.0, 1.0, None, None, None, -100, "fp32", False)
    for bits in (options["neg"].bits[:, :8], options["neg"].bits[:4]):
        with pytest.raises(ValueError, match=r"neg.bits must be \(5, at least 9\) for 70 items"):
            columns.Columns.of(p, 0, bits)
    apart = torch.zeros(5, 40, dtype=torch.uint8)[:, 1:20]  # neither at a word nor of whole words
    apart[:, :9] = options["neg"].bits[:, :9]
    want = columns.Columns.of(p, 0, options["neg"].bits).bits
    assert torch.equal(columns.Columns.of(p, 0, apart).bits[:, :3], want[:, :3])


def test_any_strides() -> None:
    _, catalog, options = problem(3, 70, 8, 0, "all")
    line = torch.linspace(-1.0, 1.0, 100)
    for rows, items in (
        (line[:8].expand(3, 8), catalog.T.contiguous().T),
        (line[:3, None].expand(3, 8), line[:77].unfold(0, 8, 1)),
    ):
        odd = {"bias": torch.stack([line, line], 1)[:70, 0], "target": options["target"].repeat_interleave(2)[::2]}
        plain = {name: x.contiguous() for name, x in odd.items()}
        given = slice_cross_entropy(rows, items, reduction="none", backend="triton", **odd)
        want = slice_cross_entropy(rows.contiguous(), items.contiguous(), reduction="none", backend="triton", **plain)
        assert torch.equal(given, want)
