"""Cases of rank_slice and top_k, and how their results are compared with float64 (`checks.py` has the rules)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from alterrec_fast.ops import RankSlice, rank_slice, top_k
from alterrec_fast.ops.slices import pack_bits, uses_bits

from . import truth
from .checks import judge, watched
from .device import Device, FaultError
from .truth import ARITHMETICS, Arithmetic, Source


@dataclass(frozen=True)
class Ranking:
    """Inputs of one call that ranks."""

    query: Tensor
    catalog: Tensor
    arithmetic: Arithmetic
    options: dict[str, Any]  # exclude, bias, first_item

    @classmethod
    def draw(cls, source: Source, arithmetic: str, extras: str, exact: bool, b: int, v: int, d: int) -> Ranking:
        how, strided = ARITHMETICS[arithmetic], extras == "strided"
        query = source.matrix(b, d, how.query, exact, strided)
        catalog = source.matrix(v, d, how.catalog, exact, strided)
        if extras == "overlapping":  # rows that share memory: one query for all, and windows of one vector
            query = query[:1].expand(b, d)
            catalog = source.matrix(1, v + d - 1, how.catalog, exact, False)[0].unfold(0, d, 1)
        return cls(query, catalog, how, ranking_options(source, extras, exact, b, v))

    @property
    def keywords(self) -> dict[str, Any]:
        return self.options | {"precision": self.arithmetic.precision, "backend": "triton"}

    @property
    def first_item(self) -> int:
        first: int = self.options.get("first_item", 0)
        return first

    def scores(self) -> Tensor:
        """(B, V) float64."""
        return truth.scores_of(self.query, self.catalog, self.options.get("bias"), self.arithmetic.bf16)

    def torch_scores(self) -> Tensor:
        with self.arithmetic.applied():
            return truth.torch_scores(self.query, self.catalog, self.options.get("bias"), self.arithmetic.bf16)

    def excluded(self, shape: torch.Size) -> Tensor:
        return truth.excluded_mask(self.options.get("exclude"), shape).to(self.query.device)


def ranking_options(source: Source, extras: str, exact: bool, b: int, v: int) -> dict[str, Any]:
    """Every form of exclude, bias and first_item, by name."""
    draw = source.integers if exact else source.normal
    if extras == "ids":
        return {"exclude": source.ids(-2, v, b, 9).int(), "bias": draw(v), "first_item": 77}
    if extras == "lists":
        ends = torch.arange(b + 1, device=source.device) * 7
        return {"exclude": (source.ids(-2, v, 7 * b), ends), "bias": draw(2 * v).bfloat16()[::2], "first_item": 1}
    if extras == "one":
        return {"exclude": source.ids(0, v, b)}
    if extras == "masked":
        return {"bias": draw(v).masked_fill(torch.arange(v, device=source.device) % 5 == 0, -torch.inf)}
    return {}


def ranges(v: int, first_item: int) -> dict[str, tuple[int, int, int]]:
    """start, stop, top for every way in which the launcher cuts a slice: bits or ids, the skipped ranks buffered or
    counted, nothing but the top, everything."""
    half, quarter, few = v // 2, v // 4, v // 80
    return {
        "bits": (20, half, 5),
        "bits, deep": (quarter, half, 0),
        "ids": (20, 20 + few, 5),
        "ids, deep": (quarter, quarter + few, 5),
        "empty": (7, 7, 3),
        "all": (0, v - first_item, 0),
    }


RANK_SLICE_CASES = (
    ("bits", "fp32", "none"),
    ("bits", "bf16", "none"),
    ("ids", "bf16", "none"),
    ("bits, deep", "bf16", "ids"),
    ("ids, deep", "fp32", "lists"),
    ("bits", "tf32", "lists"),
    ("bits", "bf16", "strided"),
    ("ids", "mixed", "one"),
    ("bits", "rounded", "ids"),
    ("bits", "widened", "none"),
    ("ids, deep", "bf16", "none"),
    ("bits, deep", "fp32", "strided"),
    ("empty", "bf16", "ids"),
    ("all", "bf16", "one"),
    ("ids", "tf32", "ids"),
    ("bits", "bf16", "masked"),
    ("ids, deep", "fp32", "masked"),
    ("bits", "fp32", "overlapping"),
)
TOP_K_CASES = (  # k, or "many" for an eighth of the catalog
    (20, "bf16", "none"),
    (20, "fp32", "ids"),
    (20, "tf32", "none"),
    (20, "bf16", "lists"),
    (5, "mixed", "strided"),
    (5, "rounded", "one"),
    (1, "widened", "none"),
    ("many", "bf16", "ids"),
    ("many", "fp32", "lists"),
    ("many", "tf32", "none"),
    (20, "bf16", "masked"),
    ("many", "fp32", "masked"),
    (5, "fp32", "overlapping"),
)


def slice_is_identical(found: RankSlice, r: Ranking, start: int, stop: int, top: int) -> None:
    """Raises FaultError unless members, top and thresholds are those of the float64 scores; for exact dot products."""
    scores = r.scores()
    order = truth.order_of(scores, r.first_item)
    v = scores.shape[1]
    mask = truth.mask_of(order, start, stop, v) & ~r.excluded(scores.shape) & (scores > -torch.inf)
    if (found.bits is not None) != uses_bits(v, stop - start):
        raise FaultError("the slice has the other form")
    if found.bits is not None:
        same = torch.equal(found.bits, pack_bits(mask))
    else:
        ids = torch.where(mask, torch.arange(v, device=mask.device), v).sort(1).values[:, : stop - start]
        assert found.ids is not None
        same = torch.equal(found.ids.long(), ids.masked_fill(ids == v, -1))
    if not same:
        wrong = found.mask() ^ mask
        raise FaultError(f"{int(wrong.sum())} items in {int(wrong.any(1).sum())} rows are in the wrong place")
    if not torch.equal(found.top, order[:, :top]):
        raise FaultError("the top is wrong")
    if start < stop and not torch.equal(found.thresholds.double(), scores.gather(1, order[:, [start, stop - 1]])):
        raise FaultError("the thresholds are wrong")


def slice_is_no_worse(found: RankSlice, r: Ranking, start: int, stop: int, top: int) -> str:
    """Raises FaultError where an item is further from its place, by its true score, than torch's error allows."""
    scores = r.scores()
    order, excluded = truth.order_of(scores, r.first_item), r.excluded(scores.shape)
    scale = float(scores[scores.isfinite()].abs().max())
    theirs = r.torch_scores().double()
    their_order = truth.order_of(theirs, r.first_item)
    if start == stop:
        return "empty"
    mask = truth.mask_of(order, start, stop, scores.shape[1])
    their_mask = truth.mask_of(their_order, start, stop, scores.shape[1])
    ours = truth.misplaced(found.mask() & ~excluded, mask & ~excluded, scores, order, start, stop)
    torchs = truth.misplaced(their_mask, mask, scores, order, start, stop)
    best, ends = scores.gather(1, order[:, :top]), scores.gather(1, order[:, [start, stop - 1]])
    ours = max(ours, _farthest(scores.gather(1, found.top), best), _farthest(found.thresholds.double(), ends))
    their_ends = theirs.gather(1, their_order[:, [start, stop - 1]])
    torchs = max(torchs, _farthest(scores.gather(1, their_order[:, :top]), best), _farthest(their_ends, ends))
    return judge(ours / scale, torchs / scale, 2.0**-9 if r.arithmetic.tf32 else 4e-6, "error")


