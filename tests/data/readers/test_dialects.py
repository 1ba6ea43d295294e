"""Quotes, escapes, line ends and encodings of text tables: read right, or refused with the line, never misread."""

import bz2
import csv
import io
import lzma
import re
import zlib
from pathlib import Path

import pandas as pd
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from alterrec_fast.data.readers import delimited, scan
from alterrec_fast.data.readers.delimited import ATOMIC, CSV, read_batches
from alterrec_fast.data.readers.tables import read_table
from alterrec_fast.data.sessions import DataError

from .common import HEADER, NO_HOLDOUT, fails, ids, put, run

ESCAPED = (
    'session_id,item_id,timestamp,title\ns,a,1,"say \\"hi, all\\""\ns,b,2,"5\\""\ns,c,3,"x"\nt,d,4,plain\nt,e,5,\n'
)


def read(path: Path, content: str | bytes, layout=CSV) -> list[list[str | None]]:
    """Header and rows, an empty field as ''; the same in batches of a record or two, or refused the same."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "BATCH", 5)
        try:
            parts = list(read_batches(path, layout))
        except DataError as error:
            message = re.escape(str(error).partition(":")[0].partition(", lines ")[0])
            with pytest.raises(DataError, match=message):
                patch.undo()
                list(read_batches(path, layout))
            raise
    frame = pl.concat(read_batches(path, layout))
    assert pl.concat(parts).equals(frame)
    return [frame.columns, *([value or "" for value in row] for row in frame.rows())]


def test_quotes_escaped_by_a_backslash(tmp_path):
    rows = read(tmp_path / "a.csv", ESCAPED)
    assert [row[3] for row in rows[1:]] == ['say "hi, all"', '5"', "x", "plain", ""]
    table = read_table(tmp_path / "a.csv", ["title"])
    assert table.where(2) == f"{tmp_path / 'a.csv'}, line 4"
    assert read(tmp_path / "c.csv", 'a,b\n"x \\"y\\"",1\n"x ""y""",1\n')[1:] == [['x "y"', "1"]] * 2
    # Spark leaves other backslashes alone, Python's writer escapes quotes outside quotes too
    rows = read(tmp_path / "b.csv", 'a,b\nC:\\new,"a \\"b\\" \\\\ c"\n12\\" tv,x\n')
    assert rows[1:] == [["C:\\new", 'a "b" \\ c'], ['12" tv', "x"]]


def test_backslashes_at_the_end_of_a_doubling_file_are_no_escapes(tmp_path):
    rows = read(tmp_path / "a.csv", 'a,b\n"C:\\",x\n"D:\\","{""k"": ""\\""v\\""""}"\n')
    assert rows[1:] == [["C:\\", "x"], ["D:\\", '{"k": "\\"v\\""}']]


def test_two_readings_that_both_fit_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv, line 2: a backslash before a quote .* may escape it or not"):
        read(tmp_path / "a.csv", 'a,b\n"\\"\n\n,\\""\n')


