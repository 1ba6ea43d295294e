"""UCI Online Retail (and Online Retail II) as published, xlsx or csv: an invoice is a session."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl

from ..sessions import DataError
from .files import listing, need_folder
from .raw import Options, Raw
from .tables import Table, choose_text, column_names, read_sheets, read_table, with_ids
from .values import Times, clean_text, shown

_NAMES = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice")
_NAMES_II = ("Invoice", "StockCode", "Description", "Quantity", "InvoiceDate", "Price")
_DATE = "%m/%d/%Y %H:%M"  # 12/1/2010 8:26, as the csv copies have it
_PRODUCT = r"^\d{5}"  # POST, D, M, DOT, BANK CHARGES, gift_0001_20, TEST001, ... are not goods
_SUFFIXES = (".xlsx", ".csv", ".csv.gz")


def read(path: Path, options: Options) -> Raw:
    """Reads invoices as sessions and stock codes as items; all sheets of a workbook, one after the other.

    path: the file, or a folder with one such file. Left out and counted, the first reason that holds: cancellations
    (an invoice number with C in front), codes that do not start with five digits, quantity or price of zero or less,
    and repeats of an item within an invoice. The only text column is ``title``: the description that an item has most
    often, the first of those that tie. Raises DataError naming file and line.
    """
    file = path if path.is_file() else _find(path)
    chosen = choose_text(file, ["title"], options.text_columns, ["title"])
    left_out: dict[str, int] = {}
    parts, rows = [], 0
    for table in _tables(file):
        parts.append(_sales(table, left_out))
        rows += len(table.frame)
    frame = pl.concat(parts)
    titles = _titles(frame)
    interactions = frame.unique(["session_id", "item_id"], keep="first", maintain_order=True)
    left_out["repeats of an item within an invoice"] = len(frame) - len(interactions)
    return Raw([interactions.drop("title")], titles.select("item_id", *chosen), {"invoice rows": rows}, left_out)


def _find(folder: Path) -> Path:
    need_folder(folder)
    found = sorted(path for path in folder.iterdir() if path.name.lower().endswith(_SUFFIXES))
    if len(found) != 1:
        raise DataError(f"{folder}: expected one xlsx or csv file, found {listing(folder)}; name the file")
    return found[0]


def _tables(file: Path) -> list[Table]:
    """The file's tables, under the first edition's column names."""
    excel = file.suffix.lower() == ".xlsx"
    tables = read_sheets(file) if excel else [read_table(file, _edition(column_names(file)))]
    return [_renamed(table) for table in tables]


def _edition(names: list[str]) -> tuple[str, ...]:
    return _NAMES_II if "Invoice" in names else _NAMES


def _renamed(table: Table) -> Table:
    names = _edition(table.frame.columns)
    missing = [name for name in names if name not in table.frame.columns]
    if missing:
        place = f"{table.path}, sheet {table.sheet!r}"
        raise DataError(f"{place}: column {', '.join(missing)} is missing; found {', '.join(table.frame.columns)}")
    frame = table.frame.select(names).rename(dict(zip(names, _NAMES, strict=True)))
    return replace(table, frame=frame)


def _sales(table: Table, left_out: dict[str, int]) -> pl.DataFrame:
    """The rows that sell a product: ``session_id``, ``item_id``, ``timestamp``, ``title``."""
    frame = with_ids(table, "InvoiceNo", "StockCode", left_out)
    frame = _keep(frame, ~pl.col("session_id").str.starts_with("C"), "rows of cancelled invoices", left_out)
    frame = _keep(frame, pl.col("item_id").str.contains(_PRODUCT), "rows whose stock code is no product", left_out)
    for column in ("Quantity", "UnitPrice"):
        values = frame[column].cast(pl.Float64, strict=False)
        wrong = (values.is_null() | values.is_nan()).arg_true()
        if len(wrong):
            place, value = table.where(frame["row"][wrong[0]]), shown(frame[column][wrong[0]])
            raise DataError(f"{place}: {column} is {value}, expected a number")
        frame = frame.with_columns(values)
    sold = (pl.col("Quantity") > 0) & (pl.col("UnitPrice") > 0)
    frame = _keep(frame, sold, "rows with a quantity or price of zero or less", left_out)
    times = Times("InvoiceDate", [_DATE]).parse(table, frame)
    return frame.select("session_id", "item_id", times.alias("timestamp"), pl.col("Description").alias("title"))


def _keep(frame: pl.DataFrame, condition: pl.Expr, reason: str, left_out: dict[str, int]) -> pl.DataFrame:
    kept = frame.filter(condition)
    left_out[reason] = left_out.get(reason, 0) + len(frame) - len(kept)
    return kept


def _titles(frame: pl.DataFrame) -> pl.DataFrame:
    items = frame.select("item_id").unique(maintain_order=True)
    counts = (
        clean_text(frame, ["title"])
        .drop_nulls("title")
        .group_by("item_id", "title", maintain_order=True)
        .len()
        .sort("len", descending=True, maintain_order=True)
        .unique("item_id", keep="first", maintain_order=True)
    )
    return items.join(counts.select("item_id", "title"), on="item_id", how="left", maintain_order="left")
