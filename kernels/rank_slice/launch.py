"""Rank slices of the whole catalog: sample, scan, select, fallback, compact.

Everything is decided on the device, in a fixed sequence of launches: nothing here waits for the device, so that a call
can be captured in a CUDA graph. docs/gpu.md explains the stages.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .. import shapes, tiles
from .compact import compact, sorted_top
from .fallback import fallback
from .keys import LAST, split_keys
from .plan import MARGIN, Plan, Ranking, Workspace, plan
from .sample import sample
from .scan import scan
from .select import select


def ranks(r: Ranking, margin: float = MARGIN, slack: float = 1.0) -> tuple[Tensor, Tensor]:
    """Ranks up to shapes.ROWS sessions; members go where `r` says.

    margin and slack decide how often a row falls back, never what is returned.

    Returns the keys (B, top) int64 of the first ranks in order, and the keys (B, 4) int64 of the items at rank start,
    stop - 1 and top - 1; LAST where a row has no candidate of that rank.
    """
    if r.ranked == 0:
        return _nothing(r)
    p, blocks = _cut(r, slack)
    w = Workspace.of(r, p)
    sample(r, p, w, margin)
    scan(r, p, w, blocks)
    select(r, p, w, margin)
    fallback(r, p, w)
    compact(r, p, w, blocks)
    return sorted_top(r, w), w.bounds


def _nothing(r: Ranking) -> tuple[Tensor, Tensor]:
    """What `ranks` returns of a catalog without items, of which no rank can be asked."""
    return r.offsets.new_full((r.rows, r.top), LAST.value), r.offsets.new_full((r.rows, 4), LAST.value)


def _cut(r: Ranking, slack: float) -> tuple[Plan, shapes.Blocks]:
    """The plan of a call and the scan's tile. The tile depends on the plan's zones, which are the same for any tile;
    the plan's sizes depend on the tile. Hence the first plan, for its zones alone."""
    device = r.query.device
    excluded = triton.cdiv(2 * r.values.numel(), max(r.rows, 1)) if r.skip_excluded else 0
    sizes = (r.rows, r.ranked, r.start, r.stop, r.top, r.words is not None, excluded, shapes.sm_count(device), slack)
    zones = plan(*sizes, shapes.scoring_blocks(r.precision, r.query, r.catalog))
    forms = (zones.has_start, zones.has_stop, r.bias is not None, r.bad is not None)
    blocks = shapes.scan_blocks(r.precision, r.query, r.catalog, *forms)
    return plan(*sizes, blocks), blocks


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
    margin: float = MARGIN,
    slack: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """query (B, d), catalog (V, d), exclude as values (E,) and offsets (B + 1,) int64, bias (V,), of any strides.

    Items whose bias is -inf are no candidates; a row that has fewer than `stop` has a shorter slice. margin and slack
    as in `ranks`.

    Returns members, top (B, top) int64, thresholds (B, 2) float32, and the first error. Members are bits (B, width)
    uint8 with `as_bits`, else ids (B, stop - start) int32; ids, top and thresholds are filled up with -1, -1 and -inf.
    The first error, with `check`, is an int64: row << 32 | the score's bits, for the first row with a candidate whose
    score is not finite, or tiles.NO_ERROR.
    """
    query, catalog = tiles.readable(query), tiles.readable(catalog)
    values, offsets = exclude_values.contiguous(), exclude_offsets.contiguous()
    (b, _), v, device = query.shape, catalog.shape[0], query.device
    size = max(1, triton.cdiv(b, max(1, triton.cdiv(b, shapes.ROWS))))  # even blocks: a few rows cost as much as many
    bad = tiles.no_error(check, triton.cdiv(b, size), device)
    if as_bits:
        members = torch.zeros(b, width, dtype=torch.uint8, device=device)
    else:
        members = torch.empty(b, stop - start, dtype=torch.int32, device=device)
    top_items = torch.empty(b, top, dtype=torch.int64, device=device)
    thresholds = torch.empty(b, 2, dtype=torch.float32, device=device)
    for begin in range(0, b, size):
        rows = slice(begin, min(begin + size, b))
        r = Ranking(
            query=query[rows],
            catalog=catalog,
            bias=bias,
            values=values,
            offsets=offsets[rows.start : rows.stop + 1],
            first_item=first_item,
            precision=precision,
            start=start,
            stop=stop,
            top=top,
            bad=None if bad is None else bad[begin // size :],
            words=members[rows].view(torch.int32) if as_bits else None,
            ids=None if as_bits else members[rows],
        )
        keys, bounds = ranks(r, margin, slack)
        split_keys(keys, v, None, top_items[rows])
        split_keys(bounds[:, :2], v, thresholds[rows], None)
    if start == stop:
        thresholds[:, 0], thresholds[:, 1] = math.inf, -math.inf
    return members, top_items, thresholds, tiles.first_error(bad, size)
