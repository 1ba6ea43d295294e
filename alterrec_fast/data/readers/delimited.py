"""Reads one delimited text file, plain or gzipped: right, or refused with the line.

polars parses, and never alone: its rows must be as many as `scan` counts. It splits files at quotes by parity, which
only holds where every quote is proper, so Python's csv module reads the files in which one is not: quotes escaped by a
backslash, bare quotes inside a field, and carriage returns as line ends.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path

import numpy as np
import polars as pl

from ..sessions import DataError
from .files import STEP, blocks
from .scan import Scan, after_last_record, line_of_record, scan, skip_blank

MAX_COLUMNS = 10_000
BATCH = 1 << 25  # bytes parsed at a time, and more where a record is longer
_MAX_HEADER = 1 << 24  # bytes
_MAX_FIELD = 1 << 24
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars (|)"}
_BACKSLASH = re.compile(r'\\["\\]|\\')
_UNIT = "\x1f"  # ASCII's unit separator, in place of a separator of several characters


@dataclass(frozen=True)
class Layout:
    """How a text table is written: its separator, whether fields may be quoted, its encoding, and whether the first
    record is a header; without one, columns have the names 1, 2, 3, ..."""

    separator: str = ","
    quoted: bool = True
    encoding: str = "utf-8"
    has_header: bool = True

    @property
    def mark(self) -> str:
        """The one character that separates fields for the parsers."""
        return self.separator if len(self.separator) == 1 else _UNIT

    @property
    def first_line(self) -> int:
        return 1 if self.has_header else 0


CSV = Layout()
ATOMIC = Layout(separator="\t", quoted=False)


def header(path: Path, layout: Layout = CSV) -> list[str]:
    """The column names as polars has them; raises DataError for a file that is empty, no text, or far too wide."""
    head, whole = _head(path, layout)
    scanned = scan([head], layout.mark, layout.quoted)
    if scanned.lone_cr or scanned.escaped or not scanned.proper:
        return next(read_batches(path, layout)).columns  # the dialect is the whole file's
    if not whole:
        raise DataError(f"{path}, line 1: the header is longer than {_MAX_HEADER:,} bytes")
    if head.count(layout.mark.encode()) >= MAX_COLUMNS:
        width = head.count(layout.mark.encode()) + 1
        raise DataError(f"{path}, line 1: about {width:,} columns; expected at most {MAX_COLUMNS:,}")
    return _parse(path, head, layout, n_rows=0).columns


def read_batches(path: Path, layout: Layout = CSV) -> Iterator[pl.DataFrame]:
    """All columns as String ("00123" must stay what it is), in one frame or several of about BATCH bytes.

    Raises DataError for bytes that are not UTF-8, a gzip that is cut short or damaged, lines with too many fields,
    quotes that no dialect explains or that two explain differently, and files that are empty or unreadable.
    """
    scanned = scan(_content(path, layout), layout.mark, layout.quoted)
    if scanned.nul_line is not None:
        raise DataError(f"{path}, line {scanned.nul_line - 1 + layout.first_line}: a byte 0; expected text in UTF-8")
    if _needs_csv(path, layout, scanned):
        if bad := _bad_byte(path, layout):
            raise DataError(bad)
        escaped = layout.quoted and scanned.escaped and _escape_dialect(path, layout)
        is_mixed = scanned.lone_cr and scanned.records > 1  # line feeds end lines, too
        yield from _read_by_csv(path, layout, _records(_content(path, layout), layout, escaped), is_mixed)
        return
    line = layout.first_line
    for head, body in _whole_records(path, layout):
        frame = _parse(path, head + body, layout)
        quotes = layout.quoted and b'"' in body
        num_records = scan([head + body], layout.mark, True).records - 1 if quotes else body.count(b"\n")
        num_records += not quotes and not body.endswith(b"\n") and bool(body)
        if len(frame) == num_records:
            yield frame
        else:  # the parsers differ: what csv rewrites is beyond doubt
            yield from _read_by_csv(path, layout, _records([head + body], layout, False, line), False)
        line += body.count(b"\n")


def line_of(path: Path, row: int, layout: Layout) -> int:
    """The line (from 1) on which row (from 0) of a file starts that was read."""
    scanned = scan(_content(path, layout), layout.mark, layout.quoted)
    if not _needs_csv(path, layout, scanned):
        line = line_of_record(_content(path, layout), row + 1, layout.quoted)
        return line - 1 + layout.first_line
    with _long_fields():
        escaped = layout.quoted and scanned.escaped and _escape_dialect(path, layout)
        return next(islice(_records(_content(path, layout), layout, escaped), row + 1, None))[0]


def _needs_csv(path: Path, layout: Layout, scanned: Scan) -> bool:
    doubtful = scanned.escaped and layout.quoted
    return scanned.lone_cr or not scanned.proper or (doubtful and not _breaks_when_escaped(path, layout))


def _content(path: Path, layout: Layout, size: int = STEP) -> Iterator[bytes]:
    """The file in UTF-8, with one character for a separator and a header."""
    content = blocks(path, layout.encoding, size)
    if len(layout.separator) > 1:
        content = _with_mark(path, content, layout)
    if not layout.has_header:
        content = _with_header(content, layout)
    return content


def _with_mark(path: Path, content: Iterable[bytes], layout: Layout) -> Iterator[bytes]:
    rest, mark = b"", _UNIT.encode()
    for block in content:
        if mark in block:
            raise DataError(f"{path}: holds a unit separator (0x1f), expected fields separated by {layout.separator!r}")
        rest += block
        end = rest.rfind(b"\n") + 1  # a separator may go on in the next block, and no line end lies in one
        yield rest[:end].replace(layout.separator.encode(), mark)
        rest = rest[end:]
    yield rest.replace(layout.separator.encode(), mark)


def _with_header(content: Iterator[bytes], layout: Layout) -> Iterator[bytes]:
    head = b""
    for block in content:
        head += block
        if b"\n" in skip_blank(head) or len(head) > _MAX_HEADER:
            break
    first = skip_blank(head).partition(b"\n")[0].decode(errors="replace")
    with _long_fields():
        quoted = layout.quoted and first
        fields = next(csv.reader([first], delimiter=layout.mark)) if quoted else first.split(layout.mark)
    names = layout.mark.join(str(number) for number in range(1, len(fields) + 1))
    yield names.encode() + b"\n" + skip_blank(head) if first.strip() else b""
    yield from content


def _whole_records(path: Path, layout: Layout) -> Iterator[tuple[bytes, bytes]]:
    """The header line and about BATCH bytes of whole records, one pair at least; the quotes must be proper."""
    head, pieces, held = None, [], 0
    for block in chain(_content(path, layout, min(STEP, BATCH)), [None]):
        pieces.append(block or b"")
        held += len(pieces[-1])
        if held < BATCH and block is not None:
            continue
        rest = b"".join(pieces)
        if head is None:
            rest = skip_blank(rest)
            length = _header_length(rest, layout)
            if length == 0 and block is not None:
                pieces, held = [rest], 0
                continue
            head, rest = (rest[:length], rest[length:]) if length else (rest, b"")
        end = len(rest) if block is None else after_last_record(rest, layout.quoted)
        if end or block is None:
            yield head, rest[:end]
        pieces = [rest[end:]]
        held = 0 if end == 0 else len(pieces[0])


def _header_length(content: bytes, layout: Layout) -> int:
    """The length of the first record with its line feed; 0 where the content ends within it."""
    length, num_quotes = 0, 0
    while end := content.find(b"\n", length) + 1:
        num_quotes += content.count(b'"', length, end) if layout.quoted else 0
        length = end
        if num_quotes % 2 == 0:
            return length
    return 0


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
    expected = _SEPARATORS.get(layout.separator, repr(layout.separator))
    return f"; the header seems to be separated by {_SEPARATORS[best]}, expected {expected}"


def _head(path: Path, layout: Layout) -> tuple[bytes, bool]:
    """The header line with the blank lines before it, and whether it ends within what a header may take."""
    size = 1 << 16
    while True:
        _need_text(path, b"".join(islice(blocks(path, size=1 << 12), 1)), layout)
        head = b""
        for block in _content(path, layout, size):
            head += block
            if len(head) >= size:
                break
        head = head[:size]
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


def _need_text(path: Path, head: bytes, layout: Layout) -> None:
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
    if layout.encoding == "utf-8" and (head.startswith((b"\xff\xfe", b"\xfe\xff")) or wide):
        raise DataError(f"{path}: the text is UTF-16; convert the file, for example with iconv -f utf-16 -t utf-8")


def _parse(path: Path, source: bytes, layout: Layout, n_rows: int | None = None) -> pl.DataFrame:
    """All columns, since polars overlooks lines with too many fields when it reads some."""
    try:
        frame = pl.read_csv(
            source,
            separator=layout.mark,
            quote_char='"' if layout.quoted else None,
            infer_schema=False,
            n_rows=n_rows,
        )
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


class _Stream(io.RawIOBase):
    """A file of blocks."""

    def __init__(self, content: Iterable[bytes]) -> None:
        self._blocks, self._rest = iter(content), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = block
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _records(
    content: Iterable[bytes], layout: Layout, escaped: bool = False, start: int | None = None
) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of every record, header included; blank lines before the header are not records.

    start: the line of the first record, by default the file's first.
    """
    raw = io.BufferedReader(_Stream(content), 1 << 16)
    with io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="") as text:
        if not layout.quoted:
            reader = csv.reader(text, delimiter=layout.mark, quoting=csv.QUOTE_NONE)
        elif escaped:
            # Only a quote and a backslash are escaped: Spark writes the backslash of C:\new as it is.
            lines = (_BACKSLASH.sub(lambda match: match[0].ljust(2, "\\"), line) for line in text)
            reader = csv.reader(lines, delimiter=layout.mark, strict=True, escapechar="\\")
        else:
            reader = csv.reader(text, delimiter=layout.mark, strict=True)
        line = first = layout.first_line if start is None else start
        begun = False
        for fields in reader:
            begun = begun or bool(fields)
            if begun:
                yield line, fields
            line = reader.line_num + first


