"""The command line, as a person meets it: from raw files to recommendations, and errors in one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner, Result

import alterrec_fast as af
from alterrec_fast.cli import app
from alterrec_fast.data.sessions import Dataset
from alterrec_fast.extras import TRAIN

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
    assert (metrics["variant"], metrics["seed"]) == ("id_only", 3) and "sweep" not in metrics
    refused = run("evaluate", out, "--alpha", "0.5")
    assert refused.exit_code == 1 and "alpha weighs an ID and a text network (alterrec, " in refused.output


def test_evaluate(trained: Path) -> None:
    done = run("evaluate", trained, "--split", "test", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["test"] == json.loads((trained / "metrics.json").read_text())["test"]
    assert "hits@20" in run("evaluate", trained).output


def test_evaluate_at_another_alpha_gives_the_sweeps_figures(trained: Path) -> None:
    sweep = json.loads((trained / "metrics.json").read_text())["sweep"]
    for split in ("validation", "test"):
        for alpha in ("0", "0.3", "1"):
            done = run("evaluate", trained, "--split", split, "--alpha", alpha, "--json")
            assert done.exit_code == 0, done.output
            assert json.loads(done.output)[split]["fused"] == sweep[split][alpha]
    beyond = run("evaluate", trained, "--alpha", "1.5")
    assert beyond.exit_code == 1 and "alpha must lie in [0, 1], got 1.5" in beyond.output


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alterrec_fast.run.write_report", lambda run: None)  # its figures take seconds


@pytest.mark.usefixtures("no_report")
def test_resume_alone_takes_the_runs_own_settings_and_extends_it(shop: Dataset, tmp_path: Path) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    settings = [*FAST, "--set", "m_random=0", "--variant", "id_only", "--seed", "3"]
    done = run("train", "--data", shop.path, "--out", out, *settings)
    assert "epoch 2 of 2  id    lr 1.0e-03  loss" in done.output and " s left" in done.output
    assert re.search(r"test, after epoch [012], the best by validation", done.output)
    again = run("train", "--out", out, "--resume")
    assert again.exit_code == 0, again.output
    longer = run("train", "--out", out, "--resume", "--set", "m_max=4")
    assert longer.exit_code == 0, longer.output
    assert re.findall("epoch . of 4", longer.output) == ["epoch 3 of 4", "epoch 4 of 4"]
    assert run("train", "--data", shop.path, "--out", whole, *settings, "--set", "m_max=4").exit_code == 0
    assert (out / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
    shorter = run("train", "--out", out, "--resume", "--set", "m_max=3")
    assert shorter.exit_code == 1 and "begun with m_max = 4 (now 3)" in shorter.output
    other = run("train", "--out", out, "--resume", "--seed", "4")
    assert other.exit_code == 1 and "begun with seed = 3 (now 4)" in other.output


def test_a_preset_is_written_down_and_set_overrides_it(shop: Dataset, tmp_path: Path) -> None:
    out, override = tmp_path / "run", ["--set", "lr_step_id=3", "--set", "m_random=0"]
    line = ["train", "--data", shop.path, "--out", out, "--variant", "id_only", "--preset", "published"]
    done = run(*line, *FAST, *override)
    assert done.exit_code == 0, done.output
    written = tomllib.loads((out / "config.toml").read_text())
    assert (written["preset"], written["hard_fraction"], written["lr_step_id"]) == ("published", 0.5, 3)
    assert "<dt>Preset</dt><dd>published</dd>" in (out / "report.html").read_text()
    other = run("train", "--out", out, "--resume", "--preset", "paper")
    assert other.exit_code == 1 and "begun with preset = 'published' (now 'paper')" in other.output


@pytest.mark.usefixtures("no_report")
def test_runs_are_listed_and_unfinished_ones_said(shop: Dataset, tmp_path: Path) -> None:
    settings = ["--data", shop.path, *FAST, "--set", "m_random=0", "--variant", "id_only"]
    folder = tmp_path / "all"
    assert run("train", *settings, "--out", folder / "one").exit_code == 0
    assert run("train", *settings, "--out", folder / "two", "--seeds", "0,1").exit_code == 0
    for copy in ("begun", "damaged"):
        shutil.copytree(folder / "one", folder / copy)
    (folder / "begun" / "metrics.json").unlink()
    (folder / "damaged" / "metrics.json").write_text("{}")
    listed = run("runs", folder)
    assert listed.exit_code == 0, listed.output
    begun, damaged, one, two = listed.output.splitlines()[1:]
    assert re.match(r"begun +id_only +0 +\d+\.\d\d +\d+\.\d\d +unfinished, epoch 2 of 2, best [012]$", begun)
    assert damaged.startswith("damaged") and "metrics.json" in damaged
    assert re.match(r"one +id_only +0( +\d+\.\d\d){4} +finished, best epoch [012] of 2$", one)
    assert re.match(r"two +id_only +0,1( +\d+\.\d\d){4} +finished, best epoch ", two)
    test = json.loads((folder / "one" / "metrics.json").read_text())["test"]["fused"]
    assert f"{100 * test['ndcg@20']:.2f}" in one
    assert "begun is unfinished, epoch 2 of 2, best" in run("evaluate", folder / "begun").stderr
    assert not run("evaluate", folder / "one").stderr
    seeds = run("train", "--out", folder / "two", "--resume")
    assert seeds.exit_code == 1 and "several seeds: name all of them" in seeds.output
    assert run("train", "--out", folder / "two", "--resume", "--seeds", "0,1").exit_code == 0


def test_the_shell_completes_commands() -> None:
    asked = {"_ALTERREC_FAST_COMPLETE": "complete_bash", "COMP_WORDS": "alterrec-fast rec", "COMP_CWORD": "1"}
    done = CliRunner().invoke(app, [], prog_name="alterrec-fast", env=asked)
    assert done.output.split() == ["recommend"]


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
        (["train", "--resume"], "--resume needs --out"),
        (["runs", "."], "holds no run directory"),
        (["train", "--demo", "--set", "width"], "NAME=VALUE"),
        (["train", "--demo", "--set", "widht=3"], "unknown setting 'widht'"),
        (["train", "--demo", "--seeds", "a"], "'a'"),
        (["train", "--demo", "--seeds", "0,1", "--seed", "2"], "--seed and --seeds"),
        (["train", "--demo", "--out", "/proc/none"], "/proc/none"),
        (["train", "--data", "nowhere", "--out", "/dev/null/run"], "/dev/null/run: nothing can be written there"),
        (["prepare", "generic", "nowhere", "/proc/none/x"], "/proc/none: nothing can be written there"),
        (["prepare", "generic", "nowhere", "x", "--test-fraction", "nan"], "test_fraction"),
        (["prepare", "generic", "nowhere", "x", "--separator", "\\"], "nowhere"),
        (["recommend", "nowhere", "--sessions", "a.csv", "--out", "./a.csv"], "is the file of --sessions"),
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


def test_what_a_terminal_obeys_is_printed_as_text(shop: Dataset, tmp_path: Path) -> None:
    """Titles and ids of a stranger: escape sequences, line ends, marks of direction; other scripts stay as they are."""
    raw = pl.Series(["\x1b[31mred\x07", "two\nlines\r", "\u202efilm\u2069", "größe 中文 👩\u200d🔧"] * 50)
    ids = pl.Series([f"\x1b]0;{i}\x07" for i in range(200)])
    splits = {name: shop.split(name) for name in ("train", "validation", "test")}
    data = Dataset.write(tmp_path / "data", splits, pl.DataFrame({"item_id": ids, "title": raw}), ["title"], {})
    out = tmp_path / "run"
    done = run("train", "--data", data.path, "--out", out, *FAST, "--variant", "id_only")
    assert done.exit_code == 0, done.output
    shown = run("recommend", out, "--session", "'\x1b]0;1\x07'", "-n", "199")
    assert shown.exit_code == 0, shown.output
    assert len(shown.output.splitlines()) == 199
    assert not set("\x1b\x07\r\u202e\u2069") & set(shown.output)
    for text in (
        r"\x1b]0;7\x07",
        r"\x1b[31mred\x07",
        r"two\x0alines\x0d",
        r"\u202efilm\u2069",
        "größe 中文 👩\u200d🔧",
    ):
        assert text in shown.output
    unknown = run("recommend", out, "--session", "a\x1b[2Jb")
    assert unknown.exit_code == 1 and "\x1b" not in unknown.output


def test_a_session_of_the_whole_catalog_is_said(trained: Path, shop: Dataset) -> None:
    done = run("recommend", trained, "--session", " ".join(shop.items["item_id"]))
    assert done.exit_code == 0
    assert done.output.strip() == "nothing to recommend: every item of the catalog is in the session; see --repeats"


def test_settings_may_have_blanks_around_the_equals_sign(shop: Dataset, tmp_path: Path) -> None:
    blanks = [text.replace("=", " = ") for text in FAST]
    extra = ["--set", "group_edges = 3, 30", "--variant", "id_only", "--device", "cpu"]
    done = run("train", "--data", shop.path, "--out", tmp_path / "run", *blanks, *extra)
    assert done.exit_code == 0, done.output
    written = (tmp_path / "run" / "config.toml").read_text()
    assert "width = 16" in written and 'device = "cpu"' in written
    assert list(json.loads((tmp_path / "run" / "metrics.json").read_text())["groups"]) == ["0-3", "4-30", "31+"]


def test_version_and_module() -> None:
    done = subprocess.run([sys.executable, "-m", "alterrec_fast", "--version"], capture_output=True, text=True)
    assert done.stdout == f"alterrec-fast {af.__version__}\n"


HIDDEN = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
import alterrec_fast as af, torch
import alterrec_fast.training.alternate  # a training step, of which benchmarks on bare machines take the time
af.top_k(torch.ones(1, 2), torch.ones(3, 2), k=1)
af.Config(width=8), af.FullSoftmaxLoss(), af.RankSliceSampler(1, 2)
from typer.testing import CliRunner
from alterrec_fast.cli import app
for name in ("train", "load"):
    try:
        getattr(af, name)
        print("imported", name)
    except ImportError as error:
        print(error)
for line in (["doctor"], ["--version"], ["train", "--demo"], ["prepare", "generic", "x", "y"],
             ["recommend", "x", "--session", "1"], ["evaluate", "x"]):
    done = CliRunner().invoke(app, line)
    print(line[0], done.exit_code, (done.output.strip() or repr(done.exception)).splitlines()[-1])
"""


