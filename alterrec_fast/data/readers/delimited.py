"""Reads one delimited text file, plain or gzipped: right, or refused with the line.

polars parses, and never alone: its rows must be as many as `scan` counts. It splits files at quotes by parity, which
only holds where every quote is proper, so Python's csv module reads the files in which one is not: quotes escaped by a
backslash, bare quotes inside a field, and carriage returns as line ends.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import polars as pl

from ..sessions import DataError
from .files import Content, need_regular, read_content, read_head
from .scan import Scan, line_of_record, scan

MAX_COLUMNS = 10_000
_MAX_HEADER = 1 << 24  # bytes
_MAX_FIELD = 1 << 24
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars (|)"}
_BACKSLASH = re.compile(r'\\["\\]|\\')


@dataclass(frozen=True)
class Layout:
    """How a text table is written: its separator, and whether fields may be quoted."""

    separator: str = ","
    quoted: bool = True


CSV = Layout()
ATOMIC = Layout(separator="\t", quoted=False)


def header(path: Path, layout: Layout = CSV) -> list[str]:
    """The column names as polars has them; raises DataError for a file that is empty, no text, or far too wide."""
    head, whole = _head(path, layout)
    scanned = scan(np.frombuffer(head, np.uint8), layout.separator, layout.quoted)
    if scanned.lone_cr or scanned.escaped or not scanned.proper:
        return read_delimited(path, layout)[0].columns  # the dialect is the whole file's
    if not whole:
        raise DataError(f"{path}, line 1: the header is longer than {_MAX_HEADER:,} bytes")
    if head.count(layout.separator.encode()) >= MAX_COLUMNS:
        width = head.count(layout.separator.encode()) + 1
        raise DataError(f"{path}, line 1: about {width:,} columns; expected at most {MAX_COLUMNS:,}")
    return _parse(path, head, layout, n_rows=0).columns


def read_delimited(path: Path, layout: Layout = CSV) -> tuple[pl.DataFrame, np.ndarray | None]:
    """All columns as String ("00123" must stay what it is), and the line of each record where `line_of` can't tell.

    Raises DataError for bytes that are not UTF-8, a gzip that is cut short or damaged, lines with too many fields,
    quotes that no dialect explains or that two explain differently, and files that are empty or unreadable.
    """
    content = read_content(path)
    scanned = scan(content.data, layout.separator, layout.quoted)
    if scanned.nul_line is not None:
        raise DataError(f"{path}, line {scanned.nul_line}: a byte 0; expected text in UTF-8")
    doubtful = scanned.escaped and layout.quoted
    if scanned.lone_cr or not scanned.proper or (doubtful and not _breaks_when_escaped(content, layout)):
        return _read_by_csv(path, content, layout, scanned)
    frame = _parse(path, content.source, layout)
    if len(frame) != scanned.records - 1:  # the parsers differ: what csv rewrites is beyond doubt
        return _read_by_csv(path, content, layout, scanned)
    return frame, None


def line_of(path: Path, row: int, layout: Layout) -> int:
    """The line (from 1) on which row (from 0) of a file with proper quotes starts."""
    return line_of_record(read_content(path).data, row + 1, layout.quoted)


def separator_hint(path: Path, layout: Layout, wanted: Sequence[str]) -> str:
    """In words, the other separator under which the header has more of the wanted names; empty where none has."""
    line = next((line for line in _head(path, layout)[0].decode(errors="replace").splitlines() if line.strip()), "")
    line = line.removeprefix("\ufeff")

    def hits(separator: str) -> int:
        names = {name.strip().strip('"') for name in line.split(separator)}
        return len(set(wanted) & (names | {name.partition(":")[0] for name in names}))

    best = max(_SEPARATORS, key=hits)
    if hits(best) <= hits(layout.separator):
        return ""
    return f"; the header seems to be separated by {_SEPARATORS[best]}, expected {_SEPARATORS[layout.separator]}"


def _head(path: Path, layout: Layout) -> tuple[bytes, bool]:
    """The header line with the blank lines before it, and whether it ends within what a header may take."""
    size = 1 << 16
    while True:
        head = read_head(path, size)
        _need_text(path, head)
        length, num_quotes, begun = 0, 0, False
        for line in io.BytesIO(head):
            length += len(line)
            num_quotes += line.count(b'"') if layout.quoted else 0
            begun = begun or bool(line.strip(b"\xef\xbb\xbf\r\n"))
            if begun and num_quotes % 2 == 0 and line.endswith(b"\n"):  # else a quoted name goes on
                return head[:length], True
        if len(head) < size:
            return head, True
        if size >= _MAX_HEADER:
            return head, False
        size *= 16


def _need_text(path: Path, head: bytes) -> None:
    """Raises DataError where the first bytes are those of something else, saying of what."""
    unpack = "unpack it, or compress it with gzip"
    for magic, kind in (
        (b"PAR1", "a Parquet file; name it .parquet"),
        (b"PK\x03\x04", "a zip archive or an Excel workbook"),
        (b"\xd0\xcf\x11\xe0", "an old Excel workbook"),
        (b"\x28\xb5\x2f\xfd", f"zstd; {unpack}"),  # polars would unpack this and zlib, to any size
        *((b"x" + level, f"zlib; {unpack}") for level in (b"\x01", b"\x9c", b"\xda")),
        (b"\xfd7zXZ\0", f"xz; {unpack}"),
        (b"BZh91AY&SY", f"bzip2; {unpack}"),
    ):
        if head.startswith(magic):
            raise DataError(f"{path}: expected delimited text, found {kind}")
    pairs = np.frombuffer(head[:4096][: len(head[:4096]) & ~1], np.uint8).reshape(-1, 2)
    wide = len(pairs) > 3 and ((pairs == 0).mean(0) > 0.4).any()  # Latin letters in two bytes, one of them 0
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or wide:
        raise DataError(f"{path}: the text is UTF-16; convert the file, for example with iconv -f utf-16 -t utf-8")


def _parse(path: Path, source: Path | bytes, layout: Layout, n_rows: int | None = None) -> pl.DataFrame:
    """All columns, since polars overlooks lines with too many fields when it reads some."""
    try:
        frame = pl.read_csv(
            source,
            separator=layout.separator,
            quote_char='"' if layout.quoted else None,
            infer_schema=False,
            n_rows=n_rows,
            glob=False,
        )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except pl.exceptions.NoDataError as error:
        raise DataError(f"{path}: the file is empty; expected a header line") from error
    except pl.exceptions.PolarsError as error:
        raise DataError(_what_is_wrong(path, layout) or f"{path}: {str(error).splitlines()[0]}") from error
    if any("\ufffd" in name for name in frame.columns):  # polars replaces bad bytes in a header
        raise DataError(_what_is_wrong(path, layout) or f"{path}, line 1: the header holds a replacement character")
    return frame


# -- Python's csv module, for what polars would misread


@contextmanager
def _long_fields() -> Iterator[None]:
    """csv takes fields of 128 KiB; polars has no such limit."""
    before = csv.field_size_limit(_MAX_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


@dataclass(frozen=True)
class _Survey:
    """What a dialect makes of a file. error: in words, with line, or None. even: all records as wide as the header."""

    error: str | None
    line: int
    even: bool


def _records(content: Content, layout: Layout, escaped: bool = False) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of every record, header included; blank lines before the header are not records."""
    raw = io.BytesIO(content.source) if isinstance(content.source, bytes) else content.source.open("rb")
    with io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="") as text:
        if not layout.quoted:
            reader = csv.reader(text, delimiter=layout.separator, quoting=csv.QUOTE_NONE)
        elif escaped:
            # Only a quote and a backslash are escaped: Spark writes the backslash of C:\new as it is.
            lines = (_BACKSLASH.sub(lambda match: match[0].ljust(2, "\\"), line) for line in text)
            reader = csv.reader(lines, delimiter=layout.separator, strict=True, escapechar="\\")
        else:
            reader = csv.reader(text, delimiter=layout.separator, strict=True)
        line, begun = 1, False
        for fields in reader:
            begun = begun or bool(fields)
            if begun:
                yield line, fields
            line = reader.line_num + 1