def _survey(path: Path, layout: Layout, escaped: bool) -> _Survey:
    width, line, even = 0, 0, True
    try:
        for first_line, fields in _records(_content(path, layout), layout, escaped):
            line, width = first_line, width or len(fields)
            even = even and len(fields) in (0, width)
    except csv.Error as error:
        return _Survey(f"after line {line}: {error}; are the quotes balanced?", line, False)
    return _Survey(None, line, even)


def _breaks_when_escaped(path: Path, layout: Layout) -> bool:
    """Whether backslashes can't be escapes, in a file that is right without: most often the first one shows it."""
    with _long_fields():
        return not _survey(path, layout, True).even


def _read_by_csv(
    path: Path, layout: Layout, records: Iterator[tuple[int, list[str]]], is_mixed: bool
) -> Iterator[pl.DataFrame]:
    """The records in frames of about BATCH bytes, the first of which is the header."""
    names: list[str] = []
    first = last = num_rows = 0
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=layout.mark)

    def parsed() -> pl.DataFrame:
        frame = _parse(path, out.getvalue().encode(), Layout(layout.mark))
        if len(frame) != num_rows:
            raise DataError(f"{path}, lines {first} to {last}: {num_rows} records, but the parser read {len(frame)}")
        return frame

    while True:
        try:
            with _long_fields():  # for each record anew: others read with csv between two of a generator's frames
                line, fields = next(records)
        except StopIteration:
            break
        except csv.Error as error:
            raise DataError(f"{path}, after line {last}: {error}; are the quotes balanced?") from error
        width = len(names) or len(fields)
        if width > MAX_COLUMNS:
            raise DataError(f"{path}, line {line}: {width:,} columns; expected at most {MAX_COLUMNS:,}")
        if len(fields) > width:
            raise DataError(f"{path}, line {line}: {_too_many(len(fields), width)}")
        if 0 < len(fields) < width and is_mixed:
            cause = "a carriage return in a field without quotes, perhaps, which ends a line as line feeds do"
            raise DataError(f"{path}, line {line}: {len(fields)} fields, but the header has {width}; {cause}")
        if names and out.tell() >= BATCH:
            yield parsed()
            out, first, num_rows = io.StringIO(newline=""), line, 0
            writer = csv.writer(out, delimiter=layout.mark)
            writer.writerow(names)
        writer.writerow(fields)
        if names:
            num_rows += 1
        else:
            names, first = fields, line
        last = line
    yield parsed()


