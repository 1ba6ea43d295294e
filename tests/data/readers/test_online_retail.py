"""UCI Online Retail, both editions, as CSV and as a workbook."""

import builtins
from datetime import datetime
from pathlib import Path

import pytest

from alterrec_fast.data.sessions import Dataset

from .common import NO_HOLDOUT, fails, ids, put, run

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
        "rows equal to an earlier one in all columns": 0,
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
