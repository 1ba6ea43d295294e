"""`alterrec-fast bench`: its verdicts, what it makes of contestants that fail, its records, comparison and pages."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alterrec_fast.benchmarks import (
    bench,
    figures,
    losses,
    machine,
    steadiness,
    tables,
    test_contestants,
    training,
    truth,
    verdicts,
)
from alterrec_fast.benchmarks.compare import (
    Known,
    agreement,
    baseline_of,
    compare,
    key,
    kind_of,
    read_baselines,
    summary,
)
from alterrec_fast.benchmarks.contest import Arena, Budget, Contest, how_it_ended
from alterrec_fast.benchmarks.contestants import OPS, Op
from alterrec_fast.benchmarks.records import FLOOR, LEAST_NOISE, Record, Results, assess, both, conclude, share_floors
from alterrec_fast.benchmarks.worker import Call, Shape, Task
from typer.testing import CliRunner

from alterrec_fast.cli import app
from tests import bench_stubs

BUDGET = Budget(sittings=2, rounds=3, long=1.0, turn=0.05, first=20.0, memory=8 << 30)


def held(arena: Arena, op: Op, shape: Shape = bench_stubs.SHAPE, sittings: int = 2) -> list[Record]:
    """The records of a contest after so many sittings."""
    contest = Contest(op, shape, threads=1)
    for _ in range(sittings):
        arena.sit(contest)
    return contest.records


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    return Arena(tmp_path_factory.mktemp("arena"), BUDGET, {}, threads=1)


@pytest.fixture(scope="module")
def good(arena: Arena) -> dict[str, Record]:
    return {record.contestant: record for record in held(arena, bench_stubs.op(*bench_stubs.GOOD))}


# --- contests ---


def test_good_contestants_are_timed(good: dict[str, Record]) -> None:
    floor, sleeps = good[FLOOR], good["sleeps"]
    assert all(r.failed is None and [len(turns) for turns in r.turns] == [3, 3] for r in good.values())
    assert floor.ratio == 1.0 and floor.error == 0.0 and floor.detail == {"answer": 42.0}
    assert sleeps.seconds is not None and sleeps.ratio is not None and floor.seconds is not None
    assert sleeps.seconds >= 0.02 and sleeps.ratio > 1.0
    assert sleeps.share == pytest.approx(2 * floor.seconds / sleeps.seconds)
    assert sleeps.shape == replace(bench_stubs.SHAPE, threads=1)


def test_memory_is_that_of_the_contestants_own_process(good: dict[str, Record]) -> None:
    holds, floor = good["holds"], good[FLOOR]
    assert holds.extra_bytes is not None and holds.peak_bytes is not None and floor.extra_bytes is not None
    assert 64 << 20 <= holds.extra_bytes < 96 << 20
    assert holds.peak_bytes > holds.extra_bytes
    assert floor.extra_bytes < 32 << 20


def test_a_bad_contestant_costs_its_own_record_alone(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "budget", replace(BUDGET, first=10.0))
    contestants = (*bench_stubs.GOOD, *bench_stubs.BAD)
    found = {record.contestant: record for record in held(arena, bench_stubs.op(*contestants))}
    assert all(found[contestant.name].seconds is not None for contestant in bench_stubs.GOOD)
    expected = {
        "triples": "wrong: error 6.3e+01, allowed 1e-06",
        "not a number": "wrong: error nan, allowed 1e-06",
        "raises": "RuntimeError: cannot do this",
        "dies": "killed by SIGSEGV: last words",
        "dies later": "the process ended with status 3",
        "eats": "RuntimeError: ",
        "hangs": "stopped after 10 s",
        "is not installed": "ModuleNotFoundError: No module named 'no_such_library'",
    }
    for name, words in expected.items():
        record = found[name]
        assert record.failed is not None and record.failed.startswith(words), (name, record.failed)
        assert record.seconds is None and record.ratio is None
    assert "alloc" in str(found["eats"].failed)
    page = tables.table(list(found.values()))
    assert all(words in page for words in expected.values())


def test_without_inputs_every_record_says_why(arena: Arena) -> None:
    records = held(arena, bench_stubs.op(*bench_stubs.GOOD, without_inputs=True))
    assert [record.failed for record in records] == ["no inputs: MemoryError: no room for the inputs"] * 3


def test_a_later_sitting_without_inputs_takes_nothing_away(arena: Arena) -> None:
    contest = Contest(bench_stubs.op(bench_stubs.GOOD[0]), bench_stubs.SHAPE, threads=1)
    arena.sit(contest)
    before = replace(contest.records[0])
    contest.op = bench_stubs.op(bench_stubs.GOOD[0], without_inputs=True)
    arena.sit(contest)
    now = contest.records[0]
    assert now.seconds == before.seconds is not None and now.turns == before.turns and now.failed is None
    assert now.stopped == "in sitting 2 no inputs: MemoryError: no room for the inputs"


def test_an_interpreter_without_the_library_is_told_so(arena: Arena) -> None:
    sampled = next(op for op in OPS if op.name == "sampled_softmax")
    replay = tuple(contestant for contestant in sampled.contestants if contestant.python == "replay")
    shape = Shape(200, 8, sessions=8, negatives=16)
    (record,) = held(arena, replace(sampled, contestants=replay), shape)
    assert record.failed is None or record.failed.startswith(("ModuleNotFoundError", "ImportError"))
    arena.pythons["replay"] = "/no/such/python"
    (record,) = held(arena, replace(sampled, contestants=replay), shape)
    assert "/no/such/python" in str(record.failed)


def test_how_a_process_ended_in_words() -> None:
    assert how_it_ended(-9, "") == "killed by SIGKILL, out of memory?"
    assert how_it_ended(1, "ImportError: no") == "the process ended with status 1: ImportError: no"
    assert how_it_ended(None, "") == "the process does not answer"


def test_all_sit_as_often_and_long_calls_have_fewer_turns(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    for long, turns in ((1.0, 3), (0.01, 2), (0.001, 1)):
        monkeypatch.setattr(arena, "budget", replace(BUDGET, long=long))
        records = {r.contestant: r for r in held(arena, bench_stubs.op(*bench_stubs.GOOD), sittings=3)}
        assert all(len(record.turns) == 3 for record in records.values())
        assert [len(own) for own in records["sleeps"].turns] == [turns] * 3


@pytest.mark.parametrize(("long", "slow"), [(1.0, 2), (0.05, 1)])
def test_nobody_is_timed_cold(arena: Arena, monkeypatch: pytest.MonkeyPatch, long: float, slow: int) -> None:
    """Neither ours nor a rival: an untimed turn comes before the first round, and tells how many turns there are."""
    monkeypatch.setattr(arena, "budget", replace(BUDGET, long=long))
    task = Task(partial(bench_stubs.warms, slow=slow), bench_stubs.compare)
    contestants = [bench_stubs.GOOD[0]]
    contestants += [replace(bench_stubs.GOOD[0], name=str(own), ours=own, task=task) for own in (True, False)]
    _, *found = held(arena, bench_stubs.op(*contestants))
    assert all(turn < 0.2 for record in found for turns in record.turns for turn in turns)
    assert all([len(turns) for turns in record.turns] == [3, 3] for record in found)


def test_a_late_failure_takes_no_sitting_away(arena: Arena) -> None:
    dies, wrong = (
        replace(bench_stubs.GOOD[0], name=name, task=Task(prepare, bench_stubs.compare))
        for name, prepare in (("dies", bench_stubs.dies_the_second_time), ("wrong", bench_stubs.wrong_the_second_time))
    )
    for path in arena.folder.glob("been-here-*"):
        path.unlink()
    floor, died, lied = held(arena, bench_stubs.op(bench_stubs.GOOD[0], dies, wrong), sittings=3)
    assert [len(record.turns) for record in (floor, died, lied)] == [3, 1, 0]
    assert died.failed is None and died.ratio is not None and died.stopped is not None
    assert died.stopped == "in sitting 2 the process ended with status 3"
    assert died.stopped in tables.table([floor, died])
    assert lied.seconds is None and lied.failed is not None and lied.failed.startswith("wrong")


def test_nobody_is_at_work_while_a_contestant_tunes_itself(tmp_path: Path) -> None:
    lingers = Task(bench_stubs.lingers, bench_stubs.compare)
    tasks = {FLOOR: lingers, "tunes": replace(lingers, tunes=True), "also tunes": replace(lingers, tunes=True)}
    contestants = [replace(bench_stubs.GOOD[0], name=name, task=task) for name, task in tasks.items()]
    held(Arena(tmp_path, BUDGET, {}, threads=3), bench_stubs.op(*contestants), sittings=1)
    spans = sorted(tuple(map(float, path.read_text().split())) for path in tmp_path.glob("ready-*"))
    assert len(spans) == 3 and all(spans[i][1] <= spans[i + 1][0] for i in range(2))


def test_bandwidth_is_measured_with_the_threads_of_the_contest(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_bandwidths", {1: 1e6, 2: 2e6})
    shape = replace(bench_stubs.SHAPE, threads=2)
    record, *_ = held(arena, bench_stubs.op(*bench_stubs.GOOD), shape)
    assert record.bandwidth_ratio == pytest.approx((record.seconds or 0.0) / (bench_stubs.traffic(shape) / 2e6))


def test_others_are_what_is_busy_less_what_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"clock": 100.0, "busy": 50.0, "own": 3.0}
    monkeypatch.setattr(bench.time, "monotonic", lambda: now["clock"])
    monkeypatch.setattr(machine, "busy_seconds", lambda: now["busy"])
    monkeypatch.setattr(machine, "own_seconds", lambda: now["own"])
    watch = bench.Watch()
    now |= {"clock": 110.0, "busy": 68.0, "own": 16.0}
    assert watch.others() == pytest.approx(0.5)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="CPU time of processes is read from /proc")
def test_the_work_of_contestants_that_have_ended_is_our_own(arena: Arena) -> None:
    before = machine.own_seconds(), time.process_time()
    spins = replace(bench_stubs.GOOD[0], task=Task(bench_stubs.spins, bench_stubs.compare))
    held(arena, bench_stubs.op(spins))
    assert machine.own_seconds() - before[0] > time.process_time() - before[1] + 1.0


def test_slow_spells_of_the_machine_are_told() -> None:
    looks = [(0.0, 1e-3), (0.1, 1e-3), (0.2, 1.5e-3), (0.3, 1.4e-3), (0.4, 1.1e-3)]
    told = steadiness.spells(looks)
    assert told == "best 1.00 ms, over 1.2 times that in 40% of 5 looks, for up to 0.1 s at a stretch"
    assert "in 0% of 1 looks, for up to 0.0 s" in steadiness.spells(looks[:1])
    threads = torch.get_num_threads()
    assert steadiness.look(threads) > 0.0


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


# --- records ---


def record(op: str, contestant: str, ratio: float, noise: float = 0.01, ours: bool = True) -> Record:
    """As a contest of two sittings of three turns leaves it, the floor's best turns being 10 ms and a bit more."""
    turns = [[0.012 * ratio, 0.010 * ratio, 0.011 * ratio], [0.010 * ratio * math.exp(noise), 0.013 * ratio]]
    return Record(op, Shape(40_258, 300, threads=2), contestant, ours, "alterrec-fast 0.1.0", 1e-5, 1e-7, turns=turns)


