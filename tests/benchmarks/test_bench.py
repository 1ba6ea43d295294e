"""`alterrec-fast bench`: how it measures, what it makes of implementations that fail, and what a run leaves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from alterrec_fast.benchmarks.harness import bench
from alterrec_fast.benchmarks.harness.machine import Machine
from alterrec_fast.benchmarks.harness.op import BASELINE, Implementation, Op
from alterrec_fast.benchmarks.harness.processes import Budget, Measurement, Runner, how_it_ended
from alterrec_fast.benchmarks.harness.report import Record, Results, comparison, markdown, read_stored, table
from alterrec_fast.benchmarks.harness.worker import Case
from alterrec_fast.benchmarks.ops import OPS
from typer.testing import CliRunner

from alterrec_fast.cli import app
from tests.benchmarks import stubs

BUDGET = Budget(repetitions=2, samples=3, seconds=0.02, first=20.0, memory=8 << 30)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("runner"), BUDGET, threads=1)


def measured(runner: Runner, op: Op, repetitions: int = 2) -> dict[str, Record]:
    measurement = Measurement(op, stubs.CASE, threads=1)
    for _ in range(repetitions):
        runner.repeat(measurement)
    return {record.implementation: record for record in measurement.records}


@pytest.fixture(scope="module")
def good(runner: Runner) -> dict[str, Record]:
    return measured(runner, stubs.op(*stubs.GOOD))


def results_of(*records: Record) -> Results:
    return Results("alterrec-fast bench", "2026-11-27", Machine.this(2), 0.5, list(records))


# --- measuring ---


def test_every_repetition_has_its_samples(good: dict[str, Record]) -> None:
    assert all(r.failed is None and [len(s) for s in r.samples] == [3, 3] for r in good.values())
    base, sleeps = good[BASELINE], good["sleeps"]
    assert base.error == 0.0 and base.detail == {"answer": 42.0}
    assert sleeps.seconds is not None and 0.02 <= sleeps.seconds <= sleeps.quartiles[0] <= sleeps.quartiles[2]
    assert sleeps.case == replace(stubs.CASE, threads=1)
    results = results_of(*good.values())
    assert results.ratio(base) == 1.0 and (results.ratio(sleeps) or 0.0) > 1.0


def test_memory_is_that_of_the_implementations_process(good: dict[str, Record]) -> None:
    holds, base = good["holds"], good[BASELINE]
    assert holds.extra_bytes is not None and holds.peak_bytes is not None and base.extra_bytes is not None
    assert 64 << 20 <= holds.extra_bytes < 96 << 20 and base.extra_bytes < 32 << 20
    assert holds.peak_bytes > holds.extra_bytes


def test_a_bad_implementation_costs_its_own_record_alone(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "budget", replace(BUDGET, first=8.0))
    records = measured(runner, stubs.op(*stubs.GOOD, *stubs.BAD), repetitions=1)
    assert all(records[one.name].seconds is not None for one in stubs.GOOD)
    expected = {
        "triples": "wrong: error 6.3e+01, allowed 1e-06",
        "not a number": "wrong: error nan, allowed 1e-06",
        "raises": "RuntimeError: cannot do this",
        "dies": "killed by SIGSEGV: last words",
        "dies later": "the process ended with status 3",
        "allocates": "RuntimeError: ",
        "hangs": "stopped after 8 s",
        "is not installed": "ModuleNotFoundError: No module named 'no_such_library'",
    }
    page = table(list(records.values()), results_of(*records.values()))
    for name, words in expected.items():
        record = records[name]
        assert record.failed is not None and record.failed.startswith(words), (name, record.failed)
        assert record.seconds is None and words in page


def test_without_inputs_every_record_says_why(runner: Runner) -> None:
    records = measured(runner, stubs.op(*stubs.GOOD, without_inputs=True), repetitions=1)
    assert {record.failed for record in records.values()} == {"no inputs: MemoryError: no memory for the inputs"}


def test_a_late_failure_takes_no_repetition_away(runner: Runner) -> None:
    late = [Implementation(f.__name__, f) for f in (stubs.dies_the_second_time, stubs.wrong_the_second_time)]
    base, died, lied = measured(runner, stubs.op(stubs.BASE, *late), repetitions=3).values()
    assert [len(record.samples) for record in (base, died, lied)] == [3, 1, 0]
    assert died.failed == "in repetition 2 the process ended with status 3" and died.seconds is not None
    assert died.failed in table([base, died], results_of(base, died))
    assert lied.seconds is None and lied.failed is not None and lied.failed.startswith("wrong")


def test_the_first_calls_are_not_timed(runner: Runner) -> None:
    record = measured(runner, stubs.op(Implementation("slow", stubs.slow_at_first)), repetitions=1)["slow"]
    assert len(record.samples[0]) == 3 and max(record.samples[0]) < 0.2


def test_long_calls_have_fewer_samples() -> None:
    assert [BUDGET.samples_of(seconds) for seconds in (0.1, 0.6, 3.0)] == [3, 2, 1]


def test_how_a_process_ended_in_words() -> None:
    assert how_it_ended(-9, "") == "killed by SIGKILL, out of memory?"
    assert how_it_ended(1, "ImportError: no") == "the process ended with status 1: ImportError: no"
    assert how_it_ended(None, "") == "the process does not answer"


# --- what a run leaves ---


@pytest.fixture
def short_run(runner: Runner, good: dict[str, Record], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Case]]:
    """bench.run() with repetitions that are over at once; the cases that it asks for are listed."""
    asked: list[Case] = []

    def repeat(measurement: Measurement) -> None:
        asked.append(measurement.case)
        measurement.repetitions += 1
        del measurement.takers[3:]
        for taker, one in zip(measurement.takers, good.values(), strict=True):
            sizes = {"op": measurement.op.name, "case": measurement.case, "product": measurement.case.label}
            taker.record = replace(one, **sizes)

    monkeypatch.setattr(runner, "repeat", repeat)
    monkeypatch.setattr(bench, "Runner", lambda *_: runner)
    monkeypatch.setattr(bench.BackgroundLoad, "cores", lambda self: 1.5)
    yield asked


def test_a_run_leaves_json_a_table_and_figures(
    short_run: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "read_stored", lambda: {Machine.this(bench.cores()).kind: {}})
    done = CliRunner().invoke(app, ["bench", "--quick", "--op", "rank_slice", "--compare", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "as slow as the baseline: 0 of 0" in done.output
    results = Results.read(tmp_path / "results.json")
    cases = len(short_run) // bench.QUICK.repetitions
    assert short_run == short_run[:cases] * bench.QUICK.repetitions  # all of them, and then all again
    assert len(results.records) == 3 * cases
    page = (tmp_path / "table.md").read_text()
    assert "busy with other work" in page and "## rank_slice" in page and "**sleeps**" in page
    for name in ("time_rank_slice", "memory_rank_slice"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000, name
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()


def test_without_matplotlib_the_extra_is_named(
    short_run: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "alterrec_fast.benchmarks.harness.plots", None)
    lines: list[str] = []
    bench.run(bench.Options(tmp_path, quick=True, ops=("top_k",)), tell=lines.append)
    assert "no figures" in lines[-1] and "alterrec-fast[bench]" in lines[-1] and (tmp_path / "table.md").exists()


def test_cases_that_do_not_fit_the_time_are_listed(
    short_run: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "QUICK_MINUTES", -1.0)
    results = bench.run(bench.Options(tmp_path, quick=True, ops=("top_k",)), tell=lambda _: None)
    assert short_run == [] and all(record.case.threads for record in results.records)
    assert all(record.failed == "not begun within -1 minutes" for record in results.records)
    assert "not begun within" in (tmp_path / "table.md").read_text()


def test_what_is_known_is_written_after_each_case(
    short_run: list[Case], runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeat = runner.repeat

    def stops(measurement: Measurement) -> None:
        if short_run:
            raise KeyboardInterrupt
        repeat(measurement)

    monkeypatch.setattr(runner, "repeat", stops)
    with pytest.raises(KeyboardInterrupt):
        bench.run(bench.Options(tmp_path, quick=True, ops=("top_k",)), tell=lambda _: None)
    assert "## top_k" in (tmp_path / "table.md").read_text()


def test_a_request_that_cannot_be_served_is_refused_in_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "--out", str(tmp_path / "out"), "--op", "no_op"])
    assert done.exit_code == 1 and "no_op" in done.output, done.output


def test_tables_have_the_baseline_ours_and_distinct_keys() -> None:
    for op in OPS:
        for case in (*op.quick, *op.full, *op.gpu):
            takers = [one for one in op.implementations if one.takes(case)]
            assert takers[0].name == BASELINE and any(one.ours for one in takers)
    for quick in (False, True):
        plan = bench.plan(bench.Options(Path(), quick), 2)
        keys = [record.key for op, case in plan for record in Measurement(op, case, threads=2).records]
        assert len(set(keys)) == len(keys) and all("thread" in key for key in keys)
    assert bench.thread_counts(6) == [1, 2, 4, 6] and bench.thread_counts(1) == [1]


# --- records, the table, the comparison ---


def record(op: str, name: str, seconds: float, product: str = "a") -> Record:
    samples = [[1.2 * seconds, seconds], [1.5 * seconds]]
    return Record(op, Case(40_258, 300, threads=2), name, name == "ours", "", 1e-5, product, 3, 1e9, samples)


def test_ratios_are_to_the_least_time_of_the_same_product() -> None:
    results = results_of(record("x", BASELINE, 2.0), record("x", "ours", 3.0), record("y", BASELINE, 1.0))
    assert [results.ratio(one) for one in results.records] == [2.0, 3.0, 1.0]
    other = record("z", "ours", 3.0, product="b")
    assert results_of(*results.records, other).ratio(other) is None
    row = table(results.records[:2], results).splitlines()[-1]
    assert row == "| **ours** | 3000.0 | 3600.0 | 750.0 | 3.00 | 100% |  |  |  |"


def test_a_single_sample_is_its_own_quartiles() -> None:
    assert replace(record("x", "ours", 1.0), samples=[[2.0]]).quartiles == (2.0, 2.0, 2.0)


def test_the_comparison_names_what_got_slower() -> None:
    kind = Machine.this(2).kind
    results = results_of(record("x", BASELINE, 1.0), record("x", "ours", 1.5), record("y", "ours", 1.2))
    stored = {f"x | {results.records[1].case.label} | ours": 1.1, f"y | {results.records[1].case.label} | ours": 1.0}
    said = comparison(results, {kind: stored}).splitlines()
    assert said[0].endswith("1 of 2 ratios to torch.mm") and "1.50 times mm, was 1.10" in said[1] and len(said) == 2
    assert "no baseline of this kind" in comparison(results, {"another machine": stored})
    results.records[1] = replace(results.records[1], samples=[], failed="RuntimeError")
    assert "no ratio any more" in comparison(results, {kind: stored})
    results.records[1].failed = "not begun within 4 minutes"
    assert "0 of 1" in comparison(results, {kind: stored})


def test_the_stored_baseline_has_every_op() -> None:
    stored = read_stored()
    assert stored and all(
        {key.split(" | ")[0] for key in ratios} == {op.name for op in OPS} for ratios in stored.values()
    )
    assert all(ratio > 0.0 for ratios in stored.values() for ratio in ratios.values())


def test_a_row_of_another_length_is_refused() -> None:
    assert markdown(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"
    with pytest.raises(ValueError, match="every row must have 1 cells"):
        markdown(["a"], [["x", "y"]])
