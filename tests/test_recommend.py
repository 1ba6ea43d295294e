"""Recommendations for many sessions: each is what the session alone gets, whatever the table's form and cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

import alterrec_fast as af
from alterrec_fast import recommend
from alterrec_fast.cli import app
from alterrec_fast.data.sessions import Dataset
from alterrec_fast.errors import DataError, FileError
from alterrec_fast.trained import TrainedModel
from alterrec_fast.training.config import from_mapping

SETTINGS = {"variant": "id_only", "width": 16, "layers": 1, "m_random": 0, "m_max": 1, "k1": 2, "k2": 60}


@pytest.fixture(scope="module")
def model(shop: Dataset, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    out = tmp_path_factory.mktemp("many") / "run"
    af.train(from_mapping({**SETTINGS, "data": str(shop.path), "out": str(out), "eval_targets": 40}, "test"))
    return af.load(out)


@pytest.fixture(scope="module")
def sessions(shop: Dataset) -> dict[str, list[str]]:
    """30 sessions of test items, one of them longer than the encoder sees."""
    ids = shop.items["item_id"]
    lists = {f"s{i}": ids.gather(shop.test[i]).to_list() for i in range(29)}
    return {**lists, "long": (ids.to_list() * 2)[:70]}


def table(sessions: dict[str, list[str]]) -> pl.DataFrame:
    rows = [(session, item) for session, items in sessions.items() for item in items]
    return pl.DataFrame(rows, schema=["session_id", "item_id"], orient="row")


def by_session(found: pl.DataFrame) -> dict[Any, list[tuple[str, float]]]:
    assert dict(found.schema) == recommend.OUTPUT
    pairs: dict[Any, list[tuple[str, float]]] = {}
    for session, rank, item, score in found.iter_rows():
        pairs.setdefault(session, []).append((item, score))
        assert rank == len(pairs[session])
    return pairs


@pytest.mark.parametrize("repeats", [False, True])
def test_many_sessions_get_what_each_gets_alone(
    repeats: bool, model: TrainedModel, sessions: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alterrec_fast.trained.CHUNK", 7)  # sessions lie across pieces
    found = by_session(model.recommend_many(table(sessions), 5, repeats=repeats))
    assert list(found) == list(sessions)
    for session, items in sessions.items():
        alone = model.recommend(items, 5, repeats)
        assert [item for item, _ in found[session]] == [one.item for one in alone]
        np.testing.assert_allclose([score for _, score in found[session]], [one.score for one in alone], rtol=1e-5)


def test_one_row_a_session_and_integers_are_read_too(model: TrainedModel, sessions: dict[str, list[str]]) -> None:
    expected = model.recommend_many(table(sessions), 3)
    wide = pl.DataFrame({"session_id": list(sessions), "item_id": list(sessions.values()), "other": 1})
    assert model.recommend_many(wide, 3).equals(expected)
    numbered = wide.with_columns(pl.Series("session_id", range(len(sessions))))
    assert list(by_session(model.recommend_many(numbered, 3))) == [str(i) for i in range(len(sessions))]
    assert model.recommend_many({"session_id": ["a"], "item_id": [sessions["s0"][0]]}, 3).height == 3


@pytest.mark.parametrize(("source", "target"), [(".parquet", ".csv"), (".csv", ".parquet"), (".csv.gz", ".csv")])
def test_from_file_to_file(
    source: str, target: str, model: TrainedModel, sessions: dict[str, list[str]], tmp_path: Path
) -> None:
    read, written = tmp_path / f"sessions{source}", tmp_path / "new" / f"best{target}"
    if source == ".parquet":
        table(sessions).write_parquet(read)
    else:
        table(sessions).write_csv(read, compression="gzip" if source.endswith("gz") else "uncompressed")
    done = CliRunner().invoke(
        app, ["recommend", str(model.path), "--sessions", str(read), "--out", str(written), "-n", "4"]
    )
    assert done.exit_code == 0, done.output
    assert f"{4 * len(sessions)} rows" in done.output
    found = pl.read_parquet(written) if target == ".parquet" else pl.read_csv(written, schema=recommend.OUTPUT)
    assert found.equals(model.recommend_many(table(sessions), 4))
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_an_error_leaves_what_was_there(model: TrainedModel, sessions: dict[str, list[str]], tmp_path: Path) -> None:
    out = tmp_path / "best.csv"
    out.write_text("before")

    def pieces() -> Iterator[pl.DataFrame]:
        yield from model.recommend_pieces(table(sessions))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recommend.write_table(pieces(), out)
    assert out.read_text() == "before"
    assert list(tmp_path.iterdir()) == [out]


def test_allowed_and_excluded_items(model: TrainedModel, sessions: dict[str, list[str]]) -> None:
    every = by_session(model.recommend_many(table(sessions), 200, repeats=True))
    allow, exclude = sorted(item for item, _ in every["s0"][::3]), [item for item, _ in every["s0"][:30]]
    for options in ({"allow": allow}, {"exclude": exclude}, {"allow": allow, "exclude": [*exclude, "unknown"]}):
        chosen = set(options.get("allow", model.dataset.items["item_id"])) - set(options.get("exclude", ()))
        found = by_session(model.recommend_many(table(sessions), 200, **options))
        for session, ranked in every.items():
            expected = [item for item, _ in ranked if item in chosen and item not in sessions[session]]
            assert [item for item, _ in found[session]] == expected
        alone = model.recommend(sessions["s1"], 200, **options)
        assert [one.item for one in alone] == [item for item, _ in found["s1"]]
    with pytest.raises(ValueError, match="leave no item"):
        model.recommend_many(table(sessions), allow=["unknown"])


def test_unknown_items_are_skipped_and_said(
    model: TrainedModel, sessions: dict[str, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    some = {"none": ["x", "y"], "part": ["z", *sessions["s0"]], "all": sessions["s1"]}
    found = by_session(model.recommend_many(table(some), 3))
    assert list(found) == ["part", "all"]
    assert found["part"] == by_session(model.recommend_many(table({"part": sessions["s0"]}), 3))["part"]
    assert caplog.messages == [
        "3 items are unknown and skipped, such as 'x' in session 'none'; 1 sessions hold no others and get no "
        "recommendations"
    ]
    with pytest.raises(DataError, match="'x' in session 'none' is not in the catalog"):
        model.recommend_many(table(some), 3, strict=True)
    assert model.recommend(some["part"], 3) == model.recommend(sessions["s0"], 3)
    assert caplog.messages[-1] == "unknown items 'z' are skipped"
    with pytest.raises(ValueError, match="unknown items 'z'"):
        model.recommend(some["part"], 3, strict=True)
    empty = pl.DataFrame({"session_id": ["e"], "item_id": [[]]}, schema_overrides={"item_id": pl.List(pl.String)})
    assert model.recommend_many(empty).height == 0
    assert model.recommend_many(table({})).height == 0


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_a_session_in_two_places_is_refused(chunk: int, model: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alterrec_fast.trained.CHUNK", chunk)
    item = model.dataset.items["item_id"][0]
    apart = pl.DataFrame({"session_id": ["a", "b", "b", "c", "b"], "item_id": [item] * 5})
    with pytest.raises(DataError, match="rows of session 'b' are not together: sort the table by session_id"):
        model.recommend_many(apart)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"session_id": ["a"]}, "column item_id missing"),
        ({"session_id": ["a"], "item_id": [1.5]}, "column item_id is Float64, expected text or integers"),
    ],
)
def test_other_tables_are_refused(columns: dict[str, list[Any]], message: str, model: TrainedModel) -> None:
    with pytest.raises(DataError, match=message):
        model.recommend_many(pl.DataFrame(columns))


def test_files_that_cannot_be(model: TrainedModel, tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(FileError, match=r"bad\.parquet: not a table that can be read"):
        model.recommend_many(tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"s\.txt: sessions are read from"):
        model.recommend_many(tmp_path / "s.txt")
    (tmp_path / "semicolons.csv").write_text("session_id;item_id\ns;a\n")
    with pytest.raises(DataError, match=r"semicolons\.csv: column session_id and item_id missing.*session_id;item_id"):
        model.recommend_many(tmp_path / "semicolons.csv")
    for out, message in (("x.json", ".parquet or .csv"), ("bad.parquet/x.csv", "nothing can be written there")):
        args = ["recommend", str(model.path), "--sessions", "s.csv", "--out", str(tmp_path / out)]
        done = CliRunner().invoke(app, args)
        assert done.exit_code == 1 and message in done.output
    assert "expected --session IDS" in CliRunner().invoke(app, ["recommend", str(model.path), "--out", "x"]).output
