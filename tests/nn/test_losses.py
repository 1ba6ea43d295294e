"""The losses as modules: rows and padded sequences against what torch computes from the whole score matrix."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import alterrec_fast as af
from tests.ops.loss_helpers import needs_native

V, D = 90, 12


def sequences(b: int, length: int, seed: int, padding: int = -100) -> tuple[Tensor, Tensor, Tensor]:
    """query (b, length, D), catalog (V, D), target (b, length) of which about a third is padding."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(1, V, (b, length), generator=g)
    target[torch.rand(b, length, generator=g) < 0.35] = padding
    return torch.randn(b, length, D, generator=g), torch.randn(V, D, generator=g), target


def value_and_gradients(loss: Any, query: Tensor, catalog: Tensor, *others: Any, **options: Any) -> list[Tensor]:
    query, catalog = query.detach().requires_grad_(), catalog.detach().requires_grad_()
    value = loss(query, catalog, *others, **options)
    weights = torch.linspace(0.5, 1.5, value.numel()).view(value.shape)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), (query, catalog))]


def assert_same(ours: list[Tensor], theirs: list[Tensor], atol: float = 1e-5) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=atol)


@settings(max_examples=30, deadline=None)
@given(
    b=st.integers(0, 6),
    length=st.integers(0, 5),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    temperature=st.sampled_from([0.2, 1.0]),
    with_bias=st.booleans(),
    padding=st.sampled_from([0, -100]),
    flat=st.booleans(),
    seed=st.integers(0, 99),
)
def test_full_softmax_is_torchs_cross_entropy(
    b: int, length: int, reduction: str, temperature: float, with_bias: bool, padding: int, flat: bool, seed: int
) -> None:
    query, catalog, target = sequences(b, length, seed, padding)
    if flat:
        query, target = query.flatten(0, 1), target.flatten()
    bias = torch.randn(V) if with_bias else None
    loss = af.FullSoftmaxLoss(temperature=temperature, ignore_index=padding, reduction=reduction)

    def torchs(query: Tensor, catalog: Tensor, target: Tensor) -> Tensor:
        logits = (query @ catalog.T + (0 if bias is None else bias)) / temperature
        if reduction == "mean" and not (target != padding).any():
            return 0 * logits.sum()  # where torch has nan
        losses = F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=padding, reduction=reduction)
        return losses.view(target.shape) if reduction == "none" else losses

    ours = value_and_gradients(loss, query, catalog, target, bias=bias)
    # Logits grow with 1 / temperature, and with them what float32 rounds off, in ours as in torch's.
    assert_same(ours, value_and_gradients(torchs, query, catalog, target), atol=1e-5 / temperature)


def rowwise(query: Tensor, catalog: Tensor, target: Tensor, member: Tensor, log_q: Tensor | None = None) -> Tensor:
    """Losses (T,) against the members of each row, from the whole score matrix."""
    logits = query @ catalog.T
    if log_q is not None:
        logits = logits - log_q
    own = F.one_hot(target, V).bool()
    return F.cross_entropy(logits.masked_fill(~(member | own), -torch.inf), target, reduction="none")


@pytest.mark.parametrize("for_every_target", [False, True])
def test_slices_of_the_real_rows_or_of_all(for_every_target: bool) -> None:
    query, catalog, target = sequences(4, 6, 0)
    real = target != -100
    member = torch.rand(4, 6, V) < 0.3
    member[0, 0], target[0, 0] = False, 5  # a real row without negatives
    real[0, 0] = True
    neg = af.RankSlice.from_mask(member.flatten(0, 1) if for_every_target else member[real])
    loss = af.SliceCrossEntropy(reduction="none")

    def torchs(query: Tensor, catalog: Tensor) -> Tensor:
        out = torch.zeros(4, 6)
        out[real] = rowwise(query[real], catalog, target[real], member[real])
        return out

    assert_same(value_and_gradients(loss, query, catalog, target, neg), value_and_gradients(torchs, query, catalog))
    mean = af.SliceCrossEntropy()(query, catalog, target, neg)
    torch.testing.assert_close(mean, torchs(query, catalog)[real].mean())


