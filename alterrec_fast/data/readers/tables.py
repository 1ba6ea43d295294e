"""Reads one table file (delimited text, Parquet, Excel) as Strings, with errors that name file and line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl

from ..sessions import SPLITS, DataError
from . import json_lines, sheets
from .delimited import CSV, MAX_COLUMNS, Layout, header, line_of, read_batches, separator_hint
from .files import check_unpacked, need_regular
from .values import drop_missing_ids, shown

# a panic, which is no Exception, is how polars meets some damaged files
_PARQUET_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)
OTHERS = "others"  # the column of the interactions that holds a hash of all columns with no meaning of their own
_BATCH_VALUES, _MIN_BATCH = 1 << 22, 1 << 10  # of a Parquet file: values, and rows at least


@dataclass(frozen=True)
class Table:
    """A table, or a batch of its rows. frame: the columns asked for, in the file's row order; text files and Excel give
    Strings.

    others: the columns that nobody asked for, which tell repeated rows from rows that only look alike. first: the
    number of the first row in its file, from 0. rows_of: as in json_lines.batches.
    """

    path: Path
    frame: pl.DataFrame
    layout: Layout = CSV
    sheet: str | None = None
    others: pl.DataFrame = field(default_factory=pl.DataFrame)
    first: int = 0
    rows_of: Sequence[str] = ()

    def where(self, row: int) -> str:
        """The place of the file's row (from 0) in words: a line of a text file, a row of a Parquet file or a sheet."""
        if self.sheet is not None:
            return f"{self.path}, sheet {self.sheet!r}, row {row + 2}"
        if self.path.suffix == ".parquet":
            return f"{self.path}, row {row + 1}"
        if json_lines.is_json_lines(self.path):
            columns = [*self.frame.columns, *self.others.columns]
            return f"{self.path}, line {json_lines.line_of(self.path, row, columns, self.rows_of)}"
        return f"{self.path}, line {line_of(self.path, row, self.layout)}"

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


class Rows:
    """Numbers the rows of several tables on, and finds their places."""

    def __init__(self) -> None:
        self._tables: list[tuple[int, Table]] = []  # a file's first row among all, and its first batch
        self._count = 0

    def add(self, table: Table, frame: pl.DataFrame) -> pl.DataFrame:
        """frame, rows of the table numbered by ``row``, under the numbers that they have among all tables."""
        if table.first == 0:
            self._tables.append((self._count, table))
        start = self._tables[-1][0]
        self._count = start + table.first + len(table.frame)
        return frame.with_columns(pl.col("row").cast(pl.Int64) + start)

    def where(self, row: int) -> str:
        start, table = next((start, table) for start, table in reversed(self._tables) if start <= row)
        return table.where(row - start)


def column_names(path: Path, layout: Layout = CSV) -> list[str]:
    """The column names of a file; raises DataError for one that is empty or cannot be read."""
    if json_lines.is_json_lines(path):
        return json_lines.names(path)
    return _parquet_names(path) if path.suffix == ".parquet" else header(path, layout)


def text_columns(path: Path, layout: Layout = CSV) -> list[str]:
    """The columns of an item table that may be text: all but ``item_id`` and the index that pandas writes."""
    names = [name for name in column_names(path, layout) if name != "item_id"]
    return [name for name in names if name.strip() and not name.startswith(("Unnamed: ", "__index_level_"))]


def read_table(
    path: Path, required: Sequence[str], optional: Sequence[str] = (), layout: Layout = CSV, whole: bool = False
) -> Table:
    """Reads the required columns, the optional ones as far as they are there, and if whole the others as well.

    Raises DataError for missing columns (naming those found), and for what the readers of each kind of file refuse.
    """
    batches = list(table_batches(path, required, optional, layout, whole))
    frame, others = pl.concat(batch.frame for batch in batches), pl.concat(batch.others for batch in batches)
    return replace(batches[0], frame=frame, others=others)