def _farthest(x: Tensor, y: Tensor) -> float:
    distance = torch.where(x == y, 0.0, x - y).abs()  # equal infinities are no distance apart
    return float(distance.max()) if x.numel() else 0.0


def rank_case(
    device: Device, seed: int, form: str, arithmetic: str, extras: str, shape: tuple[int, int, int], inputs: int
) -> str:
    """One form on fresh inputs (B, V, d): whole numbers, then normal ones, `inputs` times."""
    told = ""
    for i in range(2 * inputs):
        exact = i % 2 == 0
        r = Ranking.draw(Source(seed + i, device.device), arithmetic, extras, exact, *shape)
        ranks = ranges(shape[1], r.first_item)[form]
        with r.arithmetic.applied():
            found = watched(
                device,
                partial(rank_slice, r.query, r.catalog, start=ranks[0], stop=ranks[1], top=ranks[2], **r.keywords),
            )
        if exact:
            slice_is_identical(found, r, *ranks)
        else:
            told = slice_is_no_worse(found, r, *ranks)
    return told


ADVERSARIES = ("equal", "ascending", "one cluster at the boundary", "zeros of both signs", "huge")


def adversary(name: str, device: torch.device, v: int) -> tuple[Tensor, Tensor]:
    """Query (2, 1) and catalog (V, 1) whose scores are exact, and make limits miss or buffers overflow."""
    ramp = torch.arange(v, device=device).float()[:, None]
    catalogs = {
        "equal": ramp * 0 + 1,
        "ascending": ramp,
        "one cluster at the boundary": torch.where((ramp > v // 4) & (ramp < 3 * v // 4), 7.0, ramp % 13),
        "zeros of both signs": torch.where(ramp % 2 == 0, 0.0, -0.0),
        "huge": torch.where(ramp % 2 == 0, 1e30, 1.0) * torch.where(ramp % 3 == 0, -1.0, 1.0),
    }
    return torch.tensor([[1.0], [-1.0]], device=device), catalogs[name]


def assert_bad_value_is_named(device: Device, op: Callable[..., Any], **ranks: int) -> None:
    """Asserts that check=True finds a score that is not finite, and names its row."""
    source = Source(1, device.device)
    query, catalog = source.integers(3, 8).abs() + 1, source.integers(300, 8)
    catalog[40, 3] = float("nan")
    with pytest.raises(ValueError, match="row 0 has a score of nan"):
        op(query, catalog, **ranks, check=True, backend="triton")


def top_case(
    device: Device, seed: int, k: int, arithmetic: str, extras: str, shape: tuple[int, int, int], inputs: int
) -> str:
    """As `rank_case`."""
    told = ""
    for i in range(2 * inputs):
        exact = i % 2 == 0
        r = Ranking.draw(Source(seed + i, device.device), arithmetic, extras, exact, *shape)
        with r.arithmetic.applied():
            found = watched(device, partial(top_k, r.query, r.catalog, k=k, **r.keywords))
        told = top_is_right(found, r, k, exact)
    return told


def top_is_right(found: tuple[Tensor, Tensor], r: Ranking, k: int, exact: bool) -> str:
    """Raises FaultError unless these are the k best items, identical where dot products are exact."""
    scores, items = found
    true = r.scores().masked_fill(r.excluded(torch.Size((r.query.shape[0], r.catalog.shape[0]))), -torch.inf)
    order = truth.order_of(true, r.first_item)[:, :k]
    best = true.gather(1, order)
    if exact:
        if not torch.equal(items, order.masked_fill(best == -torch.inf, -1)) or not torch.equal(scores.double(), best):
            raise FaultError(f"{int((items != order).sum())} items are in the wrong place")
        return ""
    if bool((items.sort(1).values.diff(dim=1) == 0).any()) or bool((items < r.first_item).any()):
        raise FaultError("an item stands twice, or is none")
    scale = float(best[best.isfinite()].abs().max())
    theirs = r.torch_scores().double().masked_fill(true == -torch.inf, -torch.inf)
    their_order = truth.order_of(theirs, r.first_item)[:, :k]
    ours = max(_farthest(scores.double(), best), _farthest(true.gather(1, items), best))
    torchs = max(_farthest(theirs.gather(1, their_order), best), _farthest(true.gather(1, their_order), best))
    return judge(ours / scale, torchs / scale, 2.0**-9 if r.arithmetic.tf32 else 4e-6, "error")
