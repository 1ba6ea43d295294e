"""Sequential files of RecBole: many windows of a session, a row each, joined to the session that they were cut from."""

from __future__ import annotations

import polars as pl

from ..sessions import DataError
from .tables import Table
from .values import shown

Window = tuple[str, ...]
_PRINTED_LIST = r"(?s)^[\[(].*[\])]$|^\S+,\s"  # [1, 2] or 1, 2
_SEPARATORS = ",;|"  # of lists that RecBole would take for one id: 1,2


def join_windows(table: Table, frame: pl.DataFrame) -> pl.DataFrame:
    """Interactions in long form: ``session_id``, ``item_id``, ``row`` (of the first window).

    frame: rows of table with ``session_id``, ``item_id_list`` (ids with blanks between, the oldest first), ``item_id``
    (the next one) and ``row``. Where each list of a session ends the row before, each row adds its item: so RecBole
    writes prefixes, whole or cut to a maximum length. Else windows are joined in file order where they overlap most,
    and those within what is joined add nothing. Raises DataError, with line, for windows that fit nowhere, and for
    lists that are printed, or hold commas, semicolons or bars where no ``item_id`` does.
    """
    before = pl.col("item_id_list").fill_null("").str.extract_all(r"\S+")
    strange = [mark for mark in _SEPARATORS if not frame["item_id"].str.contains(mark, literal=True).any()]
    texts = frame["item_id_list"].str.strip_chars()
    printed = frame.filter(texts.str.contains(_PRINTED_LIST) | texts.str.contains_any(strange))
    if len(printed):
        place, value = table.where(printed["row"][0]), shown(printed["item_id_list"][0])
        raise DataError(f"{place}: item_id_list is {value}, expected ids with blanks between")
    # a blank before each id: what ends a text then ends a list
    rows = frame.select("session_id", "item_id", "row", before.alias("before"))
    rows = rows.with_columns((" " + pl.col("before").list.join(" ")).alias("text"))
    rows = rows.with_columns(pl.min("row").over("session_id").alias("first_row"))
    forwards, rest = _in_order(rows.sort("session_id", "row"))
    backwards, rest = _in_order(rest.sort("session_id", "row", descending=[False, True]))
    groups = rest.sort("first_row", "row").partition_by("session_id", maintain_order=True)
    joined = [(group["session_id"][0], _join(table, group), group["first_row"][0]) for group in groups]
    overlapping = pl.DataFrame(joined, schema=forwards.schema, orient="row")
    sessions = pl.concat([forwards, backwards, overlapping]).sort("first_row", maintain_order=True)
    return sessions.rename({"first_row": "row"}).explode("item_id")


def _in_order(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The items (List) that each row adds, for the sessions whose every list ends the row before and is no
    shorter than that row's list; the other rows.

    rows: in order of sessions. The first row of a session adds its list and its item, the others their item.
    """
    whole = pl.when(pl.col("text") == " ").then(pl.lit("")).otherwise("text") + " " + pl.col("item_id")
    length = pl.col("before").list.len()
    goes_on = (length > 0) & (length >= length.shift(1)) & whole.shift(1).str.ends_with(pl.col("text"))
    is_first = pl.col("session_id") != pl.col("session_id").shift(1)
    rows = rows.with_columns(is_first.fill_null(True).alias("first"))
    in_order = rows.select((pl.col("first") | goes_on).all().over("session_id")).to_series()
    added = pl.when("first").then(_window()).otherwise(pl.concat_list("item_id"))
    return rows.filter(in_order).select("session_id", added.alias("item_id"), "first_row"), rows.filter(~in_order)


def _window() -> pl.Expr:
    return pl.col("before").list.concat(pl.col("item_id"))


def _join(table: Table, rows: pl.DataFrame) -> list[str]:
    """The items of one session, whose rows are in file order."""
    windows = [tuple(window) for window in rows.select(_window()).to_series().to_list()]
    session = max(windows, key=len)
    pending = list(zip(windows, rows["row"].to_list(), strict=True))
    while pending:
        rest = []
        for window, row in pending:
            longer = _extended(session, window)
            session = session if longer is None else longer
            if longer is None:
                rest.append((window, row))
        if len(rest) == len(pending):
            window, row = rest[0]
            raise DataError(
                f"{table.where(row)}: the items {shown(' '.join(window))} overlap with no other row of their session; "
                "expected windows of one sequence"
            )
        pending = rest
    return list(session)


def _extended(session: Window, window: Window) -> Window | None:
    """The session with the window, no longer than it, joined at the longest overlap; as it is where it holds the
    window; None where nothing overlaps."""
    size = len(window)
    if any(session[i : i + size] == window for i in range(len(session) - size + 1)):
        return session
    for overlap in range(size - 1, 0, -1):
        if session[-overlap:] == window[:overlap]:
            return session + window[overlap:]
        if session[:overlap] == window[-overlap:]:
            return window[:-overlap] + session
    return None
