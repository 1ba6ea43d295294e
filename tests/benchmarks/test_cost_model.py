"""The cost model: its formulas against hand-made cases and simulations, and a fit that finds planted constants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from alterrec_fast.benchmarks import cost_model, machine
from alterrec_fast.benchmarks.cost_model import H100, JOBS, PAIR, Job
from alterrec_fast.benchmarks.records import FLOOR, Record, Results
from alterrec_fast.benchmarks.worker import Shape


def test_a_product_bound_stream_by_hand() -> None:
    job = Job(1_000_000, 1, sessions=512, width=100)
    parts = cost_model.seconds(job, training=False)
    assert parts["stream"] == pytest.approx(2.7 * 2 * 512 * 1_000_000 * 100 / H100.products)
    assert parts["agree"] == 0.0
    few = cost_model.seconds(replace(job, sessions=8), training=False)
    assert few["stream"] == pytest.approx(2.7 * 2 * 1_000_000 * 100 / H100.memory)  # bound by reading the catalog once


def test_memory_by_hand() -> None:
    parts = cost_model.memory(Job(64_000_000, 64, sessions=512, width=100, start=20, stop=20_000), training=True)
    assert parts["teacher's rows, bf16"] == 2 * 1_000_000 * 100
    assert sum(size for name, size in parts.items() if "rows" in name or "moments" in name) == 16 * 1_000_000 * 100
    assert parts["slices"] == 512 * 4 * 19_980 / 64  # ids: a bit for each of a million items would take more
    assert cost_model.slice_bytes(512, 64_000, 19_980) == 512 * 64_000 / 8


@pytest.mark.parametrize("training", [False, True])
def test_more_gpus_share_the_work_and_pay_for_talking(training: bool) -> None:
    one, eight, many = (Job(100_000_000, gpus) for gpus in (1, 8, 64))
    for job in (eight, many):
        assert sum(cost_model.memory(job, training).values()) < sum(cost_model.memory(one, training).values()) / 4
        alone, shared = cost_model.seconds(one, training), cost_model.seconds(job, training)
        assert shared["stream"] == pytest.approx(alone["stream"] / job.gpus)
        assert shared["agree"] > 0
    near, far = (cost_model.seconds(job, training)["agree"] for job in (eight, many))
    assert far > 5 * near  # between machines


def test_candidates_are_those_of_a_simulation() -> None:
    rng = np.random.default_rng(0)
    items, start, stop = 50_000, 20, 8_000
    sampled = cost_model.sample_size(items, start, stop, 128, 32.0)
    found = []
    for _ in range(30):
        scores = rng.standard_normal(items)
        sample = np.sort(rng.choice(scores, sampled, replace=False))[::-1]

        def limit(rank: int, sign: float, sample: np.ndarray = sample) -> float:
            """The sampled score so many deviations above (-1) or below (+1) the place of a rank."""
            share = (rank + 0.5) / items
            place = share * sampled + sign * (4.0 * np.sqrt(share * sampled * (1.0 - share)) + 3.0)
            return float(sample[min(max(round(place), 0), sampled - 1)])

        low, high, zone = limit(stop - 1, 1.0), limit(stop - 1, -1.0), limit(start, 1.0)
        ranked = np.sort(scores)[::-1]
        assert low <= ranked[stop - 1] < high and zone <= ranked[start]
        found.append(((scores >= low) & (scores < high)).sum() + (scores >= zone).sum())
    assert cost_model.candidates(items, start, stop, sampled) == pytest.approx(np.mean(found), rel=0.1)


def test_sampling_more_leaves_fewer_candidates_and_the_size_is_the_cheapest() -> None:
    items, start, stop, width = 400_000, 20, 20_000, 128
    best = cost_model.sample_size(items, start, stop, width, 32.0)

    def cost(sampled: int) -> float:
        """Cycles of a session: the sample's products, and settling what its bracket of `stop` leaves."""
        left = 8.0 * np.sqrt(stop / items * (1 - stop / items) / sampled) * items
        return sampled * width / 32.0 + cost_model.SETTLE_CYCLES * left

    assert cost(best) <= min(cost(round(best * factor)) for factor in (0.8, 1.25)) * 1.001
    few, many = (cost_model.candidates(items, start, stop, n) for n in (best // 2, best * 2))
    assert many < few


def test_the_table_says_what_does_not_fit() -> None:
    lines = cost_model.table(JOBS).splitlines()
    assert len(lines) == 2 + 9
    billion = [line for line in lines if line.startswith("| 1,000,000,000 |")]
    assert [line.count("does not fit") for line in billion] == [2, 1, 0]


def test_the_documented_table_is_that_of_the_formulas() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    assert cost_model.table(JOBS) in page


SHAPES = ((40_000, 128), (40_258, 300), (160_000, 128), (400_000, 128), (1_000_000, 128))


def curve(product: float, score: float, candidate: float, rest: float, shapes: tuple[tuple[int, int], ...]) -> Results:
    """A run whose rank_slice costs exactly so much: less than torch's product does, which takes 3 us an item."""
    records = []
    for items, width in shapes:
        shape = Shape(items, width, start=20, stop=20_000, threads=2, figure="V")
        kept = cost_model.candidates(items, 20, 20_000, cost_model.sample_size(items, 20, 20_000, width, 32.0))
        floor = Record("rank_slice", shape, FLOOR, False, "torch", 1e-5, seconds=items * 3e-6)
        size = cost_model.slice_bytes(512, items, 19_980) + PAIR * kept * 512 + rest
        time = 512 * (items * (product * width + score) + kept * candidate)
        ours = Record("rank_slice", shape, "alterrec-fast", True, "", 1e-5, seconds=time, extra_bytes=int(size))
        records += [floor, ours]
    return Results("", "2026-11-24", machine.look(2), 2e10, 0.0, 0.0, 0.0, records)


def test_a_fit_finds_planted_constants_where_ours_is_faster_than_mm() -> None:
    results = curve(1e-11, 3e-10, 2e-9, 1e6, SHAPES)
    ours, floor = results.records[-1], results.records[-2]
    assert (ours.seconds or 0.0) < (floor.seconds or 0.0)
    found, checked = cost_model.fit(results)
    assert found.product == pytest.approx(1e-11, rel=1e-6)
    assert found.score == pytest.approx(3e-10, rel=1e-6) and found.candidate == pytest.approx(2e-9, rel=1e-6)
    assert found.sessions_bytes == pytest.approx(1e6, rel=1e-3)
    assert all(one.seconds == pytest.approx(one.measured_seconds) for one in checked)
    assert all(one.bytes == pytest.approx(one.measured_bytes, rel=1e-4) for one in checked)
    assert cost_model.checks(checked).count("\n") == 1 + len(checked)
    with pytest.raises(ValueError, match="three sizes"):
        cost_model.fit(replace(results, records=results.records[:4]))


def test_a_fit_of_one_width_has_the_sum_of_product_and_score() -> None:
    found, checked = cost_model.fit(curve(1e-11, 3e-10, 2e-9, 1e6, tuple((v, d) for v, d in SHAPES if d == 128)))
    assert 128 * found.product + found.score == pytest.approx(128e-11 + 3e-10, rel=1e-6)
    assert all(one.seconds == pytest.approx(one.measured_seconds) for one in checked)


def test_a_fit_has_no_negative_constant() -> None:
    found, _ = cost_model.fit(curve(1e-11, -2e-10, 2e-9, 1e6, SHAPES))
    assert found.score == 0.0 and found.candidate > 0.0 and found.product > 0.0
