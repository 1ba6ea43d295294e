"""The flash-like loss in Triton, forced for small catalogs, against the specification and the other kernels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from alterrec_fast.kernels import flash_loss, shapes
from torch import Tensor

from alterrec_fast.ops import RankSlice, slice_cross_entropy
from tests.kernels.test_slice_cross_entropy import compare, problem, slice_of
from tests.ops.loss_helpers import call

FORMS = ("all", "bits", "ids")


@pytest.fixture(autouse=True)
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "FLASH_ITEMS", 1)
    monkeypatch.setattr(shapes, "FLASH_IDS", 1 << 30)


def bf16_problem(b: int, v: int, d: int, first: int, form: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    query, catalog, options = problem(b, v, d, first, form)
    return query.bfloat16(), catalog.bfloat16(), options


def triton(query: Tensor, catalog: Tensor, **options: Any) -> list[Tensor]:
    return call(slice_cross_entropy, query, catalog, backend="triton", **options)


@pytest.mark.parametrize(
    ("b", "v", "d", "first"),
    [
        (5, 230, 20, 0),  # an edge in every dimension
        (70, 128, 33, 3),  # two blocks of sessions in backward
        (130, 200, 128, 1),  # and in forward; the whole width
        (3, 1, 16, 0),  # one item
        (6, 400, 8, 150),  # tiles of padding
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_matches_the_reference(guarded: list[Tensor], b: int, v: int, d: int, first: int, form: str) -> None:
    query, catalog, options = bf16_problem(b, v, d, first, form)
    bias = torch.randn(v, generator=torch.Generator().manual_seed(1))
    bias[: first + 2 : 2] = -math.inf if v > 1 else 0.0
    for name in ("target", "positives"):
        masked = (options[name] >= 0) & (bias[options[name].clamp(min=0)] == -math.inf)
        options[name] = options[name].masked_fill(masked, v - 1)
    compare(query, catalog, options | {"bias": bias, "temperature": 0.5, "positive_weight": 0.7})


@pytest.mark.parametrize("form", FORMS)
def test_random_cases(form: str) -> None:
    g = torch.Generator().manual_seed(FORMS.index(form))
    for _ in range(12):
        b, v, d = (int(torch.randint(1, most, (1,), generator=g)) for most in (12, 300, 129))
        first = int(torch.randint(min(v, 80), (1,), generator=g))
        query, catalog, options = bf16_problem(b, v, d, first, form)
        if torch.rand(1, generator=g) < 0.5:
            del options["positives"]
        if torch.rand(1, generator=g) < 0.5:
            options["bias"] = torch.randn(v, generator=g).bfloat16()
        compare(query, catalog, options | {"temperature": float(torch.rand(1, generator=g)) + 0.05})


@pytest.mark.parametrize("form", FORMS)
def test_logits_that_grow_or_fall_along_the_catalog(form: str) -> None:
    """The running maximum changes in every tile, or in none after the first; exponentials of all but a few are 0."""
    for sign in (1.0, -1.0):
        query, catalog, options = bf16_problem(4, 700, 16, 0, form)
        rising = sign * torch.linspace(-300.0, 300.0, 700)
        options |= {"neg": slice_of(torch.ones(4, 700, dtype=torch.bool), form)}
        compare(query, catalog, options | {"bias": rising, "temperature": 0.25})


@pytest.mark.parametrize("form", FORMS)
def test_ignored_rows_may_be_nan(form: str) -> None:
    query, catalog, options = bf16_problem(5, 150, 24, 2, form)
    clean = triton(query, catalog, **options)
    query[1] = math.nan  # its target is -100
    losses, grad_query, grad_catalog = triton(query, catalog, **options)
    assert torch.equal(grad_catalog, clean[2])
    assert not grad_query[1].any() and losses[1] == 0.0
    assert torch.equal(grad_query[2:], clean[1][2:])


@pytest.mark.parametrize("form", FORMS)
def test_only_some_gradients(form: str) -> None:
    query, catalog, options = bf16_problem(4, 150, 8, 0, form)
    bias, weights = torch.randn(150), torch.linspace(0.5, 1.5, 4)
    every = triton(query, catalog, bias=bias, **options)
    for at, tensor in enumerate((query, catalog, bias), 1):
        tensor.requires_grad_()
        losses = slice_cross_entropy(query, catalog, bias=bias, reduction="none", backend="triton", **options)
        (grad,) = torch.autograd.grad((losses * weights).sum(), tensor)
        tensor.requires_grad_(False)
        assert torch.equal(grad, every[at])
    losses = slice_cross_entropy(query, catalog, bias=bias, reduction="none", backend="triton", **options)
    assert torch.equal(losses, every[0])


@pytest.mark.parametrize("form", FORMS)
def test_empty_slices_and_no_rows(form: str) -> None:
    for b in (0, 3):
        query, catalog, options = bf16_problem(b, 70, 8, 0, form)
        options["neg"] = slice_of(torch.zeros(b, 70, dtype=torch.bool), form)
        if form == "all":
            options |= {"first_item": 70, "positives": None, "target": torch.full((b,), -100)}
        assert not any(x.any() for x in triton(query, catalog, **options))


def test_ids_of_every_kind_become_bits() -> None:
    """int64, padded, and with places at the ends of words."""
    query, catalog, options = bf16_problem(3, 130, 8, 0, "all")
    ids = torch.tensor([[0, 31, 32, 63, 64, 129], [1, 2, 95, 96, -1, -1], [-1] * 6])
    listed = RankSlice.from_indices(ids, 130)
    found = [triton(query, catalog, **options | {"neg": slice_of(listed.mask(), form)}) for form in ("bits", "ids")]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.nan, 1e38])
def test_bad_scores(form: str, bad: float) -> None:
    query, catalog, options = bf16_problem(6, 150, 8, 0, form)
    query[0] = bad
    with pytest.raises(ValueError, match=r"scores: row 0 has a score of (-?inf|nan), expected a finite one"):
        triton(query, 100 * catalog, check=True, **options)
    loss, grad_query, *_ = triton(query, 100 * catalog, check=False, **options)
    assert not loss[0].isfinite()
    assert not grad_query[0].isfinite().all()
    assert grad_query[2].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_the_other_kernels(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    query, catalog, options = bf16_problem(7, 300, 40, 1, form)
    ours = triton(query, catalog, **options)
    again = triton(query, catalog, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    monkeypatch.setattr(shapes, "FLASH_ITEMS", 1 << 40)
    for mine, others in zip(ours, triton(query, catalog, **options), strict=True):
        torch.testing.assert_close(mine, others, rtol=2.0**-7, atol=2.0**-7 * float(others.abs().max()))


def test_which_losses_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    query, catalog = (torch.empty(n, 128, dtype=torch.bfloat16, device="meta") for n in (512, 1_000_000))
    bits, ids = torch.empty(512, 125_056, dtype=torch.uint8), torch.empty(512, 5_000, dtype=torch.int32)
    for neg in (None, bits, ids):
        assert flash_loss.is_flash(query, catalog, neg, None, "bf16")
    assert not flash_loss.is_flash(query, catalog, ids[:, :4_999], None, "bf16")
    assert not flash_loss.is_flash(query, catalog, None, None, "fp32")
    assert not flash_loss.is_flash(query, catalog[:100_000], None, None, "bf16")
    assert not flash_loss.is_flash(query.float(), catalog, None, None, "bf16")
    assert not flash_loss.is_flash(query.repeat(1, 2), catalog.repeat(1, 2), None, None, "bf16")
    assert flash_loss.is_flash(query, catalog, None, torch.empty(512, 16, dtype=torch.int64), "bf16")
    assert not flash_loss.is_flash(query, catalog, None, torch.empty(512, 17, dtype=torch.int64), "bf16")
    half = query.to(torch.float16), catalog.to(torch.float16)
    assert flash_loss.is_flash(*half, None, None, "fp16")
    assert not flash_loss.is_flash(*half, None, None, "fp32")
