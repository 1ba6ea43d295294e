"""What is an id and what is none, ids that two files write differently, repeated rows, and text that says nothing."""

import polars as pl
import pytest

from alterrec_fast.data.readers.values import MISSING

from .common import HEADER, NO_HOLDOUT, fails, ids, put, run

INTER = "session_id:token\titem_id:token\n"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_spellings_of_a_missing_value_are_no_ids_and_no_text(tmp_path, kind):
    rows = [("s", "a"), ("s", "b"), *((missing, "a") for missing in MISSING), *(("s", missing) for missing in MISSING)]
    rows += [("s", " nan "), ("  ", "b"), (None, "b")]
    frame = pl.DataFrame(rows, schema=["session_id", "item_id"], orient="row").with_row_index("timestamp")
    getattr(frame, f"write_{kind}")(put(tmp_path / "raw") / f"interactions.{kind}")
    items = pl.DataFrame(
        {"item_id": ["a", "nan", "b"], "title": ["NULL", "x", "Nan bread"], "price": [1.5, 2, float("nan")]}
    )
    getattr(items, f"write_{kind}")(tmp_path / "raw" / f"items.{kind}")
    summary, data = run(tmp_path, **NO_HOLDOUT)
    assert ids(data, "train") == [["a", "b"]]
    assert summary.left_out["rows with no session or item id"] == 2 * len(MISSING) + 3
    assert summary.left_out["item table rows with no item id"] == 1
    assert data.items.rows() == [("a", None, "1.5"), ("b", "Nan bread", None)]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("[1, 2, 3]", "list"),
        ("['a' 'b']", "list"),
        ('["a"]', "list"),
        ("[1. 2.]", "list"),
        ("[a, b]", "list"),
        ("[]", "list"),
        ("('a', 'b')", "list"),
        ("(1,)", "list"),
        ("{'a': 1}", "list"),
        ("array(['a'], dtype=object)", "list"),
        ("tensor([1, 2])", "list"),
        ("<Item object at 0x7f01>", "list"),
        ("[object Object]", "list"),
        ("[1\n 2]", "list"),
        ("1.23457E+12", "rounded number"),
        ("1,2E+15", "rounded number"),
        ("1.2345678901234568e+16", "rounded number"),
    ],
)
@pytest.mark.parametrize("source", ["generic", "recbole", "item table"])
def test_values_that_are_surely_no_ids(tmp_path, value, kind, source):
    quoted = '"' + value.replace('"', '""') + '"'
    message = rf"item_id is .*, a {'printed list or object' if kind == 'list' else kind}; expected one id"
    if source == "recbole" and "\n" not in value:
        put(tmp_path / "raw", **{"d.inter": f"{INTER}s\ta\ns\t{value}\n"})
        fails(tmp_path, rf"d\.inter, line 3: {message}", "recbole")
    elif source == "generic":
        put(tmp_path / "raw", interactions__csv=f"{HEADER}s,a,1\ns,{quoted},2\n")
        fails(tmp_path, rf"interactions\.csv, line 3: {message}")
        put(tmp_path / "raw", interactions__csv=f"{HEADER}{quoted},a,1\ns,b,2\n")
        fails(tmp_path, rf"interactions\.csv, line 2: {message.replace('item_id', 'session_id')}")
    else:
        put(
            tmp_path / "raw",
            interactions__csv=f"{HEADER}s,a,1\ns,b,2\n",
            items__csv=f"item_id,title\na,A\n{quoted},B\n",
        )
        fails(tmp_path, rf"items\.csv, line 3: {message}")


