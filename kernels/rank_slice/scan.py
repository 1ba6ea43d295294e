"""The pass over the whole catalog: certain members become bits, candidates go to a buffer."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import shapes, tiles
from ..tiles import launch
from .keys import popcount
from .plan import LIMITS, OPEN, START_HIGH, START_LOW, STOP_HIGH, STOP_LOW, Plan, Ranking, Workspace

# How items are dealt to the columns of a tile. Of the accumulators of one row a thread of the tensor cores holds
# columns 2 q and 2 q + 1 of every 2 W columns, W = BLOCK_V / 32 words. `_dealt_items` gives each column its item so
# that the 32 scores of a thread are those of 32 neighbours, a whole word q of bits. For BLOCK_V = 128, W = 4:
#
#     column   0  1 |  2  3 |  4  5 |  6  7 |  8  9 | 10 11 | ...
#     thread   0    |  1    |  2    |  3    |  0    |  1    | ...
#     item     0  1 | 32 33 | 64 65 | 96 97 |  2  3 | 34 35 | ...
#
# In [BLOCK_B, 16, W, 2], the tile's columns seen as pairs, a thread holds [b, :, q, :]: bits 2 i and 2 i + 1 of word q
# are the left and the right of its pair i.


@triton.jit
def _dealt_items(BLOCK_V: tl.constexpr):
    """The item, counted from the tile's first, that each column of a tile scores."""
    WORDS: tl.constexpr = BLOCK_V // 32
    column = tl.arange(0, BLOCK_V)
    return column // 2 % WORDS * 32 + column // (2 * WORDS) * 2 + column % 2


@triton.jit
def _reaches(left, right, limit):
    """Words [B, W] with a bit for each score, left and right [B, 16, W] of every pair, that reaches limit [B, 1, 1]."""
    bit = (1 << (2 * tl.arange(0, 16)))[None, :, None]
    return tl.sum(tl.where(left >= limit, bit, 0), 1) | tl.sum(tl.where(right >= limit, 2 * bit, 0), 1)


