"""What `alterrec-fast bench` measures: ours pass on every op, and what is not right does not."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alterrec_fast.benchmarks import (
    losses,
    test_contestants,
    training,
    truth,
    verdicts,
)
from alterrec_fast.benchmarks.contestants import OPS, Op
from alterrec_fast.benchmarks.records import FLOOR
from alterrec_fast.benchmarks.worker import Call, Shape


def test_the_fastest_setting_is_taken_and_recorded() -> None:
    made = {number: Call(lambda i, s=number: time.sleep(s)) for number in (0.02, 0.001, 0.04)}
    assert losses.fastest("chunk", made).detail() == {"chunk": 0.001}


def test_every_contestant_is_in_the_pytest_front_end() -> None:
    cases = {(case.values[0].name, case.values[2].name): case.marks for case in test_contestants.CASES}
    assert set(cases) == {(op.name, one.name) for op in OPS for one in op.contestants}
    (mark,) = cases["sasrec", "RecBole SASRec"]
    assert mark.name == "skip" and "--python recbole=PATH" in mark.args[0]


def test_the_floor_of_a_pass_has_a_product_for_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sasrec = next(op for op in OPS if op.name == "sasrec")
    shape = TINY["sasrec"]
    batches = training.batches_of(shape)
    assert batches > 1 and sasrec.operations(shape) == 2.0 * batches * 64 * 300 * 16
    inputs, calls, mm = sasrec.make(shape), [], torch.mm

    def counted(*args: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return mm(*args, **more)

    monkeypatch.setattr(torch, "mm", counted)
    floor = training.products(shape, inputs)
    floor.run(0)
    assert len(calls) == batches
    assert sasrec.traffic(shape) == batches * 2 * (64 + 300) * 16 * 4


# --- verdicts: ours pass on every op, and what is not right does not ---

TINY = {
    "rank_slice": Shape(3_000, 16, sessions=24, start=5, stop=700, threads=1),
    "top_k": Shape(3_000, 16, sessions=24, stop=20, threads=1),
    "full_softmax": Shape(3_000, 16, sessions=24, threads=1),
    "slice_cross_entropy": Shape(3_000, 16, sessions=24, start=5, stop=700, threads=1),
    "sampled_softmax": Shape(3_000, 16, sessions=24, negatives=50, threads=1),
    "step": Shape(3_000, 16, sessions=24, start=5, stop=700, threads=1),
    "sasrec": Shape(300, 16, sessions=64, training=True, threads=1),
    "alterrec": Shape(300, 16, sessions=64, start=5, stop=100, training=True, threads=1),
}
NEEDS_NOTHING = ("torch", "numpy", "alterrec-fast", "alterrec_fast")


TINY_CASES = [
    pytest.param(op, shape, id=f"{op.name}-{shape.precision}")
    for op in OPS
    for shape in (TINY[op.name], replace(TINY[op.name], precision="bf16"))
    if any(contestant.ours and contestant.takes(shape) for contestant in op.contestants)
]


@pytest.mark.parametrize(("op", "shape"), TINY_CASES)
def test_contestants_that_need_no_library_are_right(
    op: Op, shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = op.make(shape)
    true = op.truth(shape, inputs)
    for contestant in op.contestants:
        if contestant.task is None or contestant.package not in NEEDS_NOTHING or not contestant.takes(shape):
            continue
        call = contestant.task.prepare(shape, inputs)
        error = contestant.task.compare(call.read(call.run(0), true["rows"]), true)
        assert error <= contestant.allowed(shape), contestant.name
        assert contestant.name == FLOOR or call.run(1) is not None
        assert all(seconds >= 0.0 for seconds in call.detail().values())


def test_wrong_slices_and_rankings_are_found() -> None:
    shape = TINY["rank_slice"]
    inputs = truth.make_ranking(shape)
    true = truth.ranking_truth(shape, inputs)
    ranked = true["scores"].sort(1, descending=True).indices
    members = ranked[:, 5:700]
    assert verdicts.compare_slice({"members": members}, true) == 0.0
    assert verdicts.compare_slice({"members": ranked[:, 4:699]}, true) > 1e-5
    assert verdicts.compare_slice({"members": ranked[:, 6:701]}, true) > 1e-5
    for bad in (ranked[:, 5:699], torch.cat([members[:, :-1], members[:, :1]], 1)):
        with pytest.raises(ValueError, match="wrong"):
            verdicts.compare_slice({"members": bad}, true)
    # Nor does the tolerance of bfloat16 let a slice of other ranks pass.
    ours = next(contestant for contestant in OPS[0].contestants if contestant.ours)
    allowed = ours.allowed(replace(shape, precision="bf16"))
    rounded = replace(shape, precision="bf16")
    true_of_rounded = truth.ranking_truth(rounded, truth.make_ranking(rounded))
    order = true_of_rounded["scores"].sort(1, descending=True).indices
    assert verdicts.compare_slice({"members": order[:, 4:699]}, true_of_rounded) > allowed
    assert verdicts.compare_slice({"members": order[:, 20:715]}, true_of_rounded) > allowed
    assert verdicts.compare_some({"members": members[:, 50:60]}, true) == 0.0
    assert verdicts.compare_some({"members": ranked[:, 695:705]}, true) > 1e-5
    best = truth.ranking_truth(TINY["top_k"], inputs)
    assert verdicts.compare_best({"members": ranked[:, :20]}, best) == 0.0
    assert verdicts.compare_best({"members": ranked[:, :20].flip(1)}, best) > 1e-5
    with pytest.raises(ValueError, match="wrong"):
        verdicts.compare_best({"members": ranked[:, :19]}, best)


@pytest.mark.parametrize("part", ["loss", "grad_query", "grad_catalog"])
def test_a_wrong_loss_or_gradient_is_found(part: str) -> None:
    shape = TINY["full_softmax"]
    inputs = truth.make_loss(shape)
    true = truth.loss_truth(shape, inputs)
    query, catalog = inputs["query"][0].requires_grad_(), inputs["catalog"].requires_grad_()
    loss = torch.nn.functional.cross_entropy(query @ catalog.T, inputs["target"][0])
    grads = torch.autograd.grad(loss, (query, catalog))
    found = {"loss": loss.detach(), "grad_query": grads[0], "grad_catalog": grads[1]}
    assert verdicts.compare_loss(found, true) < 1e-5
    assert verdicts.compare_loss(found | {part: found[part] * 1.01}, true) == pytest.approx(0.01, rel=1e-2)


def test_a_wrong_step_or_pass_is_found() -> None:
    true = {"rows": torch.arange(8), "product": torch.ones(8, 8), "loss": torch.tensor(2.0), "weight": torch.ones(100)}
    right = {"loss": torch.tensor(2.0), "weight": torch.ones(100)}
    assert verdicts.compare_step(right, true) == 0.0
    assert verdicts.compare_step(right | {"loss": torch.tensor(2.02)}, true) == pytest.approx(0.01, rel=1e-3)
    assert verdicts.compare_step(right | {"weight": 1.01 * torch.ones(100)}, true) == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(ValueError, match="bias"):
        verdicts.compare_step(right | {"bias": torch.ones(1)}, true)
    passed = {"targets": torch.tensor(100), "loss": torch.tensor(1.0)}
    assert verdicts.compare_pass(passed, {"targets": torch.tensor(100)}) == 0.0
    assert verdicts.compare_pass(passed, {"targets": torch.tensor(200)}) == 0.5
    with pytest.raises(ValueError, match="wrong"):
        verdicts.compare_pass(passed | {"loss": torch.tensor(float("nan"))}, {"targets": torch.tensor(100)})
