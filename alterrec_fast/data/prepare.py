"""Raw files to a prepared data set: a reader, ids to catalog rows, splits by session, a summary of what is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from .readers import READERS, Options, Raw
from .readers.tables import OTHERS
from .readers.values import is_present, shown
from .sessions import SPLITS, DataError, Dataset, Sessions, check_place

_FREE = -1  # the split code of a session whose split the files leave open
_SPELLINGS: dict[str, Callable[[pl.Expr], pl.Expr]] = {  # in which two files may write the same ids differently
    "leading zeros": lambda ids: ids.str.replace(r"^0+(.)", "$1"),
    "a decimal point, as in 3.0": lambda ids: ids.str.replace(r"\.0*$", ""),
    "case": lambda ids: ids.str.to_lowercase(),
    "blanks at the ends": lambda ids: ids.str.strip_chars(),
}
_TRAIN, _VALIDATION, _TEST = range(len(SPLITS))


@dataclass(frozen=True)
class Summary:
    """What `prepare` read, left out and kept; every row or session that is not in the result is in left_out.

    read, left_out, notes: counts by what was counted. sessions and interactions: counts by split. split: how the
    splits were made. warnings: sentences on what is likely to be a mistake.
    """

    source: str
    out: str
    split: str
    read: dict[str, int]
    left_out: dict[str, int]
    notes: dict[str, int]
    sessions: dict[str, int]
    interactions: dict[str, int]
    num_items: int
    text_columns: list[str]
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One count a line, zero counts left away."""
        lines = [f"{count:>12,} {what} read" for what, count in self.read.items()]
        lines += [f"{count:>12,} {what}: left out" for what, count in self.left_out.items() if count]
        lines += [
            f"{sum(self.sessions.values()):>12,} sessions kept",
            f"{sum(self.interactions.values()):>12,} interactions",
            f"{self.num_items:>12,} items, text: {', '.join(self.text_columns) or 'none'}",
        ]
        lines += [f"{count:>12,} {what}" for what, count in self.notes.items() if count]
        lines += [
            f"{self.sessions[name]:>12,} {name} sessions, {self.interactions[name]:,} interactions" for name in SPLITS
        ]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join([f"{self.source} -> {self.out} (split {self.split})", *lines])


@dataclass(frozen=True)
class _Coded:
    """Kept sessions by number. items: (T,) item codes; starts, lengths, split: (S,); a row is a session, file order.

    times: (S,) of the last interaction, None where the files carry no time.
    """

    items: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    split: np.ndarray
    times: np.ndarray | None