def results_of(records: list[Record]) -> Results:
    """A run of these records, the floors among them."""
    for op in {record.op for record in records}:
        conclude([record for record in records if record.op == op], products=1, streaming=0.004, operations=1e9)
    share_floors(records)
    assess(records)
    return Results("alterrec-fast bench", "2026-11-24", machine.look(2), 2e10, 0.1, 1.9, 0.0, records)


@pytest.fixture
def stored() -> Results:
    ratios = {"rank_slice": 1.3, "top_k": 1.05, "full_softmax": 3.2}
    records = []
    for op, ratio in ratios.items():
        records += [record(op, FLOOR, 1.0, ours=False), record(op, "alterrec-fast", ratio)]
        records += [record(op, "mm, topk", 4.0 * ratio, ours=False)]
    return results_of(records)


def test_ratios_are_those_of_the_best_turns() -> None:
    results = results_of([record("top_k", FLOOR, 1.0, noise=0.0), record("top_k", "alterrec-fast", 2.0, noise=0.0)])
    floor, mine = results.records
    assert mine.ratio == pytest.approx(2.0) and mine.share == pytest.approx(0.5)
    assert floor.seconds == pytest.approx(0.010) and floor.gflops == pytest.approx(100.0)
    assert mine.bandwidth_ratio == pytest.approx(0.020 / 0.004)
    assert mine.noise == LEAST_NOISE  # the sittings agree, however much the turns do not
    assert mine.interval == pytest.approx((2.0 / math.exp(LEAST_NOISE), 2.0 * math.exp(LEAST_NOISE)))


