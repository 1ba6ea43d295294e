"""Reads JSON lines, an object a line, as Strings: values by their key, those of inner objects as `key.inner`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ..sessions import DataError
from .files import STEP, blocks

SUFFIXES = (".jsonl", ".ndjson", ".json")
BATCH = 1 << 25  # bytes parsed at a time
_LOOKED_AT = 1 << 20  # bytes from which the keys are taken
_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException)


def is_json_lines(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(SUFFIXES)


def names(path: Path) -> list[str]:
    """The columns: every key of the first lines, with those of inner objects and of objects in lists as `key.inner`.

    Raises DataError for a file that holds no object.
    """
    schema = _schema(path)
    return [name for key, dtype in schema.items() for name in _names(key, dtype)]


def batches(path: Path, columns: list[str], rows_of: Sequence[str]) -> Iterator[tuple[pl.DataFrame, np.ndarray]]:
    """The columns in frames of about BATCH bytes, and for each row its line. Lists stay lists of String, but where a
    column of rows_of is one: each element of its list is then a row, with what else its object holds.

    Raises DataError, with line, for what is no object.
    """
    schema = {key: dtype for key, dtype in _schema(path).items() if set(_names(key, dtype)) & set(columns)}
    line = 1
    for block in _whole_lines(path):
        ends = block.split(b"\n")
        numbers = np.array([line + i for i, text in enumerate(ends) if text.strip()], np.int64)
        line += len(ends) - 1
        if len(numbers) == 0:
            continue
        try:
            parsed = pl.read_ndjson(io.BytesIO(block), schema=schema)
        except _ERRORS as error:
            raise DataError(_what_is_wrong(path) or f"{path}: {str(error).splitlines()[0]}") from error
        if len(parsed) != len(numbers):
            span = f"lines {numbers[0]} to {numbers[-1]}"
            raise DataError(f"{path}, {span}: {len(numbers)} objects, but the parser read {len(parsed)}")
        frame = parsed.select(_column(name, schema).alias(name) for name in columns)
        lists = [name for name in columns if frame.schema[name] == pl.List(pl.String)]
        keys = {_key(name, schema) for name in rows_of if name in lists}
        lists = [name for name in lists if _key(name, schema) in keys]
        if lists:
            frame = frame.with_row_index("line of the batch")
            _check_lengths(path, frame, lists, numbers)
            frame = frame.explode(lists)
            numbers = numbers[frame["line of the batch"].to_numpy()]
            frame = frame.drop("line of the batch")
        yield frame, numbers


def line_of(path: Path, row: int, columns: list[str], rows_of: Sequence[str]) -> int:
    """The line (from 1) of a row (from 0) that `batches` gave."""
    for _, lines in batches(path, columns, rows_of):
        if row < len(lines):
            return int(lines[row])
        row -= len(lines)
    raise IndexError(f"{path}: no row {row}")


def _schema(path: Path) -> dict[str, pl.DataType]:
    head = b""
    for block in blocks(path, size=STEP):
        head += block
        if len(head) >= _LOOKED_AT and b"\n" in block:
            head = head[: head.rindex(b"\n")]
            break
    schema: dict[str, pl.DataType] = {}
    for number, line in enumerate(head.split(b"\n"), 1):
        if line.strip():
            for key, value in _object(path, number, line).items():
                schema[key] = _union(schema.get(key, pl.String()), _dtype(value))
    if not schema:
        raise DataError(f"{path}: the file is empty; expected a JSON object in each line")
    return schema


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not JSON ({error}); expected an object in each line") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}, line {number}: {type(value).__name__} in JSON, expected an object in each line")
    return value


def _dtype(value: object) -> pl.DataType:
    """String, or List or Struct of it, or List of Struct; what is deeper stays JSON."""
    if isinstance(value, dict) and value:
        return pl.Struct(dict.fromkeys(value, pl.String))
    if isinstance(value, list):
        inner = _dtype(value[0]) if value else pl.String()
        return pl.List(inner if isinstance(inner, pl.Struct) else pl.String)
    return pl.String()


def _union(one: pl.DataType, other: pl.DataType) -> pl.DataType:
    if isinstance(one, pl.Struct) and isinstance(other, pl.Struct):
        return pl.Struct({field.name: pl.String for field in (*one.fields, *other.fields)})
    if isinstance(one, pl.List) and isinstance(other, pl.List):
        inner = _union(one.inner, other.inner)  # type: ignore[arg-type]
        return pl.List(inner)
    return other if one == pl.String else one


def _names(key: str, dtype: pl.DataType) -> list[str]:
    inner = dtype.inner if isinstance(dtype, pl.List) else dtype
    return [f"{key}.{field.name}" for field in inner.fields] if isinstance(inner, pl.Struct) else [key]


def _key(name: str, schema: dict[str, pl.DataType]) -> str:
    return next(key for key, dtype in schema.items() if name in _names(key, dtype))


def _column(name: str, schema: dict[str, pl.DataType]) -> pl.Expr:
    if name in schema:
        return pl.col(name)
    key = _key(name, schema)
    inner = name[len(key) + 1 :]
    if isinstance(schema[key], pl.List):
        return pl.col(key).list.eval(pl.element().struct.field(inner))
    return pl.col(key).struct.field(inner)


def _whole_lines(path: Path) -> Iterator[bytes]:
    pieces: list[bytes] = []
    held = 0
    for block in blocks(path, size=min(STEP, BATCH)):
        end = block.rfind(b"\n") + 1 if held + len(block) >= BATCH else 0
        pieces.append(block[:end] if end else block)
        held += len(block)
        if end:
            yield b"".join(pieces)
            pieces, held = [block[end:]], len(block) - end
    yield b"".join(pieces)


def _check_lengths(path: Path, frame: pl.DataFrame, lists: list[str], numbers: np.ndarray) -> None:
    lengths = [frame[name].list.len() for name in lists]
    for other in lengths[1:]:
        wrong = (lengths[0] != other).fill_null(False).arg_true()
        if len(wrong):
            raise DataError(f"{path}, line {numbers[wrong[0]]}: lists of unequal length in {', '.join(lists)}")


def _what_is_wrong(path: Path) -> str | None:
    """The first line that is no object, in words."""
    number = 1
    for block in _whole_lines(path):
        for line in block.split(b"\n"):
            if line.strip():
                try:
                    _object(path, number, line)
                except DataError as error:
                    return str(error)
            number += 1
        number -= 1  # a block ends with a line feed, after which the next one goes on
    return None