@pytest.mark.parametrize("form", ["shared", "real rows", "every target", "expanded"])
def test_sampled_negatives_in_all_their_forms(form: str) -> None:
    query, catalog, target = sequences(5, 4, 1)
    real = target != -100
    log_q = torch.randn(V)
    drawn = torch.stack([torch.randperm(V)[:20] for _ in range(20)]).view(5, 4, 20)
    if form == "shared":
        drawn = drawn[0, 0].expand(5, 4, 20)
    elif form == "expanded":
        drawn = drawn[:, :1].expand(5, 4, 20)
    negatives = {"shared": drawn[0, 0], "real rows": drawn[real]}.get(form, drawn)
    member = torch.zeros(5, 4, V, dtype=torch.bool).scatter_(2, drawn, True)
    loss = af.SampledSoftmaxLoss(log_q=log_q, reduction="sum")

    def torchs(query: Tensor, catalog: Tensor) -> Tensor:
        return rowwise(query[real], catalog, target[real], member[real], log_q).sum()

    ours = value_and_gradients(loss, query, catalog, target, negatives)
    assert_same(ours, value_and_gradients(torchs, query, catalog))


def test_positives_follow_their_rows() -> None:
    query, catalog, target = sequences(3, 4, 2)
    positives = torch.randint(-1, V, (3, 4, 2))
    real = target != -100
    neg = af.rank_slice(query[real], catalog, start=5, stop=60)
    loss = af.SliceCrossEntropy(positive_weight=0.5, temperature=0.3)
    torch.testing.assert_close(
        loss(query, catalog, target, neg, positives=positives),
        af.slice_cross_entropy(
            query[real], catalog, target[real], neg, positives=positives[real], positive_weight=0.5, temperature=0.3
        ),
    )
    sampled = af.SampledSoftmaxLoss(positive_weight=0.5)(query, catalog, target, torch.arange(30), positives=positives)
    plain = af.sampled_softmax(
        query[real], catalog, target[real], torch.arange(30), positives=positives[real], positive_weight=0.5
    )
    torch.testing.assert_close(sampled, plain)


def test_gradients_of_parameters_and_bias_arrive() -> None:
    query, _, target = sequences(3, 4, 3, padding=0)
    items = torch.nn.Embedding(V, D, padding_idx=0)
    bias = torch.nn.Parameter(torch.zeros(V))
    af.FullSoftmaxLoss(first_item=1, ignore_index=0)(query, items.weight, target, bias).backward()
    assert items.weight.grad is not None and bias.grad is not None
    assert items.weight.grad[1:].abs().sum(1).all() and not items.weight.grad[0].any() and bias.grad[0] == 0


def test_the_gradient_of_the_catalog_may_be_sparse() -> None:
    query, catalog, target = sequences(3, 4, 7)
    negatives, log_q = torch.randint(V, (int((target != -100).sum()), 5)), torch.randn(V)
    dense, sparse = (
        value_and_gradients(
            lambda q, e, how=how: af.SampledSoftmaxLoss(log_q=log_q, sparse_grad=how)(q, e, target, negatives),
            query,
            catalog,
        )
        for how in (False, True)
    )
    touched = torch.cat([negatives.flatten(), target[target != -100]]).unique()
    assert sparse[2].is_sparse and torch.equal(sparse[2].coalesce().indices()[0], touched)
    assert_same([*sparse[:2], sparse[2].to_dense()], dense)


@pytest.mark.parametrize("name", ["FullSoftmaxLoss", "SliceCrossEntropy", "SampledSoftmaxLoss"])
def test_autocast_is_bf16_with_a_float32_loss_and_gradients_of_the_inputs_dtype(name: str) -> None:
    query, catalog, target = sequences(3, 4, 8)
    real = target != -100
    others = {
        "FullSoftmaxLoss": (),
        "SliceCrossEntropy": (af.rank_slice(query[real], catalog, start=5, stop=60),),
        "SampledSoftmaxLoss": (torch.arange(40),),
    }[name]
    bias = torch.randn(V)
    exact = value_and_gradients(getattr(af, name)(temperature=0.5), query, catalog, target, *others, bias=bias)
    rounded = value_and_gradients(
        getattr(af, name)(temperature=0.5, precision="bf16"), query, catalog, target, *others, bias=bias
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = value_and_gradients(getattr(af, name)(temperature=0.5), query, catalog, target, *others, bias=bias)
    assert [x.dtype for x in ours] == [torch.float32] * 3
    assert_same(ours, rounded)
    for mine, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.05)
    assert not torch.equal(ours[1], exact[1])


