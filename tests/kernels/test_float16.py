"""float16 in Triton: sets as the reference's, gradients under a scaled loss near float64's; the temperature as a
tensor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from alterrec_fast.kernels import shapes
from torch import Tensor

import alterrec_fast as af
from tests.conftest import integers

HALF = torch.float16
SCALE = 2.0**16  # of the loss, as a GradScaler begins with
FORMS = ("all", "bits", "ids", "own", "shared", "flash", "flash bits")


def assert_same_sets(query: Tensor, catalog: Tensor, start: int, stop: int, **options: Any) -> None:
    ours, truth = (
        af.rank_slice(query, catalog, start=start, stop=stop, top=4, backend=engine, check=True, **options)
        for engine in ("triton", "reference")
    )
    assert torch.equal(ours.mask(), truth.mask())
    assert torch.equal(ours.top, truth.top)
    assert torch.equal(ours.thresholds, truth.thresholds)
    ours, truth = (
        af.top_k(query, catalog, k=9, backend=engine, check=True, **options) for engine in ("triton", "reference")
    )
    assert torch.equal(ours.scores, truth.scores)
    assert torch.equal(ours.indices, truth.indices)


@pytest.mark.parametrize(
    ("dtypes", "start", "stop"),
    [
        ((HALF, HALF), 20, 700),
        ((HALF, HALF), 500, 540),
        ((HALF, torch.float32), 500, 540),
        ((torch.float32, torch.float32), 20, 700),
    ],
)
def test_sets_are_the_references(dtypes: tuple[torch.dtype, torch.dtype], start: int, stop: int) -> None:
    """Integers, whose products are exact; float32 is rounded to float16, to which 2049 is a tie."""
    query, catalog = integers(3, 20, 1).to(dtypes[0]), integers(1_100, 20, 2).to(dtypes[1])
    catalog[::3, 0] = 2049.0
    assert_same_sets(query, catalog, start, stop, precision="fp16", bias=integers(1, 1_100, 4)[0].half(), first_item=7)


def test_scores_beyond_the_range_of_float16_are_finite() -> None:
    assert_same_sets(300 * integers(2, 16, 1).half(), 300 * integers(500, 16, 2).half(), 5, 60)


def test_float32_values_beyond_the_range_are_not() -> None:
    query, catalog = integers(2, 8, 1).abs() + 1.0, integers(300, 8, 2)
    catalog[7, 3] = 70_000.0
    with pytest.raises(ValueError, match=r"scores: row 0 has a score of inf, expected a finite one"):
        af.rank_slice(query, catalog, start=2, stop=9, precision="fp16", check=True, backend="triton")


def loss(form: str, query: Tensor, catalog: Tensor, bias: Tensor, temperature: Any, **more: Any) -> Tensor:
    """The mean over rows of which one is ignored and some have positives."""
    (b, v), g = (query.shape[0], catalog.shape[0]), torch.Generator().manual_seed(3)
    target = torch.randint(v, (b,), generator=g)
    target[1] = -100
    options = {"positives": torch.randint(-1, v, (b, 2), generator=g), "bias": bias, "temperature": temperature} | more
    if form in ("own", "shared"):
        neg = torch.randint(-1, v, (b, 40) if form == "own" else (90,), generator=g)
        return af.sampled_softmax(query, catalog, target, neg, log_q=torch.randn(v, generator=g).half(), **options)
    neg = None
    if form in ("bits", "ids", "flash bits"):
        neg = af.RankSlice.from_mask(torch.rand(b, v, generator=g) < (0.02 if form == "ids" else 0.5))
    return af.slice_cross_entropy(query, catalog, target, neg, **options)


def drawn(b: int = 12, v: int = 600, d: int = 24) -> list[Tensor]:
    """Query, catalog and bias in float16, and a temperature."""
    g = torch.Generator().manual_seed(5)
    query, catalog, bias = (torch.randn(shape, generator=g) for shape in ((b, d), (v, d), (v,)))
    return [query.half(), (0.3 * catalog).half(), bias.half(), torch.tensor(0.4)]


def gradients(form: str, inputs: list[Tensor], scale: float, **more: Any) -> list[Tensor]:
    """In float64, of the loss times scale, divided by it afterwards; as in a batch 32 times as large."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    (loss(form, *leaves, **more) * (scale / 32.0)).backward()
    assert all(x.grad.dtype == x.dtype for x in leaves)
    return [x.grad.double() / scale for x in leaves]


