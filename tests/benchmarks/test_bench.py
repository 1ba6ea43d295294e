"""`alterrec-fast bench`: its contests, what it makes of contestants that fail, and what a run leaves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from alterrec_fast.benchmarks import (
    bench,
    machine,
    steadiness,
    tables,
)
from alterrec_fast.benchmarks.compare import (
    key,
    kind_of,
)
from alterrec_fast.benchmarks.contest import Arena, Budget, Contest, how_it_ended
from alterrec_fast.benchmarks.contestants import OPS, Op
from alterrec_fast.benchmarks.records import FLOOR, Record, Results
from alterrec_fast.benchmarks.worker import Shape, Task
from typer.testing import CliRunner

from alterrec_fast.cli import app
from tests.benchmarks import stubs as bench_stubs

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