def test_bare_quotes_inside_a_field_are_part_of_it(tmp_path):
    text = 'a,b,c\n1,12" tv,x\n2,"a, ""b""",y\n3,5" and 7",z\n4,"two\nlines",6"\n'
    rows = read(tmp_path / "a.csv", text)
    assert rows == [
        ["a", "b", "c"],
        ["1", '12" tv', "x"],
        ["2", 'a, "b"', "y"],
        ["3", '5" and 7"', "z"],
        ["4", "two\nlines", '6"'],
    ]
    assert read_table(tmp_path / "a.csv", ["a"]).where(3).endswith("line 5")
    put(tmp_path / "raw", interactions__csv=HEADER[:-1] + ",title\n" + 's,a,1,12" tv\ns,b,2,tv\ns,c,?,x"\n')
    fails(tmp_path, r"interactions\.csv, line 4: timestamp is '\?'")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('a,b\n1,"12" tv"\n', r"after line 1: .*expected after"),
        ('a,b\n1,x\n2,"open\n3,x\n', r"after line 2: unexpected end of data"),
        ('a,b\n1,x" y\n2,p,q\n', r"line 3: 3 fields, but the header has 2"),
        (b'a,b\n1,12" tv\n2,caf\xe9\n', r"line 3: byte 0xe9 at column 6 is not UTF-8"),
        (b"a,b\n1,\0\n", r"line 2: a byte 0; expected text in UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "the text is UTF-16; .*iconv -f utf-16"),
        ("a,b\n1,2\n".encode("utf-16-le"), "the text is UTF-16"),
        (b"\x28\xb5\x2f\xfd" + bytes(99), "found zstd; unpack it, or compress it with gzip"),
        (zlib.compress(b"a,b\n1,2\n"), "found zlib"),
        (bz2.compress(b"a,b\n1,2\n"), "found bzip2"),
        (lzma.compress(b"a,b\n1,2\n"), "found xz"),
        (b"PAR1" + bytes(99), r"found a Parquet file; name it \.parquet"),
        (b"PK\3\4" + bytes(99), "found a zip archive or an Excel workbook"),
        ("session_id,item_id\n0,s,a\n", r"line 2: 3 fields, but the header has 2; has the first column.* no name\?"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_line(tmp_path, content, message):
    with pytest.raises(DataError, match=rf"a\.csv(, |: ){message}|a\.csv: expected delimited text, {message}"):
        path = tmp_path / "a.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        read_table(path, [])


@pytest.mark.parametrize(("end", "last"), [("\r", 4), ("\r\n", 4), ("\n", 4), ("\r\r\n", 7)])
def test_line_ends(tmp_path, end, last):
    text = HEADER + "a,x,1\na,y,2\n"
    put(tmp_path / "raw", interactions__csv=text.replace("\n", end))
    _, data = run(tmp_path, **NO_HOLDOUT)
    assert ids(data, "train") == [["x", "y"]]
    put(tmp_path / "raw", interactions__csv=(text + "a,z,?\n").replace("\n", end))
    fails(tmp_path, rf"interactions\.csv, line {last}: timestamp is '\?'")


def test_carriage_returns_alone_in_a_file_without_quotes(tmp_path):
    assert read(tmp_path / "a.inter", 'a\tb\r1\t"x\r', ATOMIC) == [["a", "b"], ["1", '"x']]


def test_a_carriage_return_in_a_field_without_quotes_splits_no_record(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv, line 3: 1 fields, but the header has 2; a carriage return"):
        read(tmp_path / "a.csv", "a,b\n1,x\ry\n2,z\n")
    with pytest.raises(DataError, match=r"a\.inter, line 2: 1 fields, but the header has 2; a carriage return"):
        read(tmp_path / "a.inter", "a\tb\n1\rx\ty\n", ATOMIC)
    assert read(tmp_path / "a.csv", 'a,b\n1,"x\ry"\n2,z\n') == [["a", "b"], ["1", "x\ry"], ["2", "z"]]
    assert read(tmp_path / "a.csv", "a,b\n1,x\r2,y\n") == [["a", "b"], ["1", "x"], ["2", "y"]]


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", r"bars \(\|\)")])
def test_another_separator_is_named(tmp_path, separator, name):
    put(tmp_path / "raw", interactions__csv=(HEADER + "a,x,1\n").replace(",", separator))
    fails(tmp_path, f"column session_id, item_id, timestamp is missing; .*separated by {name}, expected commas")


def test_a_name_that_differs_in_case_or_blanks_is_shown(tmp_path):
    put(tmp_path / "raw", interactions__csv="session_id, Item_ID,timestamp\na,x,1\n")
    fails(tmp_path, "column item_id is missing; .*' Item_ID' differs in case or blanks")


def test_an_index_of_pandas_is_no_text(tmp_path):
    table = pd.DataFrame({"session_id": ["a", "a"], "item_id": ["x", "y"], "timestamp": [1, 2]})
    items = pd.DataFrame({"item_id": ["x", "y"], "title": ["X", "Y"]})
    put(tmp_path / "raw", interactions__csv=table.to_csv(), items__csv=items.to_csv())
    _, data = run(tmp_path, **NO_HOLDOUT)
    assert ids(data, "train") == [["x", "y"]] and data.text_columns == ["title"]
    again = pd.read_csv(io.StringIO(items.to_csv()))  # "Unnamed: 0"
    put(tmp_path / "raw", items__csv=again.to_csv(index=False))
    assert run(tmp_path, overwrite=True, **NO_HOLDOUT)[1].text_columns == ["title"]


def test_records_are_counted_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "_CHUNK", 7)
    text = 'a,b\r\n1,"x\ny"\r\n"2 ""and"" 3",4\n\n"5",\n'
    expected = [["a", "b"], ["1", "x\ny"], ['2 "and" 3', "4"], ["", ""], ["5", ""]]
    assert read(tmp_path / "a.csv", text) == expected
    table = read_table(tmp_path / "a.csv", ["a"])
    assert [table.where(row).rpartition(" ")[2] for row in range(4)] == ["2", "4", "5", "6"]
    assert read(tmp_path / "a.csv", text.replace("4", '4"')) == [*expected[:2], ['2 "and" 3', '4"'], *expected[3:]]


# Dialects by how they write one record. Each value of a written file has one meaning; no value is padded with blanks.


def doubled(rows: list[list[str]], all_quoted: bool) -> str:
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL, lineterminator="\n").writerows(rows)
    return text.getvalue()


def escaped(rows: list[list[str]], all_quoted: bool) -> str:
    def field(value: str) -> str:
        inner = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{inner}"' if all_quoted or re.search(r'[",\n\r\\]', value) else value

    return "".join(",".join(map(field, row)) + "\n" for row in rows)


