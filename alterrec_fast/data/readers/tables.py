"""Finds and reads one table file (CSV, gzipped CSV, Parquet, Excel), with errors that name file and line.

A file is parsed by polars alone. Only once something is wrong is it read again, line by line, to say where.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ..sessions import SPLITS, DataError

TABLE_SUFFIXES = (".csv", ".csv.gz", ".parquet")
_ISO = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M", "%Y-%m-%d")
NO_ID = "rows with no session or item id"


@dataclass(frozen=True)
class Layout:
    """How a text table is written: its separator, and whether fields may be quoted."""

    separator: str = ","
    quoted: bool = True


CSV = Layout()
ATOMIC = Layout(separator="\t", quoted=False)


@dataclass(frozen=True)
class Table:
    """One table as read. frame: the columns asked for, in the file's row order; text files and Excel give Strings."""

    path: Path
    frame: pl.DataFrame
    layout: Layout = CSV
    sheet: str | None = None

    def where(self, row: int) -> str:
        """The place of row (from 0) in words: a line of a text file, a row of a Parquet file or of a sheet."""
        if self.sheet is not None:
            return f"{self.path}, sheet {self.sheet!r}, row {row + 2}"
        if self.path.suffix == ".parquet":
            return f"{self.path}, row {row + 1}"
        with _open(self.path) as file:
            for index, (line, _) in enumerate(_records(file, self.layout)):
                if index == row + 1:  # record 0 is the header
                    return f"{self.path}, line {line}"
        return f"{self.path}, row {row + 1}"

    def ids(self, column: str) -> pl.Series:
        """The column as String; raises DataError for a type that would not keep ids as they are, such as floats."""
        values = self.frame[column]
        if values.dtype == pl.String:
            return values
        if values.dtype.is_integer() or isinstance(values.dtype, pl.Categorical | pl.Enum):
            return values.cast(pl.String)
        if values.null_count() == len(values):
            return values.cast(pl.String, strict=False)
        raise DataError(f"{self.path}, column {column}: ids must be strings or integers, found {values.dtype}")


