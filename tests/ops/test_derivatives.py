"""Derivatives beyond the first, forward mode and torch.func: right on every engine, or refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import alterrec_fast as af
from alterrec_fast.ops import library, reference

needs_native = pytest.mark.skipif(bool(library.NO_EXTENSION), reason="the extension is not built")
FORMS = ["all", "bits", "ids", "own", "shared"]
B, V, D = 4, 12, 3


def loss_of(form: str, **more: Any) -> Callable[..., Tensor]:
    """The losses (B,) of query, catalog and bias, with an ignored row and a positive that repeats."""
    g = torch.Generator().manual_seed(7)
    options: dict[str, Any] = {"target": torch.tensor([5, -100, 2, 9]), "temperature": 0.7, "positive_weight": 0.3}
    options |= {"positives": torch.tensor([[1, -1], [2, 3], [4, 4], [0, 9]]), "reduction": "none"}
    if form == "bits":
        options["neg"] = af.RankSlice.from_mask(torch.rand(B, V, generator=g) < 0.5)
    if form == "ids":
        options["neg"] = af.RankSlice.from_indices(torch.tensor([[1, 3, 7], [0, 1, 2], [5, 6, -1], [8, 2, 3]]), V)
    if form in ("own", "shared"):
        options["neg"] = torch.randint(-1, V, (B, 6) if form == "own" else (6,), generator=g)
        options["log_q"] = torch.randn(V, generator=g)
    op: Callable[..., Tensor] = af.sampled_softmax if form in ("own", "shared") else af.slice_cross_entropy
    return lambda q, e, b: op(q, e, bias=b, **options, **more)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = ((B, D), (V, D), (V,))
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def penalty(loss: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The gradients of a penalty on the gradients."""
    grads = torch.autograd.grad(loss(*tensors).square().sum(), tensors, create_graph=True)
    value = sum((g.square() * torch.linspace(0.5, 1.5, g.numel()).view_as(g)).sum() for g in grads)
    assert isinstance(value, Tensor)
    return list(torch.autograd.grad(value, tensors))


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_of_the_reference(form: str, blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_BYTES", 1 if blocks else 64 << 20)  # a block for each row, computed again
    assert torch.autograd.gradgradcheck(loss_of(form), inputs(torch.float64))


@needs_native
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_a_penalty_on_gradients_counts(form: str, precision: str) -> None:
    tensors = inputs(torch.float32)
    expected = penalty(loss_of(form, backend="reference", precision=precision), tensors)
    assert all(g.any() for g in expected)
    for ours, theirs in zip(
        penalty(loss_of(form, backend="native", precision=precision), tensors), expected, strict=True
    ):
        tolerance = 1e-4 if precision == "fp32" else 2.0**-7
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@needs_native
def test_one_tensor_as_query_and_catalog() -> None:
    x = torch.randn(V, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = []
    for engine in ("native", "reference"):
        loss = af.slice_cross_entropy(x, x, torch.arange(V).roll(1), backend=engine)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append(torch.stack([grad.detach(), *torch.autograd.grad(grad.square().sum(), x)]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("engine", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("form", ["own", "shared"])
def test_a_sparse_gradient_that_has_a_gradient_is_dense(form: str, engine: str) -> None:
    tensors = inputs(torch.float32)
    expected = penalty(loss_of(form, backend="reference"), tensors)
    sparse = loss_of(form, backend=engine, sparse_grad=True)
    for ours, theirs in zip(penalty(sparse, tensors), expected, strict=True):
        torch.testing.assert_close(ours.to_dense(), theirs, rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(sparse(*tensors).sum(), tensors[1])[0].is_sparse


@pytest.mark.parametrize("form", FORMS)
def test_forward_mode(form: str) -> None:
    primals = [x.detach() for x in inputs(torch.float64)]
    tangents = [torch.randn_like(x) for x in primals]
    loss = loss_of(form)
    steps = [[x + sign * 1e-6 * t for x, t in zip(primals, tangents, strict=True)] for sign in (1.0, -1.0)]
    expected = (loss(*steps[0]) - loss(*steps[1])) / 2e-6
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-4)):  # the reference by itself; native's inputs
        at, along = tuple(x.to(dtype) for x in primals), tuple(t.to(dtype) for t in tangents)
        _, tangent = torch.func.jvp(loss, at, along)
        torch.testing.assert_close(tangent.double(), expected, rtol=tolerance, atol=tolerance)
        with forward_ad.dual_level():
            dual = loss(*(forward_ad.make_dual(x, t) for x, t in zip(at, along, strict=True)))
            assert torch.equal(forward_ad.unpack_dual(dual).tangent, tangent)


@pytest.mark.parametrize("form", FORMS)
def test_functional_transforms(form: str) -> None:
    tensors = inputs(torch.float32)
    loss = loss_of(form)
    plain = torch.autograd.grad(loss(*tensors).sum(), tensors)
    detached = [x.detach() for x in tensors]
    every = (0, 1, 2)
    for ours, theirs in zip(torch.func.grad(lambda *x: loss(*x).sum(), every)(*detached), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(torch.func.jacrev(loss, every)(*detached), plain, strict=True):
        torch.testing.assert_close(ours.sum(0), theirs)

    def of_query(q: Tensor) -> Tensor:
        return loss(q, *detached[1:]).sum()

    expected = torch.autograd.functional.hessian(of_query, detached[0])
    assert expected.any()
    torch.testing.assert_close(torch.func.hessian(of_query)(detached[0]), expected)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(of_query))(detached[0]), expected)


@needs_native
def test_an_engine_that_is_named_refuses_transforms() -> None:
    q, e, b = (x.detach() for x in inputs(torch.float32))
    loss = loss_of("all", backend="native")
    with pytest.raises(af.BackendError, match=r"no rules for torch\.func transforms and forward-mode .*'reference'"):
        torch.func.jvp(lambda q: loss(q, e, b), (q,), (q,))
    with pytest.raises(af.BackendError, match=r"no rules for torch\.func transforms"):
        torch.func.grad(lambda q: loss(q, e, b).sum())(q)
    with pytest.raises(RuntimeError, match=r"does not currently support double backward"):
        compiled = torch.compile(loss_of("all"), backend="aot_eager")
        penalty(compiled, inputs(torch.float32))
