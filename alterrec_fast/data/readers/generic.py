"""Interactions in long form beside an item table: `interactions.*` and `items.*`, CSV, gzipped CSV or Parquet."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from ..sessions import DataError
from .files import find_table, need_table
from .raw import Options, Raw
from .tables import check_splits, choose_text, column_names, need_columns, read_table, text_columns, with_ids
from .values import check_ids, clean_text, parse_times


def read(path: Path, options: Options) -> Raw:
    """Reads `interactions` (session_id, item_id, timestamp, optionally split) and, if there is one, `items`.

    path: the folder, or the interactions file, whose folder then holds `items`. Text columns: all of `items` by
    default, but for an index without a name. Raises DataError naming file and line.
    """
    file = path if path.is_file() else need_table(path, "interactions")
    table = read_table(file, ["session_id", "item_id", "timestamp"], ["split"], whole=True)
    left_out: dict[str, int] = {}
    frame = with_ids(table, "session_id", "item_id", left_out)
    frame = frame.with_columns(parse_times(table, frame, "timestamp").alias("timestamp"))
    if "split" in frame.columns:
        frame = frame.with_columns(pl.col("split").cast(pl.String))
        check_splits([table], [frame])
    item_file = find_table(file.parent, "items")
    if item_file is None:
        choose_text(file.parent / "items.*", [], options.text_columns, [])
    items = None if item_file is None else _read_items(item_file, options)
    return Raw(frame.drop("row"), items, {"interaction rows": len(table.frame)}, left_out, item_file)


def _read_items(file: Path, options: Options) -> pl.DataFrame:
    available = text_columns(file)
    need_columns(file, column_names(file), ["item_id"])
    chosen = choose_text(file, available, options.text_columns, available)
    table = read_table(file, ["item_id"], chosen)
    for name in chosen:
        kind = table.frame[name].dtype
        if kind.is_nested() or kind == pl.Binary:
            raise DataError(f"{file}, column {name}: {kind} is no text; name the columns to use (--text-columns)")
    frame = table.frame.with_columns(table.ids("item_id"))
    check_ids(table, frame.select("item_id").with_row_index("row"), "item_id")  # a text column may be named row
    return clean_text(frame, chosen)
