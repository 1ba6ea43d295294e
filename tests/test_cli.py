"""The command line, as a person meets it: from raw files to recommendations, and errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner, Result

from alterrec_fast.cli import app
from alterrec_fast.data.sessions import Dataset

FAST = [
    "--set",
    "width=16",
    "--set",
    "layers=1",
    "--set",
    "m_random=1",
    "--set",
    "m_gap=1",
    "--set",
    "m_max=2",
    "--set",
    "k1=2",
    "--set",
    "k2=40",
]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def trained(shop: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    done = run("train", "--data", shop.path, "--text-model", "packaged", "--out", out, *FAST)
    assert done.exit_code == 0, done.output
    assert "fused" in done.output and str(out / "report.html") in done.output
    return out


def test_from_raw_files_to_recommendations(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = [(f"s{s}", f"0{(s * 7 + i) % 23}", 1000 * s + i) for s in range(60) for i in range(4)]
    pl.DataFrame(rows, schema=["session_id", "item_id", "timestamp"], orient="row").write_csv(raw / "interactions.csv")
    titles = {"item_id": [f"0{i}" for i in range(23)], "title": [f"thing number {i}" for i in range(23)]}
    pl.DataFrame(titles).write_csv(raw / "items.csv")
    done = run("prepare", "generic", raw, tmp_path / "data")
    assert done.exit_code == 0, done.output
    again = run("prepare", "generic", raw, tmp_path / "data")
    assert again.exit_code == 1 and "--overwrite" in again.output
    out = tmp_path / "run"
    done = run("train", "--data", tmp_path / "data", "--text-model", "packaged", "--out", out, *FAST, "--seeds", "0,1")
    assert done.exit_code == 0, done.output
    assert "±" in done.output
    shown = run("recommend", out, "--session", "07 014", "-n", "3")
    assert shown.exit_code == 0, shown.output
    lines = shown.output.strip().splitlines()
    assert len(lines) == 3
    assert "±" in run("evaluate", out).output
    assert all("thing number" in line for line in lines)


def test_config_file_and_flags(shop: Dataset, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('variant = "id_only"\nwidth = 16\nm_max = 1\nm_random = 0\nk1 = 2\nk2 = 30\n')
    out = tmp_path / "run"
    done = run("train", "--data", shop.path, "--config", tmp_path / "c.toml", "--out", out, "--seed", "3")
    assert done.exit_code == 0, done.output
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["variant"], metrics["seed"]) == ("id_only", 3)


def test_evaluate(trained: Path) -> None:
    done = run("evaluate", trained, "--split", "test", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["test"] == json.loads((trained / "metrics.json").read_text())["test"]
    assert "hits@20" in run("evaluate", trained).output


def test_ctrl_c_says_how_to_go_on(shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("alterrec_fast.run.train", interrupted)
    done = run("train", "--data", shop.path, "--out", tmp_path / "run")
    assert done.exit_code == 130
    assert done.output.strip() == "stopped; the same command with --resume goes on from the last checkpoint"


def test_doctor_names_every_engine() -> None:
    done = run("doctor")
    assert done.exit_code == 0
    for name in ("reference", "native", "triton"):
        assert name in done.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train"], "--data"),
        (["train", "--data", "nowhere", "--out", "x"], "nowhere"),
        (["train", "--demo", "--set", "width"], "NAME=VALUE"),
        (["train", "--demo", "--set", "widht=3"], "unknown setting 'widht'"),
        (["train", "--demo", "--seeds", "a"], "'a'"),
        (["train", "--demo", "--seeds", "0,1", "--seed", "2"], "--seed and --seeds"),
        (["train", "--demo", "--out", "/proc/none"], "/proc/none"),
        (["prepare", "generic", "nowhere", "x", "--test-fraction", "nan"], "test_fraction"),
        (["recommend", "nowhere", "--session", "1"], "no trained model"),
        (["evaluate", "nowhere"], "no trained model"),
        (["prepare", "generic", "nowhere", "x"], "nowhere"),
    ],
)
def test_errors_are_one_line(args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*args)
    assert done.exit_code == 1
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())  # nothing half-made


def test_recommend_names_an_unknown_item(trained: Path) -> None:
    done = run("recommend", trained, "--session", "nothing")
    assert done.exit_code == 1
    assert "unknown items 'nothing'" in done.output
