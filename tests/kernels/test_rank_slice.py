"""rank_slice in Triton: the identical sets that the reference and the native engine return, at any margin."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from alterrec_fast.kernels import shapes, tiles
from alterrec_fast.kernels.rank_slice import launch as kernels
from alterrec_fast.kernels.rank_slice.compact import _ascending_kernel
from alterrec_fast.kernels.rank_slice.plan import MARGIN, plan
from alterrec_fast.kernels.rank_slice.select import _select_kernel
from alterrec_fast.kernels.top_k import top_k_fwd
from torch import Tensor

import alterrec_fast as af
from alterrec_fast.ops import library
from alterrec_fast.ops.slices import RankSlice, bits_width, exclude_lists, unpack_bits, uses_bits
from tests.conftest import integers

MISSES: list[dict[str, float]] = [{}, {"margin": -4.0}, {"slack": 0.0}]  # limits that do not hold, buffers too small


def launched(
    query: Tensor, catalog: Tensor, start: int, stop: int, top: int, miss: dict[str, float], **options: Any
) -> Any:
    """members, top and thresholds straight from the launcher, with margins of our choice."""
    v = catalog.shape[0]
    lists = exclude_lists(options.get("exclude"), query.shape[0], query.device)
    as_bits = uses_bits(v, stop - start)
    tail = (options.get("bias"), options.get("first_item", 0), options.get("precision", "fp32"), True)
    found = kernels.rank_slice_fwd(query, catalog, start, stop, top, *lists, *tail, as_bits, bits_width(v), **miss)
    assert found[3] is not None
    assert int(found[3]) == torch.iinfo(torch.int64).max
    return found[:3]


def same(
    query: Tensor, catalog: Tensor, start: int, stop: int, top: int, miss: dict[str, float], **options: Any
) -> None:
    """Asserts equality, bit for bit, with the reference and with the native engine."""
    members, best, thresholds = launched(query, catalog, start, stop, top, miss, **options)
    engines = ["reference"] if library.NO_EXTENSION else ["reference", "native"]
    for engine in engines:
        want = af.rank_slice(query, catalog, start=start, stop=stop, top=top, backend=engine, **options)
        assert torch.equal(members, want.ids if want.bits is None else want.bits), engine
        assert torch.equal(best, want.top), engine
        assert torch.equal(thresholds, want.thresholds), engine


@pytest.fixture
def missed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each call so far, the rows whose limits did not hold or whose buffer was too small."""
    found: list[int] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        kernel[grid](*args, **options)
        if kernel is _select_kernel:
            found.append(int(options["MissedCount"]))

    monkeypatch.setattr(tiles, "_launcher", record)
    return found


# All forms: bits or ids, the skipped ranks buffered or counted, nothing but the top, everything.
RANGES = [(20, 1_500, 5), (600, 1_500, 0), (1_000, 1_020, 5), (10, 30, 40), (7, 7, 3), (0, 2_200, 0)]
CASES = [(*ranks, miss) for ranks in RANGES for miss in MISSES[:2]] + [(*ranks, MISSES[2]) for ranks in RANGES[::3]]


@pytest.mark.parametrize(("start", "stop", "top", "miss"), CASES)
def test_equals_the_other_engines(start: int, stop: int, top: int, miss: dict[str, float]) -> None:
    query, catalog = integers(2, 20, 1), integers(2_301, 20, 2)
    exclude = torch.randint(-2, 2_301, (2, 7), generator=torch.Generator().manual_seed(3))
    bias = integers(1, 2_301, 4)[0]
    same(query, catalog, start, stop, top, miss, exclude=exclude, bias=bias, first_item=77)


@pytest.mark.parametrize("miss", MISSES[:2], ids=["", "miss"])
@pytest.mark.parametrize(("start", "stop", "top"), RANGES)
def test_searches_that_a_few_scores_narrow(
    start: int, stop: int, top: int, miss: dict[str, float], monkeypatch: pytest.MonkeyPatch, guarded: list[Tensor]
) -> None:
    """As with samples and buffers larger than the cache; where the few mislead, all is searched."""
    monkeypatch.setattr(shapes, "FEW", 64)
    generator = torch.Generator().manual_seed(7)
    few, many = (
        integers(2, 20, 1),
        integers(2_301, 20, 2) * torch.rand(2_301, 1, generator=generator).bfloat16().float(),
    )
    exclude = torch.randint(-2, 2_301, (2, 7), generator=generator)
    same(few, many, start, stop, top, miss, exclude=exclude, first_item=77)
    same(few, integers(2_301, 4, 2).repeat(1, 5), start, stop, top, miss)  # ties


