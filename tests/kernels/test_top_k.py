"""top_k in Triton, by blocks and by limits: exactly what the reference and the native engine return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from alterrec_fast.kernels import top_k as kernels
from torch import Tensor

import alterrec_fast as af
from alterrec_fast.ops import library
from alterrec_fast.ops.slices import exclude_lists
from tests.conftest import integers


def same(query: Tensor, catalog: Tensor, k: int, miss: dict[str, float], **options: Any) -> None:
    lists = exclude_lists(options.get("exclude"), query.shape[0], query.device)
    tail = (options.get("bias"), options.get("first_item", 0), options.get("precision", "fp32"), True)
    scores, items, _ = kernels.top_k_fwd(query, catalog, k, *lists, *tail, **miss)
    for engine in ["reference"] if library.NO_EXTENSION else ["reference", "native"]:
        want = af.top_k(query, catalog, k=k, backend=engine, **options)
        assert torch.equal(scores, want[0]), engine
        assert torch.equal(items, want[1]), engine


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_equal_the_other_engines(precision: str, guarded: list[Tensor]) -> None:
    query, catalog, bias = integers(3, 20, 1), integers(3_001, 20, 2), integers(1, 3_001, 3)[0]
    exclude = torch.randint(-2, 3_001, (3, 40), generator=torch.Generator().manual_seed(3))
    exclude[0, :20] = catalog[:, :1].T.new_tensor(range(100, 120)).long()  # a block without its best
    assert kernels._blocks(3, 3_001 - 77, 5) == (3, 128)
    same(query, catalog, 5, {}, exclude=exclude, bias=bias, first_item=77, precision=precision)
    same(query, catalog, 16, {})


@pytest.mark.parametrize("miss", [{}, {"margin": -4.0}], ids=["", "miss"])
def test_large_k_equals_the_other_engines(miss: dict[str, float]) -> None:
    query, catalog, bias = integers(2, 20, 1), integers(2_301, 20, 2), integers(1, 2_301, 3)[0]
    exclude = torch.randint(-2, 2_301, (2, 30), generator=torch.Generator().manual_seed(3))
    assert kernels._blocks(2, 2_301 - 77, 300) is None
    same(query, catalog, 300, miss, exclude=exclude, bias=bias, first_item=77, precision="bf16")


def test_places_stay_empty_where_all_is_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    query, catalog = integers(2, 5, 1), integers(40, 5, 2)
    exclude = torch.stack([torch.arange(40), torch.arange(40) - 3])
    same(query, catalog, 6, {}, exclude=exclude)
    monkeypatch.setattr(kernels, "_blocks", lambda *_: None)
    same(query, catalog, 6, {}, exclude=exclude)


def test_blocks_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_blocks", lambda *_: (2, 256))
    same(integers(2, 8, 1), integers(700, 8, 2), 3, {}, exclude=torch.tensor([[3, 699], [0, -1]]))


def test_shapes_at_their_extremes() -> None:
    for b, v, d, k in ((1, 1, 1, 1), (65, 130, 3, 2), (2, 63, 1_024, 63), (2, 9, 2, 0)):
        same(integers(b, d, b), integers(v, d, v), k, {})
    nobody = af.top_k(integers(2, 4, 1)[:0], integers(9, 4, 2), k=3, backend="triton")
    assert [x.shape for x in nobody] == [(0, 3), (0, 3)]


def test_bad_values_are_named() -> None:
    query, catalog = integers(3, 8, 1).abs() + 1, integers(300, 8, 2)
    catalog[40, 3] = float("nan")
    for k in (2, 250):
        with pytest.raises(ValueError, match=r"scores: row 0 has a score of nan, expected a finite one"):
            af.top_k(query, catalog, k=k, backend="triton")
        af.top_k(query, catalog, k=k, check=False, backend="triton")  # no promise but to return