def bare(rows: list[list[str]], all_quoted: bool) -> str:
    """Quotes only around fields that need them; a quote inside another field stands for itself."""

    def field(value: str) -> str:
        return '"' + value.replace('"', '""') + '"' if re.search(r'[,\n\r]|^"', value) else value

    return "".join(",".join(map(field, row)) + "\n" for row in rows)


VALUES = st.text(st.sampled_from('"\\, \nab'), max_size=5)
TABLES = st.integers(2, 3).flatmap(lambda width: st.lists(st.lists(VALUES, min_size=width, max_size=width), max_size=6))


@given(rows=TABLES, dialect=st.sampled_from([doubled, escaped, bare]), all_quoted=st.booleans(), crlf=st.booleans())
@example(rows=[['a"', "x"], ['"', "y"]], dialect=escaped, all_quoted=True, crlf=False)
@settings(max_examples=400, deadline=None)
def test_random_files_are_read_right_or_refused_with_a_line(tmp_path_factory, rows, dialect, all_quoted, crlf):
    path = tmp_path_factory.getbasetemp() / "random.csv"
    header = ["first", "second", "third"][: len(rows[0]) if rows else 2]
    text = dialect([header, *rows], all_quoted)
    text = text.replace("\n", "\r\n") if crlf else text
    expected = [[value.replace("\n", "\r\n") if crlf else value for value in row] for row in [header, *rows]]
    if dialect is escaped and '\\"' not in text.replace("\\\\", ""):
        expected = [[value.replace("\\", "\\\\") for value in row] for row in expected]  # nothing shows the escapes
    try:
        found = read(path, text)
    except DataError as error:
        assert re.search(r"line \d+", str(error))
        reading = agreed(text)
        assert dialect is escaped or "may escape it or not" in str(error) or reading is None
    else:
        assert found == expected


def agreed(text: str) -> list[list[str]] | None:
    """What Python's csv module (strict) and pandas both read; None where they differ or refuse."""
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        frame = pd.read_csv(io.StringIO(text, newline=""), dtype=str, keep_default_na=False, skip_blank_lines=False)
    except (csv.Error, ValueError):
        return None
    return rows if [list(frame.columns), *frame.to_numpy().tolist()] == rows else None


@given(text=st.text(st.sampled_from('"\\,\n\rab'), max_size=24))
@settings(max_examples=400, deadline=None)
def test_random_text_is_read_as_csv_and_pandas_read_it(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text.csv"
    text = f"first,second\n{text}\n"
    reading = agreed(text)
    try:
        found = read(path, text)
    except DataError as error:
        assert re.search(r"line \d+", str(error))
        assert reading is None or '\\"' in text
    else:
        if reading is not None and '\\"' not in text:
            assert found == reading


def test_a_parser_that_loses_a_record_is_found_out(tmp_path, monkeypatch):
    parse = delimited._parse
    monkeypatch.setattr(delimited, "_parse", lambda *given, **options: parse(*given, **options)[:-1])
    (tmp_path / "a.csv").write_text('a,b\n1,"x\ny"\n2,z\n')
    with pytest.raises(DataError, match=r"a\.csv, lines 1 to 4: 2 records, but the parser read 1"):
        list(read_batches(tmp_path / "a.csv"))