def errors(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(got, truth, strict=True)]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param.startswith("flash"):
        monkeypatch.setattr(shapes, "FLASH_ITEMS", 1)
    return str(request.param)


def test_gradients_of_a_scaled_loss(form: str) -> None:
    inputs = drawn()
    truth = gradients(form, [x.double() for x in inputs], 1.0, backend="reference")
    for scale in (SCALE, 1.0):
        *grads, temperature = errors(gradients(form, inputs, scale, backend="triton"), truth)
        assert max(grads) < 1e-3, (scale, grads)
        assert temperature < 1e-3, (scale, temperature)


@pytest.mark.parametrize("form", FORMS[:5])
def test_gradients_of_float32_rounded_to_float16(form: str) -> None:
    inputs = [x.float() for x in drawn()]
    truth = gradients(form, [x.double() for x in inputs], 1.0, backend="reference")
    grads = errors(gradients(form, inputs, SCALE, backend="triton", precision="fp16"), truth)
    assert max(grads) < 1e-3, grads


@pytest.mark.parametrize("form", FORMS[:5])
def test_a_float32_temperature(form: str) -> None:
    inputs = [x.float() for x in drawn()]
    truth = gradients(form, [x.double() for x in inputs], 1.0, backend="reference")
    assert max(errors(gradients(form, inputs, 1.0, backend="triton"), truth)) < 1e-5
    fixed, free = (float(loss(form, *inputs[:3], t, backend="triton")) for t in (0.4, torch.tensor(0.4)))
    assert math.isclose(fixed, free, rel_tol=1e-6)


@pytest.mark.parametrize("form", ["all", "bits"])
def test_probabilities_that_float16_does_not_hold(form: str) -> None:
    """Of most items, 1e-6 and less, under a loss that is not scaled; their gradients alone are compared."""
    inputs = [x.float() for x in drawn()]
    rare = torch.arange(600) % 4 > 0
    inputs[2] -= 3.0 * rare
    truth = gradients(form, [x.double() for x in inputs], 1.0, backend="reference")
    got = gradients(form, inputs, 1.0, backend="triton", precision="fp16")
    target = torch.randint(600, (12,), generator=torch.Generator().manual_seed(3))
    rare[target] = False
    assert max(errors([x[rare] for x in got[1:3]], [x[rare] for x in truth[1:3]])) < 1e-3


def test_an_overflow_is_seen(form: str) -> None:
    """By a GradScaler, which looks for what is not finite."""
    inputs = [x.requires_grad_() for x in drawn()]
    (loss(form, *inputs, backend="triton") * 1e38).backward()
    assert not any(x.grad.isfinite().all() for x in inputs[:3])
    assert not inputs[0].grad[1].any()  # whose target is ignored


def test_a_bad_row_shows_in_its_own_gradient(form: str) -> None:
    inputs = [x.requires_grad_() for x in drawn()]
    with torch.no_grad():
        inputs[0][4] = math.nan
    loss(form, *inputs, backend="triton", check=False, reduction="none").sum().backward()
    assert not inputs[0].grad[4].isfinite().any()
    assert inputs[0].grad[:4].isfinite().all()


def test_a_temperature_that_is_not_above_0(form: str) -> None:
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"temperature must be above 0, got {bad}"):
            loss(form, *drawn()[:3], torch.tensor(bad), backend="triton", check=True)
