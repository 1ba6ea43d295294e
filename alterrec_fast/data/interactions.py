"""Any number of interactions to sessions of item numbers, in bounded memory.

Batches of rows wait in memory, or above HELD bytes in Parquet files of a scratch folder. polars' streaming engine
numbers the items and sorts the rows by session and time, and spills what is above its budget. The sorted rows come back
in batches of whole sessions, whose item numbers go to a file that is mapped into memory. Beyond batches, memory holds
the item ids and a few numbers for each session.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from .readers.raw import Raw
from .readers.tables import OTHERS
from .readers.values import shown
from .scratch import Scratch
from .sessions import SPLITS, DataError

HELD = 256 << 20  # bytes of rows that wait in memory
BATCH = 1 << 19  # sorted rows at a time
BLOCK = 1 << 22  # interactions that numpy works on at a time
FREE = -1  # the split code of a session whose split the files leave open


@dataclass(frozen=True)
class Grouping:
    """How a user's interactions become sessions. gap: seconds without any that end a session. day: a session ends with
    the day (UTC). keep_repeats: keep rows that are equal in all columns."""

    gap: float | None = None
    day: bool = False
    keep_repeats: bool = False


def parse_duration(text: str) -> float:
    """Seconds of a duration such as ``30min``, ``2h``, ``45s`` or ``1d``; raises DataError for another text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d)\s*", text)
    if match is None or float(match[1]) == 0:
        raise DataError(f"duration {text!r}, expected one such as 30min, 2h, 45s or 1d")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3_600, "d": 86_400}[match[2]]


