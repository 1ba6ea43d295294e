"""What `alterrec-fast bench` compares: ours and plain torch are right on every op, and a wrong result is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alterrec_fast.benchmarks import bench_rank, bench_step, test_bench
from alterrec_fast.benchmarks.harness import inputs as data
from alterrec_fast.benchmarks.harness.op import BASELINE, LOSS, RANKS, Op
from alterrec_fast.benchmarks.harness.worker import Case
from alterrec_fast.benchmarks.ops import OPS

SMALL = Case(3_000, 16, sessions=24, threads=1)
SLICED, BEST = replace(SMALL, start=5, stop=700), replace(SMALL, stop=20)
STEP = Case(300, 16, sessions=64, start=5, stop=100, training=True, threads=1)
TINY = {
    "rank_slice": [SLICED, replace(SLICED, data="clustered"), replace(SLICED, data="popular")],
    "top_k": [BEST],
    "full_softmax": [SMALL],
    "slice_cross_entropy": [SLICED],
    "sampled_softmax": [replace(SMALL, negatives=50), replace(SMALL, negatives=50, shared=True)],
    "step": [SLICED],
    "alterrec": [STEP],
    "alterrec_text": [STEP],
}
NEEDS_NOTHING = ("torch", "numpy", "alterrec-fast")


TINY_CASES = [
    pytest.param(op, case, id=f"{op.name}-{case.dtype}-{case.data}{case.figure}{'-shared' * case.shared}")
    for op in OPS
    for tiny in TINY[op.name]
    for case in (tiny, replace(tiny, dtype="bf16"))
    if any(one.ours and one.takes(case) for one in op.implementations)
]


@pytest.mark.parametrize(("op", "case"), TINY_CASES)
def test_implementations_that_need_no_library_are_right(
    op: Op, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = op.make(case)
    truth = op.truth(case, inputs)
    for one in op.implementations:
        if one.package not in NEEDS_NOTHING or not one.takes(case):
            continue
        call = one.prepare(case, inputs)
        assert op.error_of(one, call.read(call.run(0)), truth) <= op.allowed(one, case), one.name
        assert one.name == BASELINE or call.run(1) is not None
        assert all(value >= 0.0 for value in call.detail.values())


def test_every_implementation_on_a_cpu_is_in_the_pytest_front_end() -> None:
    on_cpu = {(op.name, one.name) for op in OPS for one in op.implementations if one.devices != ("cuda",)}
    assert on_cpu == {(op.name, one.name) for op, _, one in (case.values for case in test_bench.CASES)}


def test_wrong_slices_and_rankings_are_found() -> None:
    for dtype, allowed in zip(("fp32", "bf16"), RANKS, strict=True):
        case = replace(SLICED, dtype=dtype)
        truth = data.ranking_truth(case, data.make_ranking(case))
        ranked = truth["scores"].sort(1, descending=True).indices
        members = ranked[:, 5:700]
        assert data.slice_error({"members": members}, truth) == 0.0
        for begin in (4, 20):
            assert data.slice_error({"members": ranked[:, begin : begin + 695]}, truth) > allowed
    for bad in (members[:, 1:], torch.cat([members[:, :-1], members[:, :1]], 1)):
        with pytest.raises(ValueError, match="wrong"):
            data.slice_error({"members": bad}, truth)
    best = data.ranking_truth(BEST, data.make_ranking(BEST))
    ranked = best["scores"].sort(1, descending=True).indices
    assert data.ranking_error({"members": ranked[:, :20]}, best) == 0.0
    assert data.ranking_error({"members": ranked[:, :20].flip(1)}, best) > RANKS[0]
    with pytest.raises(ValueError, match="wrong"):
        data.ranking_error({"members": ranked[:, :19]}, best)
    with pytest.raises(ValueError, match="slices of 1 to 2 items"):
        bench_rank.members_of(torch.tensor([[True, True], [True, False]]))


@pytest.mark.parametrize("part", ["loss", "grad_query", "grad_catalog"])
def test_a_wrong_loss_or_gradient_is_found(part: str) -> None:
    truth = data.loss_truth(SMALL, data.make_loss(SMALL))
    right = {name: truth[name].clone() for name in ("loss", "grad_query", "grad_catalog")}
    assert data.loss_error(right, truth) == 0.0
    error = data.loss_error(right | {part: right[part] * 1.01}, truth)
    assert error == pytest.approx(0.01, rel=1e-2) and error > LOSS[0]


def test_a_wrong_step_is_found() -> None:
    truth = {"product": torch.ones(8, 8), "loss": torch.tensor(2.0), "weight": torch.ones(100)}
    right = {"loss": torch.tensor(2.0), "weight": torch.ones(100)}
    assert bench_step.step_error(right, truth) == 0.0
    assert bench_step.step_error(right | {"loss": torch.tensor(2.02)}, truth) == pytest.approx(0.01, rel=1e-3)
    assert bench_step.step_error(right | {"weight": 1.01 * torch.ones(100)}, truth) == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(ValueError, match="bias"):
        bench_step.step_error(right | {"bias": torch.ones(1)}, truth)
