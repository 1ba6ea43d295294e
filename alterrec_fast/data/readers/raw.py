"""What every reader takes and gives, whatever the files looked like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl


@dataclass(frozen=True)
class Options:
    """What the caller may choose; each reader documents the ones that it uses.

    text_columns: columns of the item table to keep as text, None for the reader's default. locale and test are for
    amazon-m2 alone.

    The others are for generic. columns: the file's name of ``session_id``, ``item_id``, ``timestamp``, ``order`` or
    ``split``; where a file has no header, names are 1, 2, 3. user_column: of users, in place of
    ``session_id``. items: the item table's file. separator, has_header, encoding: of text tables. time_format: of times
    in text, as in strftime. leave_one_out (recbole): users may be in all three files.
    """

    text_columns: list[str] | None = None
    locale: str | None = None
    test: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    user_column: str | None = None
    items: Path | None = None
    separator: str = ","
    has_header: bool = True
    encoding: str = "utf-8"
    time_format: str | None = None
    leave_one_out: bool = False


@dataclass(frozen=True)
class Raw:
    """Interactions and item texts as read, before ids become catalog rows.

    interactions: in file order, batch after batch, a row for each interaction, with ``session_id`` and ``item_id``
    (String, never null or empty), ``timestamp`` (Int64 or Float64, any unit) unless the files carry no time, ``order``
    (Float64) if the files say what order those of one time have, and ``split`` (String: a name of SPLITS, or null where
    it is left to `prepare`) with ``row`` if the files give splits. ``others`` (UInt64), if the files have more columns,
    is a hash of them, which tells rows apart that are otherwise equal.
    items: ``item_id`` and the text columns, all String, text null where it is missing; None without an item table.
    item_file: where items comes from, if it has a file of its own, and its ids must match those of the interactions.
    read, left_out: what to count and how many, in words fit to print; complete once the interactions are read.
    where: the place of a ``row`` in words. left_open: the split whose sessions `prepare` may divide.
    per_second: how many units of ``timestamp`` make a second, once the interactions are read.
    """

    interactions: Iterable[pl.DataFrame]
    items: pl.DataFrame | None
    read: dict[str, int]
    left_out: dict[str, int]
    item_file: Path | None = None
    where: Callable[[int], str] = "row {}".format
    left_open: str | None = None
    per_second: Callable[[], float] = float

    @property
    def text_columns(self) -> list[str]:
        return [] if self.items is None else [name for name in self.items.columns if name != "item_id"]
