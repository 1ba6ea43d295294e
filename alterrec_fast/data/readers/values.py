"""Ids, times and texts: what is taken for one, what counts as missing, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import polars as pl

from ..sessions import DataError

if TYPE_CHECKING:
    from .tables import Table

NO_ID = "rows with no session or item id"
# How pandas, databases and spreadsheets print a missing value; case counts, "na" may be a name.
MISSING = [
    *("", "NULL", "Null", "null", "NA", "<NA>", "N/A", "n/a", "NaN", "nan", "-nan", "-NaN", "NaT", "None", "none"),
    *("\\N", "undefined", "#N/A", "#N/A N/A", "#NA", "#REF!", "#VALUE!", "#NAME?", "#DIV/0!", "#NUM!", "#NULL!"),
    *("(null)", "<null>", "[null]", "[NULL]", "NAN", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
]
_MISSING = rf"^\s*({'|'.join(map(re.escape, MISSING))})\s*$"
_PRINTED = (  # [1 2], ['a'], {'a': 1}, (1, 2), array(['a']), <Item object at 0x7f>; but [deleted] and {GUID} are ids
    r"""(?s)^\s*(\[\s*\]|\[\s*['"\d.+\-\[{(].*\]|\[.*[,\s].*\]|\{.*[:,'"].*\}|\(\s*['"\d].*,.*\)"""
    r"""|\w+\(.*[\[{].*\)|<.*\bat 0x[0-9a-fA-F]+>)\s*$"""
)
# 1.23457E+12 of spreadsheets; 1.2345678901234568e+16, an integer beyond 2^53 that pandas held as a float
_ROUNDED = r"^\s*(\d[.,]\d+E\+\d\d+|\d\.\d+e\+(1[6-9]|[2-9]\d|\d\d\d))\s*$"
_DOUBTFUL = f"{_MISSING}|{_PRINTED}|{_ROUNDED}"
_LEAST_UNIX = 1e8  # seconds, in 1973; what is smaller counts from a start of its own
_ISO = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M", "%Y-%m-%d")


def is_present(column: str) -> pl.Expr:
    """Whether a String is there: not null, not blank, and not one of the spellings in MISSING."""
    return ~pl.col(column).str.contains(_MISSING).fill_null(True)


def shown(value: object) -> str:
    """A value for an error message: printed with escapes, and not at any length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def drop_missing_ids(frame: pl.DataFrame, left_out: dict[str, int], table: Table | None = None) -> pl.DataFrame:
    """The rows whose session_id and item_id are present; the others are counted in left_out.

    table: where given, frame holds rows of it, and what `check_ids` refuses is an error.
    """
    names = ("session_id", "item_id")
    doubtful = frame.select(pl.any_horizontal(pl.col(names).str.contains(_DOUBTFUL).fill_null(True))).to_series()
    present = frame.filter(doubtful).select(is_present(names[0]) & is_present(names[1])).to_series()
    left_out[NO_ID] = left_out.get(NO_ID, 0) + len(present) - int(present.sum())
    if len(present) == 0:
        return frame
    if table is not None:
        check_ids(table, frame.filter(doubtful).filter(present), *names)
    return frame.filter((~doubtful).scatter(doubtful.arg_true(), present))


def check_ids(table: Table, frame: pl.DataFrame, *columns: str) -> None:
    """Raises DataError, with line, for values that are surely no ids.

    Such are printed lists, dicts, arrays and objects, and numbers that a program has rounded (1.23457E+12), under which
    many ids became one. frame: rows of table, numbered by its ``row``, with the String columns.
    """
    for column in columns:
        for pattern, kind in ((_PRINTED, "a printed list or object"), (_ROUNDED, "a rounded number")):
            wrong = frame[column].str.contains(pattern).arg_true()
            if len(wrong):
                place, value = table.where(frame["row"][wrong[0]]), shown(frame[column][wrong[0]])
                raise DataError(f"{place}: {column} is {value}, {kind}; expected one id")


def _unix_unit(time: float) -> float:
    """How many units make a second, if time is one of this century: seconds, milli-, micro- or nanoseconds."""
    return next((unit for limit, unit in ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6)) if time < limit), 1e9)