def find_table(folder: Path, stem: str, suffixes: Sequence[str] = TABLE_SUFFIXES) -> Path | None:
    """The one file of folder named stem plus one of the suffixes, or None; raises DataError where there are several."""
    found = [path for suffix in suffixes if (path := folder / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(f"{folder}: both {' and '.join(path.name for path in found)} are here; keep one")
    return found[0] if found else None


def need_table(folder: Path, stem: str, suffixes: Sequence[str] = TABLE_SUFFIXES) -> Path:
    """As find_table, but raises DataError where there is none, naming what the folder holds."""
    need_folder(folder)
    found = find_table(folder, stem, suffixes)
    if found is None:
        names = " or ".join(f"{stem}{suffix}" for suffix in suffixes)
        raise DataError(f"{folder}: expected {names}, found {listing(folder)}")
    return found


def need_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such file or folder")


def listing(folder: Path) -> str:
    """The first names in folder, for an error message."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def column_names(path: Path, layout: Layout = CSV) -> list[str]:
    """The column names of a text or Parquet file; raises DataError for one that is empty or cannot be read."""
    if path.suffix == ".parquet":
        return list(_parquet(path, None, header_only=True).columns)
    return _read_text(path, layout, header_only=True).columns


def read_table(path: Path, required: Sequence[str], optional: Sequence[str] = (), layout: Layout = CSV) -> Table:
    """Reads the required columns, and the optional ones as far as they are there.

    Raises DataError for missing columns (naming those found), bytes that are not UTF-8, a gzip that is cut short or
    damaged, lines with too many fields, unbalanced quotes, and files that are empty or unreadable.
    """
    names = column_names(path, layout)
    missing = [name for name in required if name not in names]
    if missing:
        raise DataError(f"{path}: column {', '.join(missing)} is missing; found {', '.join(names)}")
    extra = [name for name in optional if name in names]
    columns = list(dict.fromkeys([*required, *extra]))
    frame = _parquet(path, columns) if path.suffix == ".parquet" else _read_text(path, layout)
    return Table(path, frame.select(columns), layout)


def read_sheets(path: Path) -> list[Table]:
    """Every sheet of an Excel file that is not empty, with all its columns, all cells as String."""
    try:
        import fastexcel
    except ImportError as error:
        raise DataError(f'{path}: reading Excel files needs fastexcel: pip install "alterrec-fast[excel]"') from error
    tables = []
    try:
        book = fastexcel.read_excel(path)
        for sheet in book.sheet_names:
            # Strings keep "00123"; a numeric cell 536365.0 comes as "536365", a date as "2010-12-01 08:26:00".
            frame = pl.DataFrame(book.load_sheet(sheet, dtypes="string"))
            if frame.width:
                tables.append(Table(path, frame.cast(pl.String), sheet=sheet))
    except (fastexcel.FastExcelError, OSError) as error:
        raise DataError(f"{path}: not a readable Excel file ({str(error).splitlines()[0]})") from error
    if not tables:
        raise DataError(f"{path}: no sheet has any rows")
    return tables


def with_ids(table: Table, session: str, item: str, left_out: dict[str, int]) -> pl.DataFrame:
    """The table with ``session_id``, ``item_id`` and ``row`` (its row in the file), less the rows that lack an id."""
    frame = table.frame.with_columns(table.ids(session).alias("session_id"), table.ids(item).alias("item_id"))
    return drop_missing_ids(frame.with_row_index("row"), left_out)


def drop_missing_ids(frame: pl.DataFrame, left_out: dict[str, int]) -> pl.DataFrame:
    """The rows whose session_id and item_id are neither null nor empty; the others are counted in left_out."""
    kept = frame.filter(pl.col("session_id").str.len_bytes() > 0, pl.col("item_id").str.len_bytes() > 0)
    left_out[NO_ID] = left_out.get(NO_ID, 0) + len(frame) - len(kept)
    return kept


def parse_times(table: Table, frame: pl.DataFrame, column: str, formats: Sequence[str] = ()) -> pl.Series:
    """The times of frame (rows of table, numbered by its ``row``) as Int64 or Float64, in an order-keeping unit.

    Numbers stay as they are; dates and times, ISO or in one of the formats, become microseconds, in UTC where they
    name no offset. Raises DataError at the first value that is none of these, or is missing.
    """
    values = frame[column]
    if values.dtype == pl.String:
        times = _times_from_text(values, formats)
    elif values.dtype.is_temporal() and values.dtype in (pl.Date, pl.Datetime):
        times = values.cast(pl.Datetime("us")).to_physical()
    elif values.dtype.is_integer():
        times = values.cast(pl.Int64, strict=False)
    elif values.dtype.is_float():
        times = values.cast(pl.Float64)
    else:
        raise DataError(f"{table.path}, column {column}: expected times, found {values.dtype}")
    if times.dtype == pl.Float64:
        times = times.to_frame().select(pl.when(pl.col(times.name).is_finite()).then(pl.col(times.name))).to_series()
    if times.null_count():
        bad = times.is_null().arg_true()[0]
        expected = "Unix seconds or a date and time such as 2010-12-01 08:26:00"
        raise DataError(f"{table.where(frame['row'][bad])}: {column} is {values[bad]!r}, expected {expected}")
    return times


def _times_from_text(values: pl.Series, formats: Sequence[str]) -> pl.Series:
    whole = values.cast(pl.Int64, strict=False)
    if whole.null_count() == 0:
        return whole
    numbers = values.cast(pl.Float64, strict=False)
    if numbers.null_count() == 0 or numbers[0] is not None:  # the first value says which kind the column is
        return numbers
    text = values.str.replace(r"^(\S{10}) ", "${1}T")
    times = pl.repeat(None, len(values), dtype=pl.Int64, eager=True)
    for form in (*formats, *_ISO):
        source = values if form in formats else text
        zone = "UTC" if form.endswith("z") else None
        parsed = source.str.to_datetime(form, time_unit="us", time_zone=zone, strict=False).to_physical()
        times = times.zip_with(times.is_not_null(), parsed)
        if times.null_count() == 0:
            break
    return times.alias(values.name)


def check_splits(tables: Sequence[Table], frames: Sequence[pl.DataFrame]) -> None:
    """Raises DataError where a ``split`` is not one of the three names, or a session has rows in two splits."""
    for table, frame in zip(tables, frames, strict=True):
        wrong = frame.filter(~pl.col("split").is_in(SPLITS).fill_null(False))
        if len(wrong):
            place, value = table.where(wrong["row"][0]), wrong["split"][0]
            raise DataError(f"{place}: split is {value!r}, expected {', '.join(SPLITS)}")
    columns = [pl.lit(i).alias("table") for i in range(len(frames))]
    rows = pl.concat(
        frame.select("session_id", "split", "row", column) for frame, column in zip(frames, columns, strict=True)
    )
    torn = rows.filter(pl.col("split") != pl.col("split").first().over("session_id"))
    if len(torn):
        session, split, row, table_index = torn.row(0)
        first = rows.filter(pl.col("session_id") == session)["split"][0]
        place = tables[table_index].where(row)
        raise DataError(f"{place}: session {session!r} is in split {split} here and in {first} before; expected one")


def choose_text(
    path: Path, available: Sequence[str], wanted: Sequence[str] | None, default: Sequence[str]
) -> list[str]:
    """The text columns to keep: those wanted, or the default; raises DataError for one that is not available."""
    unknown = [name for name in wanted or () if name not in available]
    if unknown:
        raise DataError(f"{path}: no text column {', '.join(unknown)}; found {', '.join(available) or 'none'}")
    return list(dict.fromkeys(default if wanted is None else wanted))


def clean_text(frame: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """``item_id`` and the columns as String, without blanks at either end, null where nothing is left."""
    stripped = [pl.col(name).cast(pl.String).str.strip_chars() for name in columns]
    return frame.select("item_id", *stripped).with_columns(pl.col(columns).replace("", None))


def _parquet(path: Path, columns: Sequence[str] | None, header_only: bool = False) -> pl.DataFrame:
    try:
        return pl.read_parquet(
            path, columns=None if columns is None else list(columns), n_rows=0 if header_only else None, glob=False
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def _read_text(path: Path, layout: Layout, header_only: bool = False) -> pl.DataFrame:
    """All columns, since polars overlooks lines with too many fields when it reads some, and all as String: types are
    the readers' business, and "00123" must stay what it is."""
    try:
        # gzip and not polars unpacks: it tells a cut file from a damaged one, and where it ends
        source = _unpack(path, layout, header_only) if _is_gzip(path) else path
        frame = pl.read_csv(
            source,
            separator=layout.separator,
            quote_char='"' if layout.quoted else None,
            infer_schema=False,
            n_rows=0 if header_only else None,
            glob=False,
        )
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}, line {_last_line(path)}: the gzip data ends early or is damaged ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except pl.exceptions.NoDataError as error:
        raise DataError(f"{path}: the file is empty; expected a header line") from error
    except pl.exceptions.PolarsError as error:
        raise DataError(_what_is_wrong(path, layout) or f"{path}: {str(error).splitlines()[0]}") from error
    if any("\ufffd" in name for name in frame.columns):  # polars replaces bad bytes in a header
        raise DataError(_what_is_wrong(path, layout) or f"{path}, line 1: the header holds a replacement character")
    return frame


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b" or path.suffix == ".gz"


def _unpack(path: Path, layout: Layout, header_only: bool) -> bytes:
    """The file's content, or its header line alone, blank lines before it included."""
    with gzip.open(path) as file:
        if not header_only:
            return file.read()
        head = b""
        while line := file.readline():
            head += line
            if head.strip() and not (layout.quoted and head.count(b'"') % 2):  # else a quoted name goes on
                break
        return head


def _open(path: Path) -> io.BufferedReader:
    return io.BufferedReader(gzip.open(path)) if _is_gzip(path) else path.open("rb")


def _records(file: io.BufferedReader, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of every record, header included; blank lines before the header are not records."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
    if layout.quoted:
        reader = csv.reader(text, delimiter=layout.separator, strict=True)
    else:
        reader = csv.reader(text, delimiter=layout.separator, quoting=csv.QUOTE_NONE)
    line, begun = 1, False
    for fields in reader:
        begun = begun or bool(fields)
        if begun:
            yield line, fields
        line = reader.line_num + 1


def _last_line(path: Path) -> int:
    """The line in which a damaged gzip file ends."""
    lines = 1
    with gzip.open(path) as file:
        try:
            while chunk := file.read1(1 << 16):
                lines += chunk.count(b"\n")
        except (EOFError, OSError, zlib.error):
            pass
    return lines


def _what_is_wrong(path: Path, layout: Layout) -> str | None:
    """The first line that polars could not have read, in words; None where this second look finds none."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8"
                return f"{path}, line {number}: {byte}; convert the file, for example with iconv -f latin1 -t utf-8"
    with _open(path) as file:
        width, line_number = 0, 0
        try:
            for line_number, fields in _records(file, layout):
                width = width or len(fields)
                if len(fields) > width:
                    return f"{path}, line {line_number}: {len(fields)} fields, but the header has {width}"
        except csv.Error as error:
            return f"{path}, after line {line_number}: {error}; are the quotes balanced?"
    return None