@dataclass(frozen=True)
class Coded:
    """S sessions of T interactions, in no order of meaning.

    items: (T,) item numbers, session after session, oldest first, mapped into memory. lengths: (S,). first: (S,) int64,
    the place in the files of a session's first interaction. times: (S,) of its last one, None where the files carry no
    time. split: (S,) int8, a place in SPLITS or FREE.
    """

    items: np.ndarray
    lengths: np.ndarray
    first: np.ndarray
    times: np.ndarray | None
    split: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def order(self) -> np.ndarray:
        """(S,) the sessions by time; those of the same time, and all that have none, in file order."""
        return np.argsort(self.first) if self.times is None else np.lexsort((self.first, self.times))

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Runs of sessions, of about BLOCK interactions, with their items."""
        ends = np.cumsum(self.lengths)
        begin = place = 0
        while begin < len(self):
            stop = max(begin + 1, int(np.searchsorted(ends, place + BLOCK, side="right")))
            yield slice(begin, stop), self.items[place : ends[stop - 1]]
            begin, place = stop, int(ends[stop - 1])

    def select(self, sessions: np.ndarray, kept: np.ndarray, space: Scratch) -> Coded:
        """Without the interactions, in sessions (S,) bool, of items that are not kept (V,) bool."""
        lengths = self.lengths.copy()

        def parts() -> Iterator[np.ndarray]:
            for run, items in self.blocks():
                session = np.repeat(np.arange(run.start, run.stop), self.lengths[run])
                stays = kept[items] | ~sessions[session]
                lengths[run] = np.bincount(session[stays] - run.start, minlength=run.stop - run.start)
                yield items[stays]

        items = space.array(parts(), self.items.dtype.type)
        return replace(self, items=items, lengths=lengths)

    def choose(self, sessions: np.ndarray, space: Scratch) -> Coded:
        """The sessions (S,) bool alone."""

        def parts() -> Iterator[np.ndarray]:
            for run, items in self.blocks():
                yield items[np.repeat(sessions[run], self.lengths[run])]

        items = space.array(parts(), self.items.dtype.type)
        times = None if self.times is None else self.times[sessions]
        return Coded(items, self.lengths[sessions], self.first[sessions], times, self.split[sessions])


class Interactions:
    """The rows of raw files, read once and kept until they are sorted."""

    def __init__(self, batches: Iterable[pl.DataFrame], space: Scratch) -> None:
        held: list[pl.DataFrame] = []
        parts: list[pl.LazyFrame] = []
        size = count = 0
        for batch in batches:
            # a view of a filtered text may hold on to all of it
            batch = batch.with_columns(pl.int_range(count, count + len(batch), dtype=pl.Int64).alias("place"))
            held.append(batch)
            count += len(batch)
            size += int(batch.estimated_size())
            if size > HELD:
                file = space.folder / f"rows-{len(parts)}.parquet"
                pl.concat(held, how="diagonal_relaxed").write_parquet(file, compression="lz4", statistics=False)
                parts.append(pl.scan_parquet(file))
                held, size = [], 0
        if held:
            parts.append(pl.concat(held, how="diagonal_relaxed").lazy())
        self._rows = pl.concat(parts, how="diagonal_relaxed")
        self.columns = self._rows.collect_schema().names()

    def items(self) -> pl.Series:
        """The ids of the items, as they first appear."""
        first = self._rows.group_by("item_id").agg(pl.col("place").min()).sort("place")
        return first.select("item_id").collect(engine="streaming")["item_id"]

    def sort(self, names: pl.Series) -> Iterator[pl.DataFrame]:
        """The rows with ``item`` (the place of their item in names) for the id, by session and time, in batches of
        whole sessions."""
        keys = [name for name in ("session_id", "timestamp", "order", "place") if name in self.columns]
        index = names.to_frame("item_id").with_row_index("item").lazy()
        rows = self._rows.join(index, on="item_id", how="left").drop("item_id")
        if "split" in self.columns:
            codes = {name: code for code, name in enumerate(SPLITS)}
            rows = rows.with_columns(pl.col("split").replace_strict(codes, default=FREE, return_dtype=pl.Int8))
        batches = rows.sort(keys).collect_batches(chunk_size=BATCH, maintain_order=True, engine="streaming")
        rest: pl.DataFrame | None = None
        for batch in batches:
            batch = batch if rest is None else pl.concat([rest, batch])
            if len(batch) == 0:
                continue
            begin = int((batch["session_id"] != batch["session_id"][-1]).sum())  # of the last session, which may go on
            if begin:
                yield batch[:begin]
            rest = batch[begin:]
        if rest is not None and len(rest):
            yield rest


def code(
    raw: Raw, rows: Interactions, names: pl.Series, grouping: Grouping, space: Scratch, left_out: dict[str, int]
) -> Coded:
    """The sessions of two or more items, each in order of time, without repeated rows.

    Raises DataError, with line, where a session is in two splits.
    """
    maker = _Maker(raw, grouping)
    dtype = np.int32 if len(names) <= np.iinfo(np.int32).max else np.int64
    items = space.array((maker.add(batch) for batch in rows.sort(names)), dtype)
    maker.check_splits()
    if "timestamp" in rows.columns:
        left_out["rows equal to an earlier one in all columns"] = maker.num_repeats
    left_out["sessions of one item"] = maker.num_short
    first, split, lengths = (np.concatenate(part) if part else np.empty(0, np.int64) for part in maker.parts())
    times = np.concatenate(maker.times) if maker.times else None
    if raw.left_open is not None:
        split[split == SPLITS.index(raw.left_open)] = FREE
    return Coded(items, lengths, first, times, split)


class _Maker:
    """Takes sorted rows, a batch of whole sessions at a time, and collects what is known of each session."""

    def __init__(self, raw: Raw, grouping: Grouping) -> None:
        self._raw, self._grouping = raw, grouping
        self.num_repeats = self.num_short = 0
        self.times: list[np.ndarray] = []
        self._first: list[np.ndarray] = []
        self._split: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._torn: tuple[int, int, str, int, int] | None = None  # place, row, session, its split, the one before

    def parts(self) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        return self._first, self._split, self._lengths

    def add(self, rows: pl.DataFrame) -> np.ndarray:
        """The items of the sessions that are kept."""
        if "split" in rows.columns:
            self._look_for_torn(rows)
        if "timestamp" in rows.columns and not self._grouping.keep_repeats:
            first = _is_first(rows)
            if first is not None:
                self.num_repeats += len(rows) - int(first.sum())
                rows = rows.filter(first)
        begins = _is_change(rows["session_id"])
        if "timestamp" in rows.columns and (self._grouping.gap is not None or self._grouping.day):
            begins |= self._is_cut(rows["timestamp"].to_numpy())
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=len(rows))
        kept = lengths > 1
        self.num_short += int((~kept).sum())
        self._lengths.append(lengths[kept])
        self._first.append(np.minimum.reduceat(rows["place"].to_numpy(), starts)[kept])
        if "timestamp" in rows.columns:
            self.times.append(rows["timestamp"].to_numpy()[(starts + lengths - 1)[kept]])
        split = rows["split"].to_numpy() if "split" in rows.columns else np.full(len(rows), FREE, np.int8)
        self._split.append(split[starts[kept]])
        items: np.ndarray = rows["item"].to_numpy()[np.repeat(kept, lengths)]
        return items

    def _is_cut(self, times: np.ndarray) -> np.ndarray:
        second = self._raw.per_second()
        cut = np.zeros(len(times), bool)
        if self._grouping.gap is not None:
            cut[1:] = np.diff(times) > self._grouping.gap * second
        if self._grouping.day:
            cut[1:] |= np.diff(times // (86_400 * second)) != 0
        return cut

    def _look_for_torn(self, rows: pl.DataFrame) -> None:
        """Remembers the first row, in file order, whose split is not that of its session's first."""
        split, starts = rows["split"].to_numpy(), np.flatnonzero(_is_change(rows["session_id"]))
        if (np.minimum.reduceat(split, starts) == np.maximum.reduceat(split, starts)).all():
            return
        in_order = rows.sort("place").with_columns(pl.col("split").first().over("session_id").alias("before"))
        torn = in_order.filter(pl.col("split") != pl.col("before")).select(
            "place", "row", "session_id", "split", "before"
        )
        found = torn.row(0)
        if self._torn is None or found[0] < self._torn[0]:
            self._torn = found

    def check_splits(self) -> None:
        if self._torn is None:
            return
        _, row, session, split, before = self._torn
        place, names = self._raw.where(row), (SPLITS[split], SPLITS[before])
        raise DataError(
            f"{place}: session {shown(session)} is in split {names[0]} here and in {names[1]} before; expected one"
        )


def _is_change(values: pl.Series) -> np.ndarray:
    return (values != values.shift()).fill_null(True).to_numpy().copy()


def _is_first(rows: pl.DataFrame) -> pl.Series | None:
    """Which sorted rows repeat no earlier one; None where none does."""
    session = np.cumsum(_is_change(rows["session_id"]))
    same = ~_is_change(rows["timestamp"])
    same[1:] &= session[1:] == session[:-1]
    if not same.any():
        return None
    tied = same.copy()
    tied[:-1] |= same[1:]
    keys = [name for name in ("item", "timestamp", "order", OTHERS) if name in rows.columns]
    some = rows.select(pl.Series("session", session), *keys).filter(pl.Series(tied))
    first = np.ones(len(rows), bool)
    first[tied] = some.select(pl.struct(pl.all()).is_first_distinct()).to_series().to_numpy()
    return pl.Series(first)