def prepare(
    source: str,
    raw: str | Path,
    out: str | Path,
    *,
    text_columns: list[str] | None = None,
    locale: str | None = None,
    test: str | Path | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    catalog: Literal["sessions", "all"] = "sessions",
    overwrite: bool = False,
) -> Summary:
    """Reads the raw files of source and writes the data set to out, whole or not at all.

    source: a name in READERS. raw: a folder or file, as the reader says. text_columns: item columns to keep as text,
    None for the reader's default. locale (needed) and test (a labelled test file) are for amazon-m2 alone.

    Splits are those of the files. Where these give none, sessions are ordered by their last timestamp (ties in file
    order): the latest test_fraction of them are the test split, the validation_fraction of all sessions before these
    are the validation split. Without timestamps file order stands in for time, and validation_fraction is of the
    sessions that the test split leaves. A fraction above 0 gives its split at least one session.

    catalog: "sessions" for the items that occur in a kept session, "all" for the rest of the item table too. Catalog
    rows follow the item table, then come items without an entry, as they first appear.

    Raises DataError, which names file and line, for raw files that cannot be read, for an unknown source, locale or
    column, for fractions that leave nothing to train on, where out exists without overwrite, and where it holds what
    prepare did not make; ValueError for another catalog.
    """
    raw, out = Path(raw), Path(out)
    if source not in READERS:
        raise DataError(f"no source {source!r}; choose from {', '.join(READERS)}")
    if source != "amazon-m2" and (locale is not None or test is not None):
        raise DataError(f"locale and test file are for amazon-m2 alone, source is {source}")
    if catalog not in ("sessions", "all"):
        raise ValueError(f"catalog must be 'sessions' or 'all', got {catalog!r}")
    if not (0 <= validation_fraction < 1 and 0 <= test_fraction < 1 and validation_fraction + test_fraction < 1):
        given = f"{validation_fraction} and {test_fraction}"
        raise DataError(f"validation_fraction and test_fraction must be in [0, 1) and sum to less than 1, got {given}")
    if out.resolve() in (raw.resolve(), *raw.resolve().parents):
        raise DataError(f"{out}: holds the raw files {raw}, which writing would replace; choose another folder")
    check_place(out, overwrite)  # Dataset.write checks too, but only after all the reading

    read = READERS[source](raw, Options(text_columns, locale, None if test is None else Path(test)))
    left_out = dict(read.left_out)
    table = _item_table(read, left_out)
    seen = read.interactions["item_id"].unique(maintain_order=True)
    warnings = _check_match(read, table["item_id"], seen)
    names = pl.concat([table["item_id"], seen]).unique(maintain_order=True)
    coded = _code(read, names, left_out)
    if len(coded.lengths) == 0:
        raise DataError(f"{raw}: no session of two or more items; {_counted(read.read, left_out)}")
    split, how = _splits(coded, validation_fraction, test_fraction)
    if not (split == _TRAIN).any():
        raise DataError(f"{raw}: no sessions are left for training; {len(split)} sessions, split {how}")

    used = np.zeros(len(names), bool)
    used[coded.items] = True
    if catalog == "all":
        used[: len(table)] = True
    rows = np.cumsum(used) - 1  # catalog row of each used item code
    rows = rows.astype(np.int32 if rows[-1] < np.iinfo(np.int32).max else np.int64)
    items = names.to_frame().filter(pl.Series(used)).join(table, on="item_id", how="left", maintain_order="left")
    order = np.arange(len(split)) if coded.times is None else np.argsort(coded.times, kind="stable")
    by_split = {name: _gather(rows, coded, order[split[order] == code]) for code, name in enumerate(SPLITS)}

    texts = pl.col(read.text_columns)
    trained = np.zeros(len(items), bool)
    trained[by_split["train"].items] = True
    notes = {
        "items that the item table lacks": int(used[len(table) :].sum()),
        "items with no text": len(items) - len(items.filter(pl.any_horizontal(texts.is_not_null()))),
        "items in no training session": int((~trained).sum()),
    }
    summary = Summary(
        source=source,
        out=str(out),
        split=how,
        read=read.read,
        left_out=left_out,
        notes=notes,
        sessions={name: len(part) for name, part in by_split.items()},
        interactions={name: len(part.items) for name, part in by_split.items()},
        num_items=len(items),
        text_columns=read.text_columns,
        warnings=warnings,
    )
    facts = {key: value for key, value in asdict(summary).items() if key not in ("out", "num_items", "text_columns")}
    Dataset.write(out, by_split, items, read.text_columns, {**facts, "raw": str(raw)}, overwrite)
    return summary


def _item_table(read: Raw, left_out: dict[str, int]) -> pl.DataFrame:
    """The item table with one row for an id, the first; empty where there is none."""
    if read.items is None:
        return pl.DataFrame(schema={"item_id": pl.String})
    named = read.items.filter(is_present("item_id"))
    table = named.unique("item_id", keep="first", maintain_order=True)
    left_out["item table rows with no item id"] = len(read.items) - len(named)
    left_out["item table rows that repeat an item id"] = len(named) - len(table)
    return table


def _check_match(read: Raw, table: pl.Series, seen: pl.Series) -> list[str]:
    """A warning where the item table, if it is a file, lacks more than a tenth of the items seen; raises DataError
    where it has rows and lacks them all: the ids are then written in two ways."""
    if read.item_file is None or len(seen) == 0:
        return []
    lacking = seen.filter(~seen.is_in(table.implode()))
    if len(lacking) <= len(seen) // 10:
        return []
    examples = ", ".join(shown(value) for value in lacking[:3])
    share = "all" if len(lacking) == len(seen) else f"{len(lacking):,} of the"
    message = f"it lacks {share} {len(seen):,} items of the interactions, such as {examples}"
    if len(table):
        message += f"; it has ids such as {', '.join(shown(value) for value in table[:3])}"
    for what, rewrite in _SPELLINGS.items():
        same, others = (values.to_frame("id").select(rewrite(pl.col("id")))["id"] for values in (lacking, table))
        if 2 * int(same.is_in(others.implode()).sum()) > len(lacking):
            message += f"; most would match but for {what}"
            break
    if len(table) and len(lacking) == len(seen):
        raise DataError(f"{read.item_file}: {message}")
    return [f"{read.item_file}: {message}"]