@triton.jit
def _of_warp(words, PTX: tl.constexpr):
    """The bits that any thread of a warp has in its word."""
    if PTX:
        # $0 the result, $1 this thread's word
        return tl.inline_asm_elementwise(
            "redux.sync.or.b32 $0, $1, 0xffffffff;", "=r,r", [words], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return words


@triton.jit
def _store_items(Scores, Items, before, hits, any_hits, bit, left, right, item, PTX: tl.constexpr):
    """Appends scores, and the ids `item` and item + 1, of those of two neighbours whose bits, `bit` and the next, are
    set in `hits`, a word of a row's items: `before` places behind Scores and Items, and one more for each lower bit.

    A scattered tl.store first brings addresses, values and mask into a layout of its own, through shared memory. The
    PTX stores from where values are, and a warp without a hit, the rule in a large catalog, jumps over it: `any_hits`
    are those of the warp.
    """
    if PTX:
        # $0 a result that nobody reads, $1 Scores, $2 Items, $3 before, $4 hits, $5 any_hits, $6 bit, $7 left,
        # $8 right, $9 item
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred %hit;
                .reg .b32 %t;
                .reg .b32 %n;
                .reg .b64 %at;
                mul.lo.u32 %n, $6, 3;
                and.b32 %t, $5, %n;
                setp.eq.s32 %hit, %t, 0;
                @%hit bra NONE;
                sub.s32 %t, $6, 1;
                and.b32 %t, %t, $4;
                popc.b32 %n, %t;
                add.s32 %n, %n, $3;
                and.b32 %t, $4, $6;
                setp.ne.s32 %hit, %t, 0;
                mad.wide.s32 %at, %n, 4, $1;
                @%hit st.global.f32 [%at], $7;
                mad.wide.s32 %at, %n, 4, $2;
                @%hit st.global.b32 [%at], $9;
                @%hit add.s32 %n, %n, 1;
                shl.b32 %t, $6, 1;
                and.b32 %t, %t, $4;
                setp.ne.s32 %hit, %t, 0;
                mad.wide.s32 %at, %n, 4, $1;
                @%hit st.global.f32 [%at], $8;
                mad.wide.s32 %at, %n, 4, $2;
                add.s32 %t, $9, 1;
                @%hit st.global.b32 [%at], %t;
            NONE:
                mov.b32 $0, 0;
            }
            """,
            "=r,l,l,r,r,r,r,f,f,r",
            [Scores.to(tl.int64), Items.to(tl.int64), before, hits, any_hits, bit, left, right, item],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        place = before + popcount(hits & (bit - 1))
        keep = (hits & bit) != 0
        tl.store(Items + place, tl.broadcast_to(item, place.shape), mask=keep)
        tl.store(Scores + place, left, mask=keep)
        place += keep.to(tl.int32)
        keep = (hits & (2 * bit)) != 0
        tl.store(Items + place, tl.broadcast_to(item + 1, place.shape), mask=keep)
        tl.store(Scores + place, right, mask=keep)


@triton.jit
def _store_words(Words, words, keep, PTX: tl.constexpr):
    """Stores each word from the thread that made it, for the same reason."""
    if PTX:
        # $0 a result that nobody reads, $1 Words, $2 words, $3 keep
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred %keep;
                setp.ne.s32 %keep, $3, 0;
                @%keep st.global.b32 [$1], $2;
                mov.b32 $0, 0;
            }
            """,
            "=r,l,r,r",
            [Words.to(tl.int64), words, keep.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(Words, words, mask=keep)


@triton.jit
def _append(Scores, Items, buffer, filled, capacity, hits, left, right, tile, PTX: tl.constexpr):
    """Appends the items whose bits are set in hits [B, W] to the program's part of the rows' buffers, which begins at
    buffer [B, 1, 1] and holds filled [B] items; -> how many items that part has been given."""
    WORDS: tl.constexpr = hits.shape[1]
    word = tl.arange(0, WORDS)[None, :]
    pair = tl.arange(0, 16)[None, :, None]
    count = popcount(hits)
    # A byte for the items of each word; the product adds up those of the words before.
    counts = tl.sum(count << (8 * word), 1)
    before = filled[:, None] + ((counts[:, None] * 0x01010100) >> (8 * word) & 0xFF)
    hits = tl.where(before + count <= capacity, hits, 0)  # a row that runs out of room falls back as a whole
    _store_items(
        Scores + buffer,
        Items + buffer,
        before[:, None, :],
        hits[:, None, :],
        _of_warp(hits, PTX)[:, None, :],
        1 << (2 * pair),
        left,
        right,
        ((tile * WORDS + word) * 32)[:, None, :] + 2 * pair,
        PTX,
    )
    return filled + ((counts * 0x01010101) >> 24 & 0xFF)


@triton.jit(
    do_not_specialize=[
        *("B", "V", "first_item", "capacity", "dealt"),
        *("stride_qb", "stride_cv", "stride_bias", "stride_words"),
    ]
)
def _scan_kernel(
    Query,
    Catalog,
    Bias,
    Limits,
    Words,
    Scores,
    Items,
    Counts,
    Certain,
    Above,
    Bad,
    B,
    V,
    first_item,
    capacity,
    dealt,
    stride_qb,
    stride_cv,
    stride_bias,
    stride_words,
    HAS_BIAS: tl.constexpr,
    HAS_OPEN: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_STOP: tl.constexpr,
    BITS: tl.constexpr,
    CHECK: tl.constexpr,
    PTX: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Scores every item once. Certain members go to Words as bits; candidates go to a buffer.

    Each program has a part of every row's buffer to itself and fills it in the order of ids: there are no atomics and
    nothing to wait for. Groups of 2 ** dealt neighbouring tiles are dealt to the programs in turn, which fills all
    parts alike. Counts may exceed `capacity`: that row falls back.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_b, safe_rows = rows < B, tl.minimum(rows, B - 1)
    split, splits = tl.program_id(1), tl.num_programs(1)
    # Nothing compares with NaN, so that rows beyond B have no members and no candidates.
    row_limits = Limits + rows * LIMITS
    open_low = tl.load(row_limits + OPEN, mask=in_b, other=float("nan"))[:, None, None]
    start_high = tl.load(row_limits + START_HIGH, mask=in_b, other=float("nan"))[:, None, None]
    start_low = tl.load(row_limits + START_LOW, mask=in_b, other=float("nan"))[:, None, None]
    stop_high = tl.load(row_limits + STOP_HIGH, mask=in_b, other=float("nan"))[:, None, None]
    stop_low = tl.load(row_limits + STOP_LOW, mask=in_b, other=float("nan"))[:, None, None]

    WORDS: tl.constexpr = BLOCK_V // 32
    tl.static_assert(WORDS <= 4, "the items of a row are counted in the bytes of one number")
    offs_v, word = _dealt_items(BLOCK_V), tl.arange(0, WORDS)[None, :]
    part = rows * splits + split  # of the rows' buffers
    buffer = (part * capacity)[:, None, None]
    filled = tl.zeros([BLOCK_B], tl.int32)  # items buffered
    certain = tl.zeros([BLOCK_B, WORDS], tl.int32)  # members by their score alone
    above = tl.zeros([BLOCK_B, WORDS], tl.int32)  # items above the slice
    query = tiles.resident_query(Query, safe_rows, stride_qb, FORM)
    first_group = first_item // BLOCK_V >> dealt
    groups = (tl.cdiv(V, BLOCK_V) - 1 >> dealt) + 1 - first_group
    for turn in range(tl.cdiv(tl.maximum(groups - split, 0), splits) << dealt):
        tile = (first_group + split + (turn >> dealt) * splits << dealt) + (turn & (1 << dealt) - 1)
        items = (tile * BLOCK_V + offs_v).to(tl.int64)
        inside = tl.minimum(items, V - 1)
        scores = tiles.score(query, Query, Catalog, safe_rows, inside, stride_qb, stride_cv, FORM)
        candidates = (items >= first_item) & (items < V)
        if HAS_BIAS:
            bias, open_items = tiles.ranking_bias(Bias, inside, stride_bias)
            scores += bias[None, :]
            candidates &= open_items
        if CHECK:
            wrong = candidates[None, :] & in_b[:, None] & ~(tl.abs(scores) < float("inf"))
            tiles.report(Bad, scores, wrong, rows)
        if (tile * BLOCK_V < first_item) | (tile * BLOCK_V > V - BLOCK_V):
            scores = tl.where(candidates[None, :], scores, float("nan"))
        left, right = tl.split(tl.reshape(scores, [BLOCK_B, 16, WORDS, 2]))
        # A bit for each item, first of all: a limit then costs five instructions for two scores, and what follows from
        # several limits is worked out for 32 items at once.
        hits = tl.zeros([BLOCK_B, WORDS], tl.int32)
        if HAS_STOP:
            over_stop = _reaches(left, right, stop_high)
            hits = _reaches(left, right, stop_low) & ~over_stop
        if HAS_START:
            over_start = _reaches(left, right, start_high)
            above += popcount(over_start)
            if BITS:
                hits |= _reaches(left, right, start_low) & ~over_start
        if HAS_OPEN:
            hits |= _reaches(left, right, open_low)
        if BITS:
            members = over_stop & ~over_start if HAS_START else over_stop
            at = Words + rows[:, None] * stride_words + tile * WORDS + word
            _store_words(at, members, in_b[:, None] & (tile * WORDS + word < stride_words), PTX)
            certain += popcount(members)
        filled = _append(Scores, Items, buffer, filled, capacity, hits, left, right, tile, PTX)
    # What stays empty holds no number: no reader asks how far a part is filled.
    for place in range(tl.min(tl.where(in_b, filled, capacity), 0), capacity):
        tl.store(Scores + part * capacity + place, float("nan"), mask=in_b & (place >= filled))
    tl.store(Counts + part, filled, mask=in_b)
    tl.store(Certain + part, tl.sum(certain, 1), mask=in_b)
    tl.store(Above + part, tl.sum(above, 1), mask=in_b)


def scan(r: Ranking, p: Plan, w: Workspace, blocks: shapes.Blocks) -> None:
    """Scores the whole catalog: members by their score alone to r.words, candidates to the workspace."""
    launch(
        _scan_kernel,
        (triton.cdiv(r.rows, blocks.b), p.splits),
        **r.scores(blocks.d),
        **r.member_words(),
        **w.candidates(),
        **w.counters(),
        Limits=w.limits,
        Bad=r.bad,
        B=r.rows,
        capacity=p.capacity,
        dealt=p.dealt,
        HAS_OPEN=p.has_open,
        **p.zones(),
        BITS=p.bits,
        CHECK=r.bad is not None,
        PTX=shapes.is_cuda(r.query.device),
        **blocks.options(),
        **shapes.scan_registers(p.has_start, r.query.device),
    )
