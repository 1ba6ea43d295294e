"""What every engine accepts and refuses: strides, ignored rows, masks by bias, arguments of a wrong kind."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import alterrec_fast as af
from alterrec_fast.ops import library
from tests.ops.loss_helpers import call

needs_native = pytest.mark.skipif(bool(library.NO_EXTENSION), reason="the extension is not built")
ENGINES = ["reference", pytest.param("native", marks=needs_native)]
B, V, D = 4, 60, 6


def integers(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randint(-3, 4, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


def strange(x: Tensor, form: str) -> Tensor:
    """A tensor of the same shape with other strides; only "transposed" and "offset" hold the same values."""
    if form == "transposed":
        return x.T.contiguous().T
    if form == "one row":
        return x[:1].expand_as(x)
    if form == "one column":
        return x[..., :1].expand_as(x)
    if form == "windows":
        return torch.arange(x.shape[0] + x.shape[1], dtype=x.dtype).unfold(0, x.shape[1], 1)[: x.shape[0]]
    if form == "offset":
        wide = x.new_zeros(x.shape[0], 2 * x.shape[1] + 3)
        wide[:, 3::2] = x
        return wide[:, 3::2]
    raise ValueError(form)


MATRIX_FORMS = ["transposed", "one row", "one column", "windows", "offset"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", MATRIX_FORMS)
@pytest.mark.parametrize("which", ["query", "catalog"])
def test_any_strides_of_a_matrix_give_what_a_copy_gives(which: str, form: str, engine: str) -> None:
    inputs = {"query": integers(B, D, 1), "catalog": integers(V, D, 2)}
    inputs[which] = strange(inputs[which], form)
    copied = {name: x.clone(memory_format=torch.contiguous_format) for name, x in inputs.items()}
    target = torch.arange(B)
    with af.backend(engine):
        neg = af.rank_slice(**copied, start=2, stop=30, top=3)
        assert af.rank_slice(**inputs, start=2, stop=30, top=3) == neg
        assert all(map(torch.equal, af.top_k(**inputs, k=5), af.top_k(**copied, k=5)))
        for op, options in (
            (af.slice_cross_entropy, {"neg": neg}),
            (af.slice_cross_entropy, {}),
            (af.sampled_softmax, {"neg": torch.arange(20).repeat(B, 1)}),
            (af.sampled_softmax, {"neg": torch.arange(20)}),
        ):
            expected = call(op, **copied, target=target, temperature=4.0, **options)
            for ours, theirs in zip(
                call(op, **inputs, target=target, temperature=4.0, **options), expected, strict=True
            ):
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("engine", ENGINES)
def test_any_strides_of_a_vector_give_what_a_copy_gives(engine: str) -> None:
    query, catalog = integers(B, D, 1), integers(V, D, 2)
    every_other = integers(1, 2 * V, 3)[0, ::2]
    ids = torch.arange(2 * B)[::2]
    lists = {"positives": (torch.arange(3 * B).view(3, B) % V).T, "target": ids}

    def everything(copied: bool) -> list[Any]:
        def x(tensor: Tensor) -> Tensor:
            return tensor.contiguous() if copied else tensor

        exclude = x(torch.arange(8).expand(B, 8))
        neg = af.rank_slice(query, catalog, start=2, stop=30, bias=x(every_other), exclude=exclude)
        options: dict[str, Any] = {name: x(ids) for name, ids in lists.items()}
        options |= {"temperature": 4.0, "bias": x(every_other)}
        expanded = x(torch.arange(12).expand(B, 12))
        log_q = x(every_other.flip(0).expand(1, V)[0])
        results: list[Any] = [neg, *af.top_k(query, catalog, k=4, bias=x(every_other), exclude=x(ids))]
        wide = replace(neg, ids=x(neg.indices().int().T.contiguous().T), bits=None)
        for loss in (
            lambda q, e: af.slice_cross_entropy(q, e, neg=wide, reduction="none", **options),
            lambda q, e: af.sampled_softmax(q, e, neg=expanded, log_q=log_q, reduction="none", **options),
            lambda q, e: af.sampled_softmax(q, e, neg=x(ids), reduction="none", **options),
        ):
            q, e = query.clone().requires_grad_(), catalog.clone().requires_grad_()
            losses = loss(q, e)
            weights = torch.linspace(0.5, 1.5, 2 * B)[::2]
            results += [losses, *torch.autograd.grad(losses, (q, e), x(weights))]
            results += torch.autograd.grad(loss(q, e).sum(), (q, e))  # its gradient is one number, expanded
        return results

    with af.backend(engine):
        for ours, theirs in zip(everything(False), everything(True), strict=True):
            if isinstance(ours, af.RankSlice):
                assert ours == theirs
            else:
                torch.testing.assert_close(ours, theirs)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "all": lambda q, e, t, **options: af.slice_cross_entropy(q, e, t, **options),
    "bits": lambda q, e, t, **options: af.slice_cross_entropy(
        q, e, t, af.RankSlice.from_mask(torch.arange(V).remainder(3).lt(2).repeat(q.shape[0], 1)), **options
    ),
    "ids": lambda q, e, t, **options: af.slice_cross_entropy(
        q, e, t, af.RankSlice.from_indices(torch.tensor([[1, 7, 9]]).repeat(q.shape[0], 1), V), **options
    ),
    "sampled": lambda q, e, t, **options: af.sampled_softmax(
        q, e, t, torch.arange(0, V, 2).repeat(q.shape[0], 1), **options
    ),
    "shared": lambda q, e, t, **options: af.sampled_softmax(q, e, t, torch.arange(0, V, 2), **options),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("form", LOSSES)
def test_rows_with_an_ignored_target_are_not_looked_at(form: str, check: bool, engine: str) -> None:
    query, catalog = integers(B, D, 1), integers(V, D, 2)
    target, options = torch.tensor([5, -100, 2, -100]), {"check": check, "backend": engine, "temperature": 4.0}
    positives = torch.tensor([[1, -1], [2, 3], [4, 4], [0, 1]])
    real = target != -100
    query[1], query[3, 2] = math.nan, math.inf
    losses, grad_query, grad_catalog = call(LOSSES[form], query, catalog, t=target, positives=positives, **options)
    fewer = call(LOSSES[form], query[real], catalog, t=target[real], positives=positives[real], **options)
    assert not losses[~real].any() and not grad_query[~real].any()
    torch.testing.assert_close(losses[real], fewer[0])
    q, e = query.clone().requires_grad_(), catalog.clone().requires_grad_()
    grads = torch.autograd.grad(LOSSES[form](q, e, target, positives=positives, **options), (q, e))
    q2, e2 = query[real].clone().requires_grad_(), catalog.clone().requires_grad_()
    loss = LOSSES[form](q2, e2, target[real], positives=positives[real], **options)
    expected = torch.autograd.grad(loss, (q2, e2))
    assert not grads[0][~real].any() and grad_catalog.isfinite().all()
    torch.testing.assert_close(grads[0][real], expected[0])
    torch.testing.assert_close(grads[1], expected[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("check", [True, False])
def test_items_with_a_bias_of_minus_infinity_are_never_ranked(check: bool, engine: str) -> None:
    query, catalog, bias = integers(B, D, 1), integers(V, D, 2), integers(1, V, 3)[0]
    bias[torch.arange(V) % 4 != 1] = -math.inf  # 15 of 60 are left
    options: dict[str, Any] = {"check": check, "backend": engine}
    candidates = bias.isfinite().nonzero()[:, 0]
    few = bias[candidates]
    for start, stop in ((2, 9), (0, 15), (0, 40), (10, 40), (20, 40)):
        neg = af.rank_slice(query, catalog, start=start, stop=stop, top=20, bias=bias, **options)
        want = af.rank_slice(query, catalog[candidates], start=min(start, 15), stop=min(stop, 15), top=15, bias=few)
        assert torch.equal(neg.mask()[:, candidates], want.mask()) and neg.counts().equal(want.counts())
        assert torch.equal(neg.top[:, :15], candidates[want.top]) and (neg.top[:, 15:] == -1).all()
        scores = (query @ catalog.T + bias).sort(1, descending=True).values
        assert torch.equal(neg.thresholds, scores[:, [start, stop - 1]])
    scores, indices = af.top_k(query, catalog, k=20, bias=bias, exclude=candidates[:B], **options)
    assert (indices[:, 14:] == -1).all() and (scores[:, 14:] == -math.inf).all()
    assert bias[indices[:, :14]].isfinite().all() and not (indices == candidates[:B, None]).any()
    nothing = torch.full((V,), -math.inf)
    assert not af.rank_slice(query, catalog, start=0, stop=20, bias=nothing, **options).counts().any()
    assert (af.top_k(query, catalog, k=3, bias=nothing, **options).indices == -1).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("form", LOSSES)
def test_items_with_a_bias_of_minus_infinity_are_no_negatives(form: str, check: bool, engine: str) -> None:
    query, catalog, bias = integers(B, D, 1), integers(V, D, 2), integers(1, V, 3)[0]
    masked = torch.arange(V) % 4 == 1
    bias[masked] = -math.inf
    options: dict[str, Any] = {"check": check, "temperature": 4.0, "reduction": "none"}
    target, positives = torch.tensor([0, 2, 3, 6]), torch.tensor([[4, -1], [2, 3], [8, 8], [0, 10]])
    leaves = [x.clone().requires_grad_() for x in (query, catalog, bias)]
    losses = LOSSES[form](*leaves[:2], target, positives=positives, bias=leaves[2], backend=engine, **options)
    grads = torch.autograd.grad(losses.sum(), leaves)
    assert not grads[1][masked].any() and not grads[2][masked].any()
    finite = [query, catalog, bias.masked_fill(masked, -1e4)]  # so low that it takes no part, and torch can do it
    leaves = [x.double().requires_grad_() for x in finite]
    wide: dict[str, Any] = options | {"bias": leaves[2], "positives": positives, "backend": "reference"}
    expected = LOSSES[form](*leaves[:2], target, **wide)
    torch.testing.assert_close(losses, expected.float())
    for ours, theirs in zip(grads, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(ours, theirs.float())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", LOSSES)
def test_a_masked_target_or_positive_is_named(form: str, engine: str) -> None:
    query, catalog, bias = integers(B, D, 1), integers(V, D, 2), torch.zeros(V)
    bias[8] = -math.inf
    target, positives = torch.tensor([0, 2, 8, 6]), torch.tensor([[1], [8], [-1], [8]])
    with pytest.raises(ValueError, match="target: row 2 holds 8, whose bias is -inf"):
        LOSSES[form](query, catalog, target, bias=bias, backend=engine)
    target[2] = -100
    with pytest.raises(ValueError, match="positives: row 1 holds 8, whose bias is -inf"):
        LOSSES[form](query, catalog, target, positives=positives, bias=bias, backend=engine)
    for value in (math.inf, math.nan):
        bias[4] = value
        with pytest.raises(ValueError, match="has a score of"):
            LOSSES["all"](query, catalog, target, bias=bias, backend=engine)
        with pytest.raises(ValueError, match="has a score of"):
            af.top_k(query, catalog, k=3, bias=bias, backend=engine)


def wrong_kinds() -> dict[str, Callable[[Tensor, Tensor, Tensor], object]]:
    return {
        r"query must be a torch.Tensor, got numpy.ndarray; torch.from_numpy": lambda q, e, t: af.top_k(
            q.numpy(),
            e,
            k=1,  # type: ignore[arg-type]
        ),
        "catalog must be a torch.Tensor, got list": lambda q, e, t: af.top_k(q, e.tolist(), k=1),  # type: ignore[arg-type]
        "k must be an integer, got float 2.0": lambda q, e, t: af.top_k(q, e, k=2.0),  # type: ignore[arg-type]
        "start must be an integer, got str '3'": lambda q, e, t: af.rank_slice(q, e, start="3", stop=5),  # type: ignore[arg-type]
        "stop must be an integer, got a tensor": lambda q, e, t: af.rank_slice(q, e, start=3, stop=t[0]),  # type: ignore[arg-type]
        "top must be an integer, got None": lambda q, e, t: af.rank_slice(q, e, start=0, stop=1, top=None),  # type: ignore[arg-type]
        "first_item must be an integer, got bool True": lambda q, e, t: af.top_k(q, e, k=1, first_item=True),
        "bias must be a torch.Tensor, got list": lambda q, e, t: af.top_k(q, e, k=1, bias=[0.0] * V),  # type: ignore[arg-type]
        "exclude must be a torch.Tensor, got list": lambda q, e, t: af.top_k(q, e, k=1, exclude=[1, 2]),  # type: ignore[arg-type]
        "exclude offsets must be a torch.Tensor": lambda q, e, t: af.top_k(q, e, k=1, exclude=(t, [0])),  # type: ignore[arg-type]
        "check must be True, False or None": lambda q, e, t: af.top_k(q, e, k=1, check="no"),  # type: ignore[arg-type]
        "target must be a torch.Tensor, got": lambda q, e, t: af.slice_cross_entropy(q, e, t.numpy()),  # type: ignore[arg-type]
        "neg must be a RankSlice or None, got a tensor": lambda q, e, t: af.slice_cross_entropy(q, e, t, t),  # type: ignore[arg-type]
        "positives must be a torch.Tensor": lambda q, e, t: af.slice_cross_entropy(q, e, t, positives=[[1]] * B),  # type: ignore[arg-type]
        "positive_weight must be a number, got a tensor": lambda q, e, t: af.sampled_softmax(
            q,
            e,
            t,
            t,
            positive_weight=torch.ones(()),  # type: ignore[arg-type]
        ),
        "temperature must be a number, got str": lambda q, e, t: af.sampled_softmax(q, e, t, t, temperature="hot"),  # type: ignore[arg-type]
        "max_saved_bytes must be an integer": lambda q, e, t: af.slice_cross_entropy(q, e, t, max_saved_bytes=1e6),  # type: ignore[arg-type]
        "ignore_index must be an integer": lambda q, e, t: af.slice_cross_entropy(q, e, t, ignore_index=None),  # type: ignore[arg-type]
        "neg must be a torch.Tensor, got list": lambda q, e, t: af.sampled_softmax(q, e, t, [1, 2]),  # type: ignore[arg-type]
        "neg must be a tensor of ids, got a RankSlice": lambda q, e, t: af.sampled_softmax(
            q,
            e,
            t,
            af.RankSlice.uniform(B, V, 3),  # type: ignore[arg-type]
        ),
        "log_q must be a torch.Tensor, got float": lambda q, e, t: af.sampled_softmax(q, e, t, t, log_q=0.5),  # type: ignore[arg-type]
    }


def test_methods_of_a_slice_name_arguments_of_a_wrong_kind() -> None:
    neg = af.RankSlice.uniform(B, V, 9)
    calls: dict[str, Callable[[], object]] = {
        "m must be an integer, got float 2.0": lambda: neg.sample(2.0),  # type: ignore[arg-type]
        "hard_fraction must be a number, got str 'half'": lambda: neg.mix("half"),  # type: ignore[arg-type]
        "weights must be a torch.Tensor, got list": lambda: neg.mix(0.5, weights=[1.0] * V),  # type: ignore[arg-type]
        "size must be an integer, got float 9.0": lambda: af.RankSlice.uniform(B, V, 9.0),  # type: ignore[arg-type]
        "ids must be a torch.Tensor, got list": lambda: af.RankSlice.from_indices([[1]], V),  # type: ignore[arg-type]
        "mask must be a torch.Tensor, got numpy": lambda: af.RankSlice.from_mask(np.ones((2, 3), bool)),  # type: ignore[arg-type]
    }
    for message, make in calls.items():
        with pytest.raises(TypeError, match=message):
            make()


@pytest.mark.parametrize("message", wrong_kinds())
def test_arguments_of_a_wrong_kind_are_named(message: str) -> None:
    with pytest.raises(TypeError, match=message):
        wrong_kinds()[message](torch.ones(B, D), torch.ones(V, D), torch.arange(B))


def test_numpys_integers_and_floats_are_numbers() -> None:
    q, e, t = integers(B, D, 1), integers(V, D, 2), torch.arange(B)
    neg = af.rank_slice(q, e, start=np.int64(2), stop=np.int32(9))  # type: ignore[arg-type]
    assert neg == af.rank_slice(q, e, start=2, stop=9)
    loss = af.slice_cross_entropy(q, e, t, neg, temperature=np.float32(2), positive_weight=np.float64(1))  # type: ignore[arg-type]
    torch.testing.assert_close(loss, af.slice_cross_entropy(q, e, t, neg, temperature=2))


def test_a_slice_made_by_hand_is_checked() -> None:
    neg = af.rank_slice(integers(B, D, 1), integers(V, D, 2), start=2, stop=40)
    ids = af.RankSlice.from_indices(torch.arange(3).repeat(B, 1), V)
    assert neg.bits is not None and ids.ids is not None
    wrong: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, r"bits must be \(4, 8\), got \(4, 7\)", lambda: replace(neg, bits=neg.bits[:, :7])),
        (ValueError, r"bits must be \(4, 8\), got \(3, 8\)", lambda: replace(neg, bits=neg.bits[:3])),
        (TypeError, "bits must be torch.uint8, got torch.int8", lambda: replace(neg, bits=neg.bits.char())),
        (TypeError, "bits must be a torch.Tensor, got numpy", lambda: replace(neg, bits=neg.bits.numpy())),
        (ValueError, r"bits must be \(4, 16\), got", lambda: replace(neg, num_items=100)),
        (ValueError, r"ids must be \(4, n\), got \(12,\)", lambda: replace(ids, ids=ids.ids.flatten())),
        (TypeError, "ids must be torch.int32, got torch.int64", lambda: replace(ids, ids=ids.ids.long())),
        (ValueError, "exactly one of bits and ids", lambda: replace(ids, ids=None)),
        (ValueError, "exactly one of bits and ids", lambda: replace(neg, ids=ids.ids)),
        (ValueError, r"thresholds must be \(4, 2\)", lambda: replace(neg, thresholds=neg.thresholds[:2])),
        (
            ValueError,
            r"exclude_offsets must be \(5,\), got \(4,\)",
            lambda: replace(neg, exclude_offsets=torch.zeros(4).long()),
        ),
        (ValueError, "0 <= first_item <= num_items", lambda: replace(neg, first_item=V + 1)),
        (TypeError, "size must be an integer, got float 38.0", lambda: replace(neg, size=38.0)),
    ]
    for error, message, make in wrong:
        with pytest.raises(error, match=message):
            make()


@pytest.mark.parametrize("engine", ENGINES)
def test_ids_of_a_slice_beyond_the_catalog_are_named(engine: str) -> None:
    query, catalog, target = integers(B, D, 1), integers(V, D, 2), torch.arange(B)
    for width in (2, 50):  # read one by one, and as a mask
        ids = torch.full((B, width), -1, dtype=torch.int32)
        neg = af.RankSlice.from_indices(torch.arange(width).repeat(B, 1), V)
        ids[1, 0] = V
        with pytest.raises(ValueError, match=r"neg\.ids: row 1 holds 60"):
            af.slice_cross_entropy(query, catalog, target, replace(neg, ids=ids, bits=None), backend=engine)


def test_slices_are_compared_saved_and_loaded(tmp_path: Any) -> None:
    neg = af.rank_slice(integers(B, D, 1), integers(V, D, 2), start=2, stop=40, top=2, exclude=torch.arange(B))
    few = af.rank_slice(integers(B, D, 1), integers(V, D, 2), start=2, stop=3)
    same = copy.deepcopy(neg)
    assert (neg == same) is True and (neg == few) is False and (neg != few) is True and neg != "neg"
    assert neg.bits is not None and few.ids is not None
    assert neg != replace(neg, bits=torch.zeros_like(neg.bits))
    with pytest.raises(TypeError, match="unhashable"):
        hash(neg)
    for slice_ in (neg, few):
        file = io.BytesIO()
        torch.save({"neg": slice_}, file)
        file.seek(0)
        assert torch.load(file, weights_only=True)["neg"] == slice_
    object.__setattr__(same, "bits", neg.bits[:, :3])
    file = io.BytesIO()
    torch.save(same, file)
    file.seek(0)
    with pytest.raises(ValueError, match=r"bits must be \(4, 8\), got \(4, 3\)"):
        torch.load(file, weights_only=True)
