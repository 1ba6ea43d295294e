"""top_k on the native engine: the identical items that the reference returns."""

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

pytestmark = pytest.mark.skipif(bool(library.NO_EXTENSION), reason="the extension is not built")
if not library.NO_EXTENSION:
    from alterrec_fast import _C


def integers(rows: int, width: int, seed: int) -> Tensor:
    return torch.randint(-3, 4, (rows, width), generator=torch.Generator().manual_seed(seed)).float()


def same(query: Tensor, catalog: Tensor, k: int, **options: Any) -> af.TopK:
    """Asserts that both engines return the same items and scores, and returns them."""
    native = af.top_k(query, catalog, k=k, backend="native", **options)
    reference = af.top_k(query, catalog, k=k, backend="reference", **options)
    assert torch.equal(native.indices, reference.indices)
    assert torch.equal(native.scores, reference.scores)
    return native


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(st.integers(0, 5), st.integers(1, 600), st.integers(1, 20)),
    st.integers(0, 999),
    st.sampled_from(["fp32", "bf16"]),
    st.data(),
)
def test_equals_the_reference(size: tuple[int, int, int], seed: int, precision: str, data: st.DataObject) -> None:
    b, v, d = size
    first = data.draw(st.integers(0, v))
    k = data.draw(st.integers(0, v - first))
    exclude = torch.randint(-2, v, (b, 3), generator=torch.Generator().manual_seed(seed))
    bias = integers(1, v, seed + 2)[0] if data.draw(st.booleans()) else None
    options = {"exclude": exclude, "bias": bias, "first_item": first, "precision": precision}
    same(integers(b, d, seed), integers(v, d, seed + 1), k, **options)


@pytest.mark.parametrize(("b", "v", "d", "k"), [(600, 9_000, 8, 20), (2, 30_000, 5, 30_000), (3, 8_500, 1_024, 1)])
def test_scanned_catalogs_equal_the_reference(b: int, v: int, d: int, k: int) -> None:
    query, catalog = integers(b, d, 1), integers(v, d, 2)
    same(query, catalog, k)
    same(query, catalog, min(k, v - 70), precision="bf16", first_item=70, bias=integers(1, v, 3)[0])


@pytest.mark.parametrize("v", [500, 9_000])
def test_excluded_items_make_room_for_others(v: int) -> None:
    query, catalog = integers(4, 6, 1), integers(v, 6, 2)
    best = same(query, catalog, 40)[1]
    exclude = torch.cat([best, best], 1)  # every one of the best, twice
    assert not (same(query, catalog, 40, exclude=exclude)[1][:, :, None] == best[:, None]).any()
    everything = (torch.arange(v).repeat(4), torch.arange(5) * v)
    scores, items = same(query, catalog, 10, exclude=everything)
    assert (items == -1).all()
    assert (scores == -torch.inf).all()
    uneven = (torch.cat([torch.arange(v), best[1]]), torch.tensor([0, v, v + 40, v + 40, v + 40]))
    same(query, catalog, 10, exclude=uneven)


@pytest.mark.parametrize("fallback", ["missed", "overflow"])
def test_a_missed_bracket_costs_time_alone(fallback: str) -> None:
    query, catalog = integers(30, 8, 1), integers(9_000, 8, 2)
    _C.force_fallback(fallback)
    try:
        same(query, catalog, 20, exclude=torch.arange(30), first_item=3)
    finally:
        _C.force_fallback("as needed")


def test_is_an_op_that_compiles_into_one_graph() -> None:
    query, catalog = integers(4, 8, 1), integers(300, 8, 2)
    exclude = exclude_lists(torch.arange(4), 4, torch.device("cpu"))
    op = torch.ops.alterrec_fast.top_k.default
    torch.library.opcheck(op, (query, catalog, 7, *exclude, None, 0, "fp32", True, *NO_NORM, "native"))
    torch.library.opcheck(op, (query, catalog, 7, *exclude, catalog[:, 0], 5, "bf16", False, *NO_NORM, "native"))

    def best(query: Tensor, catalog: Tensor) -> Tensor:
        return af.top_k(query, catalog, k=7, exclude=torch.arange(4))[0] * 2

    compiled = torch.compile(best, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, catalog), best(query, catalog))


def test_bad_values_are_named() -> None:
    query, catalog = integers(4, 8, 1), integers(9_000, 8, 2)
    broken = query.clone()
    broken[2, 1] = float("nan")
    with pytest.raises(ValueError, match="scores: row 2 has a score of nan, expected a finite one"):
        af.top_k(broken, catalog, k=3, backend="native")
    with pytest.raises(ValueError, match="exclude: row 1 holds 9000"):
        af.top_k(query, catalog, k=3, exclude=torch.tensor([0, 9_000, 1, 1]), backend="native")


def test_a_backend_that_cannot_serve_says_why() -> None:
    query, catalog = integers(4, 8, 1), integers(30, 8, 2)
    with pytest.raises(af.BackendError, match=r"tensors on CPU or CUDA, got torch\.float64 on cpu"):
        af.top_k(query.double(), catalog.double(), k=3, backend="native")
    assert af.top_k(query.double(), catalog.double(), k=3)[1].shape == (4, 3)  # auto: the reference
