"""What every reader takes and gives, whatever the files looked like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl


@dataclass(frozen=True)
class Options:
    """What the caller may choose; each reader documents the ones that it uses.

    text_columns: columns of the item table to keep as text, None for the reader's default. locale and test are for
    amazon-m2 alone.
    """

    text_columns: list[str] | None = None
    locale: str | None = None
    test: Path | None = None


@dataclass(frozen=True)
class Raw:
    """Interactions and item texts as read, before ids become catalog rows.

    interactions: a row for each interaction in file order, with ``session_id`` and ``item_id`` (String, never null or
    empty), ``timestamp`` (Int64 or Float64, any unit) unless the files carry no time, and ``split`` (String: train,
    validation, test, or null where the split is left to `prepare`) if the files give splits.
    ``others`` (Struct), if the files have more columns, tells rows apart that are otherwise equal.
    items: ``item_id`` and the text columns, all String, text null where it is missing; None without an item table.
    item_file: where items comes from, if it has a file of its own, and its ids must match those of the interactions.
    read, left_out: what to count and how many, in words fit to print.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame | None
    read: dict[str, int]
    left_out: dict[str, int]
    item_file: Path | None = None

    @property
    def text_columns(self) -> list[str]:
        return [] if self.items is None else [name for name in self.items.columns if name != "item_id"]
