"""The measurements of RecBole, tiny: that they run, and count what they say."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from alterrec_fast.benchmarks.integrations import recbole as measured


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the test's own, into which RecBole writes, and one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmark"])
    monkeypatch.setattr(measured, "THREADS", 1)


def test_training_reaches_the_same_ndcg(tmp_path: Path) -> None:
    stock, full, *_ = measured.training(items=3_000, sessions=500, batch=256)
    measured.write_sessions(tmp_path, stock.items, stock.sessions)
    theirs, ours = (measured.measure(str(tmp_path), **asdict(setting)) for setting in (stock, full))
    assert ours["ndcg"] == pytest.approx(theirs["ndcg"], abs=0.002)
    assert theirs["ndcg"] > 0.02
    assert ours["seconds"] > 0 and ours["mib"] > 0


def test_evaluation_gives_the_same_ndcg_with_less_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, *_, ours = measured.evaluation(items=100_000, sessions=300)
    assert stock.batch == ours.batch == 300 and stock.options is None and ours.options is not None
    monkeypatch.setattr(measured, "ROUNDS", 1)
    answers: list[dict[str, float]] = []

    def run(folder: str, **job: Any) -> dict[str, float]:
        answers.append(measured.measure(folder, **job))
        return answers[-1]

    rows = measured.rows([ours, stock], tmp_path, run)
    _, by_us, by_them = answers  # the first has trained the model
    assert by_us["ndcg"] == by_them["ndcg"] > 0 and by_us["mib"] < by_them["mib"]
    assert rows[0][3] == rows[0][5] == "1.0"


def test_both_are_measured_at_every_batch() -> None:
    rows = [(one.options is None, one.batch) for one in measured.evaluation(items=1_000, sessions=2_200)]
    assert rows == [(True, 2_200), (True, 512), (True, 128), (False, 512), (False, 128), (False, 2_200)]


def test_rows_compare_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "RecBole": {"seconds": 6.0, "mib": 900.0, "ndcg": 0.1},
        "full softmax": {"seconds": 2.0, "mib": 90.0, "ndcg": 0.2},
    }
    monkeypatch.setattr(measured, "ROUNDS", 2)
    settings = measured.training(items=50, sessions=10)[:2]
    rows = measured.rows(settings, tmp_path, lambda folder, title, **_: answers[title])
    assert rows[0][2:] == ["6.00", "1.0", "900", "1.0", "0.1000, 0.1000"]
    assert rows[1][2:] == ["2.00", "3.0", "90", "10.0", "0.2000, 0.2000"]
