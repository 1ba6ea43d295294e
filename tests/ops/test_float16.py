"""float16: sets as the reference's, gradients under a scaled loss near float64's, and what overflows."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import alterrec_fast as af
from tests.ops.loss_helpers import needs_native

SCALE = 2.0**16  # of the loss, as a GradScaler starts with
LOSSES = ("all", "bits", "ids", "own", "shared")


def integers(rng: random.Random, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-2, 3, (rows, width), generator=torch.Generator().manual_seed(rng.randrange(2**60))).to(dtype)


@needs_native
def test_sets_are_the_references() -> None:
    """Integers, whose products are exact and which tie everywhere, with and without float32 beside float16."""
    half, single = torch.float16, torch.float32
    for seed in range(2000):
        rng = random.Random(seed)
        b, v, width = (
            rng.choice((1, 2, 5, 17)),
            rng.choice((1, 31, 64, 65, 130, 513, 600)),
            rng.choice((0, 1, 3, 16, 33)),
        )
        dtypes, precision = rng.choice((((half, half), None), ((half, single), None), ((single, single), "fp16")))
        query, catalog = (integers(rng, rows, width, x) for rows, x in zip((b, v), dtypes, strict=True))
        options: dict[str, Any] = {"precision": precision, "first_item": rng.choice((0, 0, 1))}
        ranked = v - options["first_item"]
        if rng.random() < 0.5:
            bias = integers(rng, 1, v, half)[0]
            options["bias"] = bias.masked_fill(bias == 2, -math.inf)
        start, stop = sorted(rng.randint(0, ranked) for _ in range(2))
        if rng.random() < 0.5:
            native, reference = (
                af.rank_slice(query, catalog, start=start, stop=stop, top=min(3, ranked), **options, backend=engine)
                for engine in ("native", "reference")
            )
            members = (native.bits, reference.bits) if native.bits is not None else (native.ids, reference.ids)
            pairs = [members, (native.top, reference.top), (native.thresholds, reference.thresholds)]
        else:
            native, reference = (
                af.top_k(query, catalog, k=stop, **options, backend=e) for e in ("native", "reference")
            )
            pairs = list(zip(native, reference, strict=True))
        assert all(torch.equal(*pair) for pair in pairs), seed


def loss(form: str, query: Tensor, catalog: Tensor, bias: Tensor, **more: Any) -> Tensor:
    """A mean loss over rows of which one is ignored and some have positives."""
    (b, v), g = (query.shape[0], catalog.shape[0]), torch.Generator().manual_seed(3)
    target = torch.randint(v, (b,), generator=g).index_fill(0, torch.tensor([1]), -100)
    options: dict[str, Any] = {"positives": torch.randint(-1, v, (b, 2), generator=g), "bias": bias} | more
    if form == "all":
        return af.slice_cross_entropy(query, catalog, target, **options)
    if form in ("bits", "ids"):
        mask = torch.rand(b, v, generator=g) < (0.5 if form == "bits" else 0.02)
        slice_ = af.RankSlice.from_mask(mask)
        if form == "ids":
            slice_ = af.RankSlice.from_indices(slice_.indices(), v)
        return af.slice_cross_entropy(query, catalog, target, slice_, **options)
    neg = torch.randint(-1, v, (b, 40) if form == "own" else (90,), generator=g)
    return af.sampled_softmax(query, catalog, target, neg, log_q=torch.randn(v, generator=g).half(), **options)


def inputs() -> list[Tensor]:
    """Query (96, 40), catalog (1500, 40) and bias, rounded to float16, and a temperature."""
    g = torch.Generator().manual_seed(5)
    drawn = [torch.randn(shape, generator=g) for shape in ((96, 40), (1500, 40), (1500,))]
    return [drawn[0].half(), (0.3 * drawn[1]).half(), drawn[2].half(), torch.tensor(0.4)]


def gradients(form: str, tensors: list[Tensor], scale: float, **more: Any) -> list[Tensor]:
    """Of a loss that is scaled, divided by the scale again, in float64."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    value = loss(form, *leaves[:3], temperature=leaves[3], **more)
    grads = torch.autograd.grad(value * scale, leaves)
    assert [g.dtype for g in grads] == [x.dtype for x in leaves] and value.dtype in (torch.float32, torch.float64)
    return [value.detach().double(), *(g.double() / scale for g in grads)]