def _escape_dialect(path: Path, layout: Layout) -> bool:
    """Whether backslashes escape quotes; raises DataError where neither reading holds, or both do and differ."""
    with _long_fields():
        plain, escaped = (_survey(path, layout, kind) for kind in (False, True))
        if plain.error and escaped.error:
            raise DataError(f"{path}, {max(plain, escaped, key=lambda survey: survey.line).error}")
        if plain.error or escaped.error or plain.even != escaped.even:
            return escaped.even if plain.error is None and escaped.error is None else escaped.error is None
        both = (_records(_content(path, layout), layout, kind) for kind in (False, True))
        for one, other in zip_longest(*both):
            same = one and other and [_BACKSLASH.sub(lambda match: match[0][-1], field) for field in one[1]] == other[1]
            if not same:
                line = (one or other or (1, []))[0]
                cause = 'a backslash before a quote (\\") may escape it or not, and both readings fit the file'
                raise DataError(f'{path}, line {line}: {cause}; double the quotes inside fields ("")')
    return False


def _too_many(num_fields: int, width: int) -> str:
    hint = "; has the first column, of row numbers perhaps, no name?" if num_fields == width + 1 else ""
    return f"{num_fields} fields, but the header has {width}{hint}"


def _bad_byte(path: Path, layout: Layout) -> str | None:
    if layout.encoding != "utf-8":
        return None  # it was decoded
    with io.BufferedReader(_Stream(_content(path, layout))) as file:
        for number, line in enumerate(file, layout.first_line):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8"
                return f"{path}, line {number}: {byte}; convert the file, for example with iconv -f latin1 -t utf-8"
    return None


def _what_is_wrong(path: Path, layout: Layout) -> str | None:
    """The first line that polars could not have read, in words; None where this second look finds none."""
    bad = _bad_byte(path, layout)
    if bad:
        return bad
    width, line_number = 0, 0
    try:
        with _long_fields():
            for line_number, fields in _records(_content(path, layout), layout):
                width = width or len(fields)
                if len(fields) > width:
                    return f"{path}, line {line_number}: {_too_many(len(fields), width)}"
    except csv.Error as error:
        return f"{path}, after line {line_number}: {error}; are the quotes balanced?"
    return None
