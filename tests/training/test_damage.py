"""Every file of a run, a data set and the text cache, damaged in many ways: the same results as before, or an error of
ours that names the file.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import alterrec_fast as af
from alterrec_fast import files
from alterrec_fast.data.sessions import FILES as DATA
from alterrec_fast.data.sessions import INFO, Dataset
from alterrec_fast.errors import AlterRecError, FileError
from alterrec_fast.report import write_report
from alterrec_fast.report_data import read_results
from alterrec_fast.training import checkpoint
from alterrec_fast.training.alternate import BEST, LAST
from alterrec_fast.training.config import Config
from tests.training.test_training import small

RUN = ("config.toml", "history.jsonl", "metrics.json", BEST, LAST)
CACHE = tuple(f"text/stub/{name}" for name in ("rows.f32", "keys.bin", "model.json"))
FILES = (
    *(f"data/{name}" for name in (INFO, *DATA)),
    *(f"run/{name}" for name in RUN),
    *(f"cache/{name}" for name in CACHE),
)


@dataclass(frozen=True)
class Stub:
    """A text model of no size: the embedding is a function of the text's characters."""

    key: str = "stub"
    source: str = "stub"
    revision: str | None = None

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        return np.array([np.bincount([ord(c) % 8 for c in text], minlength=8) for text in texts], np.float32)


@dataclass(frozen=True)
class Place:
    """A folder that holds data/, run/ and cache/."""

    folder: Path

    @property
    def config(self) -> Config:
        data = Dataset(self.folder / "data", *[None] * 3, {})  # type: ignore[arg-type]
        return small(data, self.folder / "run", text_model="stub", m_max=2)

    def copy(self, to: Path) -> Place:
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.folder, to)
        text = (to / "run" / "config.toml").read_text()
        (to / "run" / "config.toml").write_text(text.replace(str(self.folder), str(to)))
        return Place(to)