@pytest.mark.parametrize("engine", [pytest.param("native", marks=needs_native), "reference"])
@pytest.mark.parametrize("form", LOSSES)
def test_gradients_of_a_scaled_loss(form: str, engine: str) -> None:
    tensors = inputs()
    exact = gradients(form, [x.double() for x in tensors], 1.0, backend="reference")
    for dtype, limit, limit_of_temperature in ((torch.float16, 2e-3, 1e-3), (torch.float32, 2e-5, 1e-5)):
        found = gradients(form, [*(x.to(dtype) for x in tensors[:3]), tensors[3]], SCALE, backend=engine)
        limits = (limit, limit, limit, limit, limit_of_temperature)
        for got, want, most in zip(found, exact, limits, strict=True):
            assert float((got - want).norm() / want.norm()) <= most


@needs_native
@pytest.mark.parametrize("form", LOSSES)
def test_float32_rounded_to_float16(form: str) -> None:
    """precision="fp16", by name or by autocast, is the loss of rounded inputs, with gradients in float32."""
    tensors = [1.001 * x.float() for x in inputs()]
    rounded = [*(x.half().float() for x in tensors[:2]), *tensors[2:]]
    expected = gradients(form, rounded, 1.0, backend="native")
    for got, want in zip(gradients(form, tensors, 1.0, backend="native", precision="fp16"), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.float16):
        for got, want in zip(gradients(form, tensors, 1.0), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", [pytest.param("native", marks=needs_native), "reference"])
def test_what_overflows(engine: str) -> None:
    query, catalog, target = torch.full((3, 64), 60.0), torch.full((50, 64), 60.0), torch.arange(3)
    halves = query.half(), catalog.half()
    assert af.top_k(*halves, k=1, backend=engine).scores.eq(64 * 3600.0).all()  # beyond float16's range
    assert math.isclose(
        float(af.slice_cross_entropy(*halves, target, backend=engine)), math.log(50), rel_tol=1e-2
    )  # of 230,400, in float32
    query[1, 5] = 65520.0  # the first float32 that rounds to infinity in float16
    for call in (
        lambda: af.rank_slice(query, catalog, start=0, stop=5, precision="fp16", backend=engine),
        lambda: af.top_k(query, catalog, k=5, precision="fp16", backend=engine),
        lambda: af.slice_cross_entropy(query, catalog, target, precision="fp16", backend=engine),
        lambda: af.sampled_softmax(query, catalog, target, torch.arange(9), precision="fp16", backend=engine),
        lambda: af.sampled_softmax(
            query, catalog, target, torch.arange(9).expand(3, 9), precision="fp16", backend=engine
        ),
    ):
        with pytest.raises(ValueError, match=r"scores: row 1 has a score of (inf|nan), expected a finite one"):
            call()
    query[1, 5] = 65519.0
    assert af.top_k(query, catalog, k=1, precision="fp16", backend=engine).scores.isfinite().all()


@pytest.mark.parametrize("engine", [pytest.param("native", marks=needs_native), "reference"])
@pytest.mark.parametrize("form", LOSSES)
def test_infinite_gradients_pass(form: str, engine: str) -> None:
    """A GradScaler finds them, and skips its step."""
    found = gradients(form, inputs(), 3e38, backend=engine)
    assert found[0].isfinite() and not any(g.isfinite().all() for g in found[1:4])


def test_16_bit_formats_do_not_mix() -> None:
    query, catalog = torch.randn(3, 8).half(), torch.randn(40, 8).bfloat16()
    exact = af.top_k(query.float(), catalog.float(), k=5)
    assert torch.equal(af.top_k(query, catalog, k=5).scores, exact.scores)
    with torch.autocast("cpu", torch.bfloat16):
        same = af.top_k(query, catalog.float(), k=5)
    assert torch.equal(same.scores, exact.scores)
    for name, message in (("bf16", "query torch.float16"), ("fp16", "catalog torch.bfloat16")):
        with pytest.raises(
            ValueError, match=f"precision='{name}' takes float32 tensors and its own format, .*{message}"
        ):
            af.top_k(query, catalog, k=5, precision=name)
