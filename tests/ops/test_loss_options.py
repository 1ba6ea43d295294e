"""Sequences, a temperature with a gradient, label smoothing and class weights, on every engine of this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import alterrec_fast as af
from tests.ops.loss_helpers import needs_native

B, L, V, D = 3, 4, 700, 12
ENGINES = [pytest.param("native", marks=needs_native), "reference"]
LOSSES = ("all", "bits", "own", "shared")


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sequences(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """query (B, L, d), catalog (V, d), target (B, L) with padding, whose queries are NaN."""
    query, catalog = draw(1, B, L, D, dtype=dtype), draw(2, V, D, dtype=dtype)
    target = torch.randint(5, V, (B, L), generator=torch.Generator().manual_seed(3))
    target[0, 2:] = -100
    query[0, 2:] = torch.nan
    return query, catalog, target


def call(form: str, query: Tensor, catalog: Tensor, target: Tensor, **options: Any) -> Tensor:
    """A loss with negatives of this form, for rows or sequences."""
    g = torch.Generator().manual_seed(4)
    rows = target.numel()
    if form == "all":
        return af.slice_cross_entropy(query, catalog, target, **options)
    if form == "bits":
        neg = af.RankSlice.from_mask(torch.rand(rows, V, generator=g) < 0.3)
        return af.slice_cross_entropy(query, catalog, target, neg, **options)
    ids = torch.randint(-1, V, (rows, 30) if form == "own" else (50,), generator=g)
    ids = ids.view(*target.shape, -1) if form == "own" else ids
    return af.sampled_softmax(query, catalog, target, ids, log_q=draw(5, V), **options)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", LOSSES)
def test_sequences_are_their_rows(form: str, reduction: str, engine: str) -> None:
    query, catalog, target = sequences()
    positives = torch.randint(-1, V, (B, L, 2), generator=torch.Generator().manual_seed(6))
    options: dict[str, Any] = {"reduction": reduction, "backend": engine, "weight": draw(7, V).abs()}
    results = []
    for q, t, p in ((query, target, positives), (query.flatten(0, 1), target.flatten(), positives.flatten(0, 1))):
        leaves = [q.detach().requires_grad_(), catalog.detach().requires_grad_()]
        losses = call(form, *leaves, t, positives=p, **options)
        grads = torch.autograd.grad(losses.sum(), leaves)
        assert losses.shape == (t.shape if reduction == "none" else ())
        results.append([losses.detach().flatten(), grads[0].flatten(0, -2), grads[1]])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert results[0][1][2:4].eq(0).all() and results[0][1].isfinite().all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", LOSSES)
def test_gradient_of_the_temperature(form: str, engine: str) -> None:
    """Against float64, with a bias that masks, for each shape and dtype that holds one number."""
    query, catalog, target = sequences()
    bias = draw(8, V)
    bias[:5] = -torch.inf  # no targets
    found = {}
    for name, value in (
        ("exact", torch.tensor(0.3).double()),
        ("0-d", torch.tensor(0.3)),
        ("1-d", torch.tensor([0.3])),
    ):
        exact = name == "exact"
        options: dict[str, Any] = {
            "bias": bias.double() if exact else bias,
            "backend": "reference" if exact else engine,
        }
        q, e = (query.double(), catalog.double()) if exact else (query, catalog)
        leaves = [e.clone().requires_grad_(), value.requires_grad_()]
        loss = call(form, q, leaves[0], target, temperature=leaves[1], **options)
        found[name] = torch.autograd.grad(loss, leaves)
        assert found[name][1].shape == value.shape and found[name][1].dtype == value.dtype
    fixed = catalog.clone().requires_grad_()
    call(form, query, fixed, target, temperature=float(torch.tensor(0.3)), bias=bias, backend=engine).backward()
    torch.testing.assert_close(found["0-d"][0], fixed.grad)  # the catalog's is that of the number
    for name in ("0-d", "1-d"):
        torch.testing.assert_close(found[name][1].double().sum(), found["exact"][1], rtol=1e-5, atol=0.0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_temperature_alone_and_in_16_bits(dtype: torch.dtype) -> None:
    """Where nothing else needs a gradient, and as a parameter of the model's own dtype."""
    query, catalog, target = sequences(dtype)
    temperature = torch.tensor(0.5, dtype=dtype, requires_grad=True)
    for form in LOSSES:
        grads = []
        for engine in ("native", "reference"):
            loss = call(form, query, catalog, target, temperature=temperature, backend=engine)
            grads.append(torch.autograd.grad(loss, temperature)[0])
        assert grads[0].dtype == dtype
        torch.testing.assert_close(*grads, rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("form", LOSSES)
def test_derivatives_by_temperature_and_smoothing(form: str) -> None:
    """First and second, in float64; and torch.func's of float32."""
    query, catalog, target = (x.flatten(0, -2)[4:9] if x.ndim == 3 else x for x in sequences(torch.float64))
    catalog, target = catalog[:20], target.flatten()[4:9] % 20
    more: dict[str, Any] = {"label_smoothing": 0.2} if form == "all" else {}
    neg = torch.randint(-1, 20, (5, 6) if form == "own" else (6,), generator=torch.Generator().manual_seed(1))

    def loss(q: Tensor, e: Tensor, t: Tensor) -> Tensor:
        if form == "all":
            return af.slice_cross_entropy(q, e, target, temperature=t, weight=weight, bias=bias[:20], **more)
        if form == "bits":
            sets = af.RankSlice.from_mask(draw(5, 5, 20) > 0)
            return af.slice_cross_entropy(q, e, target, sets, temperature=t, weight=weight)
        return af.sampled_softmax(q, e, target, neg, temperature=t, weight=weight)

    weight, bias = draw(9, 20).abs(), draw(10, V, dtype=torch.float64)
    bias[-1] = bias[19] = -torch.inf if not (target == 19).any() else 0.0
    leaves = [query.requires_grad_(), catalog.requires_grad_(), torch.tensor(0.7).double().requires_grad_()]
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)
    bias, single = bias.float(), [x.detach().float() for x in leaves]
    by_function = torch.func.grad(loss, (0, 1, 2))(*single)
    for got, want in zip(by_function, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    tangent = torch.func.jvp(lambda t: loss(single[0], single[1], t), (single[2],), (torch.ones(()),))[1]
    torch.testing.assert_close(tangent, by_function[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothing_and_weights_are_those_of_cross_entropy(
    smoothing: float, weighted: bool, reduction: str, engine: str
) -> None:
    query, catalog, target = sequences()
    weight, bias, first = draw(7, V).abs() if weighted else None, draw(8, V), 5
    results = []
    for ours in (True, False):
        leaves = [x.detach().requires_grad_() for x in (query, catalog, bias)]
        if ours:
            losses = af.slice_cross_entropy(
                *leaves[:2], target, bias=leaves[2], weight=weight, label_smoothing=smoothing, temperature=0.5,
                first_item=first, reduction=reduction, backend=engine,
            )  # fmt: skip
        else:
            logits = (leaves[0].masked_fill(target.eq(-100)[..., None], 0.0) @ leaves[1].T + leaves[2]) / 0.5
            shifted = target.where(target == -100, target - first)
            losses = F.cross_entropy(
                logits[..., first:].movedim(-1, 1), shifted, None if weight is None else weight[first:],
                label_smoothing=smoothing, reduction=reduction,
            )  # fmt: skip
        results.append([losses.detach(), *torch.autograd.grad(losses.sum(), leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smoothing_of_a_16_bit_catalog(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alterrec_fast.ops.losses.MEAN_ROWS", 256)  # of 700: several blocks
    query, catalog, target = sequences(dtype)
    results = []
    for q, e in ((query, catalog), (query.double(), catalog.double())):
        leaves = [q.detach().requires_grad_(), e.detach().requires_grad_()]
        backend = "native" if q is query else "reference"
        loss = af.slice_cross_entropy(*leaves, target, label_smoothing=0.3, backend=backend)
        assert loss.dtype == (torch.float32 if q is query else torch.float64)
        results.append([loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, leaves))])
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= (1e-2 if dtype == torch.bfloat16 else 2e-3) * want.norm()


def test_items_that_are_masked_are_no_classes() -> None:
    query, catalog, target = (x[:1] if x.ndim == 3 else x for x in sequences())
    bias = torch.zeros(V)
    bias[:5] = bias[-300:] = -torch.inf
    target = target[:1] % 100 + 5
    query = query.nan_to_num(0.5)
    ours = af.slice_cross_entropy(query, catalog, target, bias=bias, label_smoothing=0.4)
    logits = (query @ catalog[5:-300].T).movedim(-1, 1)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target - 5, label_smoothing=0.4))


@pytest.mark.parametrize("form", LOSSES)
def test_weights_count_rows_and_their_mean(form: str) -> None:
    query, catalog, target = sequences()
    weight = draw(7, V).abs()
    rows = call(form, query, catalog, target, reduction="none")
    mean = call(form, query, catalog, target, weight=weight)
    real = target != -100
    torch.testing.assert_close(mean, (rows[real] * weight[target[real]]).sum() / weight[target[real]].sum())
    assert call(form, query, catalog, torch.full_like(target, -100), weight=weight) == 0.0
    assert call(form, query, catalog, target, weight=torch.zeros(V)) == 0.0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mean_over_no_weight_is_0_with_smoothing_too(engine: str) -> None:
    query, catalog, target = sequences()
    weight = torch.ones(V).index_fill(0, target[target != -100], 0.0)
    leaves = [query.requires_grad_(), catalog.requires_grad_()]
    loss = af.slice_cross_entropy(*leaves, target, weight=weight, label_smoothing=0.1, backend=engine)
    assert loss == 0.0 and not any(g.any() for g in torch.autograd.grad(loss, leaves))


def test_one_graph_under_compile() -> None:
    query, catalog, target = sequences()
    temperature, weight = torch.tensor(0.5, requires_grad=True), draw(7, V).abs()

    def loss(q: Tensor, e: Tensor, t: Tensor) -> Tensor:
        options: dict[str, Any] = {"temperature": t, "weight": weight, "check": False}
        smooth = af.slice_cross_entropy(q, e, target, label_smoothing=0.1, **options)
        return smooth + af.sampled_softmax(q, e, target, torch.arange(9), **options)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [query.detach().requires_grad_(), catalog.detach().requires_grad_(), temperature]
        value = function(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_errors() -> None:
    query, catalog, target = sequences()
    neg = af.RankSlice.uniform(B * L, V, 9)
    for message, options in (
        (r"temperature must be above 0, got -1", {"temperature": torch.tensor(-1.0)}),
        (r"temperature must be on cpu, got meta", {"temperature": torch.ones((), device="meta")}),
        (r"weight must be \(700,\), got \(3,\)", {"weight": torch.ones(3)}),
        (r"label_smoothing must lie in \[0, 1\], got 1\.5", {"label_smoothing": 1.5}),
        (r"label_smoothing must be 0 with neg, got 0\.1: it gives every item", {"label_smoothing": 0.1, "neg": neg}),
        (
            "label_smoothing must be 0 with positives, got 0.1: it gives every item",
            {"label_smoothing": 0.1, "positives": target.unsqueeze(2)},
        ),
        (r"positives must be \(3, 4, P\), as the query is, got \(3, 4\)", {"positives": target}),
        (r"target must be \(3, 4\), as the query is, got \(12,\)", {"target": target.flatten()}),
        (r"neg must be of 12 rows over 700 items, got 3 over 700", {"neg": af.RankSlice.uniform(B, V, 9)}),
    ):
        with pytest.raises(ValueError, match=message):
            af.slice_cross_entropy(**{"query": query, "catalog": catalog, "target": target, **options})
    for shape in ((L, B, 2), (B * L, 2)):  # in the order of no rows, and of rows that are cut otherwise
        neg_ids = torch.ones(shape, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"neg must be \(3, 4, n\), as the query is, or \(n,\), got \(\d+, "):
            af.sampled_softmax(query, catalog, target, neg_ids)
    with pytest.raises(TypeError, match="label_smoothing must be a number, got str 'much'"):
        af.slice_cross_entropy(query, catalog, target, label_smoothing="much")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"query must be 2-D, got shape \(1, 3, 4, 12\)"):
        af.slice_cross_entropy(query[None], catalog, target[None])
