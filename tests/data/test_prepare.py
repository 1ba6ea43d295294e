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
        prepare(source, raw or tmp_path / "raw", tmp_path / "failed", **options)
    assert not [path for path in tmp_path.iterdir() if "failed" in path.name]  # nothing, not even a draft


# -- generic


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
        "exact duplicate rows (session, item, timestamp)": 1,
        "sessions of one item": 1,
    }
    assert summary.notes["items with no text"] == 2 and data.items["title"].to_list() == ["One", None, None]
    for line in ("4 rows with no session or item id: left out", "1 sessions of one item: left out"):
        assert line in str(summary)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["left_out"] == summary.left_out


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
    table = pl.DataFrame({"item_id": [0, 1], "price": [1.5, None], "tags": [["a"], []]})
    table.write_parquet(tmp_path / "raw" / "items.parquet")
    fails(tmp_path, r"items\.parquet, column tags: List\(String\) is no text")
    _, data = run(tmp_path, text_columns=["price"], overwrite=True)
    assert set(data.items["price"]) == {None}  # item 0 is not i0


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_paths_are_no_patterns(tmp_path, kind):
    frame = pl.DataFrame({"session_id": ["s"] * 2, "item_id": ["a", "b"], "timestamp": [1, 2]})
    getattr(frame, f"write_{kind}")(put(tmp_path / "raw [1]*") / f"interactions.{kind}")
    _, data = run(tmp_path, raw=tmp_path / "raw [1]*", **NO_HOLDOUT)
    assert ids(data, "train") == [["a", "b"]]


def test_gzip_gives_the_same_as_plain_text(tmp_path):
    put(tmp_path / "raw", interactions__csv=SIX)
    summary, data = run(tmp_path)
    (tmp_path / "raw" / "interactions.csv").unlink()
    put(tmp_path / "raw", interactions__csv__gz=gzip.compress(SIX.encode()))
    again, same = run(tmp_path, overwrite=True)
    assert again == summary and [ids(same, name) for name in SPLITS] == [ids(data, name) for name in SPLITS]