@pytest.mark.parametrize(("miss", "dealt", "window"), [({}, 0, 16), ({}, 1, 99), ({}, 2, 4), ({"slack": 0.0}, 1, 99)])
def test_ids_are_in_order_without_a_sort(
    miss: dict[str, float], dealt: int, window: int, monkeypatch: pytest.MonkeyPatch, guarded: list[Tensor]
) -> None:
    """As in catalogs of many more tiles than a row has places to count them: in groups, and so many at a time."""
    rewritten, launcher = [], tiles._launcher
    monkeypatch.setattr(kernels, "plan", lambda *call: replace(plan(*call), dealt=dealt))

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if kernel is _ascending_kernel:
            rewritten.extend((options["Rewritten"] >= 0).tolist())
            options["window"] = window
        launcher(kernel, grid, *args, **options)

    monkeypatch.setattr(tiles, "_launcher", record)
    query, catalog = integers(2, 16, 1), integers(2_501, 16, 2)
    exclude = torch.randint(-2, 2_501, (2, 7), generator=torch.Generator().manual_seed(3))
    same(query, catalog, 10, 40, 5, miss, exclude=exclude, first_item=70)
    assert rewritten == [bool(miss)] * 2


def test_a_group_of_tiles_never_fills_a_part() -> None:
    """In a catalog sorted by popularity one group after the other is all candidates."""
    blocks = shapes.Blocks(b=64, v=128, d=64, warps=8, stages=3)
    for rows in (1, 64, 256, 512):
        for items in (40_258, 1_000_000, 10_000_000, 100_000_000):
            for stop in (500, 20_000):
                cut = plan(rows, items, 20, stop, 5, False, 0, 132, 1.0, blocks)
                assert cut.dealt == 0 or blocks.v << cut.dealt <= cut.capacity // 4
    assert plan(512, 10_000_000, 20, 20_000, 5, False, 0, 132, 1.0, blocks).dealt >= 1
    assert plan(512, 1_000_000, 0, 0, 2_000, False, 0, 132, 1.0, blocks).dealt == 0  # nothing to put in order


@pytest.mark.parametrize("items", [100_000, 1_000_000, 10_000_000])
def test_rows_of_a_huge_catalog_seldom_miss(items: int) -> None:
    """How many items a sample's limit leaves, and how they fall on the programs' parts, drawn for many rows: a row
    that falls back takes ten times as long as all of them."""
    stop, rows, draw = 20_000, 20_000, np.random.default_rng(items)
    blocks = shapes.Blocks(b=64, v=128, d=128, warps=4, stages=3)
    cut = plan(512, items, 20, stop, 5, False, 0, 132, 1.0, blocks)
    share = cut.sampled / items
    middle = (stop - 0.5) * share
    wanted = math.ceil(middle + MARGIN * math.sqrt(middle * (1.0 - middle / cut.sampled) * (1.0 - share)) + 2.0) + 1
    # Above the wanted-th of the sample: Gamma, narrower by what the sample holds of the catalog.
    found = stop + (wanted - middle) / share
    found = found + (draw.gamma(wanted, 1.0 / share, rows) - wanted / share) * math.sqrt(1.0 - share)
    parts = draw.poisson(found[:, None] / cut.splits, (rows, cut.splits))
    assert found.min() >= stop
    assert parts.max() <= cut.capacity
    assert parts.max() > 0.7 * cut.capacity  # no more room than the margin asks for


@pytest.mark.parametrize("top", [5, 300])
def test_a_catalog_sorted_by_popularity_misses_nothing(top: int, missed: list[int]) -> None:
    generator = torch.Generator().manual_seed(5)
    query, catalog = torch.randn(2, 16, generator=generator), torch.randn(6_000, 16, generator=generator)
    popular = -6.0 * torch.arange(1.0, 6_001).log()
    found = af.rank_slice(query, catalog, start=20, stop=150, top=top, bias=popular, backend="triton")
    want = af.rank_slice(query, catalog, start=20, stop=150, top=top, bias=popular, backend="reference")
    assert torch.equal(found.indices(), want.indices())
    assert missed == [0]


