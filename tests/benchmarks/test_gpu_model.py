"""The GPU kernels' cost model: its formulas by hand, and its reader of machine code on a text of a few lines."""

from __future__ import annotations

from dataclasses import replace

import pytest
from alterrec_fast.benchmarks import gpu_model
from alterrec_fast.benchmarks.cost_model import H100
from alterrec_fast.benchmarks.gpu_model import Call, Loop, Tile, Work

CALL = Call(sessions=4, items=1_000, width=8, size=10)


def by_kernel(works: list[Work]) -> dict[str, Work]:
    return {work.kernel: work for work in works}


def test_rank_slice_by_hand() -> None:
    works = by_kernel(gpu_model.rank_slice_work(CALL, sampled=100, entries=6, groups=3))
    stream = works["_stream_kernel"]
    assert stream.operations == 2 * 4 * 1_000 * 8
    assert stream.bytes == 2 * 8 * (4 + 1_000) + 8 * 4 * 6
    assert works["_sample_kernel"].bytes == 2 * 8 * (4 + 100) + 4 * 4 * 100
    assert works["_place_kernel"].bytes == 8 * 4 * 6 + 4 * 4 * 10
    bits = by_kernel(gpu_model.rank_slice_work(CALL, sampled=100, entries=6, groups=0))
    assert bits["_stream_kernel"].bytes == stream.bytes + 4 * 1_000 / 8
    assert bits["_ascending_kernel"].bytes == 0
    assert works["_ascending_kernel"].bytes == 2 * 4 * 4 * 10 + 8 * 4 * 3  # all in the cache


def test_passes_beyond_the_cache_are_counted() -> None:
    big = Call(512, 10_000_000, 128)
    scores = 4 * 512 * 30_000
    before = by_kernel(gpu_model.rank_slice_work(big, sampled=90_000, entries=30_000, groups=9_766))
    assert before["_ascending_kernel"].bytes == (2 + 1) * 4 * 512 * big.size + 4 * 8 * 512 * 9_766
    assert before["_limits_kernel"].bytes == 24 * 4 * 512 * 90_000
    assert before["_select_kernel"].bytes == 24 * scores + 512 * 30_000
    works = by_kernel(gpu_model.rank_slice_work(big, 90_000, 30_000, 9_766, narrow=(True, True)))
    assert works["_stream_kernel, its end"].bytes == 32 * 512 * 30_000 / 3
    twice = by_kernel(gpu_model.rank_slice_work(big, 90_000, 30_000, 39_063, windows=2))
    assert twice["_ascending_kernel"].bytes == (4 + 1) * 4 * 512 * big.size + 4 * 8 * 512 * 39_063
    assert works["_limits_kernel"].bytes == 4 * 512 * 90_000 + 512 * 2_048 * 32
    assert works["_select_kernel"].bytes == scores + 512 * 2_048 * 32 + 512 * 30_000


def test_instructions_may_take_longer_than_the_roof() -> None:
    assert Work("", 0.0, 0.0, slots=132 * 4 * gpu_model.CLOCK).seconds() == 1.0
    assert Work("", 0.0, H100.memory, slots=1.0).seconds() == 1.0


def test_top_k_by_hand() -> None:
    works = by_kernel(gpu_model.top_k_work(CALL, k=3, block=128))
    assert works["_block_best_kernel"].bytes == 2 * 8 * (4 + 1_000) + 8 * 4 * 8  # eight blocks
    assert works["_score_blocks_kernel"].operations == 2 * 4 * (3 * 128) * 8
    assert by_kernel(gpu_model.top_k_work(CALL, k=30, block=128))["topk of the keys"].bytes == 2 * 8 * 4 * 8 * 128


def test_losses_by_hand() -> None:
    dense = by_kernel(gpu_model.slice_loss_work(CALL, splits=2))
    assert dense["_partition_kernel"].bytes == 2 * 8 * 1_004 + 4 * 1_000 / 8 + 8 * 2 * 4
    assert dense["_slopes_kernel"].bytes == 2 * 8 * 1_004 + 4 * 1_000 / 8 + 2 * 4 * 1_000
    assert dense["mm, the queries' gradient"].bytes == 2 * 4 * 1_000 + 2 * 8 * 1_000 + 4 * 4 * 8
    assert sum(work.operations for work in dense.values()) == 4 * CALL.product + 2 * 4 * 8
    own = by_kernel(gpu_model.sampled_softmax_work(CALL, negatives=5))
    assert own["_gather_kernel"].operations == 2 * 4 * 5 * 8
    assert own["_gather_kernel"].bytes == 4 * 5 * (2 * 8 + 8 + 4) + 2 * 4 * 8
    assert own["_segment_kernel"].bytes == 4 * 6 * 20 + 2 * 8 * (4 + 1_000)


def test_the_roof_is_the_larger_time() -> None:
    assert Work("", H100.products, 0.0).roof() == 1.0
    assert Work("", H100.products, 2 * H100.memory).roof() == 2.0