@pytest.fixture(scope="module")
def whole(shop: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A finished run with its data and its text cache."""
    place = Place(tmp_path_factory.mktemp("whole"))
    shutil.copytree(shop.path, place.folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alterrec_fast.data.text.find_model", lambda name: Stub())
        patch.setattr("alterrec_fast.run.write_report", lambda run: read_results(run))  # figures take seconds
        patch.setenv("ALTERREC_FAST_CACHE", str(place.folder / "cache"))
        af.train(place.config)
        yield place


def recommendations(place: Place) -> Any:
    model = af.load(place.folder / "run")
    return [(one.item, one.score, one.title) for one in model.recommend(["SKU-000003", "SKU-000004"], 5)]


def evaluation(place: Place) -> Any:
    return af.load(place.folder / "run").evaluate().metrics()


def finished(place: Place) -> Any:
    return af.train(place.config, resume=True).metrics


def unfinished(place: Place) -> Any:
    (place.folder / "run" / "metrics.json").rename(place.folder / "metrics.json")
    return af.train(place.config, resume=True).metrics


def report(place: Place) -> Any:
    return read_results(place.folder / "run").metrics


def damages(file: Path, other: Path, chance: random.Random) -> dict[str, Callable[[], object]]:
    """Ways to damage the file, by name."""
    content = file.read_bytes()

    def flip(place: int, bit: int) -> None:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])

    def put(text: bytes) -> Callable[[], object]:
        return lambda: file.write_bytes(text)

    def instead(make: Callable[[], object]) -> Callable[[], object]:
        return lambda: (file.unlink(), make())

    flips = {f"bit {i}": (chance.randrange(len(content)), chance.randrange(8)) for i in range(3)}
    return {
        **{name: (lambda where=where: flip(*where)) for name, where in flips.items()},  # type: ignore[misc]
        "a bit of the first bytes": lambda: flip(chance.randrange(min(16, len(content))), chance.randrange(8)),
        "cut to nothing": put(b""),
        "cut in the middle": put(content[: len(content) // 2]),
        "cut by a byte": put(content[:-1]),
        "longer": put(content + b"\0\1\2"),
        "zeros": put(bytes(len(content))),
        "noise": put(chance.randbytes(len(content))),
        "another file of the same kind": lambda: shutil.copyfile(other, file),
        "foreign": put(chance.choice([b"{}", b"[]", b"null", b"1e999", b'{"width": 8}', b"[" * 10**5, b"x = 1"])),
        "gone": file.unlink,
        "a folder": instead(file.mkdir),
        "a pipe": instead(lambda: os.mkfifo(file)),
    }


READERS = {  # what reads each file
    "data/items.parquet": [recommendations, evaluation],
    "run/config.toml": [recommendations, finished, unfinished, report],
    "run/history.jsonl": [finished, unfinished, report],
    "run/metrics.json": [finished, report],
    f"run/{BEST}": [recommendations, unfinished],
    f"run/{LAST}": [finished, unfinished],
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_changes_no_result_or_is_named(
    name: str, whole: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(name)
    others = [other for other in FILES if other != name]
    others = [other for other in others if Path(other).suffix == Path(name).suffix] or others
    ways = READERS.get(name, [evaluation])
    monkeypatch.setenv("ALTERREC_FAST_CACHE", str(tmp_path / "place" / "cache"))
    place = whole.copy(tmp_path / "place")
    expected = {way: way(place.copy(tmp_path / "place2") if way is unfinished else place) for way in ways}
    place = whole.copy(tmp_path / "place")
    refused = 0
    for damage in damages(place.folder / name, place.folder / others[0], chance):
        for way in ways:
            whole.copy(place.folder)
            file = place.folder / name
            damages(file, place.folder / chance.choice(others), chance)[damage]()
            try:
                result = way(place)
            except AlterRecError as error:
                refused += 1
                assert file.name in str(error), f"{damage}, {way.__name__}: {error}"
            except OSError as error:  # the cache's folder is ours to write: the system's own words name the file
                assert file.name in str(error) and name.startswith("cache"), f"{damage}, {way.__name__}: {error}"
            else:
                assert result == expected[way], f"{damage}, {way.__name__}"
    assert refused or name.startswith("cache")


@pytest.mark.parametrize("file", [BEST, LAST])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a tensor is missing", "tensor .* is missing"),
        ("a tensor is of another shape", r"expected \("),
        ("a tensor is of another dtype", r"float64, expected .*float32"),
        ("a tensor is not finite", "not finite"),
        ("a tensor too many", "does not belong to a run"),
        ("no settings", "settings"),
        ("other settings", r"config\.toml: alpha = 0.5, but .* was trained with 0.25"),
        ("other data", "not the data set"),
        ("another text model", "text model is stub, but the run was trained with other"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(
    file: str, change: str, message: str, whole: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints with a right checksum, as another version or a stranger may write them."""
    place = whole.copy(tmp_path / "place")
    path = place.folder / "run" / file
    tensors, state = checkpoint.load(path)
    name = "adam.text.items.linear.weight.exp_avg" if file == LAST else "networks.id.items.table"
    if "tensor" in change:
        changed = {
            "a tensor is missing": {},
            "a tensor is of another shape": {name: tensors[name][:-1]},
            "a tensor is of another dtype": {name: tensors[name].double()},
            "a tensor is not finite": {name: tensors[name] / 0},
            "a tensor too many": {name: tensors[name], "more": torch.zeros(1)},
        }[change]
        del tensors[name]
        tensors |= changed
    elif change == "no settings":
        del state["settings"]
    elif change == "other settings":
        state["settings"]["alpha"] = 0.25
    else:
        state["data" if change == "other data" else "text"] = "other"
    checkpoint.save(path, tensors, state)
    with pytest.raises(AlterRecError, match=message):
        recommendations(place) if file == BEST else unfinished(place)


@pytest.mark.parametrize(
    "state",
    [
        {"epoch": 1},
        {"epoch": -1},
        {"best_epoch": 7},
        {"step": -1},
        {"step": 3},
        {"sums": {"loss": 1.0}},
        {"history": []},
        {"history": [{}, {}, {}]},
        {"history": 5},
        {"best": "high"},
        {"more": 1},
    ],
)
def test_a_state_that_cannot_be_is_named(state: dict[str, Any], whole: Place, tmp_path: Path) -> None:
    place = whole.copy(tmp_path / "place")
    tensors, before = checkpoint.load(place.folder / "run" / LAST)
    checkpoint.save(place.folder / "run" / LAST, tensors, {**before, **state})
    for way in (finished, unfinished):
        with pytest.raises(FileError, match=r"last\.safetensors|history\.jsonl"):
            way(place)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("variant", "best"),
        ("items", 0),
        ("items", "many"),
        ("best_epoch", 99),
        ("slice", [1]),
        ("test", {}),
        ("test.fused", None),
        ("test.id", None),
        ("test.fused.hits@20", 2.0),
        ("test.fused.hits@20", "high"),
        ("test.fused.more", 0.5),
        ("groups", {}),
        ("groups.0-30", 1),
        ("groups.$x^$", None),
        ("more", 1),
    ],
)
def test_metrics_that_cannot_be_are_named(keys: str, value: Any, whole: Place, tmp_path: Path) -> None:
    place = whole.copy(tmp_path / "place")
    file = place.folder / "run" / "metrics.json"
    metrics = files.read_sealed(file)
    *path, last = keys.split(".")
    inner: Any = metrics
    for key in path:
        inner = inner[key]
    inner[last] = value
    files.write_sealed(file, metrics)
    with pytest.raises(FileError, match=r"metrics\.json"):
        report(place)


def test_history_that_cannot_be_is_named(whole: Place, tmp_path: Path) -> None:
    file = whole.copy(tmp_path / "place").folder / "run" / "history.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    wrong = {"loss": "low", "epoch": 7, "negatives": "<b>", "seconds": -1.0, "student": "me", "more": 1}
    for key, value in wrong.items():
        changed = [*lines[:-1], {**lines[-1], key: value}]
        file.write_text("".join(json.dumps(line) + "\n" for line in changed))
        with pytest.raises(FileError, match=r"history\.jsonl, line 3"):
            report(Place(tmp_path / "place"))
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:-1], {**lines[-1], "loss": 9.0}]))
    with pytest.raises(FileError, match=r"history\.jsonl: not the history of this run"):
        finished(Place(tmp_path / "place"))


def test_a_lost_history_is_said_and_the_run_goes_on(
    whole: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = whole.copy(tmp_path / "place")
    before = (place.folder / "run" / "history.jsonl").read_text()
    (place.folder / "run" / "history.jsonl").unlink()
    finished(place)
    assert "the times of its epochs are lost" in caplog.text
    lines = [json.loads(line) for line in (place.folder / "run" / "history.jsonl").read_text().splitlines()]
    assert lines[1]["seconds"] is None and lines[1]["loss"] == json.loads(before.splitlines()[1])["loss"]
    write_report(place.folder / "run")


def test_networks_that_no_machine_can_hold_are_refused_in_a_line(whole: Place, tmp_path: Path) -> None:
    place = whole.copy(tmp_path / "place")
    config = place.folder / "run" / "config.toml"
    config.write_text(config.read_text().replace("width = 16", "width = 99999999"))
    with pytest.raises(AlterRecError, match=r"config\.toml: width must be at most"):
        recommendations(place)
