"""Rank slices of the whole catalog: bracket, stream, settle, and redo what was missed.

Everything is decided on the device, in a fixed sequence of launches: nothing here waits for the device (unless `check`
asks to), so that a call can be captured in a CUDA graph. docs/gpu.md explains the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from .. import tiles
from ..tiles import launch
from .compact import _ascending_kernel, _clear_excluded_kernel, _place_kernel
from .fallback import TARGETS, fallback
from .keys import FIRST, split_keys
from .sample import LIMITS, SPREAD, _limits_kernel, _sample_kernel
from .scan import _scan_kernel
from .select import _select_kernel

# Sessions at a time, which bounds the memory beside the result: 512 targets of a training step and the rest of its last
# session are one pass over the catalog.
ROWS = 640
FEW = 2048  # scores that are looked at first, of which a thread holds a handful
MANY = 1 << 14  # entries of a row from which on more threads put ids in order
NARROWED = 4  # times as many or more are not searched before the few have narrowed the search
MOST_SORTED = 256  # keys of a row that a program sorts by itself


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
    def zone(self) -> int:
        """Entries that may be near what is sought: an eighth of all, more than what a few are expected to leave."""
        return self.entries // 8


def plan(
    rows: int,
    ranked: int,
    start: int,
    stop: int,
    top: int,
    bits: bool,
    left_out: int,
    processors: int,
    slack: float,
    blocks: tiles.Blocks,
) -> Plan:
    """left_out: about how many items of a row are dropped from the top; slack scales the room for candidates."""
    wanted = stop - start
    # Skipped ranks are buffered, too, unless they are many: then they are counted.
    open_start = start <= max(256, wanted // 8)
    has_start = wanted > 0 and not open_start
    has_stop = wanted > 0 and (bits or has_start)
    open_ranks = max(top + left_out, 0 if has_start or not wanted else start + 1 if bits else stop)
    # Bytes of a row for the sample, which the buffer for candidates takes over.
    room = (50 << 20) // max(1, rows) + 16 * wanted
    sampled = min(ranked, max(2048, min(ranked // 64, room // 4)))
    share = sampled / ranked

    def width(rank: int) -> float:
        """Sampled items between the middle of a bracket and its limit."""
        return SPREAD * math.sqrt(max(rank * share * (1.0 - rank / ranked) * (1.0 - share), 0.0)) + 3.0

    def most_between(few: float) -> float:
        """Items that lie between two limits with so many sampled ones between them, with luck."""
        return (few + SPREAD * math.sqrt(few * (1.0 - share))) / share

    candidates = 0.0
    if open_ranks:
        candidates += most_between(open_ranks * share + width(open_ranks))
    if has_start:
        candidates += most_between(2.0 * width(start))
    if has_stop:
        candidates += most_between(2.0 * width(stop) if bits else wanted * share + width(start) + width(stop))
    all_tiles = triton.cdiv(ranked, blocks.v) + 1
    splits = max(1, min(triton.cdiv(2 * processors, triton.cdiv(rows, blocks.b)), all_tiles, 1024))
    most = triton.cdiv(all_tiles, splits) * blocks.v  # the items that a program can meet
    part = candidates * slack / splits
    capacity = min(most, math.ceil(part + SPREAD * math.sqrt(part)) + 8)
    # Brackets deep in a huge catalog may hold more than memory does; such rows are redone.
    budget = (2 * 8 * wanted * rows + (48 << 20)) // (8 * rows) + 2 * open_ranks
    capacity = min(capacity, budget // splits)
    # A redone row's buffer holds exactly what is wanted.
    exact = top + (0 if bits else wanted)
    capacity = max(capacity, triton.cdiv(exact, splits), 2)
    # Fewer groups of tiles are less to count for `_ascending_kernel`. But one that is all candidates, as catalogs that
    # are sorted by popularity have them, must not take more than a quarter of a program's part.
    dealt = 0
    while wanted and not bits and triton.cdiv(ranked, blocks.v << dealt) > splits * capacity // 2:
        if blocks.v << dealt + 1 > capacity // 4:
            break
        dealt += 1
    return Plan(sampled, splits, capacity, dealt, bits, open_ranks > 0, has_start, has_stop)


def stream_blocks(p: Plan, precision: str, query: Tensor, catalog: Tensor, blocks: tiles.Blocks) -> tiles.Blocks:
    """The stream kernel's shape on this target; the best of those that were measured on an H100 (docs/gpu.md).

    On Hopper and data-centre Blackwell the matrix unit takes operands from shared memory. That leaves 4 warps enough
    registers, and two programs share a processor: one compares scores while the matrix unit serves the other. Narrow
    queries then stay in shared memory. Wide ones are read anew for each tile: where only the open zone is looked for,
    registers suffice for twice the sessions, which halves what the catalog takes of the L2 cache's bandwidth.
    """
    width, narrow = query.shape[1], tiles.narrow(precision, query, catalog)
    same = query.dtype == catalog.dtype and (narrow or precision != "bf16")
    if not tiles.has_wide_matrix_unit(query.device) or blocks.v < 128 or p.has_start or not same:
        return blocks
    if narrow and width <= 128:
        whole = max(16, triton.next_power_of_2(width))
        if tiles.is_hopper(query.device) or p.has_stop or query.shape[0] <= 64:
            return replace(blocks, warps=4, d=whole)
        return replace(blocks, b=128, d=whole, stages=2)  # which spills nothing on Blackwell
    if narrow and not p.has_stop and query.shape[0] > 64:
        return replace(blocks, b=128, stages=4)
    return replace(blocks, warps=4)


def ranks(
    query: Tensor,
    catalog: Tensor,
    start: int,
    stop: int,
    top: int,
    exclude: tuple[Tensor, Tensor],
    bias: Tensor | None,
    first_item: int,
    precision: str,
    bad: Tensor | None,
    words: Tensor | None,
    ids: Tensor | None,
    skip_excluded: bool = False,
    spread: float = SPREAD,
    slack: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Bracket, stream, settle and redo for up to ROWS sessions.

    words: (B, W) int32 zeros to set the members' bits in, or None for a list of ids. ids: (B, stop - start) int32 that
    the list is written to, ascending and filled up with -1. skip_excluded: excluded items are no items at all (top_k)
    rather than members that leave the slice. spread and slack decide how often a row must be redone, never what is
    returned.

    Returns the keys (B, top) int64 of the first ranks in order, and the keys (B, 4) int64 of the items at rank start,
    stop - 1 and top - 1.
    """
    (b, _), v, device = query.shape, catalog.shape[0], query.device
    values, offsets = exclude
    ranked = v - first_item
    left_out = triton.cdiv(2 * values.numel(), max(b, 1)) if skip_excluded else 0
    blocks, product = tiles.scoring_blocks(precision, query, catalog), tiles.arithmetic(precision, query, catalog)
    call = (b, ranked, start, stop, top, words is not None, left_out, tiles.processors(device), slack)
    stream = stream_blocks(plan(*call, blocks), precision, query, catalog, blocks)
    p = plan(*call, stream)
    matrices = (tiles.strides(query), tiles.strides(catalog), 0 if bias is None else bias.stride(0))
    has_bias = {"HAS_BIAS": bias is not None}
    row_blocks = triton.cdiv(b, blocks.b)
    int32 = {"dtype": torch.int32, "device": device}

    # The sample has been read when the buffer is filled: one memory serves both.
    size = b * p.entries
    memory = torch.empty(max(2 * size, b * p.sampled), **int32)
    sample, scores = memory[: b * p.sampled].view(torch.float32), memory[:size].view(torch.float32)
    items = memory[size : 2 * size]
    limits = torch.empty(b, LIMITS.value, dtype=torch.float32, device=device)
    counts, certain, above = torch.empty(3, b, p.splits, **int32)
    redone = torch.empty(b, **int32)  # entries written by the redo, -1 where there was none
    bounds = torch.empty(b, TARGETS.value, dtype=torch.int64, device=device)
    rank = torch.empty(b, TARGETS.value, **int32)
    missed, missed_count = torch.empty(b, **int32), torch.zeros(1, **int32)

    backend, _ = tiles.target(device)
    launch(
        _sample_kernel,
        (row_blocks, triton.cdiv(p.sampled, blocks.v)),
        query,
        catalog,
        bias,
        sample,
        b,
        v,
        p.sampled,
        first_item,
        *matrices,
        WHOLE=p.sampled == ranked,
        **has_bias,
        **product,
        **blocks.options(),
        # For more programs on a processor it would spill.
        **({"maxnreg": 168} if backend == "cuda" and product["PRODUCT"] == "ieee" else {}),
    )
    launch(
        _limits_kernel,
        (b,),
        sample,
        offsets,
        limits,
        p.sampled,
        ranked,
        start,
        stop,
        top,
        spread,
        HAS_OPEN=p.has_open,
        OPEN_START=start < stop and not p.has_start,
        OPEN_STOP=start < stop and not p.has_stop,
        WIDE_STOP=p.has_stop and not p.bits,
        SKIP_EXCLUDED=skip_excluded,
        NARROW=p.sampled >= NARROWED * FEW,
        COLUMNS=LIMITS.value if p.has_start or p.has_stop else 1,
        CHUNK=FEW,
        num_warps=4,
    )
    stride_words = 0 if words is None else words.stride(0)
    # To have two programs on a processor, NVIDIA's assembler would spill a few of the loop's registers.
    roomy = {"maxnreg": 168} if tiles.is_blackwell(device) and p.has_start else {}
    launch(
        _scan_kernel,
        (triton.cdiv(b, stream.b), p.splits),
        query,
        catalog,
        bias,
        limits,
        words,
        scores,
        items,
        counts,
        certain,
        above,
        bad,
        b,
        v,
        first_item,
        p.capacity,
        p.dealt,
        *matrices,
        stride_words,
        **has_bias,
        HAS_OPEN=p.has_open,
        HAS_START=p.has_start,
        HAS_STOP=p.has_stop,
        BITS=p.bits,
        CHECK=bad is not None,
        PTX=backend == "cuda",
        **product,
        **stream.options(),
        **roomy,
    )
    sizes = (p.splits, p.capacity, v)
    skip = skip_excluded and values.numel() > 0
    room = p.zone if p.entries >= NARROWED * FEW else 0
    # The ids' memory is free until they are placed.
    zone = ids if ids is not None and ids.shape[1] >= 2 * room else torch.empty(b, 2 * room, **int32)
    launch(
        _select_kernel,
        (b,),
        limits,
        scores,
        items,
        counts,
        certain,
        above,
        zone,
        values,
        offsets,
        bounds,
        rank,
        redone,
        missed,
        missed_count,
        *sizes,
        room,
        start,
        stop,
        top,
        spread,
        HAS_START=p.has_start,
        HAS_STOP=p.has_stop,
        NARROW=room > 0,
        SKIP_EXCLUDED=skip,
        # Half as many where registers are short: for two zones, for excluded items, and by other assemblers.
        BLOCK=FEW // 2 if p.has_stop or skip or not tiles.is_hopper(device) else FEW,
        EXCLUDED=4,
        PARTS=triton.next_power_of_2(p.splits),
        num_warps=8,
        # For more programs on a processor it would spill.
        **({"maxnreg": 128} if backend == "cuda" else {}),
    )
    fallback(
        query,
        catalog,
        bias,
        (missed, missed_count, bounds, rank),
        words,
        (scores, items, redone),
        exclude,
        first_item,
        p.entries,
        matrices,
        product | has_bias | {"BITS": p.bits, "SKIP_EXCLUDED": skip},
        precision,
    )
    has_ids = ids is not None and stop > start
    found = torch.empty(b, **int32)
    best = torch.empty(b, top, dtype=torch.int64, device=device)
    sorts = top <= MOST_SORTED
    launch(
        _place_kernel,
        (b,),
        scores,
        items,
        bounds,
        words,
        found,
        best,
        values,
        offsets,
        p.entries,
        v,
        top,
        stride_words,
        stop - start,
        BITS=p.bits,
        HAS_IDS=has_ids,
        TOP=min(MOST_SORTED, max(16, triton.next_power_of_2(top))) if top else 0,
        SORTS=sorts,
        BLOCK=256 if has_ids else 1024,
        EXCLUDED=8,
        num_warps=8,
    )
    if words is not None and values.numel():
        launch(_clear_excluded_kernel, (b,), words, values, offsets, v, stride_words, EXCLUDED=128, num_warps=4)
    if has_ids:
        many = p.entries >= MANY
        shift = (stream.v << p.dealt).bit_length() - 1
        launch(
            _ascending_kernel,
            (b,),
            memory,
            items,
            found,
            redone,
            ids,
            p.entries,
            p.entries // 2,
            first_item >> shift,
            (v - 1 >> shift) + 1 - (first_item >> shift),
            shift,
            stop - start,
            triton.cdiv((v - 1).bit_length(), 2) * 2,
            BLOCK=4096 if many else 1024,
            num_warps=16 if many else 4,
        )
    return best if sorts else best.sort(dim=1, descending=True).values, bounds


