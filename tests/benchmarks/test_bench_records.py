"""What a run of `alterrec-fast bench` says: records, intervals, tables, figures, comparison."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alterrec_fast.benchmarks import (
    figures,
    machine,
    tables,
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
from alterrec_fast.benchmarks.contestants import OPS
from alterrec_fast.benchmarks.records import FLOOR, LEAST_NOISE, Record, Results, assess, both, conclude, share_floors
from alterrec_fast.benchmarks.worker import Shape


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


# --- figures ---


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