def test_contests_with_the_same_product_share_their_floor() -> None:
    records = []
    for op, slow, product in (("top_k", 1.0, "a"), ("rank_slice", 1.4, "a"), ("step", 1.4, "b")):
        floor, mine = record(op, FLOOR, slow, ours=False), record(op, "alterrec-fast", 2.0 * slow)
        records += [replace(floor, product=product), mine]
    found = results_of(records).records
    assert [one.ratio for one in found] == pytest.approx([1.0, 2.0, 1.4, 2.8, 1.0, 2.0])
    assert [one.share for one in found[1::2]] == pytest.approx([1 / 2, 1 / 2.8, 1 / 2])
    share_floors(found)  # nothing is counted twice
    assert [one.ratio for one in found] == pytest.approx([1.0, 2.0, 1.4, 2.8, 1.0, 2.0])
    kept = [op.product(shape) for op in OPS for shape in (*op.quick, *op.full) if "40258" in op.product(shape)]
    assert 1 < len(set(kept)) < len(kept)


def simulated(rng: np.random.Generator, sittings: int, number: int = 200) -> list[Record]:
    """A run of which ratios are 6% off for as long as two processes live and turns 2%, each third turn is 40% slower,
    and so is everything in a sitting of twenty.
    """
    records = []
    for i in range(number):
        slow = np.where(rng.random(sittings) < 0.05, 1.4, 1.0)
        for name, seconds in ((FLOOR, 1.0), ("x", 1.0 + i % 3)):
            process = np.exp(rng.normal(0, 0.06 / math.sqrt(2), (sittings, 1))) * slow[:, None]
            turns = process * np.exp(rng.normal(0, 0.02, (sittings, 3)))
            turns = seconds * turns * np.where(rng.random(turns.shape) < 1 / 3, 1.4, 1.0)
            made = Record("top_k", Shape(i + 1, 8), name, name != FLOOR, "", 1e-5, turns=turns.tolist())
            records.append(replace(made, product=f"{len(records)}"))
        conclude(records[-2:], 1, 1.0, 1.0)
    assess(records)
    return [record for record in records if record.contestant != FLOOR]


