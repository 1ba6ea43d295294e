"""The generic tables: types of Parquet and CSV, times, text columns, places."""

from datetime import datetime

import polars as pl
import pytest

from .common import HEADER, NO_HOLDOUT, SIX, fails, ids, put, run


@pytest.mark.parametrize(
    "times",
    [
        ["3", "1", "2"],
        ["3.5", "1", "2.25"],
        ["1.2e9", "-1", "0"],
        ["2010-12-01 08:26:01", "2010-12-01T08:26:00Z", "2010-12-01T09:26:00.5+01:00"],
        ["2010-12-03", "2010-12-01", "2010-12-01 08:26"],
    ],
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_times_may_be_numbers_or_iso(tmp_path, times, kind):
    frame = pl.DataFrame({"session_id": ["s"] * 3, "item_id": ["c", "a", "b"], "timestamp": times})
    getattr(frame, f"write_{kind}")(put(tmp_path / "raw") / f"interactions.{kind}")
    _, data = run(tmp_path, **NO_HOLDOUT)
    assert ids(data, "train") == [["a", "b", "c"]]


def test_parquet_types(tmp_path):
    frame = pl.DataFrame(
        {
            "session_id": [1, 1, 2, 2],
            "item_id": pl.Series(["b", "a", "a", "b"], dtype=pl.Categorical),
            "timestamp": [datetime(2020, 1, day) for day in (2, 1, 3, 4)],
        }
    )
    file = put(tmp_path / "raw") / "interactions.parquet"
    frame.write_parquet(file)
    _, data = run(tmp_path, raw=file, **NO_HOLDOUT)  # RAW may be the file itself
    assert ids(data, "train") == [["a", "b"], ["a", "b"]]
    assert data.text_columns == [] and data.items.columns == ["item_id"]

    frame.with_columns(pl.col("session_id").cast(pl.Float64)).write_parquet(file)
    fails(tmp_path, r"column session_id: ids must be strings or integers, found Float64")
    frame.with_columns(pl.lit(True).alias("timestamp")).write_parquet(file)
    fails(tmp_path, r"column timestamp: expected times, found Boolean")
    frame.with_columns(pl.Series("timestamp", [1.0, 2.0, float("nan"), 4.0])).write_parquet(file)
    fails(tmp_path, r"interactions\.parquet, row 3: timestamp is nan")
    file.write_bytes(file.read_bytes()[:-10])
    fails(tmp_path, r"interactions\.parquet: not a readable Parquet file")


def test_text_columns(tmp_path):
    items = "item_id,title,brand,price\ni0, Mug ,Acme,3\ni1,,Acme,4\n"
    put(tmp_path / "raw", interactions__csv=SIX, items__csv=items)
    _, data = run(tmp_path)
    assert data.text_columns == ["title", "brand", "price"] and data.items["title"][0] == "Mug"
    _, data = run(tmp_path, text_columns=["brand"], overwrite=True)
    assert data.items.columns == ["item_id", "brand"]
    summary, data = run(tmp_path, text_columns=[], overwrite=True)
    assert data.items.columns == ["item_id"] and summary.notes["items with no text"] == 4
    fails(tmp_path, r"items\.csv: no text column colour; found title, brand, price", text_columns=["colour"])
    (tmp_path / "raw" / "items.csv").unlink()
    fails(tmp_path, r"no text column title; found none", text_columns=["title"])
    table = pl.DataFrame({"item_id": ["i0", "1"], "price": [1.5, None], "tags": [["a"], []]})
    table.write_parquet(tmp_path / "raw" / "items.parquet")
    fails(tmp_path, r"items\.parquet, column tags: List\(String\) is no text")
    summary, data = run(tmp_path, text_columns=["price"], overwrite=True)
    assert data.items["price"].to_list() == ["1.5", None, None, None]
    assert "lacks 3 of the 4 items of the interactions, such as 'i1', 'i2', 'i3'" in summary.warnings[0]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_paths_are_no_patterns(tmp_path, kind):
    frame = pl.DataFrame({"session_id": ["s"] * 2, "item_id": ["a", "b"], "timestamp": [1, 2]})
    getattr(frame, f"write_{kind}")(put(tmp_path / "raw [1]*") / f"interactions.{kind}")
    _, data = run(tmp_path, raw=tmp_path / "raw [1]*", **NO_HOLDOUT)
    assert ids(data, "train") == [["a", "b"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "latin99"}, "encoding is 'latin99', expected one that Python knows"),
        ({"encoding": "base64"}, "encoding is 'base64'"),
        ({"separator": ""}, "separator is '', expected one ASCII character or several"),
        ({"separator": '"'}, "expected one ASCII character or several, no quote"),
        ({"separator": "\n"}, "no line end"),
    ],
)
def test_encodings_and_separators_that_cannot_be(tmp_path, options, message):
    put(tmp_path / "raw", interactions__csv=SIX)
    fails(tmp_path, message, **options)


def test_files_of_a_pattern_with_different_columns(tmp_path):
    other = "session_id,item_id,timestamp,device\nt,b,7,phone\nt,a,8,phone\nt,a,8,tv\n"
    put(tmp_path / "raw", a__csv=HEADER + "s,a,1\ns,b,2\ns,b,2\n", b__csv=other)
    summary, data = run(tmp_path, raw=tmp_path / "raw" / "*.csv", **NO_HOLDOUT)
    assert ids(data, "train") == [["a", "b"], ["b", "a", "a"]]
    assert summary.left_out["rows equal to an earlier one in all columns"] == 1
    put(tmp_path / "raw", b__csv="session_id,item_id,timestamp,split\nt,b,7,train\nt,a,8,train\n")
    fails(tmp_path, r"b\.csv: column split is in some of the files", raw=tmp_path / "raw" / "*.csv")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"split": "fold"}, "column fold is missing"),
        ({"item_id": "session_id"}, "session_id and item_id are both column session_id"),
        ({"order": "row"}, "order is column row, a name with a meaning of its own"),
        ({"timestamp": "others"}, "timestamp is column others"),
    ],
)
def test_columns_that_are_named_wrongly(tmp_path, columns, message):
    rows = "s,a,1,1,1\ns,b,2,2,2\n"
    put(tmp_path / "raw", interactions__csv="session_id,item_id,timestamp,row,others\n" + rows)
    fails(tmp_path, message, columns=columns)


def test_an_item_table_whose_ids_are_in_another_column(tmp_path):
    ratings = "".join(f"{user}::00{item}::5::{item}\n" for user in "uv" for item in range(1, 4))
    put(tmp_path / "raw", **{"ratings.dat": ratings, "movies.dat": "003::Heat (1995)::Crime\n001::Caf\u00e9::Drama\n"})
    names = {"item_id": "2", "timestamp": "4", "items.item_id": "1"}
    _, data = run(
        tmp_path, raw=tmp_path / "raw" / "ratings.dat", items=tmp_path / "raw" / "movies.dat", has_header=False,
        separator="::", columns=names, user_column="1", session_per="user", text_columns=["2"], **NO_HOLDOUT,
    )  # fmt: skip
    assert data.items.rows() == [("003", "Heat (1995)"), ("001", "Caf\u00e9"), ("002", None)]
