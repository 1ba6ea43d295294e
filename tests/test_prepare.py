"""`prepare` on small files of every source: what is kept, in which order, what is counted, and every error's words."""

import builtins
import gzip
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alterrec_fast.data.prepare import prepare
from alterrec_fast.data.readers import READERS
from alterrec_fast.data.sessions import SPLITS, DataError, Dataset

HEADER = "session_id,item_id,timestamp\n"
SIX = HEADER + "".join(f"s{s},i{i},{10 * s + i}\n" for s in range(6) for i in range(s % 3, s % 3 + 2))
NO_HOLDOUT = {"validation_fraction": 0, "test_fraction": 0}


def put(folder: Path, **files: str | bytes) -> Path:
    """Writes files, `interactions_csv=...` as interactions.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def ids(data: Dataset, split: str) -> list[list[str]]:
    """The sessions of a split as lists of item ids."""
    names = data.items["item_id"].to_list()
    sessions = data.split(split)
    return [[names[row] for row in sessions[i]] for i in range(len(sessions))]


def run(tmp_path: Path, source: str = "generic", raw: Path | None = None, **options):
    summary = prepare(source, raw or tmp_path / "raw", tmp_path / "out", **options)
    return summary, Dataset.load(tmp_path / "out")


def fails(tmp_path: Path, message: str, source: str = "generic", raw: Path | None = None, **options) -> None:
    with pytest.raises(DataError, match=message):
        prepare(source, raw or tmp_path / "raw", tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))] == []


# -- generic


def test_ids_stay_strings_columns_come_in_any_order_and_rows_are_sorted_by_time(tmp_path):
    text = "timestamp,extra,item_id,session_id\n30,x,00123,007\n10,x,123,007\n20,x,1e5,007\n20,x,1E5,007\n5,x,9,b\n6,x,123,b\n"
    put(tmp_path / "raw", interactions__csv=text, items__csv="title,item_id\nOne,123\nOther,00123\nUnused,zzz\n")
    summary, data = run(tmp_path, **NO_HOLDOUT)
    assert ids(data, "train") == [["9", "123"], ["123", "1e5", "1E5", "00123"]]  # by last time; ties in file order
    assert data.items.rows() == [("123", "One"), ("00123", "Other"), ("1e5", None), ("1E5", None), ("9", None)]
    assert data.train.items.dtype == np.int32 and data.train.offsets.dtype == np.int64
    assert summary.notes["items that the item table lacks"] == 3
    assert summary.notes["items with no text"] == 3
    assert "3 items with no text" in str(summary) and "2 train sessions, 6 interactions" in str(summary)


def test_catalog_all_adds_the_rest_of_the_item_table(tmp_path):
    put(tmp_path / "raw", interactions__csv=SIX, items__csv="item_id,title\nzzz,Z\ni1,One\n")
    _, few = run(tmp_path)
    assert few.items["item_id"].to_list() == ["i1", "i0", "i2", "i3"]
    _, every = run(tmp_path, catalog="all", overwrite=True)
    assert every.items["item_id"].to_list() == ["zzz", "i1", "i0", "i2", "i3"]
    assert ids(every, "train") == ids(few, "train")


def test_splits_by_time_take_the_latest_sessions(tmp_path):
    rows = [(f"s{s}", f"i{i}", (100 - s) * 10 + i) for s in range(20) for i in range(2)]
    pl.DataFrame(rows, schema=["session_id", "item_id", "timestamp"], orient="row").write_csv(
        put(tmp_path / "raw") / "interactions.csv"
    )
    summary, data = run(tmp_path)
    assert summary.sessions == {"train": 14, "validation": 2, "test": 4}
    assert summary.split == "by time"
    assert data.info["sessions"] == summary.sessions and data.info["source"] == "generic"


def test_time_of_a_session_is_its_last_interaction_and_ties_keep_file_order(tmp_path):
    text = HEADER + "long,a,1\nlong,b,99\nearly,c,2\nearly,d,3\ntie1,e,50\ntie1,f,60\ntie2,g,59\ntie2,h,60\n"
    put(tmp_path / "raw", interactions__csv=text)
    _, data = run(tmp_path, validation_fraction=0.25, test_fraction=0.25)
    assert ids(data, "train") == [["c", "d"], ["e", "f"]]
    assert ids(data, "validation") == [["g", "h"]]
    assert ids(data, "test") == [["a", "b"]]


def test_splits_as_given(tmp_path):
    text = "session_id,item_id,timestamp,split\n" + "".join(
        f"{s},{i},{t},{split}\n"
        for s, split, t in (("a", "test", 1), ("b", "train", 9), ("c", "validation", 5))
        for i in "xy"
    )
    put(tmp_path / "raw", interactions__csv=text)
    summary, _ = run(tmp_path)
    assert summary.sessions == {"train": 1, "validation": 1, "test": 1} and summary.split == "as given"

    put(tmp_path / "raw", interactions__csv=text + "a,z,2,train\n")
    fails(tmp_path, r"interactions\.csv, line 8: session 'a' is in split train here and in test", overwrite=True, raw=None) \
        if not (tmp_path / "out").exists() else None