@pytest.mark.parametrize("sittings", [2, 3, 5])
def test_the_interval_covers_what_another_run_finds(sittings: int) -> None:
    rng = np.random.default_rng(sittings)
    one, other = simulated(rng, sittings), simulated(rng, sittings)
    outside = 0
    for a, b in zip(one, other, strict=True):
        assert a.interval is not None and b.ratio is not None
        outside += not a.interval[0] <= b.ratio <= a.interval[1]
    assert outside <= 1
    noise = statistics.median(record.noise or 0.0 for record in one)
    assert 0.05 < noise < 0.5  # neither blind to processes nor inflated by the slow turns


def test_a_contest_that_sat_once_borrows_what_others_know_of_sittings() -> None:
    rng = np.random.default_rng(0)
    restarted, single = simulated(rng, 3), simulated(rng, 1)
    assert all(record.noise is None for record in single)  # nobody knows how much sittings differ
    floors = [replace(record, contestant=FLOOR, ratio=1.0, seconds=1.0) for record in [*restarted, *single]]
    for record in [*single, *floors[len(restarted) :]]:
        record.op = "once"
    assess([*restarted, *single, *floors])
    assert statistics.median(r.noise or 0.0 for r in single) > statistics.median(r.noise or 0.0 for r in restarted)


def test_the_noise_of_two_runs_is_not_counted_twice() -> None:
    assert both(0.2, 0.2) == pytest.approx(0.2) and both(0.1, 0.0) < 0.1


