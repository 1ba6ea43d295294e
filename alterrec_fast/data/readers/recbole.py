"""RecBole's atomic files: `NAME.inter` or `NAME.train.inter` and so on, and `NAME.item`; tabs and typed headers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl

from ..sessions import DataError
from .delimited import ATOMIC, separator_hint
from .files import listing, need_folder
from .raw import Options, Raw
from .tables import (
    OTHERS,
    Rows,
    Table,
    choose_text,
    column_names,
    need_columns,
    read_table,
    table_batches,
    with_ids,
)
from .values import Times, check_ids, clean_text, drop_missing_ids, shown
from .windows import join_windows

_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
_TYPES = ("token", "token_seq", "float", "float_seq")
_TEXT = ("token", "token_seq")


def read(path: Path, options: Options) -> Raw:
    """Reads `.inter` files in long form (an interaction a row) or sequential (a window and the next item a row).

    path: the folder, or one `.inter` file. NAME.train.inter, NAME.valid.inter and NAME.test.inter are splits as given;
    without NAME.valid.inter its split is left open; with options.leave_one_out they are one, in this order. The session
    is ``session_id`` or else ``user_id``. Text columns: the token and token_seq columns of NAME.item by default. Raises
    DataError naming file and line.
    """
    files, item_file = _find(path)
    headers = [_header(file) for file in files.values()]
    if len({tuple(sorted({"item_id_list", "timestamp"} & set(names))) for names in headers}) > 1:
        raise DataError(f"{path}: item_id_list and timestamp must be in all .inter files or in none")
    left_out: dict[str, int] = {}
    read, rows = {"interaction rows": 0}, Rows()
    items = _items(item_file, options)
    return Raw(
        _batches(files, rows, read, left_out, options.leave_one_out),
        items,
        read,
        left_out,
        None if items is None else item_file,
        where=rows.where,
        left_open="train" if "validation" not in files else None,
    )


def _batches(
    files: dict[str, Path], rows: Rows, read: dict[str, int], left_out: dict[str, int], leave_one_out: bool
) -> Iterator[pl.DataFrame]:
    for split, file in files.items():
        times = Times("timestamp")
        for table in _tables(file, ("item_id",), ("session_id", "user_id", "timestamp", "item_id_list")):
            read["interaction rows"] += len(table.frame)
            frame = rows.add(table, _interactions(table, times, left_out))
            if split and not leave_one_out:
                frame = frame.with_columns(pl.lit(split).alias("split"))
            yield frame


def _find(path: Path) -> tuple[dict[str, Path], Path]:
    """The .inter files by split (by "" where there is one file for all), train first, and the place of NAME.item."""
    folder = path.parent if path.is_file() else path
    need_folder(folder)
    found = sorted(folder.glob("*.inter"))
    chosen = [path] if path.is_file() else found
    names = {_dataset_name(file) for file in chosen}
    if len(names) == 1:
        name = names.pop()
        whole, item_file = folder / f"{name}.inter", folder / f"{name}.item"
        parts = {split: folder / f"{name}.{short}.inter" for short, split in _SPLITS.items()}
        parts = {split: file for split, file in parts.items() if file in found}
        if whole in chosen and (path.is_file() or not parts):
            return {"": whole}, item_file
        if whole not in chosen and "train" in parts:
            return parts, item_file
    expected = "NAME.inter, or NAME.train.inter with NAME.valid.inter and NAME.test.inter"
    raise DataError(f"{folder}: expected {expected}, found {listing(folder)}; name a file to choose among several")


def _dataset_name(file: Path) -> str:
    stem = file.name.removesuffix(".inter")
    name, _, split = stem.rpartition(".")
    return name if name and split in _SPLITS else stem


def _tables(file: Path, required: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[Table]:
    """The table under its bare column names, in batches, or as a whole where it holds windows; raises DataError for a
    header that is not name:type throughout."""
    typed = _header(file)
    need_columns(file, list(typed), required, ATOMIC)
    names = [f"{name}:{typed[name]}" for name in (*required, *optional) if name in typed]
    if "item_id_list" in typed:
        batches: Iterable[Table] = [read_table(file, names, layout=ATOMIC, whole=True)]
    else:
        batches = table_batches(file, names, layout=ATOMIC, whole=True)
    for table in batches:
        yield replace(table, frame=table.frame.rename(lambda name: name.rpartition(":")[0]))


def _header(file: Path) -> dict[str, str]:
    """The type of each column."""
    header = column_names(file, ATOMIC)
    wrong = [name for name in header if name.rpartition(":")[2] not in _TYPES or ":" not in name]
    if wrong:
        hint = separator_hint(file, ATOMIC, ("session_id", "user_id", "item_id", "timestamp"))
        expected = f"expected name:type ({', '.join(_TYPES)}){hint}"
        raise DataError(f"{file}, line 1: column {shown(wrong[0])} has no type, {expected}")
    return {name.rpartition(":")[0]: name.rpartition(":")[2] for name in header}


def _interactions(table: Table, times: Times, left_out: dict[str, int]) -> pl.DataFrame:
    """``session_id``, ``item_id``, ``row`` and, as far as they are there, ``timestamp`` and ``others``."""
    session = next((name for name in ("session_id", "user_id") if name in table.frame.columns), None)
    if session is None:
        found = ", ".join(table.frame.columns)
        raise DataError(f"{table.path}: column session_id or user_id is missing; found {found}")
    frame = with_ids(table, session, "item_id", left_out)
    if "item_id_list" in frame.columns:
        return drop_missing_ids(join_windows(table, frame), left_out)  # the ids in lists
    columns = [name for name in ("session_id", "item_id", "row", OTHERS) if name in frame.columns]
    if "timestamp" in frame.columns:
        return frame.select(*columns, times.parse(table, frame))
    return frame.select(columns)


def _items(file: Path, options: Options) -> pl.DataFrame | None:
    if not file.exists():
        choose_text(file, [], options.text_columns, [])
        return None
    available = [name for name, kind in _header(file).items() if kind in _TEXT and name != "item_id"]
    chosen = choose_text(file, available, options.text_columns, available)
    parts = []
    for table in _tables(file, ("item_id",), tuple(chosen)):
        check_ids(table, table.frame.select("item_id").with_row_index("row", table.first), "item_id")
        parts.append(clean_text(table.frame, chosen))
    return pl.concat(parts)
