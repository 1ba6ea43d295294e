"""The pass over the whole catalog: what is certainly a member becomes a bit, what may matter goes to a buffer."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import tiles
from .keys import popcount
from .sample import LIMITS, OPEN, START_HIGH, START_LOW, STOP_HIGH, STOP_LOW


@triton.jit
def _words(yes, bit):
    """Packs [B, 16, W] booleans, `bit` of the second axis each, into words [B, W]."""
    return tl.sum(tl.where(yes, bit, 0), 1)


@triton.jit
def _of_warp(words, PTX: tl.constexpr):
    """The bits that any thread of a warp has in its word."""
    if PTX:
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
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores every item once. What is certainly a member goes to Words as a bit; what may matter goes to a buffer.

    Each program owns a part of every row's buffer and fills it in the order of ids, so there are no atomics and nothing
    to wait for. Groups of 2 ** dealt neighbouring tiles are dealt to the programs in turn, which fills all parts alike.
    Counts may exceed `capacity`: that row is redone.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_b = rows < B
    split, splits = tl.program_id(1), tl.num_programs(1)
    # Nothing compares with NaN, so that rows beyond B have no members and no candidates.
    row_limits = Limits + rows * LIMITS
    open_low = tl.load(row_limits + OPEN, mask=in_b, other=float("nan"))[:, None, None]
    start_high = tl.load(row_limits + START_HIGH, mask=in_b, other=float("nan"))[:, None, None]
    start_low = tl.load(row_limits + START_LOW, mask=in_b, other=float("nan"))[:, None, None]
    stop_high = tl.load(row_limits + STOP_HIGH, mask=in_b, other=float("nan"))[:, None, None]
    stop_low = tl.load(row_limits + STOP_LOW, mask=in_b, other=float("nan"))[:, None, None]

    # A thread of the matrix unit holds columns 2 q and 2 q + 1 of every 2 WORDS of a row. Items are dealt to columns so
    # that these are the 32 items of word q: no word is put together from several threads.
    WORDS: tl.constexpr = BLOCK_V // 32
    tl.static_assert(WORDS <= 4, "the items of a row are counted in the bytes of one number")
    column = tl.arange(0, BLOCK_V)
    offs_v = column // 2 % WORDS * 32 + column // (2 * WORDS) * 2 + column % 2
    word = tl.arange(0, WORDS)[None, :]
    left_bit = (1 << (2 * tl.arange(0, 16)))[None, :, None]
    buffer = ((rows * splits + split) * capacity)[:, None, None]
    filled = tl.zeros([BLOCK_B], tl.int32)  # items buffered
    certain = tl.zeros([BLOCK_B, WORDS], tl.int32)  # members by their score alone
    above = tl.zeros([BLOCK_B, WORDS], tl.int32)  # items above all that is wanted
    query = tiles.resident_query(Query, rows, B, stride_qb, D, UNIT_Q, BLOCK_D)
    first_group = first_item // BLOCK_V >> dealt
    groups = (tl.cdiv(V, BLOCK_V) - 1 >> dealt) + 1 - first_group
    for turn in range(tl.cdiv(tl.maximum(groups - split, 0), splits) << dealt):
        tile = (first_group + split + (turn >> dealt) * splits << dealt) + (turn & (1 << dealt) - 1)
        items = (tile * BLOCK_V + offs_v).to(tl.int64)
        inside = tl.minimum(items, V - 1)
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
        ranked = (items >= first_item) & (items < V)
        if CHECK:
            wrong = ranked[None, :] & in_b[:, None] & ~(tl.abs(scores) < float("inf"))
            tiles.report(Bad, scores, wrong, rows)
        if (tile * BLOCK_V < first_item) | (tile * BLOCK_V > V - BLOCK_V):
            scores = tl.where(ranked[None, :], scores, float("nan"))
        left, right = tl.split(tl.reshape(scores, [BLOCK_B, 16, WORDS, 2]))
        # A bit for each item, first of all: a limit then costs five instructions for two scores, and what follows from
        # several limits is worked out for 32 items at once.
        hits = tl.zeros([BLOCK_B, WORDS], tl.int32)
        if HAS_STOP:
            over_stop = _words(left >= stop_high, left_bit) | _words(right >= stop_high, 2 * left_bit)
            hits = (_words(left >= stop_low, left_bit) | _words(right >= stop_low, 2 * left_bit)) & ~over_stop
        if HAS_START:
            over_start = _words(left >= start_high, left_bit) | _words(right >= start_high, 2 * left_bit)
            above += popcount(over_start)
            if BITS:
                near_start = _words(left >= start_low, left_bit) | _words(right >= start_low, 2 * left_bit)
                hits |= near_start & ~over_start
        if HAS_OPEN:
            hits |= _words(left >= open_low, left_bit) | _words(right >= open_low, 2 * left_bit)
        if BITS:
            members = over_stop & ~over_start if HAS_START else over_stop
            at = Words + rows[:, None] * stride_words + tile * WORDS + word
            _store_words(at, members, in_b[:, None] & (tile * WORDS + word < stride_words), PTX)
            certain += popcount(members)

        count = popcount(hits)
        # A byte for the items of each word; the product adds up those of the words before.
        counts = tl.sum(count << (8 * word), 1)
        before = filled[:, None] + ((counts[:, None] * 0x01010100) >> (8 * word) & 0xFF)
        hits = tl.where(before + count <= capacity, hits, 0)  # a row that runs out of room is redone as a whole
        _store_items(
            Scores + buffer,
            Items + buffer,
            before[:, None, :],
            hits[:, None, :],
            _of_warp(hits, PTX)[:, None, :],
            left_bit,
            left,
            right,
            ((tile * WORDS + word) * 32)[:, None, :] + 2 * tl.arange(0, 16)[None, :, None],
            PTX,
        )
        filled += (counts * 0x01010101) >> 24 & 0xFF
    own = rows * splits + split
    # What stays empty holds no number, so that nobody has to ask how far a part is filled.
    for place in range(tl.min(tl.where(in_b, filled, capacity), 0), capacity):
        tl.store(Scores + own * capacity + place, float("nan"), mask=in_b & (place >= filled))
    tl.store(Counts + own, filled, mask=in_b)
    tl.store(Certain + own, tl.sum(certain, 1), mask=in_b)
    tl.store(Above + own, tl.sum(above, 1), mask=in_b)