def test_records_survive_json(stored: Results, tmp_path: Path) -> None:
    stored.records.append(replace(stored.records[0], seconds=None, failed="killed by SIGSEGV"))
    (tmp_path / "results.json").write_text(json.dumps(asdict(stored)))
    assert Results.read(tmp_path / "results.json") == stored


def test_training_is_also_told_in_targets_a_second() -> None:
    floor, mine = results_of([record("sasrec", FLOOR, 1.0), record("sasrec", "alterrec-fast", 10.0)]).records
    assert "targets/s" not in tables.table([floor, mine])
    page = tables.table([floor, replace(mine, detail={"targets": 512.0})])
    assert "targets/s" in page and page.splitlines()[-1].endswith("| 5,120 |")
    assert len({line.count("|") for line in page.splitlines()}) == 1


def test_the_table_tells_the_floors_rate_and_the_versions_of_other_interpreters(stored: Results) -> None:
    stored.records.append(replace(stored.records[2], contestant="RecBole SASRec", version="recbole 1.2.1"))
    page = tables.markdown(stored)
    assert "torch.mm (100 GFLOP/s)" in page and "recbole 1.2.1" in page  # 1e9 operations in 10 ms


def test_gathered_forms_have_no_share_of_the_ceiling() -> None:
    records = [record("slice_cross_entropy", FLOOR, 1.0), record("slice_cross_entropy", "gathered, ids", 0.5)]
    for one in records:
        one.shape = replace(one.shape, figure="form")
    assert [one.share for one in results_of(records).records] == [None, None]
    assert records[1].ratio == pytest.approx(0.5)


def test_in_short_ours_stands_beside_the_fastest_of_the_others(stored: Results) -> None:
    stored.records.append(replace(stored.records[2], contestant="slower", seconds=9.0))
    stored.records.append(replace(stored.records[2], contestant="wrong", seconds=None, failed="wrong: error 1"))
    _, _, first, *rest = tables.in_short(stored).splitlines()
    assert first.startswith(
        "| `rank_slice` | V = 40,258, d = 300, fp32, 2 threads | 13.0 | 1.30 | mm, topk | 52.0 | 4.00 |"
    )
    assert len(rest) == 2 and tables.in_short(stored) in tables.markdown(stored)


# --- comparison ---


@pytest.mark.parametrize("op", ["rank_slice", "top_k", "full_softmax"])
def test_an_op_that_takes_a_third_longer_is_reported_and_no_other(stored: Results, op: str) -> None:
    baseline = {name: Known(**values) for name, values in baseline_of(stored).items()}
    assert compare(stored, baseline) == []
    slower = [
        replace(old, turns=[[1.3 * turn for turn in turns] for turns in old.turns])
        if (old.op, old.ours) == (op, True)
        else replace(old)
        for old in stored.records
    ]
    again = results_of(slower)
    (worse,) = compare(again, baseline)
    assert worse.name.startswith(f"{op} |") and worse.now == pytest.approx(1.3 * worse.before, rel=1e-3)
    told = summary(again, {kind_of(again.machine): baseline, "another": {}})
    assert "1 of 3" in told and op in told
    assert "no baseline of this kind" in summary(again, {"another": baseline})


@pytest.mark.parametrize("op", [op.name for op in OPS])
def test_the_stored_baseline_sees_an_op_that_takes_a_third_longer(stored: Results, op: str) -> None:
    seen = False
    for kind, baseline in read_baselines().items():
        records = []
        for name, known in baseline.items():
            own, label, contestant = name.split(" | ")
            ratio = known.ratio * (1.3 if own == op else 1.0)
            shape: Any = _Labelled(label)
            like = replace(stored.records[1], op=own, shape=shape, contestant=contestant)
            records.append(replace(like, ratio=ratio, noise=known.noise))
        reported = {worse.name for worse in compare(replace(stored, records=records), baseline)}
        wanted = {name for name in baseline if name.startswith(f"{op} |")}
        assert reported == wanted, f"{kind}: {op} alone was slower"
        seen = seen or bool(wanted)
    assert seen, f"no baseline has {op}"


@dataclass(frozen=True)
class _Labelled:
    """Stands for a shape of which the label is all that is known."""

    label: str