def rank_slice_fwd(
    query: Tensor,
    catalog: Tensor,
    start: int,
    stop: int,
    top: int,
    exclude_values: Tensor,
    exclude_offsets: Tensor,
    bias: Tensor | None,
    first_item: int,
    precision: str,
    check: bool,
    as_bits: bool,
    width: int,
    **luck: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """query (B, d), catalog (V, d), exclude as values (E,) and offsets (B + 1,) int64, bias (V,).

    Returns members, top (B, top) int64, thresholds (B, 2) float32, and what was found amiss. Members are bits
    (B, width) uint8 with `as_bits`, else ids (B, stop - start) int32. What was found amiss, with `check`, is an int64:
    row << 32 | the score's bits, for the first row with a score that is not finite, or FIRST. luck: `spread` and
    `slack` of `ranks`.
    """
    (b, _), v, device = query.shape, catalog.shape[0], query.device
    bad = torch.full((1,), FIRST.value, dtype=torch.int64, device=device) if check else None
    if as_bits:
        members = torch.zeros(b, width, dtype=torch.uint8, device=device)
    else:
        members = torch.empty(b, stop - start, dtype=torch.int32, device=device)
    best = torch.empty(b, top, dtype=torch.int64, device=device)
    thresholds = torch.empty(b, 2, dtype=torch.float32, device=device)
    size = max(1, triton.cdiv(b, max(1, triton.cdiv(b, ROWS))))  # even blocks: a few rows cost as much as many
    for begin in range(0, b, size):
        some = slice(begin, min(begin + size, b))
        words = members[some].view(torch.int32) if as_bits else None
        offsets = exclude_offsets[some.start : some.stop + 1]
        keys, bounds = ranks(
            query[some],
            catalog,
            start,
            stop,
            top,
            (exclude_values, offsets),
            bias,
            first_item,
            precision,
            bad,
            words,
            None if as_bits else members[some],
            **luck,
        )
        split_keys(keys, v, None, best[some])
        split_keys(bounds[:, :2], v, thresholds[some], None)
    if start == stop:
        thresholds[:, 0], thresholds[:, 1] = math.inf, -math.inf
    return members, best, thresholds, bad
