"""The k best items of the whole catalog, always exactly: the best blocks hold the best items.

One pass keeps the best score of every block of the catalog. An item among the k best of all lies in one of the k best
blocks, by their best scores and of two that tie the one with lower ids: every other block has k items before its own.
So these blocks alone are scored again, and their k best are taken. Where k blocks are much of the catalog, the kernels
of rank_slice find the k best instead.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shapes, tiles
from .rank_slice.keys import LAST, first_key, item_key, split_keys
from .rank_slice.launch import ranks
from .rank_slice.plan import MARGIN, Ranking
from .tiles import launch

MEMORY = 48 << 20  # bytes for the blocks' best keys, and as many for the keys of the items in the best blocks


@triton.jit(do_not_specialize=["B", "V", "first_item", "blocks", "stride_qb", "stride_cv", "stride_bias"])
def _block_best_kernel(
    Query,
    Catalog,
    Bias,
    Best,
    Bad,
    B,
    V,
    first_item,
    blocks,
    stride_qb,
    stride_cv,
    stride_bias,
    HAS_BIAS: tl.constexpr,
    CHECK: tl.constexpr,
    TILES: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Best[row, block] is the key of TILES x BLOCK_V neighbours: the best score among them, over blocks - 1 - block."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    safe_rows = tl.minimum(rows, B - 1)
    query = tiles.resident_query(Query, safe_rows, stride_qb, FORM)
    for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
        best_score = tl.full([BLOCK_B], float("-inf"), tl.float32)
        for tile in range(block * TILES, tl.minimum((block + 1) * TILES, tl.cdiv(V - first_item, BLOCK_V))):
            offs_v = first_item + tile * BLOCK_V + tl.arange(0, BLOCK_V)
            inside = tl.minimum(offs_v, V - 1).to(tl.int64)
            scores = tiles.score(query, Query, Catalog, safe_rows, inside, stride_qb, stride_cv, FORM)
            candidates = offs_v < V
            if HAS_BIAS:
                bias = tl.load(Bias + inside * stride_bias).to(tl.float32)
                scores += bias[None, :]
                candidates &= bias != float("-inf")
            if CHECK:
                wrong = candidates[None, :] & (rows < B)[:, None] & ~(tl.abs(scores) < float("inf"))
                tiles.report(Bad, scores, wrong, rows)
            # The largest of all is never NaN; only a last tile holds what stands for no item.
            if first_item + (tile + 1) * BLOCK_V > V:
                scores = tl.where((offs_v < V)[None, :], scores, float("-inf"))
            best_score = tl.maximum(best_score, tl.max(scores, 1))
        key = first_key(best_score) + (blocks - 1 - block)
        tl.store(Best + rows * blocks + block, key, mask=rows < B)


@triton.jit(do_not_specialize=["V", "first_item", "per_row", "blocks", "size", "stride_qb", "stride_cv", "stride_bias"])
def _score_blocks_kernel(
    Query,
    Catalog,
    Bias,
    Chosen,
    Best,
    Keys,
    Values,
    Offsets,
    V,
    first_item,
    per_row,
    blocks,
    size,
    stride_qb,
    stride_cv,
    stride_bias,
    FROM_EXCLUDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Scores blocks of `size` items for one row each, without the row's excluded items.

    For the chosen blocks of a row (program ids: row, place) it stores all keys; with FROM_EXCLUDED, for the blocks in
    which the row's excluded items lie, the best key alone, over what _block_best_kernel found.
    """
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(Offsets + row), tl.load(Offsets + row + 1)
    first = tl.program_id(1)
    last = per_row
    if FROM_EXCLUDED:
        last = (end - begin).to(tl.int32)
    for place in range(first, last, tl.num_programs(1)):
        if FROM_EXCLUDED:
            value = tl.load(Values + begin + place)
            real = (value >= first_item) & (value < V)
            block = tl.where(real, (value - first_item) // size, 0)
        else:
            block = (tl.load(Chosen + row * per_row + place)).to(tl.int64)
        best = tl.full([], LAST, tl.int64)
        for start in range(0, size, BLOCK_V):
            items = first_item + block * size + start + tl.arange(0, BLOCK_V)
            inside = tl.minimum(items, V - 1)
            scores = tl.zeros([BLOCK_V], tl.float32)
            for from_d in range(0, FORM.D, FORM.BLOCK_D):
                offs_d = from_d + tl.arange(0, FORM.BLOCK_D)
                q = tl.load(Query + row * (stride_qb * FORM.UNIT_Q) + offs_d, mask=offs_d < FORM.D, other=0.0)
                rows_c = Catalog + inside[:, None] * (stride_cv * FORM.UNIT_C)
                c = tl.load(rows_c + offs_d[None, :], mask=offs_d[None, :] < FORM.D, other=0.0)
                q = tiles.operand(q, FORM).to(tl.float32)
                scores += tl.sum(tiles.operand(c, FORM).to(tl.float32) * q[None, :], 1)
            if HAS_BIAS:
                bias, _ = tiles.ranking_bias(Bias, inside, stride_bias)
                scores += bias
            allowed = (items < V) & (scores == scores)
            for i in range(begin, end):
                allowed &= items != tl.load(Values + i)
            key = tl.where(allowed, item_key(scores, items, V), LAST)
            if FROM_EXCLUDED:
                best = tl.maximum(best, tl.max(key, 0))
            else:
                tl.store(Keys + (row * per_row + place) * size + start + tl.arange(0, BLOCK_V), key)
        if FROM_EXCLUDED:
            tl.store(Best + row * blocks + block, (best >> 32 << 32) + (blocks - 1 - block))


def top_k_fwd(
    query: Tensor,
    catalog: Tensor,
    k: int,
    exclude_values: Tensor,
    exclude_offsets: Tensor,
    bias: Tensor | None,
    first_item: int,
    precision: str,
    check: bool,
    margin: float = MARGIN,
    slack: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """query (B, d), catalog (V, d), exclude as values (E,) and offsets (B + 1,) int64, bias (V,), of any strides.

    Items whose bias is -inf are no candidates. margin and slack as in `ranks`.

    Returns scores (B, k) float32, items (B, k) int64, filled up with -inf and -1, and, with `check`, an int64 as
    `rank_slice_fwd` does.
    """
    query, catalog = tiles.readable(query), tiles.readable(catalog)
    (b, _), v, device = query.shape, catalog.shape[0], query.device
    values, offsets = exclude_values.contiguous(), exclude_offsets.contiguous()
    keys = torch.empty(b, k, dtype=torch.int64, device=device)
    cut = _blocks(min(b, shapes.ROWS), v - first_item, k)
    step, size = cut or (shapes.ROWS, 0)
    bad = tiles.no_error(check, triton.cdiv(b, step), device)
    whole = Ranking(
        query, catalog, bias, values, offsets, first_item, precision, start=0, stop=0, top=k, skip_excluded=True
    )
    for begin in range(0, b if k else 0, step):
        end = min(begin + step, b)
        r = replace(
            whole,
            query=query[begin:end],
            offsets=offsets[begin : end + 1],
            bad=None if bad is None else bad[begin // step :],
        )
        keys[begin:end] = _best_of_blocks(r, size) if cut else ranks(r, margin, slack)[0]
    scores, items = torch.empty(b, k, dtype=torch.float32, device=device), torch.empty_like(keys)
    split_keys(keys, v, scores, items)
    return scores, items, tiles.first_error(bad, step)


def _blocks(rows: int, ranked: int, k: int) -> tuple[int, int] | None:
    """How many rows to take at a time and the items in a block, or None where blocks do not pay."""
    size = 128  # items, whole tiles of any shape
    while rows:
        while rows * triton.cdiv(ranked, size) * 8 > MEMORY:
            size *= 2
        if rows * k * size * 8 <= MEMORY:
            return (rows, size) if k * size <= max(ranked // 4, 2048) else None
        rows, size = rows // 2, 128
    return None


def _best_of_blocks(r: Ranking, size: int) -> Tensor:
    """The keys (B, k) int64 of the k best items in order; blocks of `size` items."""
    shape = shapes.resident_blocks(r.precision, r.query, r.catalog)
    blocks = triton.cdiv(r.ranked, size)
    row_blocks = triton.cdiv(r.rows, shape.b)
    best = torch.empty(r.rows, blocks, dtype=torch.int64, device=r.query.device)
    launch(
        _block_best_kernel,
        (row_blocks, min(blocks, triton.cdiv(3 * shapes.sm_count(r.query.device), row_blocks))),
        **r.scores(shape.d),
        Best=best,
        Bad=r.bad,
        B=r.rows,
        blocks=blocks,
        CHECK=r.bad is not None,
        TILES=size // shape.v,
        **shape.options(),
    )
    chosen = min(r.top, blocks)
    keys = torch.empty(r.rows, chosen * size, dtype=torch.int64, device=r.query.device)

    def score_blocks(programs: int, from_excluded: bool, chosen_blocks: Tensor) -> None:
        launch(
            _score_blocks_kernel,
            (r.rows, programs),
            **r.scores(shape.d),
            **r.excluded(),
            Chosen=chosen_blocks,
            Best=best,
            Keys=keys,
            per_row=chosen,
            blocks=blocks,
            size=size,
            FROM_EXCLUDED=from_excluded,
            BLOCK_V=shape.v,
            num_warps=4,
        )

    if r.values.numel():
        score_blocks(4, True, best)
    score_blocks(chosen, False, best.topk(chosen, dim=1).indices)
    return keys.topk(r.top, dim=1).values
