"""Interactions in long form beside an item table: `interactions.*` and `items.*`, CSV, gzipped CSV or Parquet."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from ..sessions import DataError
from .raw import Options, Raw
from .tables import (
    check_splits,
    choose_text,
    clean_text,
    column_names,
    find_table,
    need_table,
    parse_times,
    read_table,
    with_ids,
)


def read(path: Path, options: Options) -> Raw:
    """Reads `interactions` (session_id, item_id, timestamp, optionally split) and, if there is one, `items`.

    path: the folder, or the interactions file, whose folder then holds `items`. Text columns: all of `items` by
    default. Raises DataError naming file and line.
    """
    file = path if path.is_file() else need_table(path, "interactions")
    table = read_table(file, ["session_id", "item_id", "timestamp"], ["split"])
    left_out: dict[str, int] = {}
    frame = with_ids(table, "session_id", "item_id", left_out)
    frame = frame.with_columns(parse_times(table, frame, "timestamp").alias("timestamp"))
    if "split" in frame.columns:
        frame = frame.with_columns(pl.col("split").cast(pl.String))
        check_splits([table], [frame])
    return Raw(frame.drop("row"), _read_items(file.parent, options), {"interaction rows": len(table.frame)}, left_out)


def _read_items(folder: Path, options: Options) -> pl.DataFrame | None:
    file = find_table(folder, "items")
    if file is None:
        choose_text(folder / "items.*", [], options.text_columns, [])
        return None
    available = [name for name in column_names(file) if name != "item_id"]
    chosen = choose_text(file, available, options.text_columns, available)
    table = read_table(file, ["item_id"], chosen)
    for name in chosen:
        kind = table.frame[name].dtype
        if kind.is_nested() or kind == pl.Binary:
            raise DataError(f"{file}, column {name}: {kind} is no text; name the columns to use (--text-columns)")
    return clean_text(table.frame.with_columns(table.ids("item_id")), chosen)
