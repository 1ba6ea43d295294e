"""RankSlice: its two forms hold the same sets, and its random operations follow their law."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from alterrec_fast import RankSlice
from alterrec_fast.ops.slices import bits_width, exclude_lists, pack_bits, unpack_bits, uses_bits

shapes = st.tuples(st.integers(0, 6), st.integers(1, 200))


def random_mask(rows: int, items: int, seed: int, share: float = 0.4) -> torch.Tensor:
    return torch.rand(rows, items, generator=torch.Generator().manual_seed(seed)) < share


def both_forms(mask: torch.Tensor, first_item: int = 0) -> tuple[RankSlice, RankSlice]:
    as_bits = RankSlice.from_mask(mask, first_item)
    return as_bits, RankSlice.from_indices(as_bits.indices(), mask.shape[1], first_item)


@given(shapes, st.integers(0, 99))
def test_bits_round_trip(shape: tuple[int, int], seed: int) -> None:
    mask = random_mask(*shape, seed)
    packed = pack_bits(mask)
    assert packed.shape == (shape[0], bits_width(shape[1]))
    assert packed.shape[1] % 8 == 0
    assert torch.equal(unpack_bits(packed, shape[1]), mask)
    assert not unpack_bits(packed, packed.shape[1] * 8)[:, shape[1] :].any()  # the tail stays clear


def test_bit_order_is_little_endian_in_words_of_any_size() -> None:
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, 37] = True
    assert pack_bits(mask).view(torch.int64).item() == 1 << 37
    assert pack_bits(mask).view(torch.int32).tolist() == [[0, 1 << 5]]


@given(shapes, st.integers(0, 99))
def test_both_forms_hold_the_same_sets(shape: tuple[int, int], seed: int) -> None:
    mask = random_mask(*shape, seed)
    for form in both_forms(mask):
        assert torch.equal(form.mask(), mask)
        assert torch.equal(form.counts(), mask.sum(1))
        ids = form.indices()
        for row, members in enumerate(mask):
            expected = members.nonzero().flatten().tolist()
            assert ids[row].tolist() == expected + [-1] * (ids.shape[1] - len(expected))


def test_from_indices_sorts_and_drops_repeats() -> None:
    made = RankSlice.from_indices(torch.tensor([[5, 1, 5, -1], [3, 2, 1, 0]]), 6)
    assert made.indices().tolist() == [[1, 5, -1, -1], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [([[0, 6]], "row 0 holds 6"), ([[0, 1], [2, -2]], "row 1 holds -2"), ([[1, 0]], "row 0 holds 0")],
)
def test_from_indices_names_a_bad_id(ids: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankSlice.from_indices(torch.tensor(ids), 6, first_item=1 if "holds 0" in message else 0)


def test_from_mask_rejects_members_among_the_padding() -> None:
    with pytest.raises(ValueError, match="first_item = 2"):
        RankSlice.from_mask(torch.ones(1, 4, dtype=torch.bool), first_item=2)


def test_the_smaller_form_is_chosen() -> None:
    assert uses_bits(640_000, 20_000)
    assert not uses_bits(640_064, 20_000)
    assert not uses_bits(40_000, 1_000)


@pytest.mark.parametrize("form", [0, 1])
def test_sample_draws_members_without_replacement(form: int) -> None:
    mask = random_mask(50, 40, 1)
    slice_ = both_forms(mask)[form]
    drawn = slice_.sample(12, torch.Generator().manual_seed(0))
    for row, ids in enumerate(drawn.tolist()):
        real = [i for i in ids if i >= 0]
        assert len(real) == len(set(real)) == min(12, int(mask[row].sum()))
        assert all(mask[row, i] for i in real)
        assert ids[len(real) :] == [-1] * (12 - len(real))


@pytest.mark.parametrize("form", [0, 1])
def test_sample_is_uniform(form: int) -> None:
    mask = torch.zeros(4000, 10, dtype=torch.bool)
    mask[:, [1, 4, 7, 8]] = True
    drawn = both_forms(mask)[form].sample(2, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn.flatten(), minlength=10)
    assert counts[[0, 2, 3, 5, 6, 9]].sum() == 0
    assert (counts[[1, 4, 7, 8]] - 2000).abs().max() < 5 * math.sqrt(4000 * 0.25)


@pytest.mark.parametrize("form", [0, 1])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_mix_follows_its_law(form: int, fraction: float, weighted: bool) -> None:
    rows, items, first = 3000, 60, 5
    mask = torch.zeros(rows, items, dtype=torch.bool)
    mask[:, 10:30] = True
    slice_ = both_forms(mask, first)[form]
    excluded = torch.full((rows, 2), 40)
    excluded[:, 1] = -1
    values, offsets = exclude_lists(excluded, rows, torch.device("cpu"))
    slice_ = replace(slice_, exclude_values=values, exclude_offsets=offsets)
    weights = torch.ones(items)
    if weighted:
        weights[40:] = torch.arange(20.0)
        weights[50], weights[59] = 0.0, 1000.0  # one that never enters, and one for which the law asks more than 1
        weights[:first] = 99.0  # is not looked at
    mixed = slice_.mix(fraction, torch.Generator().manual_seed(3), weights if weighted else None)
    share = mixed.mask().float().mean(0)
    assert torch.equal(mixed.counts(), mixed.mask().sum(1))
    total = weights[first:].sum() if weighted else items
    expected = ((1 - fraction) * 20 * weights / total).clamp(max=1.0)
    expected[10:30] = fraction
    expected[:first] = 0.0
    expected[40] = 0.0
    tolerance = 5 * math.sqrt(0.25 / rows)
    assert (share - expected).abs().max() < tolerance
    assert (share[expected == 0] == 0).all()


def test_a_slice_prints_its_sizes() -> None:
    assert repr(RankSlice.uniform(3, 2_000, 7)) == "RankSlice(3 sessions, 7 of 2000 items as ids, 0.00 MiB, cpu)"
    assert "as bits, 0.00 MiB" in repr(RankSlice.uniform(3, 200, 100))


def test_mix_with_fraction_one_is_the_slice_itself() -> None:
    slice_ = RankSlice.from_mask(random_mask(3, 20, 0))
    assert slice_.mix(1.0) is slice_


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_mix_rejects_what_is_no_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        RankSlice.from_mask(random_mask(3, 20, 0)).mix(fraction)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(19), r"weights must be \(20,\), got \(19,\)"),
        (torch.arange(20.0) - 7, "weights: item 3 has -4.0, expected a number from 0 up"),
        (torch.arange(20) < 3, "weights: no item from 3 on has more than 0"),
    ],
)
def test_mix_rejects_what_are_no_weights(weights: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankSlice.uniform(3, 20, 5, first_item=3, weights=weights)


@pytest.mark.parametrize(("items", "size"), [(100, 50), (10_000, 30)])
def test_uniform_has_the_size_asked_for_in_the_mean(items: int, size: int) -> None:
    made = RankSlice.uniform(2000, items, size, first_item=1, generator=torch.Generator().manual_seed(0))
    assert (made.bits is None) == (items == 10_000)
    mean = float(made.counts().float().mean())
    assert abs(mean - size * (items - 1) / items) < 5 * math.sqrt(size / 2000)
    assert not made.mask()[:, 0].any()


def test_uniform_of_everything_and_of_nothing() -> None:
    assert RankSlice.uniform(3, 10, 10).mask().all()
    assert not RankSlice.uniform(3, 10, 0).mask().any()
    assert RankSlice.uniform(0, 10, 5).mask().shape == (0, 10)


def test_same_generator_same_set() -> None:
    draws = [RankSlice.uniform(5, 100, 40, generator=torch.Generator().manual_seed(7)).mask() for _ in range(2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("form", [0, 1])
def test_pytree_and_bytes(form: int) -> None:
    slice_ = both_forms(random_mask(3, 70, 0))[form]
    leaves, spec = pytree.tree_flatten(slice_)
    again = pytree.tree_unflatten(leaves, spec)
    assert torch.equal(again.mask(), slice_.mask())
    assert slice_.nbytes == sum(t.numel() * t.element_size() for t in leaves if t is not None)
    assert torch.equal(slice_.to("cpu").mask(), slice_.mask())


@pytest.mark.parametrize(
    ("exclude", "error"),
    [
        (torch.zeros(4, dtype=torch.int64), ValueError),
        (torch.zeros(3, 2, 2, dtype=torch.int64), ValueError),
        (torch.zeros(3), TypeError),
        ((torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)), ValueError),
    ],
)
def test_exclude_of_a_wrong_form(exclude: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="exclude"):
        exclude_lists(exclude, 3, torch.device("cpu"))
