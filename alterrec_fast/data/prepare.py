"""Raw files to a prepared data set: a reader, ids to catalog rows, splits by session, a summary of what is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from tqdm import tqdm

from .filters import LEAVE_ONE_OUT, TRAIN, Filters, Splitting, apply, split
from .interactions import BLOCK, Coded, Grouping, Interactions, code
from .readers import READERS, Options, Raw
from .readers.values import is_present, shown
from .scratch import Scratch, scratch
from .sessions import LAST_ONLY, SPLITS, DataError, Dataset, Sessions, check_place

_EVERYWHERE = ("text_columns", "locale", "test", "leave_one_out")  # options that other sources than generic have
_NOT_STORED = ("out", "num_items", "text_columns")  # of the summary: Dataset.write knows them
_SPELLINGS: dict[str, Callable[[pl.Expr], pl.Expr]] = {  # in which two files may write the same ids differently
    "leading zeros": lambda ids: ids.str.replace(r"^0+(.)", "$1"),
    "a decimal point, as in 3.0": lambda ids: ids.str.replace(r"\.0*$", ""),
    "case": lambda ids: ids.str.to_lowercase(),
    "blanks at the ends": lambda ids: ids.str.strip_chars(),
}


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
            f"{self._total(self.sessions):>12,} sessions kept",
            f"{self._total(self.interactions):>12,} interactions",
            f"{self.num_items:>12,} items, text: {', '.join(self.text_columns) or 'none'}",
        ]
        lines += [f"{count:>12,} {what}" for what, count in self.notes.items() if count]
        lines += [
            f"{self.sessions[name]:>12,} {name} sessions, {self.interactions[name]:,} interactions" for name in SPLITS
        ]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join([f"{self.source} -> {self.out} (split {self.split})", *lines])

    def _total(self, by_split: dict[str, int]) -> int:
        """Of all splits; those of leave-one-out hold the same sessions, the test split whole."""
        return by_split["test"] if self.split == LEAVE_ONE_OUT else sum(by_split.values())


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
    columns: Mapping[str, str] | None = None,
    items: str | Path | None = None,
    separator: str = ",",
    has_header: bool = True,
    encoding: str = "utf-8",
    time_format: str | None = None,
    user_column: str | None = None,
    session_gap: float | None = None,
    session_per: Literal["day", "user"] | None = None,
    keep_repeats: bool = False,
    filters: Filters | None = None,
    leave_one_out: bool = False,
    test_days: float | None = None,
    validation_days: float | None = None,
    memory_limit: int | None = None,
    progress: bool = False,
) -> Summary:
    """Reads the raw files of source and writes the data set to out, whole or not at all.

    source: a name in READERS. raw: a folder or file, or a pattern, as the reader says. text_columns: item columns to
    keep as text, None for the reader's default. locale (needed) and test (a labelled test file) are for amazon-m2
    alone.

    For generic: columns are the file's names of session_id, item_id, timestamp, order and split; items is the item
    table's file; separator, has_header (False: names are 1, 2, 3) and encoding are those of text tables; time_format is
    strftime's, for times in text. user_column with session_gap (seconds) or session_per makes sessions of users: a
    session ends at a gap that is longer, with the day (UTC), or not at all.

    Splits are those of the files. Where these give none, sessions are ordered by their last timestamp (ties in file
    order): the latest test_fraction of them are the test split, the validation_fraction of all sessions before these
    are the validation split. Without timestamps file order stands in for time, and validation_fraction is of the
    sessions that the test split leaves. A fraction above 0 gives its split at least one session. With test_days, the
    test split is the sessions that end within so many days of the last one, and with validation_days the validation
    split those of the days before. With leave_one_out, each session's last item is a test target, the one before a
    validation target, and training has the rest.

    catalog: "sessions" for the items that occur in a kept session, "all" for the rest of the item table too. Catalog
    rows follow the item table, then come items without an entry, as they first appear. keep_repeats: keep rows that are
    equal in all columns. filters: what else is left out, and when. memory_limit: bytes, by default half of what is
    free; rows that don't fit wait on disk beside out. progress: show a bar.

    Raises DataError, which names file and line, for raw files that cannot be read, for an unknown source, locale or
    column, for fractions that leave nothing to train on, where out exists without overwrite, and where it holds what
    prepare did not make; ValueError for another catalog.
    """
    raw, out, filters = Path(raw), Path(out), filters or Filters()
    options = Options(
        text_columns=text_columns,
        locale=locale,
        test=None if test is None else Path(test),
        columns=columns or {},
        user_column=user_column,
        items=None if items is None else Path(items),
        separator=separator,
        has_header=has_header,
        encoding=encoding,
        time_format=time_format,
        leave_one_out=leave_one_out,
    )
    _check_source(source, options)
    if catalog not in ("sessions", "all"):
        raise ValueError(f"catalog must be 'sessions' or 'all', got {catalog!r}")
    splitting = Splitting(validation_fraction, test_fraction, test_days, validation_days, leave_one_out)
    if out.resolve() in (raw.resolve(), *raw.resolve().parents):
        raise DataError(f"{out}: holds the raw files {raw}, which writing would replace; choose another folder")
    if filters.train_only and leave_one_out:
        raise DataError("filter_train_only goes with splits by session; leave-one-out has each session in all splits")
    _check_users(user_column, session_gap, session_per)
    check_place(out, overwrite)  # Dataset.write checks too, but only after all the reading

    read = READERS[source](raw, options)
    with scratch(out, memory_limit) as space, _bar(read, progress) as batches:
        rows = Interactions(batches, space)
        left_out = dict(read.left_out)
        table = _item_table(read, left_out)
        seen = rows.items()
        warnings = _check_match(read, table["item_id"], seen)
        names = pl.concat([table["item_id"], seen]).unique(maintain_order=True)
        coded = code(read, rows, names, Grouping(session_gap, session_per == "day", keep_repeats), space, left_out)
        coded, how = _filter_and_split(read, coded, filters, splitting, len(names), space, left_out, raw)
        used = _used(coded, len(names), len(table) if catalog == "all" else 0)
        kept = names.to_frame().filter(pl.Series(used)).join(table, on="item_id", how="left", maintain_order="left")
        by_split = _by_split(coded, used, leave_one_out, space)
        if len(by_split["train"]) == 0:
            raise DataError(f"{raw}: no sessions are left for training; {len(coded)} sessions, split {how}")
        summary = Summary(
            source=source,
            out=str(out),
            split=how,
            read=read.read,
            left_out=left_out,
            notes=_notes(read, by_split, kept, int(used[len(table) :].sum()), leave_one_out),
            sessions={name: len(part) for name, part in by_split.items()},
            interactions={name: len(part.items) for name, part in by_split.items()},
            num_items=len(kept),
            text_columns=read.text_columns,
            warnings=warnings,
        )
        facts = {key: value for key, value in asdict(summary).items() if key not in _NOT_STORED}
        facts |= {LAST_ONLY: True} if leave_one_out else {}
        Dataset.write(out, by_split, kept, read.text_columns, {**facts, "raw": str(raw)}, overwrite)
    return summary


def _check_source(source: str, options: Options) -> None:
    if source not in READERS:
        raise DataError(f"no source {source!r}; choose from {', '.join(READERS)}")
    if source != "amazon-m2" and (options.locale is not None or options.test is not None):
        raise DataError(f"locale and test file are for amazon-m2 alone, source is {source}")
    if source != "generic" and options != replace(Options(), **{name: getattr(options, name) for name in _EVERYWHERE}):
        raise DataError(f"columns, formats and users are for generic alone, source is {source}")


def _check_users(user_column: str | None, session_gap: float | None, session_per: str | None) -> None:
    if session_per not in (None, "day", "user"):
        raise ValueError(f"session_per must be 'day' or 'user', got {session_per!r}")
    if session_gap is not None and session_per is not None:
        raise DataError("sessions end at a gap (--session-gap) or by --session-per, got both")
    if (session_gap is None and session_per is None) != (user_column is None):
        raise DataError("sessions of users need --user-column with --session-gap or --session-per")
    if session_gap is not None and not session_gap > 0:
        raise DataError(f"session_gap is {session_gap}, expected seconds above 0")


@contextmanager
def _bar(read: Raw, progress: bool) -> Iterator[Iterator[pl.DataFrame]]:
    """The batches of rows, with a bar of the rows read."""

    def watched() -> Iterator[pl.DataFrame]:
        for batch in read.interactions:
            yield batch
            bar.update(sum(read.read.values()) - bar.n)

    with tqdm(desc="Reading", unit=" rows", unit_scale=True, disable=None if progress else True) as bar:
        yield watched()


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


def _filter_and_split(
    read: Raw,
    coded: Coded,
    filters: Filters,
    splitting: Splitting,
    num_items: int,
    space: Scratch,
    left_out: dict[str, int],
    raw: Path,
) -> tuple[Coded, str]:
    """What passes the filters, with a split for each session, and in words how that was found."""
    if not filters.train_only:
        coded = apply(filters, coded, num_items, space, left_out)
    if len(coded) == 0:
        raise DataError(f"{raw}: no session of two or more items; {_counted(read.read, left_out)}")
    coded, how = split(coded, splitting, read.per_second)
    if filters.train_only:
        coded = apply(filters, coded, num_items, space, left_out)
    if not splitting.leave_one_out and not (coded.split == TRAIN).any():
        raise DataError(f"{raw}: no sessions are left for training; {len(coded)} sessions, split {how}")
    return coded, how


def _by_split(coded: Coded, used: np.ndarray, leave_one_out: bool, space: Scratch) -> dict[str, Sessions]:
    """The sessions of each split in order of time, with catalog rows for the numbers of the used (V,) items."""
    rows = np.cumsum(used) - 1
    rows = rows.astype(np.int32 if rows[-1] < np.iinfo(np.int32).max else np.int64)
    order, starts = coded.order, np.cumsum(coded.lengths) - coded.lengths
    by_split = {}
    for number, name in enumerate(SPLITS):
        cut = len(SPLITS) - 1 - number if leave_one_out else 0  # items that are targets of later splits
        chosen = order if leave_one_out else order[coded.split[order] == number]
        chosen = chosen[coded.lengths[chosen] - cut > 1]
        lengths = coded.lengths[chosen] - cut
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        by_split[name] = Sessions(space.array(_gather(rows, coded, starts[chosen], offsets), rows.dtype.type), offsets)
    return by_split


def _gather(rows: np.ndarray, coded: Coded, starts: np.ndarray, offsets: np.ndarray) -> Iterator[np.ndarray]:
    """The items of the sessions at starts, in pieces of about BLOCK interactions."""
    begin = 0
    while begin < len(starts):
        stop = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + BLOCK, side="right")) - 1)
        shift = np.repeat(starts[begin:stop] - offsets[begin:stop], np.diff(offsets[begin : stop + 1]))
        yield rows[coded.items[shift + np.arange(offsets[begin], offsets[stop])]]
        begin = stop


def _used(coded: Coded, num_items: int, num_all: int) -> np.ndarray:
    """(num_items,) whether an item is among the first num_all or in a session."""
    used = np.arange(num_items) < num_all
    for _, block in coded.blocks():
        used[block] = True
    return used


def _notes(
    read: Raw, by_split: dict[str, Sessions], kept: pl.DataFrame, num_lacking: int, leave_one_out: bool
) -> dict[str, int]:
    has_text = pl.any_horizontal(pl.col(read.text_columns).is_not_null())
    train = by_split["train"]
    notes = {
        "items that the item table lacks": num_lacking,
        "items with no text": len(kept) - len(kept.filter(has_text)),
        "items in no training session": _num_untrained(train, len(kept)),
    }
    if leave_one_out:
        notes["sessions too short to train on, of two or three items"] = len(by_split["test"]) - len(train)
    return notes


def _num_untrained(train: Sessions, num_items: int) -> int:
    trained = np.zeros(num_items, bool)
    for begin in range(0, len(train.items), BLOCK):
        trained[train.items[begin : begin + BLOCK]] = True
    return int((~trained).sum())


def _counted(read: dict[str, int], left_out: dict[str, int]) -> str:
    counts = [f"{count:,} {what} read" for what, count in read.items()]
    return ", ".join(counts + [f"{count:,} {what} left out" for what, count in left_out.items() if count])
