"""Reads Excel workbooks, after a look at how large their sheets are: a lone far cell costs a reader all memory."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

import polars as pl

from ..sessions import DataError
from .files import check_unpacked, need_regular

MAX_CELLS = 50_000_000  # the rectangle that a sheet spans; Excel's own limit is 17 billion
_ALWAYS_ALLOWED, _MAX_EMPTY = 1_000_000, 100  # cells of a rectangle, whatever is in it; else for each one in use
_CELL = re.compile(rb"""<(?:\w+:)?c(?=[\s/>])(?:\s[^<]*?\br\s*=\s*["']([A-Za-z]+)([0-9]+)["'])?""")
_OPEN_TAG = re.compile(rb"<(?:\w+:)?c\s|<[\w:.-]+(?:\s[^<>]*)?$")
_STEP = 1 << 22
_LONGEST_TAG = 1 << 20


def read_sheets(path: Path) -> list[tuple[str, pl.DataFrame]]:
    """Name and rows of every sheet of a workbook that is not empty, with all its columns, all cells as String.

    Raises DataError where fastexcel is not installed, for a file that is no workbook or damaged, and for sheets that
    would take far more memory than their file is large.
    """
    try:
        import fastexcel
    except ImportError as error:
        raise DataError(f'{path}: reading Excel files needs fastexcel: pip install "alterrec-fast[excel]"') from error
    sheets = []
    try:
        _check_size(path)
        book = fastexcel.read_excel(path)
        for name in book.sheet_names:
            # Strings keep "00123"; a numeric cell 536365.0 comes as "536365", a date as "2010-12-01 08:26:00".
            frame = pl.DataFrame(book.load_sheet(name, dtypes="string"))
            if frame.width:
                sheets.append((name, frame.cast(pl.String)))
    except (fastexcel.FastExcelError, zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: not a readable Excel file ({cause})") from error
    if not sheets:
        raise DataError(f"{path}: no sheet has any rows")
    return sheets


def _check_size(path: Path) -> None:
    """Raises DataError for members that unpack to too much, and for sheets whose cells lie too far apart."""
    packed, unpacked = need_regular(path).stat().st_size, 0
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():  # relations may give a sheet any name, so all members are looked at
            low, high, num_cells, rest = [1 << 62, 1 << 62], [0, 0], 0, b""  # row and column
            with archive.open(name) as file:
                while step := file.read(_STEP):
                    unpacked += len(step)
                    check_unpacked(path, packed, unpacked)
                    text = rest + step
                    last = max(text.rfind(b"<"), 0)  # what starts there may go on in the next step
                    text, rest = text[:last], text[last:]
                    if len(rest) > _LONGEST_TAG:
                        if _OPEN_TAG.match(rest):
                            raise DataError(f"{path}, {name}: a tag of more than {_LONGEST_TAG:,} bytes")
                        rest = b""
                    cells = _CELL.findall(text)
                    num_cells += len(cells)
                    for column in {letters for letters, _ in cells}:
                        low[1], high[1] = min(low[1], _column(column)), max(high[1], _column(column))
                    for digits in {digits for _, digits in cells}:
                        low[0], high[0] = min(low[0], int(digits[:9] or 0)), max(high[0], int(digits[:9] or 0))
            if num_cells and min(low) == 0:
                raise DataError(f"{path}, {name}: a cell has no place (r=...); save the sheet anew, or as CSV")
            if num_cells:
                _check_rectangle(path, name, low, high, num_cells)


def _column(letters: bytes) -> int:
    number = 0
    for letter in letters.upper()[:6]:
        number = number * 26 + letter - 64
    return number


def _check_rectangle(path: Path, name: str, low: list[int], high: list[int], num_cells: int) -> None:
    rows, columns = (last - first + 1 for first, last in zip(low, high, strict=True))
    if rows * columns > min(MAX_CELLS, max(_ALWAYS_ALLOWED, _MAX_EMPTY * num_cells)):
        raise DataError(
            f"{path}, {name}: {num_cells:,} cells are spread over {rows:,} rows and {columns:,} columns, more than is "
            "read; delete the far cells, or export the sheet as CSV"
        )
