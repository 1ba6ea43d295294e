"""Interactions in long form beside an item table, under any column names: CSV, Parquet or JSON lines."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from ..sessions import DataError
from .delimited import Layout
from .files import find_table, is_pattern, need_regular, need_table
from .raw import Options, Raw
from .tables import (
    OTHERS,
    Rows,
    check_splits,
    choose_text,
    column_names,
    need_columns,
    table_batches,
    text_columns,
    with_ids,
)
from .values import Times, check_ids, clean_text

ROLES = ("session_id", "item_id", "timestamp", "order", "split")
TABLE_ID = "items.item_id"  # the role of the item table's column of ids
_TAKEN = ("session_id", "item_id", "row", OTHERS)  # names of columns that are made while a file is read


def read(path: Path, options: Options) -> Raw:
    """Reads `interactions` (session_id, item_id, timestamp, optionally order and split) and, if there is one, `items`.

    path: the folder, the interactions file, a folder of Parquet files, or a pattern such as `clicks-*.csv`; `items` is
    looked for in the same folder unless options name it. options.columns gives the files' names of the columns, in JSON
    lines `events.aid` for the ``aid`` of each of a line's ``events``; `items.item_id` is that of ids in the item table.
    With options.user_column a user stands in place of the session, for `prepare` to divide. Text columns: all of
    `items` by default, but for an index without a name. Raises DataError naming file and line.
    """
    _check_columns(options)
    files = _find(path)
    item_file = find_table(files[0].parent, "items") if options.items is None else need_regular(options.items)
    if item_file is None:
        choose_text(files[0].parent / "items.*", [], options.text_columns, [])
    items = None if item_file is None else _read_items(item_file, options)
    left_out: dict[str, int] = {}
    read, rows, times = {"interaction rows": 0}, Rows(), Times(_name(options, "timestamp"), only=options.time_format)
    batches = _batches(files, options, rows, times, read, left_out)
    return Raw(batches, items, read, left_out, item_file, where=rows.where, per_second=lambda: times.per_second)


def _check_columns(options: Options) -> None:
    unknown = [role for role in options.columns if role not in (*ROLES, TABLE_ID)]
    if unknown:
        choices = ", ".join((*ROLES, TABLE_ID))
        raise DataError(f"--columns: no column {', '.join(unknown)} is read; choose from {choices}")
    if options.user_column is not None and "session_id" in options.columns:
        raise DataError("--columns names session_id, and sessions are to be made of users; choose one of the two")
    roles: dict[str, str] = {}
    for role in ROLES:
        name = _name(options, role)
        if name in roles:
            raise DataError(f"--columns: {roles[name]} and {role} are both column {name}; expected two columns")
        roles[name] = role
        if name in _TAKEN and not (name == role or (role in _TAKEN[:2] and name in _TAKEN[:2])):
            raise DataError(f"--columns: {role} is column {name}, a name with a meaning of its own; rename the column")


def _find(path: Path) -> list[Path]:
    if is_pattern(path):
        files = sorted(path.parent.glob(path.name))
        if not files:
            raise DataError(f"{path}: no file matches")
        return files
    if not path.is_dir():
        return [path] if path.exists() else [need_table(path, "interactions")]
    named = find_table(path, "interactions") or (path / "items.parquet").exists()
    if not named and (parts := sorted(path.glob("*.parquet"))):
        return parts
    return [need_table(path, "interactions")]


def _name(options: Options, role: str) -> str:
    if role == "session_id" and options.user_column is not None:
        return options.user_column
    return options.columns.get(role, role)


def _layout(options: Options) -> Layout:
    try:
        "".encode(options.encoding)
    except LookupError as error:
        raise DataError(f"encoding is {options.encoding!r}, expected one that Python knows, such as latin1") from error
    if not options.separator or set(options.separator) & set('"\r\n') or not options.separator.isascii():
        expected = "one ASCII character or several, no quote, no line end"
        raise DataError(f"separator is {options.separator!r}, expected {expected}")
    quoted = len(options.separator) == 1  # MovieLens separates by :: and quotes nothing
    return Layout(options.separator, quoted, codecs.lookup(options.encoding).name, options.has_header)


def _batches(
    files: Sequence[Path], options: Options, rows: Rows, times: Times, read: dict[str, int], left_out: dict[str, int]
) -> Iterator[pl.DataFrame]:
    required = [_name(options, role) for role in ("session_id", "item_id", "timestamp")]
    extra = {role: _name(options, role) for role in ("order", "split")}
    optional = [extra["split"]]
    required += [extra[role] for role in extra if role in options.columns]
    numbers = Times(extra["order"])
    have_split = set()
    for file in files:
        for table in table_batches(file, required, optional, _layout(options), whole=True, rows_of=required):
            read["interaction rows"] += len(table.frame)
            frame = with_ids(table, required[0], required[1], left_out)
            columns = ["session_id", "item_id", times.parse(table, frame).alias("timestamp")]
            if "order" in options.columns:
                columns.append(numbers.parse(table, frame).cast(pl.Float64).alias("order"))
            if OTHERS in frame.columns:
                columns.append(OTHERS)
            have_split.add(extra["split"] in frame.columns)
            if len(have_split) > 1:
                raise DataError(f"{file}: column {extra['split']} is in some of the files; expected it in all or none")
            if extra["split"] in frame.columns:
                splits = frame.select("row", pl.col(extra["split"]).cast(pl.String).alias("split"))
                check_splits(table, splits)
                columns.append(splits["split"])
            numbered = rows.add(table, frame)
            yield numbered.select(*columns, *(["row"] if extra["split"] in frame.columns else []))


def _read_items(file: Path, options: Options) -> pl.DataFrame:
    layout = _layout(options)
    names = column_names(file, layout)
    item = "item_id" if "item_id" in names else _name(options, "item_id")
    item = options.columns.get(TABLE_ID, item)
    available = [name for name in text_columns(file, layout) if name != item]
    need_columns(file, names, [item], layout)
    chosen = choose_text(file, available, options.text_columns, available)
    parts = []
    for table in table_batches(file, [item], chosen, layout):
        for name in chosen:
            kind = table.frame[name].dtype
            if kind.is_nested() or kind == pl.Binary:
                raise DataError(f"{file}, column {name}: {kind} is no text; name the columns to use (--text-columns)")
        frame = table.frame.with_columns(table.ids(item).alias("item_id"))
        # a text column may be named row
        check_ids(table, frame.select("item_id").with_row_index("row", table.first), "item_id")
        parts.append(clean_text(frame, chosen))
    return pl.concat(parts)
