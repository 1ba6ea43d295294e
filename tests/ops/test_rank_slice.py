"""rank_slice on the native engine: the identical sets that the reference returns, whatever brackets miss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import alterrec_fast as af
from alterrec_fast.ops import library
from alterrec_fast.ops.layer_norm import NO_NORM
from alterrec_fast.ops.slices import exclude_lists
from tests.ops.loss_helpers import INSTRUCTION_SETS, run_with_isa

pytestmark = pytest.mark.skipif(bool(library.NO_EXTENSION), reason="the extension is not built")
if not library.NO_EXTENSION:
    from alterrec_fast import _C

SMALL = 8192  # catalogs up to this size keep whole rows of scores, larger ones are scanned in tiles


def integers(rows: int, width: int, seed: int, most: int = 3) -> Tensor:
    """Products of such values are exact in float32 and bf16 in any order of summation, and tie everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, (rows, width), generator=generator).float()


def same(query: Tensor, catalog: Tensor, start: int, stop: int, top: int = 0, **options: Any) -> af.RankSlice:
    """Asserts that both engines return the same slice, bit for bit, and returns it."""
    native = af.rank_slice(query, catalog, start=start, stop=stop, top=top, backend="native", **options)
    reference = af.rank_slice(query, catalog, start=start, stop=stop, top=top, backend="reference", **options)
    for name in ("top", "thresholds", "bits", "ids"):
        ours, theirs = getattr(native, name), getattr(reference, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or torch.equal(ours, theirs), name
    assert (native.num_items, native.first_item, native.size) == (
        reference.num_items,
        reference.first_item,
        reference.size,
    )
    return native


@settings(max_examples=120, deadline=None)
@given(
    st.tuples(st.integers(0, 5), st.integers(1, 700), st.integers(1, 40)),
    st.integers(0, 999),
    st.sampled_from(["fp32", "bf16"]),
    st.data(),
)
def test_equals_the_reference(size: tuple[int, int, int], seed: int, precision: str, data: st.DataObject) -> None:
    b, v, d = size
    first = data.draw(st.integers(0, v))
    stop = data.draw(st.integers(0, v - first))
    start = data.draw(st.integers(0, stop))
    top = data.draw(st.integers(0, v - first))
    exclude = torch.randint(-2, v, (b, 3), generator=torch.Generator().manual_seed(seed))
    bias = integers(1, v, seed + 2)[0] if data.draw(st.booleans()) else None
    options = {"exclude": exclude, "bias": bias, "first_item": first, "precision": precision}
    same(integers(b, d, seed), integers(v, d, seed + 1), start, stop, top, **options)


RANGES = [
    (0, 0, 0),
    (20, 5_000, 5),
    (0, 9_000, 3),
    (4_000, 9_000, 0),
    (4_000, 4_100, 4),
    (8_999, 9_000, 7),
    (0, 50, 60),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("start", "stop", "top"), RANGES)
def test_scanned_catalogs_equal_the_reference(start: int, stop: int, top: int, precision: str) -> None:
    query, bias = integers(9, 33, 1), integers(1, 9_001, 2)[0]
    catalog = integers(9_001, 33, 3)
    same(query, catalog, start, stop, top, precision=precision)
    same(query, catalog, start, stop, top, precision=precision, bias=bias, first_item=1)
    same(query, catalog, min(start, 5), min(stop, 8_900), top, precision=precision, first_item=97)


SHAPES = [(600, 9_000, 8), (1, 20_000, 1), (3, 8_500, 1_024), (513, 300, 5), (2, 1, 1), (1, 63, 2), (1, 8_256, 2)]


@pytest.mark.parametrize(("b", "v", "d"), SHAPES)
def test_shapes_at_their_extremes(b: int, v: int, d: int) -> None:
    query, catalog = integers(b, d, b), integers(v, d, v)
    for start, stop in ((0, v), (v, v), (v // 3, v // 2), (0, 1)):
        same(query, catalog, start, stop, min(5, v))


def test_a_slice_of_few_ranks_is_a_list_of_ids() -> None:
    query, catalog = integers(7, 6, 1), integers(9_000, 6, 2)
    neg = same(query, catalog, 30, 200, 4, exclude=torch.arange(7 * 400).view(7, 400) * 3)
    assert neg.ids is not None
    assert (neg.ids[:, -1] == -1).any()  # excluded ids leave the list shorter


@pytest.mark.parametrize("v", [500, 9_000])
def test_every_form_of_exclude(v: int) -> None:
    query, catalog = integers(6, 5, 1), integers(v, 5, 2)
    one = torch.tensor([3, -1, 7, v - 1, 0, 3])
    lists = exclude_lists(one, 6, torch.device("cpu"))
    for exclude in (one, one.int(), one[:, None].expand(6, 4).contiguous(), lists, None):
        same(query, catalog, 5, v // 2, 3, exclude=exclude)


def adversaries(v: int) -> dict[str, tuple[Tensor, Tensor]]:
    ramp = torch.arange(v).float()[:, None]
    ones = torch.ones(4, 1)
    cluster = torch.where((ramp > v // 4) & (ramp < v // 4 * 3), 7.0, ramp % 13)
    huge = torch.where(ramp % 2 == 0, 1e30, 1.0) * torch.where(ramp % 3 == 0, -1.0, 1.0)
    return {
        "equal": (ones, torch.ones(v, 1)),
        "ascending": (ones, ramp),
        "descending": (ones, -ramp),
        "one cluster at the boundary": (ones, cluster),
        "duplicates of one item": (integers(4, 8, 1), integers(1, 8, 2).expand(v, 8).contiguous()),
        "denormals": (ones, ramp * 1e-42),
        "zeros of both signs": (ones, torch.where(ramp % 2 == 0, 0.0, -0.0)),
        "huge": (torch.tensor([[1.0], [-1.0], [0.5], [2.0]]), huge),
        "one huge item": (ones, torch.where(ramp == 77, 1e30, ramp % 101)),
    }


@pytest.mark.parametrize("v", [3_000, 20_000])
@pytest.mark.parametrize("name", list(adversaries(8)))
def test_adversarial_scores(name: str, v: int) -> None:
    query, catalog = adversaries(v)[name]
    for start, stop in ((20, v // 2), (0, v), (v // 3, v // 3 + 1), (v // 4, v - 1)):
        same(query, catalog, start, stop, 5)


@pytest.mark.parametrize("v", [3_000, 12_000])
@pytest.mark.parametrize("fallback", ["missed", "overflow"])
def test_a_missed_bracket_costs_time_alone(fallback: str, v: int) -> None:
    query, catalog = integers(40, 8, 1), integers(v, 8, 2)
    before = _C.counters()
    _C.force_fallback(fallback)
    try:
        same(query, catalog, 20, v // 2, 5, exclude=torch.arange(40), bias=integers(1, v, 3)[0], first_item=70)
        same(query, catalog, v // 3, v // 2, 5)
        same(query, catalog, 40, 40, 5)
    finally:
        _C.force_fallback("as needed")
    after = _C.counters()
    assert after["rows"] - before["rows"] == 120
    assert after[fallback] - before[fallback] == 120


def test_brackets_seldom_miss() -> None:
    generator = torch.Generator().manual_seed(3)
    catalog = torch.randn(40_000, 16, generator=generator) + torch.arange(40_000)[:, None] / 20_000  # sorted, in a way
    before = _C.counters()
    for _ in range(3):
        af.rank_slice(
            torch.randn(200, 16, generator=generator), catalog, start=20, stop=20_000, top=5, backend="native"
        )
    after = _C.counters()
    assert after["missed"] + after["overflow"] - before["missed"] - before["overflow"] <= 3


@pytest.mark.parametrize("start_stop", [(20, 2_000), (700, 2_000), (20, 6_000), (3_000, 6_000)])
def test_random_scores_differ_at_the_boundaries_alone(start_stop: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    query, catalog = torch.randn(50, 48, generator=generator), torch.randn(10_000, 48, generator=generator)
    start, stop = start_stop
    for precision, rounding in (("fp32", 1e-4), ("bf16", 1e-4)):
        native = af.rank_slice(query, catalog, start=start, stop=stop, top=5, precision=precision, backend="native")
        q, e = (x.bfloat16().double() if precision == "bf16" else x.double() for x in (query, catalog))
        scores = q @ e.T
        ranked = scores.sort(1, descending=True).values
        inside = (scores < ranked[:, [start]] - rounding) & (scores > ranked[:, [stop - 1]] + rounding)
        outside = (scores > ranked[:, [start]] + rounding) | (scores < ranked[:, [stop - 1]] - rounding)
        mask = native.mask()
        assert mask[inside].all()
        assert not mask[outside].any()
        assert (mask.sum(1) == stop - start).all()
        torch.testing.assert_close(
            native.thresholds.double(), ranked[:, [start, stop - 1]], rtol=0, atol=rounding, check_dtype=False
        )


@pytest.mark.parametrize("v", [1_000, 9_000])
def test_strides_and_mixed_dtypes(v: int) -> None:
    query, catalog = integers(12, 40, 1)[::2, 3:20], integers(v, 90, 2)[:, 5:22]
    assert not query.is_contiguous()
    same(query, catalog, 5, v // 2, 3)
    same(query.bfloat16(), catalog, 5, v // 2, 3)
    same(query, catalog.bfloat16(), 5, v // 2, 3, precision="fp32")
    same(query.bfloat16(), catalog.bfloat16(), 5, v // 2, 3)
    same(query, catalog, 5, v // 2, 3, bias=integers(1, 2 * v, 3)[0, ::2].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        same(query, catalog, 5, v // 2, 3)


@pytest.mark.parametrize("v", [3_000, 30_000])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_number_of_threads_gives_the_same_slice(v: int, precision: str) -> None:
    generator = torch.Generator().manual_seed(7)
    query, catalog = torch.randn(150, 40, generator=generator), torch.randn(v, 40, generator=generator)
    threads, slices = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            slices.append(
                af.rank_slice(query, catalog, start=20, stop=v // 2, top=5, precision=precision, backend="native")
            )
    finally:
        torch.set_num_threads(threads)
    for other in slices[1:]:
        assert torch.equal(slices[0].mask(), other.mask())
        assert torch.equal(slices[0].thresholds, other.thresholds)
        assert torch.equal(slices[0].top, other.top)


def test_is_an_op() -> None:
    query, catalog = integers(4, 8, 1), integers(300, 8, 2)
    exclude = exclude_lists(torch.tensor([[1, -1], [2, 3], [4, 299], [-1, -1]]), 4, torch.device("cpu"))
    op = torch.ops.alterrec_fast.rank_slice.default
    torch.library.opcheck(op, (query, catalog, 3, 200, 2, *exclude, None, 0, "fp32", True, *NO_NORM, "native"))
    torch.library.opcheck(op, (query, catalog, 3, 5, 2, *exclude, catalog[:, 0], 9, "bf16", False, *NO_NORM, "native"))


def test_compiles_into_one_graph() -> None:
    query, catalog = integers(4, 8, 1), integers(300, 8, 2)

    def thresholds(query: Tensor, catalog: Tensor) -> Tensor:
        return af.rank_slice(query, catalog, start=3, stop=200, top=2, exclude=torch.arange(4)).thresholds * 2

    compiled = torch.compile(thresholds, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, catalog), thresholds(query, catalog))


@pytest.mark.parametrize("v", [100, 9_000])
def test_bad_values_are_named(v: int) -> None:
    query, catalog = integers(4, 8, 1), integers(v, 8, 2)
    broken = catalog.clone()
    broken[40, 3] = float("inf")
    broken[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"scores: row 0 has a score of nan, expected a finite one"):
        af.rank_slice(query, broken, start=3, stop=50, backend="native")
    with pytest.raises(ValueError, match=r"scores: row \d has a score of (-?inf|nan), expected a finite one"):
        af.rank_slice(query, broken, start=3, stop=50, first_item=3, backend="native")
    same(query, broken, 3, 50, first_item=41)  # padding may hold anything
    huge = query * torch.tensor([1.0, 1.0, 1e38, 1.0])[:, None]
    with pytest.raises(ValueError, match=r"scores: row 2 has a score of -?inf"):
        af.rank_slice(huge, catalog, start=3, stop=50, backend="native")
    af.rank_slice(query, broken, start=3, stop=50, top=4, check=False, backend="native")  # no promise but to return
    with pytest.raises(ValueError, match=f"exclude: row 2 holds {v}, expected an id below {v}"):
        af.rank_slice(query, catalog, start=3, stop=50, exclude=torch.tensor([1, 2, v, 3]), backend="native")
    af.rank_slice(query, catalog, start=3, stop=50, exclude=torch.tensor([1, 2, v, 3]), check=False, backend="native")


def test_the_op_itself_checks_what_it_is_given() -> None:
    query, catalog = integers(4, 8, 1), integers(90, 8, 2)
    none = exclude_lists(None, 4, torch.device("cpu"))
    op = torch.ops.alterrec_fast.rank_slice
    with pytest.raises(ValueError, match=r"query must be \(rows, 8\)"):
        op(query[:, :4], catalog, 3, 50, 0, *none, None, 0, "fp32", True, *NO_NORM, "native")
    with pytest.raises(TypeError, match="query must be float32, bfloat16 or float16, got Int"):
        op(query.int(), catalog, 3, 50, 0, *none, None, 0, "fp32", True, *NO_NORM, "native")
    with pytest.raises(ValueError, match="precision must be fp32, bf16 or fp16, got fp8"):
        op(query, catalog, 3, 50, 0, *none, None, 0, "fp8", True, *NO_NORM, "native")
    with pytest.raises(TypeError, match="precision fp16 does not take BFloat16"):
        op(query, catalog.bfloat16(), 3, 50, 0, *none, None, 0, "fp16", True, *NO_NORM, "native")
    with pytest.raises(ValueError, match="expected ranks in"):
        op(query, catalog, 3, 91, 0, *none, None, 0, "fp32", True, *NO_NORM, "native")
    with pytest.raises(ValueError, match="offsets must rise"):
        op(query, catalog, 3, 9, 0, none[0], none[1] + 1, None, 0, "fp32", True, *NO_NORM, "native")


def test_masked_items_may_score_minus_infinity_unchecked() -> None:
    query, catalog = integers(5, 8, 1), integers(9_000, 8, 2)
    bias = torch.zeros(9_000)
    bias[::3] = -float("inf")
    same(query, catalog, 20, 4_000, 5, bias=bias, check=False)
    same(query[:, :4], catalog[:700, :4], 20, 300, 5, bias=bias[:700], check=False)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa: str) -> None:
    run_with_isa(isa, __file__, "-k", "scanned_catalogs or missed_bracket or strides or form_of_exclude")
