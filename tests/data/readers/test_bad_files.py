"""Damaged delimited files, plain and packed: an error that names file and line, or the right reading."""

import gzip

import polars as pl
import pytest

from alterrec_fast.data.sessions import SPLITS

from .common import HEADER, SIX, fails, ids, put, run


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


@pytest.mark.parametrize(("owner", "function"), [(pl, "scan_parquet"), (pl.LazyFrame, "collect_batches")])
def test_a_panic_of_polars_is_a_damaged_file(tmp_path, monkeypatch, owner, function):
    def panic(*given, **options):
        raise pl.exceptions.PanicException("called `Result::unwrap()` on an `Err` value")

    pl.DataFrame({"session_id": ["s"], "item_id": ["a"], "timestamp": [1]}).write_parquet(
        put(tmp_path / "raw") / "interactions.parquet"
    )
    monkeypatch.setattr(owner, function, panic)
    fails(tmp_path, r"interactions\.parquet: not a readable Parquet file \(called")
