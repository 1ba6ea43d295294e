"""The k best items of the whole catalog, exactly and without luck: the best blocks hold the best items.

One pass keeps the best score of every block of the catalog. Whoever is among the k best of all lies in one of the k
best blocks, by their best scores and of two that tie the one with lower ids: every other block has k items before its
own. So these blocks alone are scored again, and their k best are taken. Where k blocks are much of the catalog, the
kernels of rank_slice find the k best instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .rank_slice.keys import FIRST, LAST, first_key, item_key, split_keys
from .rank_slice.launch import ROWS, ranks
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
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Best[row, block] is the key of TILES x BLOCK_V neighbours: the best score among them, over blocks - 1 - block."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    query = tiles.resident_query(Query, rows, B, stride_qb, D, UNIT_Q, BLOCK_D)
    for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
        best_score = tl.full([BLOCK_B], float("-inf"), tl.float32)
        for tile in range(block * TILES, tl.minimum((block + 1) * TILES, tl.cdiv(V - first_item, BLOCK_V))):
            offs_v = first_item + tile * BLOCK_V + tl.arange(0, BLOCK_V)
            inside = tl.minimum(offs_v, V - 1).to(tl.int64)
            scores = tiles.score(
                query,
                Query,
                Catalog,
                rows,
                inside,
                B,
                stride_qb,
                stride_cv,
                D,
                UNIT_Q,
                UNIT_C,
                PRODUCT,
                UPCAST,
                BLOCK_B,
                BLOCK_V,
                BLOCK_D,
            )
            if HAS_BIAS:
                scores += tl.load(Bias + inside * stride_bias).to(tl.float32)[None, :]
            if CHECK:
                wrong = (offs_v < V)[None, :] & (rows < B)[:, None] & ~(tl.abs(scores) < float("inf"))
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
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
            for from_d in range(0, D, BLOCK_D):
                offs_d = from_d + tl.arange(0, BLOCK_D)
                q = tl.load(Query + row * (stride_qb * UNIT_Q) + offs_d, mask=offs_d < D, other=0.0)
                rows_c = Catalog + inside[:, None] * (stride_cv * UNIT_C)
                c = tl.load(rows_c + offs_d[None, :], mask=offs_d[None, :] < D, other=0.0)
                q = tiles.operand(q, PRODUCT, UPCAST).to(tl.float32)
                scores += tl.sum(tiles.operand(c, PRODUCT, UPCAST).to(tl.float32) * q[None, :], 1)
            if HAS_BIAS:
                scores += tl.load(Bias + inside * stride_bias).to(tl.float32)
            open_ = (items < V) & (scores == scores)
            for i in range(begin, end):
                open_ &= items != tl.load(Values + i)
            key = tl.where(open_, item_key(scores, items, V), LAST)
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
    **luck: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """query (B, d), catalog (V, d), exclude as values (E,) and offsets (B + 1,) int64, bias (V,).

    Returns scores (B, k) float32, items (B, k) int64 and, with `check`, an int64 as `rank_slice_fwd` does. luck:
    `spread` and `slack` of `ranks`.
    """
    (b, _), v, device = query.shape, catalog.shape[0], query.device
    bad = torch.full((1,), FIRST.value, dtype=torch.int64, device=device) if check else None
    keys = torch.empty(b, k, dtype=torch.int64, device=device)
    cut = _blocks(min(b, ROWS), v - first_item, k)
    rows, size = cut or (ROWS, 0)
    for begin in range(0, b if k else 0, rows):
        some = slice(begin, min(begin + rows, b))
        lists = exclude_values, exclude_offsets[some.start : some.stop + 1]
        if cut:
            keys[some] = _best_of_blocks(query[some], catalog, k, lists, bias, first_item, precision, bad, size)
        else:
            keys[some] = ranks(
                query[some],
                catalog,
                0,
                0,
                k,
                lists,
                bias,
                first_item,
                precision,
                bad,
                None,
                None,
                skip_excluded=True,
                **luck,
            )[0]
    scores, items = torch.empty(b, k, dtype=torch.float32, device=device), torch.empty_like(keys)
    split_keys(keys, v, scores, items)
    return scores, items, bad


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


def _best_of_blocks(
    query: Tensor,
    catalog: Tensor,
    k: int,
    exclude: tuple[Tensor, Tensor],
    bias: Tensor | None,
    first_item: int,
    precision: str,
    bad: Tensor | None,
    size: int,
) -> Tensor:
    """The keys (b, k) int64 of the k best items in order."""
    b, v, device = query.shape[0], catalog.shape[0], query.device
    shape, product = tiles.resident_blocks(precision, query, catalog), tiles.arithmetic(precision, query, catalog)
    matrices = (tiles.strides(query), tiles.strides(catalog), 0 if bias is None else bias.stride(0))
    has_bias = {"HAS_BIAS": bias is not None}
    blocks = triton.cdiv(v - first_item, size)
    row_blocks = triton.cdiv(b, shape.b)
    best = torch.empty(b, blocks, dtype=torch.int64, device=device)
    launch(
        _block_best_kernel,
        (row_blocks, min(blocks, triton.cdiv(3 * tiles.processors(device), row_blocks))),
        query,
        catalog,
        bias,
        best,
        bad,
        b,
        v,
        first_item,
        blocks,
        *matrices,
        **has_bias,
        CHECK=bad is not None,
        TILES=size // shape.v,
        **product,
        **shape.options(),
    )
    chosen = min(k, blocks)
    keys = torch.empty(b, chosen * size, dtype=torch.int64, device=device)

    def score_blocks(programs: int, from_excluded: bool, of: Tensor) -> None:
        launch(
            _score_blocks_kernel,
            (b, programs),
            query,
            catalog,
            bias,
            of,
            best,
            keys,
            *exclude,
            v,
            first_item,
            chosen,
            blocks,
            size,
            *matrices,
            FROM_EXCLUDED=from_excluded,
            **has_bias,
            **product,
            BLOCK_V=shape.v,
            BLOCK_D=shape.d,
            num_warps=4,
        )

    if exclude[0].numel():
        score_blocks(4, True, best)
    score_blocks(chosen, False, best.topk(chosen, dim=1).indices)
    return keys.topk(k, dim=1).values