def _survey(content: Content, layout: Layout, escaped: bool) -> _Survey:
    width, line, even = 0, 0, True
    try:
        for first_line, fields in _records(content, layout, escaped):
            line, width = first_line, width or len(fields)
            even = even and len(fields) in (0, width)
    except csv.Error as error:
        return _Survey(f"after line {line}: {error}; are the quotes balanced?", line, False)
    return _Survey(None, line, even)


@_long_fields()
def _breaks_when_escaped(content: Content, layout: Layout) -> bool:
    """Whether backslashes can't be escapes, in a file that is right without: most often the first one shows it."""
    return not _survey(content, layout, True).even


@_long_fields()
def _read_by_csv(path: Path, content: Content, layout: Layout, scanned: Scan) -> tuple[pl.DataFrame, np.ndarray]:
    bad = _bad_byte(path, content)
    if bad:
        raise DataError(bad)
    escaped = layout.quoted and scanned.escaped and _escape_dialect(path, content, layout)
    is_mixed = scanned.lone_cr and scanned.records > 1  # line feeds end lines, too
    rewritten, lines = io.StringIO(newline=""), []
    writer = csv.writer(rewritten, delimiter=layout.separator)
    width = 0
    try:
        for line, fields in _records(content, layout, escaped):
            width = width or len(fields)
            if width > MAX_COLUMNS:
                raise DataError(f"{path}, line {line}: {width:,} columns; expected at most {MAX_COLUMNS:,}")
            if len(fields) > width:
                raise DataError(f"{path}, line {line}: {_too_many(len(fields), width)}")
            if 0 < len(fields) < width and is_mixed:
                cause = "a carriage return in a field without quotes, perhaps, which ends a line as line feeds do"
                raise DataError(f"{path}, line {line}: {len(fields)} fields, but the header has {width}; {cause}")
            writer.writerow(fields)
            lines.append(line)
    except csv.Error as error:
        last = lines[-1] if lines else 0
        raise DataError(f"{path}, after line {last}: {error}; are the quotes balanced?") from error
    frame = _parse(path, rewritten.getvalue().encode(), Layout(layout.separator))
    if len(frame) != len(lines) - 1:
        raise DataError(f"{path}, lines 1 to {lines[-1]}: {len(lines) - 1} records, but the parser read {len(frame)}")
    return frame, np.array(lines)


