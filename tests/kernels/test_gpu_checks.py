"""The checks of tests/gpu find seeded bugs; Triton's interpreter stands in for the device, at tiny sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from alterrec_fast.ops import RankSlice, rank_slice, sampled_softmax
from tests.gpu import loss_cases, rank_cases, test_graphs
from tests.gpu.device import FaultError, Interpreted

DEVICE = Interpreted()


def small_rank_case(extras: str = "one") -> str:
    return rank_cases.rank_case(DEVICE, 1, "bits", "bf16", extras, (2, 130, 8), 1)


@pytest.mark.parametrize("extras", ["one", "masked", "overlapping"])
def test_a_right_op_passes(extras: str) -> None:
    assert "torch" in small_rank_case(extras)


def flipped(found: RankSlice) -> RankSlice:
    assert found.bits is not None
    bits = found.bits.clone()
    bits[1, 3] ^= 4
    return replace(found, bits=bits)


def unwritten(found: RankSlice) -> RankSlice:
    return replace(found, thresholds=torch.empty(found.thresholds.shape))


def out_of_bounds(found: RankSlice) -> RankSlice:
    memory = torch.empty(4)
    if memory.storage_offset():  # at the end of a block there is nothing that could be overwritten
        memory.as_strided((1,), (1,), memory.storage_offset() + 4).fill_(0.0)
    return found


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (flipped, "1 items in 1 rows are in the wrong place"),
        (unwritten, "memory held something else before: result 2 differs"),
        (out_of_bounds, r"a store out of bounds, after a tensor of \(4,\) torch.float32"),
    ],
)
def test_seeded_bugs_of_ranks_are_found(
    spoil: Callable[[RankSlice], RankSlice], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_cases, "rank_slice", lambda *args, **options: spoil(rank_slice(*args, **options)))
    with pytest.raises(FaultError, match=words):
        small_rank_case()


def test_a_row_in_the_wrong_place_is_found_among_normal_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_cases, "rank_slice", lambda *args, **options: flipped(rank_slice(*args, **options)))
    monkeypatch.setattr(rank_cases, "slice_is_identical", lambda *_: None)
    with pytest.raises(FaultError, match=r"error .* allowed"):
        small_rank_case()


def test_losses_pass_and_a_scaled_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for form in ("bits", "all", "ids"):
        loss_cases.slice_loss_case(DEVICE, 2, form, "fp32", True, 3, 130, 8, 0.02 if form == "ids" else 0.4)
    case = (DEVICE, 2, "triton", False, "fp32", True, False, 3, 130, 8)
    loss_cases.sampled_case(*case)

    def scaled(*args: Any, **options: Any) -> Any:
        return sampled_softmax(*args, **options) * 1.001

    monkeypatch.setattr(loss_cases, "sampled_softmax", scaled)
    with pytest.raises(FaultError, match=r"loss .* allowed"):
        loss_cases.sampled_case(*case)


class Replayed(Interpreted):
    """A graph that is the call itself, run again; a stale one returns what it captured."""

    def __init__(self, stale: bool) -> None:
        super().__init__()
        self.stale = stale

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any]:
        found = call()
        return (lambda: found) if self.stale else call


def test_replays_are_compared_on_inputs_that_miss() -> None:
    test_graphs.assert_ranks(Replayed(False), 1, "bits", "bf16", 2, 130)
    with pytest.raises(FaultError, match="replay on whole numbers: "):
        test_graphs.assert_ranks(Replayed(True), 1, "bits", "bf16", 2, 130)