@pytest.mark.parametrize(("b", "v", "d"), [(65, 130, 8), (1, 1, 1), (1, 63, 1_024)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ragged_shapes(b: int, v: int, d: int, precision: str, guarded: list[Tensor]) -> None:
    same(integers(b, d, b), integers(v, d, v), v // 3, v // 2 + 1, min(5, v), {}, precision=precision)


def test_stores_stay_within_bounds_in_the_fallback(guarded: list[Tensor]) -> None:
    query, catalog = integers(2, 8, 1), integers(300, 8, 2)
    for start, stop in ((5, 200), (5, 9)):
        same(query, catalog, start, stop, 5, {"margin": -4.0, "slack": 0.0}, exclude=torch.tensor([[3, 299], [0, -1]]))


def test_strides_and_mixed_dtypes() -> None:
    query, catalog = integers(4, 40, 1)[::2, 3:20], integers(500, 90, 2)[:, 5:22]
    bias = integers(1, 1_000, 3)[0, ::2].bfloat16()
    same(query, catalog, 5, 300, 3, {}, bias=bias)
    same(query.bfloat16(), catalog, 5, 300, 3, {}, precision="bf16")
    same(query, catalog.bfloat16(), 5, 300, 3, {}, precision="fp32")
    same(query.bfloat16(), catalog.bfloat16(), 5, 300, 3, {}, precision="bf16")


ramp = torch.arange(2_600).float()[:, None]
ADVERSARIES = {
    "equal": ramp * 0 + 1,
    "ascending": ramp,
    "one cluster at the boundary": torch.where((ramp > 600) & (ramp < 1_900), 7.0, ramp % 13),
    "zeros of both signs": torch.where(ramp % 2 == 0, 0.0, -0.0),
    "huge": torch.where(ramp % 2 == 0, 1e30, 1.0) * torch.where(ramp % 3 == 0, -1.0, 1.0),
}


@pytest.mark.parametrize("name", list(ADVERSARIES))
def test_adversarial_scores(name: str) -> None:
    same(torch.tensor([[1.0], [-1.0]]), ADVERSARIES[name], 20, 1_300, 5, {})


def test_rounds_to_bfloat16_as_the_reference_does() -> None:
    generator = torch.Generator().manual_seed(5)
    query, catalog = torch.randn(2, 48, generator=generator), torch.randn(3_000, 48, generator=generator)
    for precision in ("fp32", "bf16"):
        found = af.rank_slice(query, catalog, start=20, stop=1_500, top=5, precision=precision, backend="triton")
        q, e = (x.bfloat16().double() if precision == "bf16" else x.double() for x in (query, catalog))
        scores = q @ e.T
        ranked = scores.sort(1, descending=True).values
        inside = (scores < ranked[:, [20]] - 1e-4) & (scores > ranked[:, [1_499]] + 1e-4)
        outside = (scores > ranked[:, [20]] + 1e-4) | (scores < ranked[:, [1_499]] - 1e-4)
        mask = found.mask()
        assert mask[inside].all()
        assert not mask[outside].any()
        assert (mask.sum(1) == 1_480).all()


def test_the_launches_are_the_same_whatever_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph needs: a replay may miss where the captured call did not."""
    sequences = []
    for query in (integers(2, 8, 1), torch.zeros(2, 8)):  # with equal scores every row overflows
        launches: list[object] = []

        def record(
            kernel: Any, grid: tuple[int, ...], *args: Any, seen: list[object] = launches, **options: Any
        ) -> None:
            fixed = {name: tuple(x.shape) if isinstance(x, Tensor) else x for name, x in options.items()}
            seen.append((kernel.fn.__name__, grid, args, fixed))
            kernel[grid](*args, **options)

        monkeypatch.setattr(tiles, "_launcher", record)
        same(query, integers(2_500, 8, 2), 20, 1_000, 5, {"slack": 0.3})
        sequences.append(launches)
    assert sequences[0] == sequences[1]
    assert len(sequences[0]) > 5


def test_a_miss_is_rare(missed: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    catalog = torch.randn(4_000, 16, generator=generator) + torch.arange(4_000)[:, None] / 2_000  # sorted, in a way
    query = torch.randn(6, 16, generator=generator)
    for start, stop in ((20, 2_000), (1_500, 1_600)):
        af.rank_slice(query, catalog, start=start, stop=stop, top=5, backend="triton")
    assert len(missed) == 2
    assert sum(missed) <= 1


def test_no_session_and_an_empty_slice() -> None:
    query, catalog = integers(2, 8, 1), integers(90, 8, 2)
    for rows in (query, query[:0]):
        found = af.rank_slice(rows, catalog, start=5, stop=5, backend="triton")
        want = af.rank_slice(rows, catalog, start=5, stop=5, backend="reference")
        assert torch.equal(found.indices(), want.indices())
        assert torch.equal(found.thresholds, want.thresholds)


def test_bad_values_are_named() -> None:
    query, catalog = integers(3, 8, 1).abs() + 1, integers(300, 8, 2)
    broken = catalog.clone()
    broken[40, 3] = float("inf")
    with pytest.raises(ValueError, match=r"scores: row 0 has a score of inf, expected a finite one"):
        af.rank_slice(query, broken, start=3, stop=50, backend="triton")
    same(query, broken, 3, 50, 2, {}, first_item=41)  # padding may hold anything
    af.rank_slice(
        query, broken * float("nan"), start=3, stop=50, top=4, check=False, backend="triton"
    )  # no promise but to return
    with pytest.raises(ValueError, match="exclude: row 2 holds 300, expected an id below 300"):
        af.rank_slice(query, catalog, start=3, stop=50, exclude=torch.tensor([1, 2, 300]), backend="triton")


@pytest.mark.parametrize(
    ("start", "stop", "top", "allowed", "miss"),
    [
        (20, 800, 5, 650, {}),
        (5, 30, 40, 300, {}),
        (500, 1_300, 3, 300, {}),
        (1_000, 1_020, 1_400, 650, {}),
        (20, 800, 5, 0, {"margin": -4.0}),
        (1_000, 1_020, 1_400, 650, {"margin": -4.0}),
    ],
)
def test_items_masked_by_a_bias_are_no_candidates(
    start: int, stop: int, top: int, allowed: int, miss: dict[str, float]
) -> None:
    """Ranks count the others, and ranks beyond them stay empty."""
    query, catalog, first_item = integers(2, 8, 1), integers(1_500, 8, 2), 60
    bias = torch.full((1_500,), -math.inf)
    bias[first_item + torch.randperm(1_440, generator=torch.Generator().manual_seed(allowed))[:allowed]] = 3.0
    order = (query @ catalog.T + bias).sort(dim=1, descending=True, stable=True)
    mask = torch.zeros(2, 1_500, dtype=torch.bool).scatter_(1, order.indices[:, start : min(stop, allowed)], True)
    best = order.indices[:, :top].masked_fill(torch.arange(top) >= allowed, -1)
    members, top_ids, thresholds = launched(query, catalog, start, stop, top, miss, bias=bias, first_item=first_item)
    if members.dtype == torch.uint8:
        assert torch.equal(unpack_bits(members, 1_500), mask)
    else:
        assert torch.equal(RankSlice.from_indices(members, 1_500).mask(), mask)
    assert torch.equal(top_ids, best)
    assert torch.equal(thresholds, order.values[:, [start, stop - 1]])
    scores, items, _ = top_k_fwd(
        query, catalog, top, *exclude_lists(None, 2, query.device), bias, first_item, "fp32", True, **miss
    )
    assert torch.equal(items, best)
    assert torch.equal(scores, order.values[:, :top])


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_other_biases_that_are_not_finite_are_errors(value: float) -> None:
    query, catalog, bias = integers(2, 8, 1), integers(300, 8, 2), torch.zeros(300)
    bias[7], bias[8] = value, -math.inf
    for call in (
        lambda **b: af.rank_slice(query, catalog, start=3, stop=50, **b),
        lambda **b: af.top_k(query, catalog, k=2, **b),
    ):
        with pytest.raises(ValueError, match=f"{value}"):
            call(bias=bias, backend="triton", check=True)


def test_any_strides() -> None:
    """What the elements are decides, not where they lie: rows that overlap, one row for all, elements apart."""
    catalog, bias = integers(500, 8, 2), integers(1, 500, 3)[0]
    lists = torch.randint(-2, 500, (2, 12), generator=torch.Generator().manual_seed(3))
    plain = {"exclude": (lists.flatten(), torch.tensor([0, 12, 24])), "bias": bias}
    odd = {
        "exclude": (lists.flatten().repeat_interleave(2)[::2], torch.tensor([0, 9, 12, 9, 24])[::2]),
        "bias": torch.stack([bias, bias * 0], 1)[:, 0],
    }
    line = integers(1, 600, 4)[0]
    queries = line[:8].expand(2, 8), line[:2, None].expand(2, 8), line.unfold(0, 8, 3)[:2]
    catalogs = catalog.T.contiguous().T, line[:507].unfold(0, 8, 1), line[:500, None].expand(500, 8)
    for query, items in zip(queries, catalogs, strict=True):
        given = launched(query, items, 5, 300, 3, {}, **odd)
        want = launched(query.contiguous(), items.contiguous(), 5, 300, 3, {}, **plain)
        assert all(torch.equal(a, b) for a, b in zip(given, want, strict=True))


def test_a_bad_row_is_named_beyond_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "ROWS", 2)
    query, catalog = integers(3, 4, 1).abs() + 1, integers(9, 4, 2).abs() + 1
    query[2, 0] = math.inf
    with pytest.raises(ValueError, match="row 2 has a score of inf"):
        af.rank_slice(query, catalog, start=1, stop=3, backend="triton")
    with pytest.raises(ValueError, match="row 2 has a score of inf"):
        af.top_k(query, catalog, k=1, backend="triton")


def test_a_catalog_without_items() -> None:
    query, catalog = integers(2, 8, 1), integers(9, 8, 2)
    ranked = af.rank_slice(query, catalog, start=0, stop=0, first_item=9, backend="triton")
    assert ranked.indices().shape == (2, 0)
    assert af.top_k(query, catalog, k=0, first_item=9, backend="triton")[1].shape == (2, 0)
