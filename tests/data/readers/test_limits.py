"""Files made to hang a reader or to take all memory are errors before they do."""

import gzip
import os
import resource
import zipfile

import numpy as np
import polars as pl
import pytest

from alterrec_fast.data.readers import files
from alterrec_fast.data.readers.sheets import read_sheets
from alterrec_fast.data.sessions import DataError

from .common import HEADER, SIX, fails, put, run
from .test_online_retail import INVOICES, retail_xlsx

SHEET = "xl/worksheets/sheet1.xml"


@pytest.fixture(autouse=True)
def little_memory():
    """An allocation of more than 4 GiB beyond what is mapped is a MemoryError, or an abort, at once."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("source", "name", "options"),
    [
        ("generic", "interactions.csv", {}),
        ("generic", "interactions.csv.gz", {}),
        ("generic", "interactions.parquet", {}),
        ("generic", "items.csv", {}),
        ("recbole", "d.inter", {}),
        ("recbole", "d.item", {}),
        ("online-retail", "data.csv", {}),
        ("online-retail", "data.xlsx", {}),
        ("amazon-m2", "sessions_train.csv", {"locale": "UK"}),
        ("amazon-m2", "products_train.csv", {"locale": "UK"}),
    ],
)
def test_a_fifo_is_no_table(tmp_path, source, name, options):
    put(tmp_path / "raw")
    if name == "items.csv":
        put(tmp_path / "raw", interactions__csv=SIX)
    elif name == "d.item":
        put(tmp_path / "raw", **{"d.inter": "session_id:token\titem_id:token\ns\ta\ns\tb\n"})
    elif name == "products_train.csv":
        put(tmp_path / "raw", sessions_train__csv="prev_items,next_item,locale\n['a'],b,UK\n")
    os.mkfifo(tmp_path / "raw" / name)
    message = rf"{name}: expected a regular file, found a FIFO"
    fails(tmp_path, message, source, **options)
    if name not in ("items.csv", "d.item", "products_train.csv"):
        fails(tmp_path, message, source, raw=tmp_path / "raw" / name, **options)


def test_devices_and_links_to_them(tmp_path):
    (put(tmp_path / "raw") / "interactions.csv").symlink_to("/dev/zero")
    fails(tmp_path, r"interactions\.csv: expected a regular file, found a character device")
    os.mkfifo(tmp_path / "test.csv")
    put(
        tmp_path / "raw",
        sessions_train__csv="prev_items,next_item,locale\n['a'],b,UK\n",
        products_train__csv="id,locale\n",
    )
    fails(tmp_path, r"test\.csv: .*found a FIFO", "amazon-m2", locale="UK", test=tmp_path / "test.csv")


@pytest.mark.parametrize("start", [HEADER + "s,a,1\n", ""])
def test_a_gzip_bomb(tmp_path, monkeypatch, start):
    monkeypatch.setattr(files, "ALWAYS_ALLOWED", 1 << 20)
    put(tmp_path / "raw", interactions__csv__gz=gzip.compress(start.encode() + b"s" * (20 << 20)))
    fails(
        tmp_path,
        r"interactions\.csv\.gz: .* bytes unpack to more than|line 1: the header is longer than 16,777,216 bytes",
    )
    put(tmp_path / "raw", interactions__csv__gz=gzip.compress(SIX.encode()))
    run(tmp_path)


def test_a_table_of_a_million_columns(tmp_path):
    names = ",".join(map(str, range(1_000_000)))
    put(tmp_path / "raw", interactions__csv=f"{names}\n{names}\n")
    fails(tmp_path, r"interactions\.csv, line 1: about 1,000,000 columns; expected at most 10,000")
    put(tmp_path / "raw", interactions__csv=names.replace(",", '",5"') + "\n")  # no quotes that polars may see
    fails(tmp_path, r"interactions\.csv, line 1: 1,000,000 columns; expected at most 10,000|balanced")
    put(tmp_path / "raw", interactions__csv=f"{HEADER}s,a,1\n{names}\n")
    fails(tmp_path, r"interactions\.csv, line 3: 1000000 fields, but the header has 3")


def test_parquet_of_too_many_columns_or_rows(tmp_path, monkeypatch):
    file = put(tmp_path / "raw") / "interactions.parquet"
    pl.DataFrame({str(i): [1] for i in range(10_001)}).write_parquet(file)
    fails(tmp_path, r"interactions\.parquet: 10,001 columns; expected at most 10,000")
    monkeypatch.setattr(files, "ALWAYS_ALLOWED", 1 << 20)
    rows = np.zeros(2_000_000, np.int64)
    pl.DataFrame({"session_id": rows, "item_id": rows, "timestamp": rows}).write_parquet(file)
    fails(tmp_path, r"interactions\.parquet: .* bytes unpack to more than")


@pytest.mark.parametrize("cell", ["XFD1048576", "AAA900000", "C999999"])
@pytest.mark.parametrize(
    "written",
    ['<c r="{}"><v>1</v></c>', "<x:c  s='1'\n r = '{}' />", '<c s=">" r="{}" t="n"/>', '<c s="1"><v>1</v></c>'],
)
def test_a_far_cell_of_a_spreadsheet(tmp_path, cell, written):
    pytest.importorskip("fastexcel")
    whole, far = tmp_path / "whole.xlsx", put(tmp_path / "raw") / "far.xlsx"
    retail_xlsx(whole, {"Sheet": INVOICES})
    row = f'<row r="{cell.lstrip("ABCDEFX")}">{written.format(cell)}</row></sheetData>'.encode()
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(far, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"</sheetData>", row))
    columns = {"X": "16,384", "A": "703", "C": "8"}[cell[0]]
    message = rf"\d+ cells are spread over [\d,]+ rows and {columns} columns, more than is read"
    message = message if "{}" in written else r"a cell has no place \(r=\.\.\.\)"
    fails(tmp_path, rf"far\.xlsx, {SHEET}: {message}", "online-retail")


def test_a_workbook_that_unpacks_to_too_much(tmp_path, monkeypatch):
    pytest.importorskip("fastexcel")
    monkeypatch.setattr(files, "ALWAYS_ALLOWED", 1 << 20)
    file = tmp_path / "bomb.xlsx"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/sharedStrings.xml", b" " * (20 << 20))
    with pytest.raises(DataError, match=r"bomb\.xlsx: .* bytes unpack to more than"):
        read_sheets(file)
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"bomb\.xlsx: not a readable Excel file"):
        read_sheets(file)


def test_cells_are_found_across_steps(tmp_path, monkeypatch):
    pytest.importorskip("fastexcel")
    from alterrec_fast.data.readers import sheets

    retail_xlsx(tmp_path / "a.xlsx", {"Sheet": INVOICES})
    spans = []
    monkeypatch.setattr(sheets, "_check_rectangle", lambda *found: spans.append(found[2:]))
    for step in (1 << 22, 1000, 57):
        monkeypatch.setattr(sheets, "_STEP", step)
        read_sheets(tmp_path / "a.xlsx")
    assert spans[0] == spans[1] == spans[2] and spans[0][:2] == ([1, 1], [len(INVOICES) + 1, 8])