def test_a_transposed_query_is_taken() -> None:
    query, catalog, target = sequences(3, 4, 4)
    transposed = query.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    loss = af.FullSoftmaxLoss()
    torch.testing.assert_close(loss(transposed, catalog, target), loss(query, catalog, target))
    torch.testing.assert_close(loss(transposed[0], catalog, target[0]), loss(query[0], catalog, target[0]))


@needs_native
def test_one_graph_with_padding() -> None:
    query, catalog, target = sequences(3, 4, 5)
    losses = {
        af.FullSoftmaxLoss(): (),
        af.SliceCrossEntropy(): (af.rank_slice(query.flatten(0, 1), catalog, start=3, stop=50),),
        af.SampledSoftmaxLoss(): (torch.arange(40),),
    }
    for loss, others in losses.items():
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        ours = value_and_gradients(compiled, query, catalog, target, *others)
        assert_same(ours, value_and_gradients(loss, query, catalog, target, *others))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda q, e, t: af.FullSoftmaxLoss()(q[None], e, t),
            r"query must be \(B, d\) or \(B, L, d\), got \(1, 3, 4, 12\)",
        ),
        (
            lambda q, e, t: af.FullSoftmaxLoss()(q, e, t[:, 1:]),
            r"target must be \(3, 4\), as the query is, got \(3, 3\)",
        ),
        (lambda q, e, t: af.FullSoftmaxLoss(temperature=0), "temperature must be above 0, got 0"),
        (lambda q, e, t: af.SampledSoftmaxLoss(reduction="avg"), "reduction must be one of mean, sum, none, got 'avg'"),
        (
            lambda q, e, t: af.SampledSoftmaxLoss()(q, e, t, torch.zeros(3, 2, 5, dtype=torch.int64)),
            r"neg must be \(N,\), \(T, N\) with .*, or \(3, 4, N\), got \(3, 2, 5\)",
        ),
        (
            lambda q, e, t: af.SampledSoftmaxLoss()(q, e, t, torch.zeros(3, 5, dtype=torch.int64)),
            "neg must have a row for each of the 7 targets that are not ignored, or for all 12, got 3 rows",
        ),
        (
            lambda q, e, t: af.SliceCrossEntropy()(q, e, t, af.rank_slice(q[0], e, start=0, stop=5)),
            "neg must have a row for each of the 7 targets that are not ignored, or for all 12, got 4 rows",
        ),
        (
            lambda q, e, t: af.SliceCrossEntropy()(q, e, t, positives=t),
            r"positives must be \(3, 4, P\), got \(3, 4\)",
        ),
    ],
)
def test_errors_name_the_value_and_what_was_expected(call: Any, message: str) -> None:
    query, catalog, _ = sequences(3, 4, 6)
    target = torch.arange(12).where(torch.arange(12) < 7, -100).view(3, 4)
    with pytest.raises(ValueError, match=message):
        call(query, catalog, target)


def test_needs_nothing_of_the_trainer() -> None:
    code = (
        "import sys, alterrec_fast as af; af.FullSoftmaxLoss(); af.SampledSoftmaxLoss(); af.SliceCrossEntropy(); "
        "assert not {'polars', 'pydantic', 'sentence_transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_swapped_negatives_are_named_with_the_loss_that_takes_them() -> None:
    query, catalog, target = sequences(3, 4, seed=0)
    sampler = af.RankSliceSampler(0, 10)
    ids = sampler.sample(query, catalog, target, num_negatives=5)
    with pytest.raises(
        TypeError,
        match=rf"as sampler\(\.\.\.\) gives it, got a tensor of shape \({len(ids)}, 5\); .* SampledSoftmaxLoss",
    ):
        af.SliceCrossEntropy()(query, catalog, target, ids)
    with pytest.raises(
        TypeError, match=r"as sampler\.sample\(\.\.\.\) gives it, got .*RankSlice; .* SliceCrossEntropy"
    ):
        af.SampledSoftmaxLoss()(query, catalog, target, sampler(query, catalog, target))
