"""`prepare` whatever the source: order, splits, catalog, counts, and what stands in its way."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alterrec_fast.data.prepare import prepare
from alterrec_fast.data.readers import READERS
from alterrec_fast.data.sessions import DataError, Dataset

from .readers.common import HEADER, NO_HOLDOUT, SIX, fails, ids, put, run


def test_ids_stay_strings_columns_come_in_any_order_and_rows_are_sorted_by_time(tmp_path):
    text = "timestamp,extra,item_id,session_id\n30,x,00123,007\n10,x,123,007\n20,x,1e5,007\n20,x,1E5,007\n"
    text += "5,x,9,b\n6,x,123,b\n"
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
    fails(tmp_path, r"interactions\.csv, line 8: session 'a' is in split train here and in test before")
    put(tmp_path / "raw", interactions__csv=text + "d,z,2,valid\n")
    fails(tmp_path, r"line 8: split is 'valid', expected train, validation, test")
    put(tmp_path / "raw", interactions__csv=text + "d,z,2,\n")
    fails(tmp_path, r"line 8: split is None")
    put(tmp_path / "raw", interactions__csv=text.replace("train", "test"))
    fails(tmp_path, "no sessions are left for training; 3 sessions, split as given")


def test_every_row_left_out_is_counted(tmp_path):
    text = HEADER + "a,x,1\na,x,1\na,x,2\n,y,3\nb,,4\nb,y,5\n\nc,u,6\nc,v,6\n" + '"",y,not even a time\n'
    put(tmp_path / "raw", interactions__csv=text, items__csv="item_id,title\nx,One\nx,Two\n,None\nu, \nv,\n")
    summary, data = run(tmp_path, **NO_HOLDOUT)
    assert ids(data, "train") == [["x", "x"], ["u", "v"]]  # a repeat at another time is no duplicate
    assert summary.read == {"interaction rows": 10}
    assert summary.left_out == {
        "rows with no session or item id": 4,
        "item table rows with no item id": 1,
        "item table rows that repeat an item id": 1,
        "rows equal to an earlier one in all columns": 1,
        "sessions of one item": 1,
    }
    assert summary.notes["items with no text"] == 2 and data.items["title"].to_list() == ["One", None, None]
    for line in ("4 rows with no session or item id: left out", "1 sessions of one item: left out"):
        assert line in str(summary)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["left_out"] == summary.left_out


def test_bad_places_and_arguments(tmp_path):
    fails(tmp_path, "raw: no such file or folder")
    put(tmp_path / "raw", notes__txt="x")
    fails(tmp_path, r"expected interactions\.csv or interactions\.csv\.gz or interactions\.parquet, found notes\.txt")
    put(tmp_path / "raw", interactions__csv=SIX, interactions__parquet="x")
    fails(tmp_path, r"both interactions\.csv and interactions\.parquet are here")
    (tmp_path / "raw" / "interactions.parquet").unlink()
    fails(tmp_path, "no source 'netflix'; choose from generic, amazon-m2, online-retail, recbole", source="netflix")
    fails(tmp_path, "locale and test file are for amazon-m2 alone", locale="UK")
    for wrong in ({"catalog": "some"}, {"test_fraction": 1.0}, {"validation_fraction": -0.1}, {"test_fraction": 0.95}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            prepare("generic", tmp_path / "raw", tmp_path / "failed", **wrong)
    with pytest.raises(DataError, match="holds the raw files"):
        prepare("generic", tmp_path / "raw", tmp_path, overwrite=True)
    run(tmp_path)
    with pytest.raises(DataError, match="--overwrite"):
        prepare("generic", tmp_path / "raw", tmp_path / "out")
    before = ids(Dataset.load(tmp_path / "out"), "train")
    put(tmp_path / "raw", interactions__csv=SIX + "a,x,broken")
    with pytest.raises(DataError, match="line 14"):
        prepare("generic", tmp_path / "raw", tmp_path / "out", overwrite=True)
    assert ids(Dataset.load(tmp_path / "out"), "train") == before  # a failed overwrite keeps the old data


rows = st.lists(
    st.tuples(st.sampled_from(["", "s", "00", "é"]), st.sampled_from(["", "a", "b", "0", "00"]), st.integers(0, 4)),
    max_size=40,
)


@given(rows=rows)
@settings(max_examples=60, deadline=None)
def test_against_a_plain_python_reading(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("case")
    frame = pl.DataFrame(rows, schema={"session_id": str, "item_id": str, "timestamp": int}, orient="row")
    frame.write_csv(put(folder / "raw") / "interactions.csv")
    sessions: dict[str, list[tuple[int, str]]] = {}
    for session, item, time in rows:
        if session and item and (time, item) not in sessions.setdefault(session, []):
            sessions[session].append((time, item))
    kept = [sorted(session, key=lambda row: row[0]) for session in sessions.values() if len(session) > 1]
    kept.sort(key=lambda session: session[-1][0])
    if not kept:
        fails(folder, "no session of two or more items")
        return
    summary, data = run(folder, **NO_HOLDOUT)
    assert ids(data, "train") == [[item for _, item in session] for session in kept]
    assert sum(summary.left_out.values()) + sum(summary.interactions.values()) == len(rows)


def test_every_source_has_tests_of_its_own():
    folder = Path(__file__).parent / "readers"
    assert all((folder / f"test_{source.replace('-', '_')}.py").is_file() for source in READERS)
