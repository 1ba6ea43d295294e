"""Amazon-M2 (KDD Cup 2023) as published: `sessions_train.csv` and `products_train.csv`, one locale at a time."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from ..sessions import DataError
from .files import need_table
from .raw import Options, Raw
from .tables import Table, choose_text, column_names, need_columns, read_table
from .values import check_ids, clean_text, drop_missing_ids, shown

_SUFFIXES = (".csv", ".csv.gz")
_ID = r"""('[^'\\]+'|"[^"\\]+")"""
_ARRAY = rf"^\[\s*(({_ID}|\.\.\.)((\s*,\s*|\s+)({_ID}|\.\.\.))*)?\s*\]$"


def read(path: Path, options: Options) -> Raw:
    """Reads the sessions of options.locale, each prev_items followed by its next_item, in file order.

    path: the folder, or the sessions file, whose folder then holds `products_train.csv`. options.test: a labelled
    test file; its sessions are the test split, and the split of the others is left open. Text columns: title and desc
    by default. Raises DataError naming file and line, or the locales present if options.locale is not one.
    """
    file = path if path.is_file() else need_table(path, "sessions_train", _SUFFIXES)
    products = need_table(file.parent, "products_train", _SUFFIXES)
    left_out: dict[str, int] = {}
    table, frame = _read_sessions(file, options.locale, left_out)
    read = {"session rows": len(table.frame)}
    frames = [frame]
    if options.test is not None:
        test, test_frame = _read_sessions(options.test, options.locale, left_out)
        read["test session rows"] = len(test.frame)
        splits = (pl.lit(None, pl.String).alias("split"), pl.lit("test").alias("split"))
        frames = [frame.with_columns(splits[0]), test_frame.with_columns(splits[1])]
    # the files name no sessions: the row number, counted on through the test file, is the id
    sessions = pl.concat(frames).with_row_index("session_id").with_columns(pl.col("session_id").cast(pl.String))
    interactions = drop_missing_ids(sessions.explode("item_id"), left_out)
    return Raw([interactions], _read_products(products, options), read, left_out, products)


def _read_sessions(file: Path, locale: str | None, left_out: dict[str, int]) -> tuple[Table, pl.DataFrame]:
    """The table, and a row for each session of the locale: ``item_id`` (List of String), the next item last."""
    table = read_table(file, ["prev_items", "next_item", "locale"])
    frame = table.frame.with_row_index("row").filter(_is_locale(table, locale))
    reason = "sessions of other locales"
    left_out[reason] = left_out.get(reason, 0) + len(table.frame) - len(frame)
    printed = pl.col("prev_items").str.strip_chars()
    wrong = frame.filter(~printed.str.contains(_ARRAY).fill_null(False))
    if len(wrong):
        place, value = table.where(wrong["row"][0]), shown(wrong["prev_items"][0])
        raise DataError(f"{place}: prev_items is {value}, expected a printed array of quoted ids, ['B09' 'B08']")
    check_ids(table, frame, "next_item")
    # numpy prints long arrays with their middle left out, which no reader can bring back
    whole = frame.filter(~printed.str.replace_all(_ID, "").str.contains("...", literal=True))
    reason = "sessions whose prev_items are printed abridged (...)"
    left_out[reason] = left_out.get(reason, 0) + len(frame) - len(whole)
    unquoted = pl.element().str.slice(1, pl.element().str.len_chars() - 2)
    items = pl.col("prev_items").str.extract_all(_ID).list.eval(unquoted)
    return table, whole.select(items.list.concat(pl.col("next_item")).alias("item_id"))


def _read_products(file: Path, options: Options) -> pl.DataFrame:
    names = column_names(file)
    need_columns(file, names, ["id", "locale"])
    available = [name for name in names if name not in ("id", "locale", "item_id")]
    default = [name for name in ("title", "desc") if name in available]
    chosen = choose_text(file, available, options.text_columns, default)
    table = read_table(file, ["id", "locale"], chosen)
    frame, is_locale = table.frame.rename({"id": "item_id"}), _is_locale(table, options.locale)
    check_ids(table, frame.select("item_id", "locale").with_row_index("row").filter(is_locale), "item_id")
    return clean_text(frame.filter(is_locale), chosen)


def _is_locale(table: Table, locale: str | None) -> pl.Expr:
    present = table.frame["locale"].unique().drop_nulls().sort().to_list()
    if locale not in present:
        asked = "no locale was given (--locale)" if locale is None else f"no locale {locale}"
        raise DataError(f"{table.path}: {asked}; found {', '.join(present) or 'none'}")
    return pl.col("locale") == locale