def test_a_baseline_is_the_middle_of_its_runs(stored: Results) -> None:
    name = key(stored.records[1])
    runs = [
        replace(stored, records=[replace(stored.records[1], ratio=ratio, noise=noise)])
        for ratio, noise in ((1.0, 0.1), (1.5, 0.1), (1.2, 0.2))
    ]
    known = baseline_of(*runs)[name]
    assert known["ratio"] == 1.2 and known["noise"] == pytest.approx(math.log(1.5 / 1.2), abs=1e-4)
    assert baseline_of(runs[2])[name] == {"ratio": 1.2, "noise": 0.2}


def test_noise_and_strangers_are_not_reported(stored: Results) -> None:
    baseline = {name: Known(known["ratio"] / 1.3, 0.4) for name, known in baseline_of(stored).items()}
    assert compare(stored, baseline) == []
    assert compare(stored, {}) == []
    stored.records[1].ratio, stored.records[1].failed = None, "wrong: error 1, allowed 1e-05"
    assert "no ratio any more" in summary(stored, {kind_of(stored.machine): baseline})
    stored.records[1].failed = "not begun within 4 minutes"
    told = summary(stored, {kind_of(stored.machine): baseline})
    assert "no ratio any more" not in told and "1 not measured" in told


def test_two_runs_agree_or_do_not(stored: Results) -> None:
    ours = [record for record in stored.records if record.contestant != FLOOR]
    assert agreement(stored, stored).startswith(f"{len(ours)} of {len(ours)} ratios agree within 10%")
    changed = replace(ours[0], ratio=1.3 * (ours[0].ratio or 0.0))
    other = replace(stored, records=[changed if record is ours[0] else record for record in stored.records])
    told = agreement(stored, other)
    assert told.startswith(
        f"{len(ours) - 1} of {len(ours)} ratios agree within 10%; {len(ours) - 1} of {len(ours)} lie"
    )
    assert f"{ours[0].op} |" in told and told.count("\n") == 1
    # What has no interval, or no ratio, has not been shown to agree.
    for less, words in (({"noise": None}, "no interval"), ({"ratio": None}, "no ratio")):
        told = agreement(stored, replace(stored, records=[replace(stored.records[1], **less), *stored.records[2:]]))
        assert f"{len(ours) - 1} of {len(ours)} lie" in told and told.endswith(
            words + (" in one of the runs" if "ratio" in less else "")
        )


# --- what a run leaves ---


@pytest.fixture
def small_run(arena: Arena, good: dict[str, Record], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Shape]]:
    """bench.run() with sittings that are over at once; the shapes it asks for are listed."""
    asked: list[Shape] = []

    def sit(contest: Contest) -> None:
        asked.append(contest.shape)
        contest.sittings += 1
        for runner, one in zip(contest.runners, [*good.values()] * 4, strict=False):
            name = runner.record.contestant if runner.record.contestant == FLOOR else one.contestant
            runner.record = replace(one, op=contest.op.name, shape=contest.shape, contestant=name)
        del contest.runners[3:]

    monkeypatch.setattr(arena, "sit", sit)
    monkeypatch.setattr(bench, "Arena", lambda *_: arena)
    monkeypatch.setattr(bench.Watch, "others", lambda self: 1.5)
    yield asked