def _code(read: Raw, names: pl.Series, left_out: dict[str, int]) -> _Coded:
    """Ids to numbers, duplicates and sessions of one item left out, each session in order of time."""
    frame = read.interactions
    sessions = frame["session_id"].unique(maintain_order=True)
    columns = [_numbers(frame["session_id"], sessions, "session"), _numbers(frame["item_id"], names, "item")]
    if "timestamp" in frame.columns:
        columns.append(frame["timestamp"])
    if "split" in frame.columns:
        codes = {name: code for code, name in enumerate(SPLITS)}
        columns.append(frame["split"].replace_strict(codes, default=_FREE, return_dtype=pl.Int8))
    coded = pl.DataFrame(columns)
    if "timestamp" in coded.columns:
        first = _is_first(coded, frame)
        left_out["rows equal to an earlier one in all columns"] = len(coded) - int(first.sum())
        coded = coded.filter(first).sort("session", "timestamp", maintain_order=True)
    else:
        coded = coded.sort("session", maintain_order=True)

    lengths = np.bincount(coded["session"].to_numpy(), minlength=len(sessions))  # each is 1 or more
    kept = lengths > 1
    left_out["sessions of one item"] = int((~kept).sum())
    coded = coded.filter(pl.Series(np.repeat(kept, lengths)))
    lengths = lengths[kept]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    split = np.full(len(lengths), _FREE, np.int8)
    if "split" in coded.columns:
        split = coded["split"].to_numpy()[starts]
    times = coded["timestamp"].to_numpy()[ends - 1] if "timestamp" in coded.columns else None
    return _Coded(coded["item"].to_numpy(), starts, lengths, split, times)


def _is_first(coded: pl.DataFrame, frame: pl.DataFrame) -> pl.Series:
    """Which rows (Boolean) repeat no earlier one. The columns of the file that mean nothing here are looked at only
    where the others are equal."""
    keys = pl.struct("session", "item", "timestamp")
    first = coded.select(keys.is_first_distinct()).to_series()
    if OTHERS in frame.columns and not first.all():
        rows = coded.with_columns(frame[OTHERS]).with_row_index("row").filter(keys.is_duplicated())
        differ = rows.filter(pl.struct("session", "item", "timestamp", OTHERS).is_first_distinct())
        first = first.scatter(differ["row"], True)
    return first


def _numbers(values: pl.Series, names: pl.Series, column: str) -> pl.Series:
    """The position of each value in names."""
    index = names.to_frame("id").with_row_index(column)
    return values.to_frame("id").join(index, on="id", how="left", maintain_order="left")[column]


def _splits(coded: _Coded, validation_fraction: float, test_fraction: float) -> tuple[np.ndarray, str]:
    """The split code of each session (S,), and in words how it was found."""
    split = coded.split.copy()
    free = np.flatnonzero(split == _FREE)
    if len(free) == 0:
        return split, "as given"
    how = "by file order" if coded.times is None else "by time"
    if coded.times is not None:
        free = free[np.argsort(coded.times[free], kind="stable")]
    num_test = _share(len(free), test_fraction)
    if (split == _TEST).any():
        num_test, how = 0, f"{how}, test as given"
    num_validation = _share(len(free) - (num_test if coded.times is None else 0), validation_fraction)
    split[free] = _TRAIN
    split[free[max(0, len(free) - num_test - num_validation) :]] = _VALIDATION
    split[free[max(0, len(free) - num_test) :]] = _TEST
    return split, how


def _share(count: int, fraction: float) -> int:
    return max(1, round(count * fraction)) if fraction else 0


def _gather(rows: np.ndarray, coded: _Coded, chosen: np.ndarray) -> Sessions:
    """The chosen sessions, in that order, with catalog rows for item codes."""
    lengths = coded.lengths[chosen]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    index = np.repeat(coded.starts[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
    return Sessions(rows[coded.items[index]], offsets)


def _counted(read: dict[str, int], left_out: dict[str, int]) -> str:
    counts = [f"{count:,} {what} read" for what, count in read.items()]
    return ", ".join(counts + [f"{count:,} {what} left out" for what, count in left_out.items() if count])