class Times:
    """Parses a column of times batch after batch: numbers, or dates, the same throughout.

    Numbers and Parquet's times stay as they are; dates and times in text, ISO or in one of formats, become
    microseconds, in UTC where they name no offset. only: the one format that text is in.
    """

    def __init__(self, column: str, formats: Sequence[str] = (), only: str | None = None) -> None:
        self._column, self._formats = column, (only,) if only else (*formats, *_ISO)
        self._is_text: bool | None = True if only else None
        self._unit: str | None = None  # of Parquet's times, "" for numbers
        self._rounded: tuple[Table, int, str] | None = None  # the first whole number that a float would round
        self._has_floats = False
        self._smallest, self._largest = math.inf, 0.0

    @property
    def per_second(self) -> float:
        """How many units of the numbers returned make a second; numbers of Unix time are told apart by their size.

        Raises DataError where the smallest and the largest are of two units."""
        if self._unit:
            return {"days": 1 / 86_400, "ms": 1e3, "us": 1e6, "ns": 1e9}[self._unit]
        smallest, largest = _unix_unit(self._smallest), _unix_unit(self._largest)
        if smallest != largest and self._smallest > _LEAST_UNIX:
            span = f"{self._smallest:.0f} to {self._largest:.0f}"
            raise DataError(f"column {self._column}: times from {span}, Unix times of two units; expected one unit")
        return largest

    def parse(self, table: Table, frame: pl.DataFrame) -> pl.Series:
        """The times of frame (rows of table, numbered by its ``row``) as Int64 or Float64.

        Raises DataError at the first value that is none, or is missing, or a whole number that a float among the
        others would round.
        """
        values = frame[self._column]
        if len(values) == 0:
            return pl.Series(self._column, dtype=pl.Int64)
        unit = ""
        if values.dtype == pl.String:
            times = self._from_text(table, frame)
            unit = "us" if self._is_text else ""
        elif values.dtype in (pl.Date, pl.Datetime):
            times = values.to_physical().cast(pl.Int64)
            unit = values.dtype.time_unit if isinstance(values.dtype, pl.Datetime) else "days"
        elif values.dtype.is_integer():
            times = values.cast(pl.Int64, strict=False)
        elif values.dtype.is_float():
            times = values.cast(pl.Float64)
        else:
            raise DataError(f"{table.path}, column {self._column}: expected times, found {values.dtype}")
        if times.dtype == pl.Float64:
            finite = pl.when(pl.col(times.name).is_finite()).then(pl.col(times.name))
            times = times.to_frame().select(finite).to_series()
        if times.null_count():
            bad = times.is_null().arg_true()[0]
            self._refuse(table, frame["row"][bad], values[bad])
        if self._unit not in (None, unit):
            found = f"times of another kind ({unit or 'numbers'}) than in the files before ({self._unit or 'numbers'})"
            raise DataError(f"{table.path}, column {self._column}: {found}; expected one kind")
        self._unit = unit
        sizes = times.abs()
        self._smallest = min(self._smallest, float(sizes.min()))  # type: ignore[arg-type]
        self._largest = max(self._largest, float(sizes.max()))  # type: ignore[arg-type]
        return times

    def _from_text(self, table: Table, frame: pl.DataFrame) -> pl.Series:
        values = frame[self._column]
        if self._is_text:
            return self._dates(values)
        whole = values.cast(pl.Int64, strict=False)
        numbers = whole.cast(pl.Float64) if whole.null_count() == 0 else values.cast(pl.Float64, strict=False)
        is_rounded = (numbers.abs() > 1 << 53).fill_null(False)
        if is_rounded.any():
            is_rounded &= values.str.contains(r"^\s*[+-]?\d+\s*$")
        if whole.null_count() == 0 and not self._has_floats:
            if self._rounded is None and is_rounded.any():
                place = is_rounded.arg_true()[0]
                self._rounded = table, frame["row"][place], values[place]
            self._is_text = False
            return whole
        numbers = numbers.set(is_rounded, None)
        if self._is_text is None and numbers.null_count() and numbers[0] is None:  # the first value says the kind
            self._is_text = True
            return self._dates(values)
        if self._rounded is not None:
            self._refuse(*self._rounded)
        self._is_text, self._has_floats = False, True
        return numbers

    def _dates(self, values: pl.Series) -> pl.Series:
        text = values.str.replace(r"^(\S{10}) ", "${1}T")
        times = pl.repeat(None, len(values), dtype=pl.Int64, eager=True)
        for form in self._formats:
            source = text if form in _ISO else values
            zone = "UTC" if form.endswith("z") else None
            parsed = source.str.to_datetime(form, time_unit="us", time_zone=zone, strict=False).to_physical()
            times = times.zip_with(times.is_not_null(), parsed)
            if times.null_count() == 0:
                break
        return times.alias(values.name)

    def _refuse(self, table: Table, row: int, value: object) -> NoReturn:
        expected = "Unix seconds or a date and time such as 2010-12-01 08:26:00"
        if self._is_text and len(self._formats) == 1:
            expected = f"a time in the format {self._formats[0]}"
        elif str(value).strip("+- ").isdecimal():
            expected += ", or 64-bit integers alone: a float would round it"
        raise DataError(f"{table.where(row)}: {self._column} is {shown(value)}, expected {expected}")


def clean_text(frame: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """``item_id`` and the columns as String, without blanks at either end, null where nothing is left or MISSING."""
    stripped = frame.select("item_id", *(pl.col(name).cast(pl.String).str.strip_chars() for name in columns))
    return stripped.with_columns(pl.when(is_present(name)).then(pl.col(name)) for name in columns)