def test_a_run_leaves_json_a_table_and_figures(
    small_run: list[Shape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "read_baselines", lambda: {kind_of(machine.look(machine.cores())): {}})
    found = CliRunner().invoke(app, ["bench", "--quick", "--op", "rank_slice", "--compare", "--out", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert "slower than the baseline" in found.output
    results = Results.read(tmp_path / "results.json")
    contests = len(small_run) // bench.QUICK.sittings
    assert small_run == small_run[:contests] * bench.QUICK.sittings  # all of them, and then all again
    assert results.busy and len(results.records) == 3 * contests
    page = (tmp_path / "table.md").read_text()
    assert "busy with other work" in page and "## rank_slice" in page and "**sleeps**" in page
    for name in ("time_rank_slice", "memory_rank_slice", "ceiling", "threads"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000, name
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()


def test_contests_that_do_not_fit_the_time_are_listed(
    small_run: list[Shape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "QUICK_MINUTES", -1.0)
    results = bench.run(bench.Options(tmp_path, quick=True, ops=("top_k",)), tell=lambda _: None)
    assert small_run == [] and all(record.shape.threads for record in results.records)
    assert all(record.failed == "not begun within -1 minutes" for record in results.records)
    assert "not begun within" in (tmp_path / "table.md").read_text()


def test_what_cannot_be_served_is_refused_in_one_line(tmp_path: Path) -> None:
    for arguments, words in (
        (["--op", "no_op"], "no_op"),
        (["--python", "recbole"], "NAME=PATH"),
        (["--python", "other=/bin/python"], "recbole"),
    ):
        found = CliRunner().invoke(app, ["bench", "--out", str(tmp_path / "out"), *arguments])
        assert found.exit_code == 1 and words in found.output, found.output


def test_every_figure_is_drawn(tmp_path: Path, stored: Results) -> None:
    phases = {"bracket": 1.0, "stream": 6.0, "settle": 2.0}
    records = list(stored.records)
    for items in (10_000, 100_000):
        for figure, more in (("V", {}), ("threads", {"threads": items // 10_000}), ("form", {"stop": items // 8})):
            shape = replace(Shape(items, 128, figure=figure), **more)
            records += [
                replace(stored.records[1], op="rank_slice", shape=shape, extra_bytes=items, detail=phases),
                replace(stored.records[2], op="rank_slice", shape=shape, extra_bytes=2 * items),
            ]
    drawn = figures.draw(replace(stored, records=records), tmp_path)
    names = {path.stem for path in drawn}
    assert names == {"time_rank_slice", "memory_rank_slice", "ceiling", "crossover", "threads", "phases"}
    assert len(drawn) == 2 * len(names) and all(path.exists() for path in drawn)


def test_figures_are_drawn_where_ours_failed(tmp_path: Path, stored: Results) -> None:
    phases = {"bracket": 1.0, "stream": 6.0, "settle": 2.0}
    failed = replace(stored.records[1], seconds=None, ratio=None, failed="killed by SIGSEGV")
    other = replace(stored.records[1], contestant="alterrec-fast, bf16", detail=phases)
    drawn = figures.draw(replace(stored, records=[stored.records[0], failed, other]), tmp_path)
    assert "phases" in {path.stem for path in drawn}


def test_the_table_is_there_after_each_contest(
    small_run: list[Shape], arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sit = arena.sit

    def stops(contest: Contest) -> None:
        if small_run:
            raise KeyboardInterrupt
        sit(contest)

    monkeypatch.setattr(arena, "sit", stops)
    with pytest.raises(KeyboardInterrupt):
        bench.run(bench.Options(tmp_path, quick=True, ops=("top_k",)), tell=lambda _: None)
    assert "## top_k" in (tmp_path / "table.md").read_text()


def test_a_sitting_that_would_not_end_in_time_is_not_begun(
    small_run: list[Shape], arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sit = arena.sit

    def slowly(contest: Contest) -> None:
        sit(contest)
        contest.cost = 60 * bench.QUICK_MINUTES if len(small_run) == 1 else 0.0

    monkeypatch.setattr(arena, "sit", slowly)
    bench.run(bench.Options(tmp_path, quick=True, ops=("top_k",)), tell=lambda _: None)
    assert small_run.count(small_run[0]) == 1 and small_run.count(small_run[1]) == bench.QUICK.sittings


def test_the_table_of_contests_is_sound() -> None:
    for op in OPS:
        names = [contestant.name for contestant in op.contestants]
        assert names[0] == FLOOR and len(set(names)) == len(names)
        for shape in (*op.quick, *op.full):
            takers = [contestant for contestant in op.contestants if contestant.takes(shape)]
            assert takers[0].name == FLOOR and any(one.ours for one in takers) and op.traffic(shape) > 0
    for quick in (False, True):
        contests = [Contest(op, shape, threads=2) for op, shape in bench.plan(bench.Options(Path(), quick), 2)]
        keys = [key(record) for contest in contests for record in contest.records]
        assert len(set(keys)) == len(keys) and all("thread" in name for name in keys)
    assert bench.thread_counts(6) == [1, 2, 4, 6] and bench.thread_counts(1) == [1]
