"""What a call ranks, how it is cut into programs and buffers, and the memory that its stages share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import shapes, tiles

MARGIN = 5.0  # standard deviations of a sample's order statistic to either side: 3e-7 of all limits do not hold
LIMITS = tl.constexpr(8)  # columns of a row's limits: 5 are used, a power of two for the kernels
OPEN, START_HIGH, START_LOW, STOP_HIGH, STOP_LOW = (tl.constexpr(i) for i in range(5))
TARGETS = tl.constexpr(4)  # not items to predict: those of rank start, stop - 1, top - 1, the bounds; one place unused
DIGITS = tl.constexpr(256)  # of a key, as the fallback counts them


@dataclass(frozen=True)
class Ranking:
    """Up to shapes.ROWS sessions, the ranks asked for, and where members go."""

    query: Tensor  # (B, d)
    catalog: Tensor  # (V, d)
    bias: Tensor | None  # (V,); items with -inf are no candidates
    values: Tensor  # (E,) int64, the excluded items of row b at offsets[b] to offsets[b + 1]
    offsets: Tensor  # (B + 1,) int64
    first_item: int
    precision: str  # "fp32" or "bf16"
    start: int
    stop: int
    top: int
    bad: Tensor | None = None  # (1,) int64 for the first score that is not finite, as `tiles.report` writes it
    words: Tensor | None = None  # (B, W) int32 zeros, the members' bits
    ids: Tensor | None = None  # (B, stop - start) int32, the members ascending, filled up with -1
    skip_excluded: bool = False  # excluded items are no candidates (top_k) rather than members that leave the slice

    @property
    def rows(self) -> int:
        return self.query.shape[0]

    @property
    def num_items(self) -> int:
        return self.catalog.shape[0]

    @property
    def ranked(self) -> int:
        """Items from first_item on."""
        return self.num_items - self.first_item

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def drops_excluded(self) -> bool:
        return self.skip_excluded and self.values.numel() > 0

    def scores(self, block_d: int) -> dict[str, Any]:
        """The arguments of a kernel that scores, with block_d of the width at a time."""
        return {
            "Query": self.query,
            "Catalog": self.catalog,
            "Bias": self.bias,
            "V": self.num_items,
            "first_item": self.first_item,
            "stride_qb": tiles.strides(self.query),
            "stride_cv": tiles.strides(self.catalog),
            "stride_bias": 0 if self.bias is None else self.bias.stride(0),
            "HAS_BIAS": self.bias is not None,
            "FORM": tiles.Form.of(self.precision, self.query, self.catalog, block_d),
        }

    def excluded(self) -> dict[str, Any]:
        return {"Values": self.values, "Offsets": self.offsets}

    def ranks(self) -> dict[str, int]:
        return {"start": self.start, "stop": self.stop, "top": self.top}

    def member_words(self) -> dict[str, Any]:
        return {"Words": self.words, "stride_words": 0 if self.words is None else self.words.stride(0)}


@dataclass(frozen=True)
class Plan:
    """How a call is cut into programs and buffers; from sizes alone, without a look at any value."""

    sampled: int  # S
    splits: int  # programs that share a row block's catalog
    capacity: int  # items that a program may buffer for a row
    dealt: int  # log2 of the neighbouring tiles that a program takes at a time
    bits: bool
    has_open: bool  # a zone of all scores above a limit: the top, and where few ranks are skipped also those
    has_start: bool  # limits around rank start
    has_stop: bool  # limits around rank stop - 1

    @property
    def entries(self) -> int:
        """Items that a row's buffer holds."""
        return self.splits * self.capacity

    @property
    def room(self) -> int:
        """Entries that may be near what is sought, an eighth of all, more than what a few are expected to leave; 0
        where the buffer is searched as it is."""
        return self.entries // 8 if self.entries >= shapes.NARROWED * shapes.FEW else 0

    def zones(self) -> dict[str, bool]:
        return {"HAS_START": self.has_start, "HAS_STOP": self.has_stop}