# Newer versions of typer bring pydantic themselves.
@pytest.mark.parametrize("hidden", [",".join(name for name in TRAIN if name != "pydantic"), "matplotlib"])
def test_without_the_trainers_packages_ops_work_and_commands_say_what_to_install(hidden: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HIDDEN, hidden], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    needs = r"needs \w+, which is not installed: pip install 'alterrec-fast\[train\]'"
    by_name = {line.split()[0]: line for line in lines}
    assert by_name["doctor"].startswith("doctor 0") and by_name["--version"].startswith("--version 0")
    for name in ("train", "recommend", "evaluate"):
        assert re.search(rf"{name} 1 error: this command " + needs, by_name[name]), done.stdout
    assert re.match(r"alterrec_fast\.train " + needs, lines[0])
    assert ("prepare 1 error: this command needs polars" in done.stdout) == (hidden != "matplotlib")


def test_the_extra_is_what_pyproject_says() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[><=]", line)[0].replace("-", "_") for line in project["optional-dependencies"]["train"]]
    assert sorted(names) == sorted(TRAIN)
    assert sorted(re.split(r"[><=]", line)[0] for line in project["dependencies"]) == ["numpy", "torch", "typer"]


def test_recommend_names_an_unknown_item(trained: Path) -> None:
    done = run("recommend", trained, "--session", "nothing")
    assert done.exit_code == 1
    assert "unknown items 'nothing'" in done.output


def test_recommend_names_a_quote_that_is_never_closed(trained: Path) -> None:
    done = run("recommend", trained, "--session", "'SKU-000001")
    assert done.exit_code == 1
    assert "--session: a quote or backslash ends nothing" in done.output