LONG = HEADER + "".join(f"s{i // 4},i{i},{i}\n" for i in range(40_000))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"interactions\.csv: the file is empty"),
        (b"\n\n", r"interactions\.csv: the file is empty"),
        (HEADER, r"no session of two or more items; 0 interaction rows read"),
        (HEADER + "a,x,1\nb,y,2\n", r"no session of two or more items; .* 2 sessions of one item left out"),
        (HEADER + "a,x,1\na,y,2\n", r"no sessions are left for training; 1 sessions, split by time"),
        ("session_id,item,timestamp\na,x,1\n", r"column item_id is missing; found session_id, item, timestamp"),
        (HEADER + "a,x,1\na,y\n", r"interactions\.csv, line 3: timestamp is None, expected Unix seconds or a date"),
        (HEADER + "a,x,1\na,y,yesterday\n", r"interactions\.csv, line 3: timestamp is 'yesterday'"),
        (HEADER + "a,x,2020-01-01\na,y,17\n", r"interactions\.csv, line 3: timestamp is '17'"),
        (HEADER + "a,x,1.5\na,y,inf\n", r"interactions\.csv, line 3: timestamp is 'inf'"),
        (HEADER + 'a,"x\ny",1\n\n,z,\na,y,?\n', r"interactions\.csv, line 6: timestamp is '\?'"),
        (HEADER + "a,x,1\na,y,2,3\n", r"interactions\.csv, line 3: 4 fields, but the header has 3"),
        ("a,b," + HEADER + "1,2,a,x,1\n1,2,a,y,2,3\n", r"line 3: 6 fields, but the header has 5"),
        (HEADER + 'a,x,1\na,"y,2\nb,z,3\n', r"interactions\.csv, after line 2: .*are the quotes balanced"),
        (HEADER.encode() + b"a,x,1\na,caf\xe9,2\n", r"line 3: byte 0xe9 at column 6 is not UTF-8; .*iconv"),
        (HEADER.encode() + b"a,x,1,\xe9\n", r"interactions\.csv, line 2: byte 0xe9 at column 7 is not UTF-8"),
        (b"caf\xe9," + HEADER.encode() + b"1,a,x,1\n", r"interactions\.csv, line 1: byte 0xe9"),
        (LONG.encode() + b"s,\xff,1\n", r"interactions\.csv, line 40002: byte 0xff"),
        (LONG + "s,x,never\n", r"interactions\.csv, line 40002: timestamp is 'never'"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_files_are_errors_with_file_and_line(tmp_path, content, message, packed):
    data = content.encode() if isinstance(content, str) else content
    if packed:
        put(tmp_path / "raw", interactions__csv__gz=gzip.compress(data))
        message = message.replace(r"\.csv", r"\.csv\.gz")
    else:
        put(tmp_path / "raw", interactions__csv=data)
    fails(tmp_path, message)


def test_a_header_of_any_length_is_read_from_gzip(tmp_path):
    names = [f"a column with a long name {i}" for i in range(4_000)]  # 100 kB
    quoted = '"a name\nof two lines",' + ",".join(f'"{name}"' for name in names)
    table = f"\nitem_id,{quoted}\n" + "".join(f"i{i},{'x,' * 4_000}y\n" for i in range(4))
    put(tmp_path / "raw", interactions__csv=SIX, items__csv__gz=gzip.compress(table.encode()))
    _, data = run(tmp_path, text_columns=[names[-1]])
    assert data.text_columns == [names[-1]]
    assert data.items[names[-1]].to_list() == ["y"] * 4


def test_damaged_gzip(tmp_path):
    data = gzip.compress(LONG.encode())
    for size in (len(data) // 2, len(data) - 4):
        put(tmp_path / "raw", interactions__csv__gz=data[:size])
        fails(tmp_path, r"interactions\.csv\.gz, line \d+: the gzip data ends early or is damaged")
    put(tmp_path / "raw", interactions__csv__gz=data[: len(data) // 2] + b"\0\1\2\3" * 9 + data[len(data) // 2 + 36 :])
    fails(tmp_path, r"interactions\.csv\.gz, line \d+: the gzip data ends early or is damaged")
    put(tmp_path / "raw", interactions__csv__gz=LONG)
    fails(tmp_path, r"interactions\.csv\.gz, line 1: the gzip data ends early or is damaged \(Not a gzipped file")


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


# -- amazon-m2

PRODUCTS = (
    "id,locale,title,price,brand,color,size,model,material,author,desc\n"
    'B1,UK,"Mug, ""blue""",1.5,Acme,,,,,,A mug\nB1,DE,Becher,2,Acme,,,,,,\nB2,UK,Tea,3,,,,,,,"two\nlines"\n'
)


def m2(folder: Path, count: int = 50, name: str = "sessions_train__csv", **files: str) -> Path:
    lines = ["next_item,locale,prev_items"]  # any column order
    for i in range(count):
        lines.append(f"B{i},UK,\"['A{i}' 'B1'\n 'B2']\"")
        lines.append(f"C{i},DE,\"['B1']\"")
    return put(folder, **{name: "\n".join(lines) + "\n", "products_train__csv": PRODUCTS, **files})


def test_amazon_m2_splits_in_file_order(tmp_path):
    m2(tmp_path / "raw")
    summary, data = run(tmp_path, "amazon-m2", locale="UK")
    assert summary.sessions == {"train": 36, "validation": 4, "test": 10}  # 10% of the 40 that test leaves
    assert ids(data, "train")[0] == ["A0", "B1", "B2", "B0"]
    assert ids(data, "validation")[0][0] == "A36" and ids(data, "test")[-1][0] == "A49"
    assert summary.left_out["sessions of other locales"] == 50 and summary.split == "by file order"
    assert data.text_columns == ["title", "desc"]
    assert data.items.rows()[:2] == [("B1", 'Mug, "blue"', "A mug"), ("B2", "Tea", "two\nlines")]
    _, data = run(tmp_path, "amazon-m2", locale="DE", text_columns=["brand"], overwrite=True)
    assert data.items.row(0) == ("B1", "Acme")


def test_amazon_m2_test_file(tmp_path):
    m2(tmp_path / "raw", 20)
    test = m2(tmp_path / "more", 3, "test__csv") / "test.csv"
    summary, data = run(tmp_path, "amazon-m2", locale="UK", test=test, raw=tmp_path / "raw" / "sessions_train.csv")
    assert summary.sessions == {"train": 18, "validation": 2, "test": 3}
    assert ids(data, "test")[0] == ["A0", "B1", "B2", "B0"] and summary.read["test session rows"] == 6
    assert summary.split == "by file order, test as given"


def test_amazon_m2_oddities(tmp_path):
    odd = "prev_items,next_item,locale\n\"['A'\n 'B']\",C,UK\n[],C,UK\n['A' ... 'B'],C,UK\n['A' 'B'],,UK\n['A'],B,UK\n"
    put(tmp_path / "raw", sessions_train__csv=odd, products_train__csv=PRODUCTS)
    summary, data = run(tmp_path, "amazon-m2", locale="UK", **NO_HOLDOUT)
    assert ids(data, "train") == [["A", "B", "C"], ["A", "B"], ["A", "B"]]
    assert summary.left_out["sessions whose prev_items are printed abridged (...)"] == 1
    assert summary.left_out["sessions of one item"] == summary.left_out["rows with no session or item id"] == 1
    fails(tmp_path, r"sessions_train\.csv: no locale FR; found UK", "amazon-m2", locale="FR")
    fails(tmp_path, r"sessions_train\.csv: no locale was given \(--locale\); found UK", "amazon-m2")
    put(tmp_path / "raw", sessions_train__csv=odd + '"A B",C,UK\n')
    fails(
        tmp_path,
        r"sessions_train\.csv, line 8: prev_items is 'A B', expected a printed array",
        "amazon-m2",
        locale="UK",
    )
    put(tmp_path / "raw", sessions_train__csv=odd, products_train__csv="id,title\nB1,x\n")
    fails(tmp_path, r"products_train\.csv: column locale is missing; found id, title", "amazon-m2", locale="UK")
    (tmp_path / "raw" / "products_train.csv").unlink()
    fails(tmp_path, r"expected products_train\.csv or products_train\.csv\.gz", "amazon-m2", locale="UK")


# -- online-retail

RETAIL = ["InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country"]
INVOICES = [
    (536366, "22423", " Cake Stand ", 1, datetime(2010, 12, 1, 9, 0), 2.5),
    (536366, "85123A", None, 1, datetime(2010, 12, 1, 9, 0), 2.5),
    (536365, "85123A", "HEART", 6, datetime(2010, 12, 1, 8, 26), 2.55),
    (536365, "POST", "POSTAGE", 1, datetime(2010, 12, 1, 8, 26), 18.0),
    (536365, "71053", "LANTERN", 6, datetime(2010, 12, 1, 8, 26), 3.39),
    (536365, "85123A", "white heart", 1, datetime(2010, 12, 1, 8, 26), 2.55),
    ("C536379", "22423", "CAKE STAND", -1, datetime(2010, 12, 1, 9, 41), 2.5),
    (536367, "22423", "CAKE STAND", 1, datetime(2010, 12, 1, 10, 0), 2.5),
    (536367, "85123A", "white heart", 2, datetime(2010, 12, 1, 10, 0), 2.5),
    (536367, "71053", "damaged", -9, datetime(2010, 12, 1, 10, 0), 0.0),
    (536367, "gift_0001_20", "Gift", 1, datetime(2010, 12, 1, 10, 0), 20.0),
    (None, "71053", "LANTERN", 1, datetime(2010, 12, 1, 10, 0), 3.0),
    (536368, "71053", None, 1, datetime(2010, 12, 1, 10, 1), 3.0),
]


def retail_csv(date: str) -> str:
    def cell(value: object) -> str:
        return "" if value is None else value.strftime(date) if isinstance(value, datetime) else str(value)

    return "\n".join([",".join(RETAIL), *(",".join([*map(cell, row), "17850", "UK"]) for row in INVOICES)]) + "\n"


def retail_xlsx(path: Path, sheets: dict[str, list[tuple]], header: list[str] = RETAIL) -> None:
    xlsxwriter = pytest.importorskip("xlsxwriter")
    with xlsxwriter.Workbook(path) as book:
        dates = book.add_format({"num_format": "m/d/yy h:mm"})
        for name, rows in sheets.items():
            sheet = book.add_worksheet(name)
            sheet.write_row(0, 0, header)
            for i, row in enumerate(rows, 1):
                for j, value in enumerate([*row, 17850, "UK"]):
                    if isinstance(value, datetime):
                        sheet.write_datetime(i, j, value, dates)
                    elif value is not None:
                        sheet.write(i, j, int(value) if j == 1 and str(value).isdigit() else value)


def check_retail(summary, data: Dataset, cancelled: int = 1) -> None:
    assert ids(data, "train") == [["85123A", "71053"], ["22423", "85123A"], ["22423", "85123A"]]
    assert data.items.rows() == [("22423", "Cake Stand"), ("85123A", "white heart"), ("71053", "LANTERN")]
    assert summary.left_out == {
        "rows with no session or item id": 1,
        "rows of cancelled invoices": 1,
        "rows whose stock code is no product": 2,
        "rows with a quantity or price of zero or less": 1,
        "repeats of an item within an invoice": 1,
        "item table rows with no item id": 0,
        "item table rows that repeat an item id": 0,
        "exact duplicate rows (session, item, timestamp)": 0,
        "sessions of one item": 1,
    }
    assert summary.read == {"invoice rows": 13}


@pytest.mark.parametrize("date", ["%-m/%-d/%Y %-H:%M", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S"])
def test_online_retail_csv(tmp_path, date):
    put(tmp_path / "raw", data__csv=retail_csv(date))
    check_retail(*run(tmp_path, "online-retail", **NO_HOLDOUT))


def test_online_retail_xlsx(tmp_path):
    pytest.importorskip("fastexcel")
    retail_xlsx(put(tmp_path / "raw") / "Online Retail.xlsx", {"Online Retail": INVOICES})
    check_retail(*run(tmp_path, "online-retail", **NO_HOLDOUT))


def test_online_retail_second_edition_has_two_sheets_and_other_names(tmp_path):
    pytest.importorskip("fastexcel")
    header = ["Invoice", *RETAIL[1:5], "Price", "Customer ID", "Country"]
    file = put(tmp_path / "raw") / "online_retail_II.xlsx"
    retail_xlsx(file, {"Year 2009-2010": INVOICES[:2], "Year 2010-2011": INVOICES[2:]}, header)
    check_retail(*run(tmp_path, "online-retail", raw=file, **NO_HOLDOUT))
    broken = [*INVOICES[2:], (536369, "22423", "CAKE STAND", "many", datetime(2010, 12, 1), 1.0)]
    retail_xlsx(file, {"Year 2009-2010": INVOICES[:2], "Year 2010-2011": broken}, header)
    fails(tmp_path, r"sheet 'Year 2010-2011', row 13: Quantity is 'many', expected a number", "online-retail")
    retail_xlsx(file, {"Sheet": INVOICES}, ["Nr", *RETAIL[1:]])
    fails(tmp_path, r"sheet 'Sheet': column InvoiceNo is missing; found Nr, StockCode", "online-retail")
    file.write_bytes(file.read_bytes()[:100])
    fails(tmp_path, r"online_retail_II\.xlsx: not a readable Excel file", "online-retail")


def test_online_retail_errors(tmp_path, monkeypatch):
    put(tmp_path / "raw", data__csv=retail_csv("%d. %m. %Y"))
    fails(tmp_path, r"data\.csv, line 2: InvoiceDate is '01\. 12\. 2010'", "online-retail")
    put(tmp_path / "raw", data__csv=retail_csv("%Y-%m-%d").replace("2.55", "cheap"))
    fails(tmp_path, r"data\.csv, line 4: UnitPrice is 'cheap', expected a number", "online-retail")
    put(tmp_path / "raw", data__csv=retail_csv("%Y-%m-%d").replace("2.55", "nan"))
    fails(tmp_path, r"data\.csv, line 4: UnitPrice is 'nan', expected a number", "online-retail")
    put(tmp_path / "raw", data__csv=retail_csv("%Y-%m-%d").encode().replace(b"HEART", b"\xa3 HEART"))
    fails(tmp_path, r"data\.csv, line 4: byte 0xa3 .* is not UTF-8", "online-retail")
    fails(tmp_path, r"no text column Country; found title", "online-retail", text_columns=["Country"])
    put(tmp_path / "raw", other__xlsx="x")
    fails(tmp_path, r"expected one xlsx or csv file, found data\.csv, other\.xlsx", "online-retail")

    load = builtins.__import__

    def without_fastexcel(name: str, *rest: object) -> object:
        if name == "fastexcel":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_fastexcel)
    excel = tmp_path / "raw" / "other.xlsx"
    fails(tmp_path, r'needs fastexcel: pip install "alterrec-fast\[excel\]"', "online-retail", raw=excel)


# -- recbole

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = 'item_id:token\ttitle:token_seq\tprice:float\tbrand:token\n1\tA "fine" mug\t3.5\tAcme\n2\t\t1\t\n'


def test_recbole_long_form(tmp_path):
    text = INTER + "u1\t2\t5\t20\nu1\t1\t4\t1e1\nu2\t1\t3\t5\nu2\t3\t3\t6.5\nu3\t1\t1\t1\n"
    put(tmp_path / "raw", **{"ml.inter": text, "ml.item": ITEM, "ml.user": "user_id:token\n"})
    summary, data = run(tmp_path, "recbole", **NO_HOLDOUT)
    assert ids(data, "train") == [["1", "3"], ["1", "2"]]
    assert data.items.rows() == [("1", 'A "fine" mug', "Acme"), ("2", None, None), ("3", None, None)]
    assert summary.left_out["sessions of one item"] == 1 and summary.notes["items with no text"] == 2
    fails(tmp_path, r"ml\.item: no text column price; found title, brand", "recbole", text_columns=["price"])


def test_recbole_benchmark_files_are_splits_as_given(tmp_path):
    def part(*users: str) -> str:
        return INTER + "".join(f"{user}\t{i}\t1\t{i}\n" for user in users for i in (1, 2))

    files = {"d.train.inter": part("a", "b"), "d.valid.inter": part("c"), "d.test.inter": part("d")}
    put(tmp_path / "raw", **files)
    summary, data = run(tmp_path, "recbole")
    assert summary.sessions == {"train": 2, "validation": 1, "test": 1} and summary.split == "as given"
    _, same = run(tmp_path, "recbole", raw=tmp_path / "raw" / "d.train.inter", overwrite=True)
    assert [ids(same, name) for name in SPLITS] == [ids(data, name) for name in SPLITS]

    put(tmp_path / "raw", **{"d.inter": part("z", "w", "v"), "d.v2.inter": part("z")})  # a file named chooses
    summary, _ = run(tmp_path, "recbole", raw=tmp_path / "raw" / "d.inter", overwrite=True)
    assert summary.split == "by time"
    for extra in ("d.inter", "d.v2.inter"):
        fails(tmp_path, "name a file to choose among several", "recbole")
        (tmp_path / "raw" / extra).unlink()

    put(tmp_path / "raw", **{"d.test.inter": part("d", "a")})
    fails(tmp_path, r"d\.test\.inter, line 4: session 'a' is in split test here and in train before", "recbole")
    put(tmp_path / "raw", **{"d.test.inter": part("d")})
    (tmp_path / "raw" / "d.valid.inter").unlink()
    summary, _ = run(tmp_path, "recbole", overwrite=True)
    assert summary.sessions == {"train": 1, "validation": 1, "test": 1}
    assert summary.split == "by time, test as given"
    (tmp_path / "raw" / "d.train.inter").unlink()
    fails(tmp_path, r"expected NAME\.inter, or NAME\.train\.inter", "recbole")


def test_recbole_sequences_keep_the_longest_row_of_a_session(tmp_path):
    text = "session_id:token\titem_id_list:token_seq\titem_id:token\n"
    text += "1\ta\tb\n1\ta b\tc\n1\ta b c\td\n2\tx\ty\n3\t\tz\n4\tx\t\n"
    put(tmp_path / "raw", **{"d.inter": text})
    summary, data = run(tmp_path, "recbole", **NO_HOLDOUT)
    assert ids(data, "train") == [["a", "b", "c", "d"], ["x", "y"]]
    assert summary.left_out["shorter rows of a session (prefixes)"] == 2
    assert summary.left_out["sessions of one item"] == summary.left_out["rows with no session or item id"] == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.inter": INTER, "b.inter": INTER}, r"expected NAME\.inter, .*found a\.inter, b\.inter; name a file"),
        ({"a.inter": INTER, "a.train.inter": INTER}, r"expected NAME\.inter, .*name a file"),
        ({"x.txt": ""}, r"expected NAME\.inter, .*found x\.txt"),
        ({"a.inter": ""}, r"a\.inter: the file is empty"),
        ({"a.inter": "user_id\titem_id:token\n"}, r"a\.inter, line 1: column 'user_id' has no type"),
        ({"a.inter": "user_id:token\ttimestamp:float\n"}, r"column item_id is missing; found user_id, timestamp"),
        ({"a.inter": "item_id:token\ttimestamp:float\n"}, r"column session_id or user_id is missing; found item_id"),
        ({"a.inter": INTER + "u\t1\t1\t5\nu\t2\t1\tx\n"}, r"a\.inter, line 3: timestamp is 'x'"),
        ({"a.inter": INTER + "u\t1\t1\t5\t9\n"}, r"a\.inter, line 2: 5 fields, but the header has 4"),
        ({"a.train.inter": INTER, "a.test.inter": "user_id:token\titem_id:token\n"}, r"must be in all \.inter files"),
    ],
)
def test_recbole_errors(tmp_path, files, message):
    put(tmp_path / "raw", **files)
    fails(tmp_path, message, "recbole")


def test_every_source_is_tested_here():
    assert list(READERS) == ["generic", "amazon-m2", "online-retail", "recbole"]
