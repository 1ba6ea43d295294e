"""The measurements of RecBole, tiny: that they run, and count what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from alterrec_fast.benchmarks.integrations import recbole as measured


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and an argument list of the test's own: RecBole writes into the one and reads the other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    monkeypatch.setattr(measured, "THREADS", 1)


def test_training_reaches_the_same_ndcg(tmp_path: Path) -> None:
    stock, full, *_ = measured.training(items=3_000, sessions=500, batch=256)
    measured.write_sessions(tmp_path, stock.items, stock.sessions)
    theirs, ours = measured.measure(stock, tmp_path), measured.measure(full, tmp_path)
    assert ours["ndcg"] == pytest.approx(theirs["ndcg"], abs=0.002)
    assert theirs["ndcg"] > 0.02
    assert ours["seconds"] > 0 and ours["mib"] > 0


def test_evaluation_gives_the_same_ndcg_with_less_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, *_, ours = measured.evaluation(items=100_000, sessions=300)
    assert stock.batch == ours.batch == 300 and stock.options is None and ours.options is not None
    measured.write_sessions(tmp_path, stock.items, stock.sessions)

    def call(_module: str, _flag: str, setting: str, *_: str) -> dict[str, float]:
        return measured.measure(measured.Setting(**json.loads(setting)), tmp_path)

    monkeypatch.setattr(measured, "call", call)
    measured.train_once(stock, str(tmp_path))
    found = [measured.measure(setting, tmp_path) for setting in (ours, stock)]
    assert found[0]["ndcg"] == found[1]["ndcg"] > 0
    assert found[0]["mib"] < found[1]["mib"]


def test_both_are_measured_at_every_batch() -> None:
    rows = [(one.options is None, one.batch) for one in measured.evaluation(items=1_000, sessions=2_200)]
    assert rows == [(True, 2_200), (True, 512), (True, 128), (False, 512), (False, 128), (False, 2_200)]


def test_rows_compare_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "RecBole": {"seconds": 6.0, "mib": 900.0, "ndcg": 0.1},
        "full softmax": {"seconds": 2.0, "mib": 90.0, "ndcg": 0.2},
    }

    def call(module: str, flag: str, setting: str, *_: str) -> dict[str, float]:
        return next(answer for title, answer in answers.items() if f'"{title}"' in setting)

    monkeypatch.setattr(measured, "call", call)
    rows = measured.rows(measured.training(items=50, sessions=10)[:2], rounds=2)
    assert rows[0][2:] == ["6.00", "1.0", "900", "1.0", "0.1000, 0.1000"]
    assert rows[1][2:] == ["2.00", "3.0", "90", "10.0", "0.2000, 0.2000"]