def _escape_dialect(path: Path, content: Content, layout: Layout) -> bool:
    """Whether backslashes escape quotes; raises DataError where neither reading holds, or both do and differ."""
    plain, escaped = (_survey(content, layout, kind) for kind in (False, True))
    if plain.error and escaped.error:
        raise DataError(f"{path}, {max(plain, escaped, key=lambda survey: survey.line).error}")
    if plain.error or escaped.error or plain.even != escaped.even:
        return escaped.even if plain.error is None and escaped.error is None else escaped.error is None
    for one, other in zip_longest(_records(content, layout), _records(content, layout, True)):
        same = one and other and [_BACKSLASH.sub(lambda match: match[0][-1], field) for field in one[1]] == other[1]
        if not same:
            line = (one or other or (1, []))[0]
            cause = 'a backslash before a quote (\\") may escape it or not, and both readings fit the file'
            raise DataError(f'{path}, line {line}: {cause}; double the quotes inside fields ("")')
    return False


def _too_many(num_fields: int, width: int) -> str:
    hint = "; has the first column, of row numbers perhaps, no name?" if num_fields == width + 1 else ""
    return f"{num_fields} fields, but the header has {width}{hint}"


def _bad_byte(path: Path, content: Content) -> str | None:
    file = io.BytesIO(content.source) if isinstance(content.source, bytes) else content.source.open("rb")
    with file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8"
                return f"{path}, line {number}: {byte}; convert the file, for example with iconv -f latin1 -t utf-8"
    return None


@_long_fields()
def _what_is_wrong(path: Path, layout: Layout) -> str | None:
    """The first line that polars could not have read, in words; None where this second look finds none."""
    content = read_content(need_regular(path))
    bad = _bad_byte(path, content)
    if bad:
        return bad
    width, line_number = 0, 0
    try:
        for line_number, fields in _records(content, layout):
            width = width or len(fields)
            if len(fields) > width:
                return f"{path}, line {line_number}: {_too_many(len(fields), width)}"
    except csv.Error as error:
        return f"{path}, after line {line_number}: {error}; are the quotes balanced?"
    return None