def test_strange_ids_that_are_ids(tmp_path):
    strange = [
        "007",
        "7",
        "1e5",
        "1E+5",
        "1.5e+05",
        "3.0",
        "a, b",
        "[deleted]",
        "{3F2504E0-4F89}",
        "(red)",
        "na",
        "Nan",
        " x",
        "-",
        "0",
    ]
    strange += ["(foo, bar)", "f(x)", "<b>", "12,5", "2010-12-01", "A\\B", "'a'"]
    frame = pl.DataFrame({"session_id": "s", "item_id": strange, "timestamp": range(len(strange))})
    frame.write_csv(put(tmp_path / "raw") / "interactions.csv")
    assert ids(run(tmp_path, **NO_HOLDOUT)[1], "train") == [strange]


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        (lambda value: f"00{value}", r"such as '001', '002', '003'; it has ids such as '1', '2', '3'; .*leading zeros"),
        (lambda value: f"{value}.0", r"most would match but for a decimal point"),
        (lambda value: f"{value} ", r"most would match but for blanks at the ends"),
        (lambda value: f"x{value}", r"it has ids such as '1', '2', '3'$"),
    ],
)
def test_ids_that_match_nothing_of_the_item_table(tmp_path, rewrite, message):
    def write(changed: int) -> None:
        rows = [f"s,{rewrite(i) if i <= changed else i},{i}\n" for i in range(1, 21)]
        items = "item_id,title\n" + "".join(f"{i},T\n" for i in range(1, 21))
        put(tmp_path / "raw", interactions__csv=HEADER + "".join(rows), items__csv=items)

    write(20)
    fails(tmp_path, rf"items\.csv: it lacks all 20 items of the interactions, .*{message}")
    write(3)
    summary, _ = run(tmp_path, **NO_HOLDOUT)
    (warning,) = summary.warnings
    assert "it lacks 3 of the 20 items of the interactions, such as" in warning and f"warning: {warning}" in str(
        summary
    )
    write(2)
    assert run(tmp_path, overwrite=True, **NO_HOLDOUT)[0].warnings == []


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_only_rows_equal_in_all_columns_are_duplicates(tmp_path, kind):
    rows = [("s", "a", "2020-01-01", "view"), ("s", "a", "2020-01-01", "buy"), ("s", "b", "2020-01-01", None)]
    rows += [("s", "a", "2020-01-01", "view"), ("s", "b", "2020-01-01", None), ("s", "b", "2020-01-02", None)]
    frame = pl.DataFrame(rows, schema=["session_id", "item_id", "timestamp", "action"], orient="row")
    if kind == "parquet":
        frame = frame.with_columns(pl.concat_list("action", "item_id").alias("list"))
    getattr(frame, f"write_{kind}")(put(tmp_path / "raw") / f"interactions.{kind}")
    summary, data = run(tmp_path, **NO_HOLDOUT)
    assert ids(data, "train") == [["a", "a", "b", "b"]]
    assert summary.left_out["rows equal to an earlier one in all columns"] == 2


def test_repeats_with_other_columns_in_recbole(tmp_path):
    text = "session_id:token\titem_id:token\ttimestamp:float\trating:float\n"
    put(tmp_path / "raw", **{"d.inter": text + "s\ta\t1\t5\ns\ta\t1\t4\ns\tb\t2\t5\ns\tb\t2\t5\n"})
    summary, data = run(tmp_path, "recbole", **NO_HOLDOUT)
    assert ids(data, "train") == [["a", "a", "b"]]
    assert summary.left_out["rows equal to an earlier one in all columns"] == 1


def test_item_tables_with_a_column_named_row(tmp_path):
    put(tmp_path / "raw", interactions__csv=f"{HEADER}s,a,1\ns,b,2\n", items__csv="item_id,row\na,1\nb,2\n")
    put(tmp_path / "raw", **{"d.inter": f"{INTER}s\ta\ns\tb\n", "d.item": "item_id:token\trow:token\na\t1\nb\t2\n"})
    put(tmp_path / "raw", sessions_train__csv="prev_items,next_item,locale\n['a'],b,UK\n")
    put(tmp_path / "raw", products_train__csv="id,locale,row\na,UK,1\nb,UK,2\n")
    for source, options in (("generic", {}), ("recbole", {}), ("amazon-m2", {"locale": "UK", "text_columns": ["row"]})):
        _, data = run(tmp_path, source, overwrite=True, **options, **NO_HOLDOUT)
        assert data.items.rows() == [("a", "1"), ("b", "2")] and data.text_columns == ["row"]


def test_times_that_a_float_cannot_tell_apart(tmp_path):
    for times in (("1700000000000000002", "1700000000000000001", "1.5"), ("9" * 20, "9" * 19 + "8", "1")):
        rows = "".join(f"s,{item},{time}\n" for item, time in zip("abc", times, strict=True))
        put(tmp_path / "raw", interactions__csv=HEADER + rows)
        fails(tmp_path, rf"interactions\.csv, line 2: timestamp is '{times[0]}', expected .*64-bit integers alone")
    put(tmp_path / "raw", interactions__csv=f"{HEADER}s,a,1700000000000000002\ns,b,1700000000000000001\n")
    assert ids(run(tmp_path, **NO_HOLDOUT)[1], "train") == [["b", "a"]]


def test_parquet_times_in_nanoseconds_keep_their_order(tmp_path):
    times = pl.Series([200, 100]).cast(pl.Datetime("ns"))
    frame = pl.DataFrame({"session_id": ["s", "s"], "item_id": ["a", "b"], "timestamp": times})
    frame.write_parquet(put(tmp_path / "raw") / "interactions.parquet")
    assert ids(run(tmp_path, **NO_HOLDOUT)[1], "train") == [["b", "a"]]
