"""The specification itself, held against definitions written out one row at a time."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import alterrec_fast as af
from alterrec_fast.ops import reference
from tests.conftest import integers

sizes = st.tuples(st.integers(0, 6), st.integers(1, 90), st.integers(1, 5))


def ranking(scores: torch.Tensor) -> list[int]:
    """Items of one row, best first, ties by lower id."""
    return sorted(range(len(scores)), key=lambda item: (-float(scores[item]), item))


def written_out_loss(
    y: torch.Tensor, target: int, negatives: list[int], positives: list[int], weight: float
) -> torch.Tensor:
    """One row of AlterRec, Eqs. (8) to (11): each positive is classified against itself and the negatives."""
    chosen = [i for i in negatives if i != target]
    if not chosen:
        return y.sum() * 0.0
    total = y.new_zeros(())
    for i, w in [(target, 1.0)] + [(i, weight) for i in positives if i >= 0]:
        logits = torch.cat([y[i : i + 1], y[chosen]])
        total = total + w * F.cross_entropy(logits[None], torch.tensor([0]))
    return total


@given(sizes, st.integers(0, 99), st.data())
def test_rank_slice_is_the_slice_of_a_stable_sort(size: tuple[int, int, int], seed: int, data: st.DataObject) -> None:
    b, v, d = size
    first = data.draw(st.integers(0, v))
    stop = data.draw(st.integers(0, v - first))
    start = data.draw(st.integers(0, stop))
    top = data.draw(st.integers(0, v - first))
    query, catalog, bias = integers(b, d, seed), integers(v, d, seed + 1), integers(1, v, seed + 2)[0]
    exclude = torch.randint(-2, v, (b, 3), generator=torch.Generator().manual_seed(seed))
    neg = af.rank_slice(
        query,
        catalog,
        start=start,
        stop=stop,
        top=top,
        exclude=exclude,
        bias=bias,
        first_item=first,
        backend="reference",
    )
    scores = query @ catalog.T + bias
    for row in range(b):
        order = [item + first for item in ranking(scores[row, first:])]
        expected = sorted(set(order[start:stop]) - set(exclude[row].tolist()))
        assert neg.indices()[row].tolist() == expected + [-1] * (stop - start - len(expected))
        assert neg.top[row].tolist() == order[:top]
        if start == stop:
            assert neg.thresholds[row].tolist() == [math.inf, -math.inf]
        else:
            assert neg.thresholds[row].tolist() == [scores[row, order[start]], scores[row, order[stop - 1]]]


@given(sizes, st.integers(0, 99), st.data())
def test_top_k_is_the_head_of_a_stable_sort(size: tuple[int, int, int], seed: int, data: st.DataObject) -> None:
    b, v, d = size
    first = data.draw(st.integers(0, v))
    k = data.draw(st.integers(0, v - first))
    query, catalog = integers(b, d, seed), integers(v, d, seed + 1)
    exclude = torch.randint(-2, v, (b, 3), generator=torch.Generator().manual_seed(seed))
    scores, items = af.top_k(query, catalog, k=k, exclude=exclude, first_item=first, backend="reference")
    dense = query @ catalog.T
    for row in range(b):
        order = [item + first for item in ranking(dense[row, first:])]
        allowed = [item for item in order if item not in exclude[row].tolist()][:k]
        assert items[row].tolist() == allowed + [-1] * (k - len(allowed))
        assert scores[row].tolist() == [float(dense[row, i]) for i in allowed] + [-math.inf] * (k - len(allowed))


def test_the_three_forms_of_exclude_agree() -> None:
    query, catalog = integers(4, 3, 0), integers(30, 3, 1)
    ids = torch.tensor([3, -1, 7, 29])
    matrix = torch.stack([ids, torch.full_like(ids, -5)], 1).int()
    lists = (torch.tensor([3, 7, 29]), torch.tensor([0, 1, 1, 2, 3]))
    slices = [
        af.rank_slice(query, catalog, start=0, stop=30, exclude=x, backend="reference").mask()
        for x in (ids, matrix, lists)
    ]
    assert torch.equal(slices[0], slices[1])
    assert torch.equal(slices[0], slices[2])
    assert (~slices[0]).sum() == 3


@given(sizes, st.integers(0, 99), st.booleans(), st.data())
def test_slice_cross_entropy_is_the_papers_sum(
    size: tuple[int, int, int], seed: int, as_ids: bool, data: st.DataObject
) -> None:
    b, v, d = size
    generator = torch.Generator().manual_seed(seed)
    query, catalog, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((b, d), (v, d), (v,)))
    mask = torch.rand(b, v, generator=generator) < data.draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
    neg = af.RankSlice.from_mask(mask)
    if as_ids:
        neg = af.RankSlice.from_indices(neg.indices(), v)
    target = torch.randint(0, v, (b,), generator=generator)
    target[torch.rand(b, generator=generator) < 0.2] = -100
    positives = torch.randint(-1, v, (b, 3), generator=generator)
    leaves = [x.requires_grad_() for x in (query, catalog, bias)]
    loss = af.slice_cross_entropy(
        query,
        catalog,
        target,
        neg,
        positives=positives,
        positive_weight=0.5,
        temperature=0.7,
        bias=bias,
        reduction="none",
        backend="reference",
    )
    y = (query @ catalog.T + bias) / 0.7
    rows = [
        written_out_loss(y[i], int(target[i]), mask[i].nonzero().flatten().tolist(), positives[i].tolist(), 0.5)
        if target[i] != -100
        else y[i].sum() * 0.0
        for i in range(b)
    ]
    expected = torch.stack(rows) if rows else y.sum(1)
    torch.testing.assert_close(loss, expected)
    weights = torch.rand(b, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad((loss * weights).sum(), leaves)
    want = torch.autograd.grad((expected * weights).sum(), leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_without_a_slice_it_is_the_full_softmax() -> None:
    query, catalog, target = torch.randn(5, 4), torch.randn(20, 4), torch.tensor([1, 19, 7, -100, 2])
    loss = af.slice_cross_entropy(query, catalog, target, backend="reference")
    torch.testing.assert_close(loss, F.cross_entropy(query @ catalog.T, target))
    padded = af.slice_cross_entropy(query, catalog, target, first_item=1, reduction="sum", backend="reference")
    expected = F.cross_entropy(query @ catalog[1:].T, (target - 1).where(target >= 0, target), reduction="sum")
    torch.testing.assert_close(padded, expected)


@given(sizes, st.integers(0, 99), st.booleans(), st.booleans(), st.data())
def test_sampled_softmax_is_the_papers_sum(
    size: tuple[int, int, int], seed: int, shared: bool, sparse: bool, data: st.DataObject
) -> None:
    b, v, d = size
    n = data.draw(st.integers(0, 12))
    generator = torch.Generator().manual_seed(seed)
    query, catalog, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((b, d), (v, d), (v,)))
    log_q = torch.randn(v, generator=generator, dtype=torch.float64)
    negatives = torch.randint(-1, v, (n,) if shared else (b, n), generator=generator)
    target = torch.randint(0, v, (b,), generator=generator)
    positives = torch.randint(-1, v, (b, 2), generator=generator)
    leaves = [x.requires_grad_() for x in (query, catalog, bias)]
    loss = af.sampled_softmax(
        query, catalog, target, negatives, log_q=log_q, positives=positives, positive_weight=0.5, temperature=0.7,
        bias=bias, reduction="sum", sparse_grad=sparse, backend="reference",
    )  # fmt: skip
    y = (query @ catalog.T + bias) / 0.7 - log_q
    expected = y.sum() * 0.0
    for i in range(b):
        row = negatives if shared else negatives[i]
        members = [j for j in row.tolist() if j >= 0]  # a repeat counts each time
        expected = expected + written_out_loss(y[i], int(target[i]), members, positives[i].tolist(), 0.5)
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, leaves)
    want = torch.autograd.grad(expected, leaves)
    assert got[1].is_sparse == sparse
    assert not sparse or got[1].is_coalesced()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.to_dense(), other)


@pytest.mark.parametrize("rows_a_block", [1, 2, 100])
def test_row_blocks_change_nothing(rows_a_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, catalog = torch.randn(5, 4, requires_grad=True), torch.randn(40, 4, requires_grad=True)
    target, negatives = torch.tensor([1, 2, 3, 4, 5]), torch.randint(0, 40, (5, 8))

    def everything() -> list[torch.Tensor]:
        neg = af.rank_slice(query, catalog, start=3, stop=30, top=2, backend="reference")
        loss = af.slice_cross_entropy(query, catalog, target, neg, positives=neg.top, backend="reference")
        loss = loss + af.sampled_softmax(query, catalog, target, negatives, backend="reference")
        grads = torch.autograd.grad(loss, (query, catalog))
        return [neg.mask(), neg.top, neg.thresholds, loss.detach(), *grads]

    expected = everything()
    monkeypatch.setattr(reference, "BLOCK_BYTES", 4 * 40 * rows_a_block)
    for one, other in zip(everything(), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("shared", "with_slice"), list(product([False, True], repeat=2)))
def test_gradcheck(shared: bool, with_slice: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    query, catalog, bias = (
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (9, 2), (9,))
    )
    target, positives = torch.tensor([0, 4, 4]), torch.tensor([[4, -1], [4, 4], [2, 8]])
    neg = af.RankSlice.from_mask(torch.rand(3, 9, generator=generator) < 0.5) if with_slice else None
    negatives = torch.randint(0, 9, (4,) if shared else (3, 4), generator=generator)

    def slice_loss(q: torch.Tensor, e: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        return af.slice_cross_entropy(
            q, e, target, neg, positives=positives, positive_weight=0.5, temperature=0.3, bias=o, backend="reference"
        )

    def sampled_loss(q: torch.Tensor, e: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        return af.sampled_softmax(
            q,
            e,
            target,
            negatives,
            log_q=None,
            positives=positives,
            positive_weight=0.5,
            temperature=0.3,
            bias=o,
            backend="reference",
        )

    assert torch.autograd.gradcheck(slice_loss, (query, catalog, bias))
    assert torch.autograd.gradcheck(sampled_loss, (query, catalog, bias))


def test_empty_slices_and_ignored_rows_give_zero_gradients() -> None:
    query, catalog = torch.randn(3, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    neg = af.RankSlice.from_indices(torch.tensor([[2, -1], [5, 6], [1, 3]]), 10)
    loss = af.slice_cross_entropy(
        query, catalog, torch.tensor([2, 5, -100]), neg, reduction="none", backend="reference"
    )
    assert loss[0] == 0.0  # its only negative is the target
    assert loss[1] > 0.0
    assert loss[2] == 0.0
    loss.sum().backward()
    assert query.grad is not None and catalog.grad is not None
    assert query.grad[[0, 2]].abs().sum() == 0.0
    assert query.grad.isfinite().all() and catalog.grad.isfinite().all()


def test_no_rows() -> None:
    query, catalog = torch.empty(0, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64)
    loss = af.slice_cross_entropy(query, catalog, target, backend="reference")
    loss = loss + af.sampled_softmax(query, catalog, target, torch.empty(0, 3).long(), backend="reference")
    assert loss == 0.0
    loss.backward()
    assert query.grad is not None and query.grad.shape == (0, 4)


def test_bf16_rounds_the_inputs_and_keeps_their_gradients_dtype() -> None:
    query, catalog = torch.randn(4, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    target = torch.tensor([1, 2, 3, 4])
    rounded = [x.detach().bfloat16().float() for x in (query, catalog)]
    loss = af.slice_cross_entropy(query, catalog, target, precision="bf16", backend="reference")
    torch.testing.assert_close(loss, af.slice_cross_entropy(*rounded, target=target, backend="reference"))
    loss.backward()
    assert query.grad is not None and query.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss, af.slice_cross_entropy(query, catalog, target, backend="reference"))
    half = catalog.detach().bfloat16().requires_grad_()
    mixed = af.slice_cross_entropy(query, half, target, backend="reference")
    torch.testing.assert_close(mixed, loss)
    mixed.backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


def test_bad_arguments_are_named() -> None:
    q, e, t = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1])
    wrong: list[tuple[type[Exception], str, object]] = [
        (TypeError, "or float16 .*, got torch.int64", lambda: af.top_k(q.long(), e.long(), k=1)),
        (TypeError, "float64", lambda: af.top_k(q.double(), e, k=1, backend="reference")),
        (ValueError, "3 and 2", lambda: af.top_k(q, e[:, :2], k=1)),
        (ValueError, "2-D", lambda: af.top_k(q[0], e, k=1)),
        (ValueError, "rank 6 is beyond the catalog, which holds 5", lambda: af.top_k(q, e, k=6)),
        (ValueError, "rank 5 is beyond the catalog, which holds 4", lambda: af.top_k(q, e, k=5, first_item=1)),
        (ValueError, "start=3, stop=2", lambda: af.rank_slice(q, e, start=3, stop=2)),
        (ValueError, "start=-1", lambda: af.rank_slice(q, e, start=-1, stop=2)),
        (ValueError, r"bias must be \(5,\)", lambda: af.top_k(q, e, k=1, bias=torch.zeros(4))),
        (ValueError, "first_item", lambda: af.top_k(q, e, k=0, first_item=6)),
        (ValueError, "precision", lambda: af.top_k(q, e, k=1, precision="fp8")),
        (ValueError, "backend", lambda: af.top_k(q, e, k=1, backend="cuda")),
        (ValueError, "exclude: row 1 holds 5", lambda: af.top_k(q, e, k=1, exclude=torch.tensor([4, 5]))),
        (ValueError, "temperature", lambda: af.slice_cross_entropy(q, e, t, temperature=0.0)),
        (ValueError, "above 0, got -1", lambda: af.slice_cross_entropy(q, e, t, temperature=-torch.ones(1))),
        (ValueError, "hold one float, got .*2,", lambda: af.slice_cross_entropy(q, e, t, temperature=torch.ones(2))),
        (ValueError, "hold one float, .* torch.int64", lambda: af.slice_cross_entropy(q, e, t, temperature=t[1])),
        (ValueError, "reduction", lambda: af.slice_cross_entropy(q, e, t, reduction="avg")),
        (ValueError, "max_saved_bytes", lambda: af.slice_cross_entropy(q, e, t, max_saved_bytes=-1)),
        (ValueError, "target must be", lambda: af.slice_cross_entropy(q, e, t[:1])),
        (TypeError, "target must be int", lambda: af.slice_cross_entropy(q, e, t.float())),
        (ValueError, "row 1 holds 7", lambda: af.slice_cross_entropy(q, e, torch.tensor([0, 7]))),
        (ValueError, "row 0 holds 0", lambda: af.slice_cross_entropy(q, e, t, first_item=1)),
        (ValueError, "positives: row 0 holds -2", lambda: af.slice_cross_entropy(q, e, t, positives=t[:, None] - 2)),
        (ValueError, "2 rows over 5", lambda: af.slice_cross_entropy(q, e, t, af.RankSlice.uniform(2, 6, 3))),
        (
            ValueError,
            "first_item 1 or more, as here, got 0",
            lambda: af.slice_cross_entropy(q, e, t, af.RankSlice.uniform(2, 5, 3), first_item=1),
        ),
        (ValueError, "neg: row 1 holds 9", lambda: af.sampled_softmax(q, e, t, torch.tensor([[0], [9]]))),
        (ValueError, r"log_q must be \(5,\)", lambda: af.sampled_softmax(q, e, t, t, log_q=torch.zeros(4))),
    ]
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()  # type: ignore[operator]


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_a_score_that_is_not_finite_is_named(value: float) -> None:
    query, catalog = torch.full((3, 2), 2.0), torch.ones(6, 2)
    catalog[4, 0] = value
    target = torch.zeros(3, dtype=torch.int64)
    for call in (
        lambda: af.rank_slice(query, catalog, start=0, stop=2, backend="reference"),
        lambda: af.top_k(query, catalog, k=2, backend="reference"),
        lambda: af.slice_cross_entropy(query, catalog, target, backend="reference"),
        lambda: af.sampled_softmax(query, catalog, target, torch.full((3, 1), 4), backend="reference"),
    ):
        with pytest.raises(ValueError, match="scores: row 0"):
            call()
    assert af.top_k(query, catalog[:4], k=2, backend="reference")[1].tolist() == [[0, 1]] * 3
    af.top_k(query, catalog, k=2, check=False, backend="reference")  # unchecked values pass


def test_non_contiguous_rows() -> None:
    wide = torch.randn(20, 16)
    expected = af.top_k(wide[:4, :7].contiguous(), wide[4:, :7].contiguous(), k=5, backend="reference")
    strided = af.top_k(wide[:4, :7], wide[4:, :7], k=5, backend="reference")
    assert torch.equal(expected[1], strided[1])