def test_a_loop_by_hand() -> None:
    loop = Loop("", 64, 128, 320, 4, Tile(product=320, rest=160, guarded=[20] * 16), chance=0.5)
    assert loop.cycles == 1280  # 2 x 64 x 128 x 320 / 4,096
    assert loop.slots == 5120
    assert loop.product_share == 0.25
    assert loop.rest_share == 4 * (160 + 160) / 5120
    assert loop.times == 1.0
    assert loop.cache_bytes() == 2 * (64 + 128) * 320
    alone = replace(loop, programs=1)  # nobody multiplies while it compares
    assert alone.times == 1.0 + 0.25
    slow = Loop("", 64, 128, 64, 4, loop.tile, chance=1.0, resident=True)
    assert slow.times == 4 * (320 + 160 + 320) / 1024
    assert slow.cache_bytes() == 2 * 128 * 64


def test_the_chance_of_a_candidate() -> None:
    assert gpu_model.chance_of(0.0) == 0.0
    assert gpu_model.chance_of(1.5) == 1.0
    assert gpu_model.chance_of(0.01) == pytest.approx(1 - 0.99**64)


SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   IMAD.SHL.U32 R1, R0, 0x80, RZ ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR10][R2.64] ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR36], R24, gsb0 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/              @!P0 BRA P1, `(.L_x_2) ;
        /*0070*/                   FSEL R24, R24, +QNAN , P1 ;
.L_x_2:
        /*0080*/                   FSETP.GE.AND P0, PT, R24, R5, PT ;
        /*0090*/              @!P0 BRA `(.L_x_3) ;
        /*00a0*/                   POPC R6, R7 ;
        /*00b0*/               @P1 STG.E desc[UR10][R8.64], R24 ;
.L_x_3:
        /*00c0*/                   IADD3 R1, R1, 0x1, RZ ;
        /*00d0*/               @P2 BRA `(.L_x_0) ;
        /*00e0*/                   EXIT ;
.L_x_4:
        /*00f0*/                   BRA `(.L_x_4);
"""


def test_reads_a_loop_within_a_loop() -> None:
    tile = gpu_model.tile_of(SASS, matrix_instructions=5)
    assert tile.matrix == 5
    assert tile.product == 1 + 5 * 3 + 1  # the shift, five trips of three, the wait
    assert tile.rest == 1 + 1 + 1 + 2  # the branch over the edge, compare, the branch over the store, and the tail
    assert tile.guarded == [2]
    assert tile.issued(0.5) == 5 + 1


def test_copies_behind_the_stores_are_of_the_next_product() -> None:
    tail = "        /*00c4*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR10][R2.64] ;\n"
    code = SASS.replace("        /*00c0*/", tail + "        /*00c0*/")
    tile = gpu_model.tile_of(code, matrix_instructions=1)
    assert (tile.product, tile.rest) == (1 + 3 + 1 + 3, 3)


def test_a_scan_by_its_loops() -> None:
    """The outer loop stores; another, behind it, searches."""
    search = """
.L_x_5:
        /*00d2*/                   FSETP.GE.AND P0, PT, R24, R5, PT ;
        /*00d4*/               @P2 BRA `(.L_x_5) ;
        /*00e0*/                   EXIT ;
"""
    code = SASS.replace("        /*00e0*/                   EXIT ;\n", search.lstrip("\n"))
    scan = gpu_model.scan_of(code, warps=4, block=100)
    assert scan == gpu_model.Scan(few=0, once=13 - 3, step=0, read=0, after=2, warps=4, block=100)
    both = replace(scan, few=7, step=5, read=6)
    assert both.slots(rows=2, entries=250, near=101) == 2 * 4 * (24 * (7 + 5 + 2 * 6) + 3 * 10 + 2 * 2)
    search_alone = gpu_model.scan_of(code.replace("STG", "LDG"), 4, 100)
    assert search_alone == gpu_model.Scan(few=0, once=0, step=10, read=3, after=2, warps=4, block=100)


def test_the_innermost_loops_take_their_slots() -> None:
    assert gpu_model.flat_slots(SASS, warps=4, rows=2, trips=5) == 2 * 4 * 5 * 3


def test_code_that_does_not_fit_its_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="found none"):
        gpu_model.tile_of(SASS.replace("HGMMA", "HMMA"), 5)
    without = SASS.replace("@P0 BRA `(.L_x_1)", "NOP")
    with pytest.raises(ValueError, match="expected 5 HGMMA for a tile, found 1"):
        gpu_model.tile_of(without, 5)


def test_allocations_are_counted_as_they_come_and_go() -> None:
    import torch

    before = torch.empty(100, device="meta")
    with gpu_model.allocations() as peak:
        one = torch.empty(1_000, dtype=torch.uint8, device="meta")
        view = one[10:]
        del one
        assert peak() == 1_000
        two = torch.empty(500, dtype=torch.uint8, device="meta")
        del view, two
        before[:5].fill_(0)
        three = torch.empty(1_200, dtype=torch.uint8, device="meta")
        del three
    assert peak() == 1_500