def table_batches(
    path: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    layout: Layout = CSV,
    whole: bool = False,
    rows_of: Sequence[str] = (),
) -> Iterator[Table]:
    """As `read_table`, in batches of bounded size, one at least. rows_of: columns of JSON lines; where one is a list,
    each of its elements is a row."""
    names = column_names(path, layout)
    need_columns(path, names, required, layout)
    columns = list(dict.fromkeys([*required, *(name for name in optional if name in names)]))
    wanted = names if whole else columns
    first = 0
    frames = read_batches(path, layout)
    if path.suffix == ".parquet":
        frames = _parquet(path, wanted)
    elif json_lines.is_json_lines(path):
        frames = (frame for frame, _ in json_lines.batches(path, wanted, rows_of))
    for frame in frames:
        others = frame.drop(columns) if whole else pl.DataFrame()
        yield Table(path, frame.select(columns), layout, others=others, first=first, rows_of=rows_of)
        first += len(frame)


def need_columns(path: Path, names: Sequence[str], required: Sequence[str], layout: Layout = CSV) -> None:
    """Raises DataError for required columns that are not there, with the separator that the header seems to have."""
    missing = [name for name in required if name not in names]
    if not missing:
        return
    hint = "" if path.suffix == ".parquet" else separator_hint(path, layout, required)
    alike = [name for name in names if name.strip().casefold() in {name.casefold() for name in missing}]
    if alike and not hint:
        hint = f"; {alike[0]!r} differs in case or blanks"
    shown = [*names[:20], f"and {len(names) - 20:,} more"] if len(names) > 20 else names
    raise DataError(f"{path}: column {', '.join(missing)} is missing; found {', '.join(shown)}{hint}")


def read_sheets(path: Path) -> list[Table]:
    """Every sheet of an Excel file that is not empty."""
    return [Table(path, frame, sheet=name) for name, frame in sheets.read_sheets(path)]


def with_ids(table: Table, session: str, item: str, left_out: dict[str, int]) -> pl.DataFrame:
    """The table with ``session_id``, ``item_id``, ``row`` (its row in the file) and, if it has other columns,
    ``others`` (a hash of them), less the rows that lack an id; raises DataError for values that are surely no ids."""
    frame = table.frame.with_columns(table.ids(session).alias("session_id"), table.ids(item).alias("item_id"))
    if table.others.width:
        frame = frame.with_columns(table.others.select(pl.struct(pl.all()).hash().alias(OTHERS)).to_series())
    return drop_missing_ids(frame.with_row_index("row", table.first), left_out, table)


def check_splits(table: Table, frame: pl.DataFrame) -> None:
    """Raises DataError where a ``split`` is not one of the three names. frame: rows of table, numbered by ``row``."""
    wrong = frame.filter(~pl.col("split").is_in(SPLITS).fill_null(False))
    if len(wrong):
        place, value = table.where(wrong["row"][0]), shown(wrong["split"][0])
        raise DataError(f"{place}: split is {value}, expected {', '.join(SPLITS)}")


def choose_text(
    path: Path, available: Sequence[str], wanted: Sequence[str] | None, default: Sequence[str]
) -> list[str]:
    """The text columns to keep: those wanted, or the default; raises DataError for one that is not available."""
    unknown = [name for name in wanted or () if name not in available]
    if unknown:
        raise DataError(f"{path}: no text column {', '.join(unknown)}; found {', '.join(available) or 'none'}")
    return list(dict.fromkeys(default if wanted is None else wanted))


def _parquet_names(path: Path) -> list[str]:
    """The columns; raises DataError for more than a table has, and for rows that no file of this size has."""
    need_regular(path)
    try:
        scanned = pl.scan_parquet(path, glob=False)
        names = scanned.collect_schema().names()
        rows = scanned.select(pl.len()).collect().item()
    except _PARQUET_ERRORS as error:
        raise DataError(f"{path}: not a readable Parquet file ({(str(error) or 'damaged').splitlines()[0]})") from error
    if len(names) > MAX_COLUMNS:
        raise DataError(f"{path}: {len(names):,} columns; expected at most {MAX_COLUMNS:,}")
    check_unpacked(path, path.stat().st_size, rows * len(names))
    return names


def _parquet(path: Path, columns: list[str]) -> Iterator[pl.DataFrame]:
    size = max(_MIN_BATCH, _BATCH_VALUES // len(columns))
    try:
        scanned = pl.scan_parquet(path, glob=False)
        empty = scanned.head(0).select(columns).collect()
        yield from scanned.select(columns).collect_batches(chunk_size=size, maintain_order=True, engine="streaming")
        yield empty
    except _PARQUET_ERRORS as error:
        raise DataError(f"{path}: not a readable Parquet file ({(str(error) or 'damaged').splitlines()[0]})") from error