def plan(
    rows: int,
    ranked: int,
    start: int,
    stop: int,
    top: int,
    bits: bool,
    excluded: int,
    sm_count: int,
    slack: float,
    blocks: shapes.Blocks,
) -> Plan:
    """excluded: about how many items of a row are dropped from the top; slack scales the space for candidates."""
    size = stop - start
    # Skipped ranks are buffered, too, unless they are many: then they are counted.
    open_start = start <= max(256, size // 8)
    has_start = size > 0 and not open_start
    has_stop = size > 0 and (bits or has_start)
    open_ranks = max(top + excluded, 0 if has_start or not size else start + 1 if bits else stop)
    # Bytes of a row for the sample, which the buffer for candidates takes over.
    sample_bytes = (50 << 20) // max(1, rows) + 16 * size
    sampled = min(ranked, max(2048, min(ranked // 64, sample_bytes // 4)))
    share = sampled / ranked

    def width(rank: int) -> float:
        """Sampled items between the middle of a zone and its limit."""
        return MARGIN * math.sqrt(max(rank * share * (1.0 - rank / ranked) * (1.0 - share), 0.0)) + 3.0

    def most_between(few: float) -> float:
        """Items that lie between two limits with so many sampled ones between them, within the margin."""
        return (few + MARGIN * math.sqrt(few * (1.0 - share))) / share

    candidates = 0.0
    if open_ranks:
        candidates += most_between(open_ranks * share + width(open_ranks))
    if has_start:
        candidates += most_between(2.0 * width(start))
    if has_stop:
        candidates += most_between(2.0 * width(stop) if bits else size * share + width(start) + width(stop))
    all_tiles = triton.cdiv(ranked, blocks.v) + 1
    splits = max(1, min(triton.cdiv(2 * sm_count, triton.cdiv(rows, blocks.b)), all_tiles, 1024))
    most = triton.cdiv(all_tiles, splits) * blocks.v  # the items that a program can meet
    part = candidates * slack / splits
    capacity = min(most, math.ceil(part + MARGIN * math.sqrt(part)) + 8)
    # Zones deep in a huge catalog may hold more than memory does; such rows fall back.
    budget = (2 * 8 * size * rows + (48 << 20)) // (8 * rows) + 2 * open_ranks
    capacity = min(capacity, budget // splits)
    # The buffer of a row that falls back holds exactly what is asked for.
    exact = top + (0 if bits else size)
    capacity = max(capacity, triton.cdiv(exact, splits), 2)
    # Fewer groups of tiles are less to count for `_ascending_kernel`. But one that is all candidates, as catalogs that
    # are sorted by popularity have them, must not take more than a quarter of a program's part.
    dealt = 0
    while size and not bits and triton.cdiv(ranked, blocks.v << dealt) > splits * capacity // 2:
        if blocks.v << dealt + 1 > capacity // 4:
            break
        dealt += 1
    return Plan(sampled, splits, capacity, dealt, bits, open_ranks > 0, has_start, has_stop)


@dataclass(frozen=True)
class Workspace:
    """The memory that the stages of one call share. Nothing is copied from name to name: sample, scores and member_ids
    begin at one address, each written when the one before has been read for the last time."""

    sample: Tensor  # (B, S) float32
    limits: Tensor  # (B, LIMITS) float32
    scores: Tensor  # (B, entries) float32, of the candidates; NaN where there is none
    items: Tensor  # (B, entries) int32, their ids
    counts: Tensor  # (B, splits) int32, the candidates of each program
    certain: Tensor  # (B, splits) int32, members by their score alone
    above: Tensor  # (B, splits) int32, items above the slice
    zone: Tensor  # (B, 2, room) int32, what is near the scores sought; the memory of the ids where that has room
    bounds: Tensor  # (B, TARGETS) int64, keys
    targets: Tensor  # (B, TARGETS) int32, the ranks sought, negative for none
    missed: Tensor  # (B,) int32, the rows that fall back
    missed_count: Tensor  # (1,) int32
    rewritten: Tensor  # (B,) int32, the entries that the fallback has written, -1 where a row did not fall back
    histogram: Tensor  # (B, TARGETS, DIGITS) int32 zeros
    member_ids: Tensor  # (B, entries) int32, unordered
    member_counts: Tensor  # (B,) int32
    top_keys: Tensor  # (B, top) int64

    @classmethod
    def of(cls, r: Ranking, p: Plan) -> Workspace:
        b, device = r.rows, r.query.device

        def integers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        size = b * p.entries
        memory = integers(max(2 * size, b * p.sampled))
        candidates = memory[:size]
        counts, certain, above = integers(3, b, p.splits)
        return cls(
            sample=memory[: b * p.sampled].view(torch.float32),
            limits=torch.empty(b, LIMITS.value, dtype=torch.float32, device=device),
            scores=candidates.view(torch.float32),
            items=memory[size : 2 * size],
            counts=counts,
            certain=certain,
            above=above,
            zone=r.ids if r.ids is not None and r.ids.shape[1] >= 2 * p.room else integers(b, 2 * p.room),
            bounds=torch.empty(b, TARGETS.value, dtype=torch.int64, device=device),
            targets=integers(b, TARGETS.value),
            missed=integers(b),
            missed_count=torch.zeros(1, dtype=torch.int32, device=device),
            rewritten=integers(b),
            histogram=torch.zeros(b, TARGETS.value, DIGITS.value, dtype=torch.int32, device=device),
            member_ids=candidates,
            member_counts=integers(b),
            top_keys=torch.empty(b, r.top, dtype=torch.int64, device=device),
        )

    def candidates(self) -> dict[str, Tensor]:
        return {"Scores": self.scores, "Items": self.items}

    def counters(self) -> dict[str, Tensor]:
        return {"Counts": self.counts, "Certain": self.certain, "Above": self.above}

    def search(self) -> dict[str, Tensor]:
        """What select and fallback seek, and the rows that fall back."""
        return {
            "Bounds": self.bounds,
            "Ranks": self.targets,
            "Missed": self.missed,
            "MissedCount": self.missed_count,
        }
