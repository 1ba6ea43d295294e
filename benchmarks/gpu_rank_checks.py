"""rank_slice and top_k on a GPU against float64: every form, arithmetic and option (`gpu_checks.py` has the rules)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alterrec_fast.ops import RankSlice, rank_slice, top_k
from alterrec_fast.ops.slices import pack_bits, uses_bits

from . import gpu_truth as truth
from .gpu_checks import SIZES, judge, watched
from .gpu_device import Device, FaultError
from .gpu_journal import Journal
from .gpu_truth import ARITHMETICS, Arithmetic, Source


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
)


def slice_is_identical(found: RankSlice, r: Ranking, start: int, stop: int, top: int) -> None:
    """Raises FaultError unless members, top and thresholds are those of the float64 scores; for exact dot products."""
    scores = r.scores()
    order = truth.order_of(scores, r.first_item)
    v = scores.shape[1]
    mask = truth.mask_of(order, start, stop, v) & ~r.excluded(scores.shape)
    if (found.bits is not None) != uses_bits(v, stop - start):
        raise FaultError("the slice has the other form")
    if found.bits is not None:
        same = torch.equal(found.bits, pack_bits(mask))
    else:
        kept = torch.where(mask, torch.arange(v, device=mask.device), v).sort(1).values[:, : stop - start]
        assert found.ids is not None
        same = torch.equal(found.ids.long(), kept.masked_fill(kept == v, -1))
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
    scale = float(scores.abs().max())
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
    return float((x - y).abs().max()) if x.numel() else 0.0


def check_rank_slice(device: Device, journal: Journal, seed: int, form: str) -> None:
    """form: "bits" or "ids"; every case of that form, or of neither with "bits"."""
    sizes = SIZES[device.kind]
    for ranks, arithmetic, extras in RANK_SLICE_CASES:
        if ranks.startswith("ids") == (form == "ids"):
            name = f"rank_slice {ranks}, {arithmetic}, extras: {extras}"
            shape = (sizes.b, sizes.v, sizes.d)
            journal.check(
                device, name, partial(rank_case, device, seed, ranks, arithmetic, extras, shape, sizes.inputs)
            )


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


def check_rank_slice_edges(device: Device, journal: Journal, seed: int) -> None:
    """More sessions than are taken at a time, adversarial scores, bad values."""
    sizes = SIZES[device.kind]
    for form in ("bits", "ids"):
        name = f"rank_slice {form}, {sizes.many[0]} sessions"
        journal.check(device, name, partial(rank_case, device, seed, form, "bf16", "lists", sizes.many, 1))
    for name, (query, catalog) in adversaries(device, sizes.v).items():
        r = Ranking(query, catalog, ARITHMETICS["fp32"], {})
        journal.check(device, f"rank_slice, scores: {name}", partial(adversary, device, r, sizes.v))
    journal.check(
        device, "rank_slice names a bad value", partial(bad_value_is_named, device, rank_slice, start=3, stop=50)
    )


def check_huge_ranks(device: Device, journal: Journal, seed: int) -> None:
    """Addresses beyond 32 bits."""
    if huge := SIZES[device.kind].huge:
        for form in ("bits", "ids"):
            name = f"rank_slice {form}, V d > 2^31: {huge}"
            journal.check(device, name, partial(rank_case, device, seed, form, "bf16", "none", huge, 1))
        name = f"top_k 20, V d > 2^31: {huge}"
        journal.check(device, name, partial(top_case, device, seed, 20, "bf16", "none", huge, 1))


def adversary(device: Device, r: Ranking, v: int) -> str:
    ranks = ranges(v, 0)["bits"]
    slice_is_identical(
        watched(
            device, partial(rank_slice, r.query, r.catalog, start=ranks[0], stop=ranks[1], top=ranks[2], **r.keywords)
        ),
        r,
        *ranks,
    )
    return ""


def adversaries(device: Device, v: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Query (2, 1) and catalog (V, 1) whose scores are exact, and make brackets miss or buffers overflow."""
    ramp = torch.arange(v, device=device.device).float()[:, None]
    query = torch.tensor([[1.0], [-1.0]], device=device.device)
    catalogs = {
        "equal": ramp * 0 + 1,
        "ascending": ramp,
        "one cluster at the boundary": torch.where((ramp > v // 4) & (ramp < 3 * v // 4), 7.0, ramp % 13),
        "zeros of both signs": torch.where(ramp % 2 == 0, 0.0, -0.0),
        "huge": torch.where(ramp % 2 == 0, 1e30, 1.0) * torch.where(ramp % 3 == 0, -1.0, 1.0),
    }
    return {name: (query, catalog) for name, catalog in catalogs.items()}


def bad_value_is_named(device: Device, op: Callable[..., Any], **ranks: int) -> str:
    """Raises FaultError unless check=True finds a score that is not finite, with its row."""
    source = Source(1, device.device)
    query, catalog = source.integers(3, 8).abs() + 1, source.integers(300, 8)
    catalog[40, 3] = float("nan")
    try:
        op(query, catalog, **ranks, check=True, backend="triton")
    except ValueError as error:
        if "row 0 has a score of nan" in str(error):
            return str(error)
        raise FaultError(f"the wrong words: {error}") from error
    raise FaultError("a NaN went unnoticed under check=True")


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


def check_top_k(device: Device, journal: Journal, seed: int) -> None:
    sizes = SIZES[device.kind]
    case = partial(top_case, device, seed)
    normal = (sizes.b, sizes.v, sizes.d)
    large = sizes.v // 8
    for k, arithmetic, extras in (
        (20, "bf16", "none"),
        (20, "fp32", "ids"),
        (20, "tf32", "none"),
        (20, "bf16", "lists"),
        (5, "mixed", "strided"),
        (5, "rounded", "one"),
        (1, "widened", "none"),
        (large, "bf16", "ids"),
        (large, "fp32", "lists"),
        (large, "tf32", "none"),
    ):
        name = f"top_k {k}, {arithmetic}, extras: {extras}"
        journal.check(device, name, partial(case, k, arithmetic, extras, normal, sizes.inputs))
    journal.check(device, f"top_k 5, {sizes.many[0]} sessions", partial(case, 5, "bf16", "lists", sizes.many, 1))
    journal.check(device, "top_k, everything excluded", partial(all_excluded, device))
    journal.check(device, "top_k names a bad value", partial(bad_value_is_named, device, top_k, k=2))


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
    scale = float(best.abs().max())
    theirs = r.torch_scores().double().masked_fill(true == -torch.inf, -torch.inf)
    their_order = truth.order_of(theirs, r.first_item)[:, :k]
    ours = max(_farthest(scores.double(), best), _farthest(true.gather(1, items), best))
    torchs = max(_farthest(theirs.gather(1, their_order), best), _farthest(true.gather(1, their_order), best))
    return judge(ours / scale, torchs / scale, 2.0**-9 if r.arithmetic.tf32 else 4e-6, "error")


def all_excluded(device: Device) -> str:
    source = Source(2, device.device)
    query, catalog = source.integers(2, 5), source.integers(40, 5)
    exclude = torch.stack([torch.arange(40), torch.arange(40) - 3]).to(device.device)
    r = Ranking(query, catalog, ARITHMETICS["fp32"], {"exclude": exclude})
    return top_is_right(watched(device, partial(top_k, query, catalog, k=6, **r.keywords)), r, 6, True)
