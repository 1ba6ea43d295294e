"""The best next items of many sessions: a table of sessions in, a table of items and scores out, in bounded memory.

A table of sessions has the columns session_id and item_id, in a row for each item, or in a row for each session where
item_id is a list; items oldest first, the rows of a session together.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from tqdm import tqdm

from alterrec_fast import files
from alterrec_fast.errors import DataError
from alterrec_fast.model.networks import ItemVectors, Recommender
from alterrec_fast.model.packing import Packing
from alterrec_fast.ops import top_k
from alterrec_fast.training.config import Config

SESSION, ITEM = "session_id", "item_id"
OUTPUT = {SESSION: pl.String, "rank": pl.Int32, ITEM: pl.String, "score": pl.Float32}  # rank from 1
SOURCES, TARGETS = (".parquet", ".csv", ".csv.gz"), (".parquet", ".csv")
CHUNK = 1 << 18  # rows of the table of sessions in memory at a time
_log = logging.getLogger(__name__)


class Ranker:
    """Ranks the whole catalog, or a part of it, for sessions of catalog rows, by the fused score."""

    def __init__(
        self,
        recommender: Recommender,
        vectors: dict[str, ItemVectors],
        config: Config,
        candidates: np.ndarray | None = None,
    ):
        """vectors: of the recommender. candidates: (A,) int64, different rows of the catalog that may be recommended;
        None: all.
        """
        self.recommender, self.vectors, self.config, self.candidates = recommender, vectors, config, candidates
        self.view = recommender.views(vectors)["fused"]
        self.catalog = self.view.catalog
        if candidates is not None:
            self._candidate = np.full(len(self.catalog), -1)  # of each row of the catalog
            self._candidate[candidates] = np.arange(len(candidates))
            self.catalog = self.catalog[torch.from_numpy(candidates).to(self.catalog.device)]

    @torch.no_grad()
    def rank(self, items: np.ndarray, lengths: np.ndarray, n: int, repeats: bool) -> tuple[np.ndarray, np.ndarray]:
        """Scores (S, k) float32 and catalog rows (S, k) int64 of the k = min(n, candidates) best items, best first.

        items: (T,) int64, catalog rows of session after session, oldest first. lengths: (S,) int64, at least 1.
        repeats: also items of the session itself. Places that stay empty hold -inf and -1.
        """
        device, ends = self.catalog.device, np.cumsum(lengths)
        tokens = np.minimum(lengths, self.config.max_length - 1)  # as in training
        last = np.cumsum(tokens) - 1
        place = np.arange(last[-1] + 1) + np.repeat(ends - 1 - last, tokens)
        queries = self.recommender.queries(
            self.vectors, torch.from_numpy(items[place]).to(device), Packing.of(tokens, device)
        )
        rows = torch.from_numpy(last).to(device)
        query = self.view.query({name: query.index_select(0, rows) for name, query in queries.items()})
        seen = None
        if not repeats:
            ids = items if self.candidates is None else self._candidate[items]
            offsets = np.concatenate([[0], ends])
            seen = torch.from_numpy(ids).to(device), torch.from_numpy(offsets).to(device)
        k = min(n, len(self.catalog))
        scores, ranked = top_k(query, self.catalog, k=k, exclude=seen, backend=self.config.backend)
        best = ranked.cpu().numpy()
        if self.candidates is not None and k:
            best = np.where(best >= 0, self.candidates[best], -1)
        return scores.cpu().numpy(), best


@dataclass
class Skipped:
    """What a table of sessions held that cannot be used."""

    items: int = 0  # unknown ones
    sessions: int = 0  # of unknown items alone, which get no recommendations
    example: str = ""

    def say(self) -> None:
        if self.items:
            only = f"; {self.sessions} sessions hold no others and get no recommendations" if self.sessions else ""
            _log.warning("%d items are unknown and skipped, such as %s%s", self.items, self.example, only)


class Recommendations:
    """Recommends n items to every session of a table; see `TrainedModel.recommend_many` for the options."""

    def __init__(self, ranker: Ranker, ids: pl.Series, n: int, repeats: bool, strict: bool):
        """ids: (V,) String, the item ids of the catalog."""
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        self.ranker, self.ids, self.n, self.repeats, self.strict = ranker, ids, n, repeats, strict
        self._rows = pl.DataFrame({ITEM: ids}).with_row_index("row")

    def of(self, tables: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """Pieces of a table of sessions -> pieces of a table of `OUTPUT`, sessions in the same order.

        Raises DataError where a column is missing or of another kind, or the rows of a session are not together; with
        `strict` for an item that is not in the catalog.
        """
        skipped, before = Skipped(), np.empty(0, np.uint64)
        with tqdm(desc="recommend", unit="session", unit_scale=True, disable=None) as bar:  # on a terminal only
            for table in _whole_sessions(map(_long, tables)):
                sessions, lengths = _runs(table[SESSION])
                hashes = sessions.hash().to_numpy()
                again = np.isin(hashes, before)
                if again.any() or len(np.unique(hashes)) < len(hashes):
                    again = again if again.any() else sessions.is_duplicated().to_numpy()
                    name = sessions[int(again.argmax())]
                    raise DataError(f"the rows of session {name!r} are not together: sort the table by {SESSION}")
                before = np.union1d(before, hashes)
                yield from self._rank(table, sessions, lengths, skipped, bar)
        skipped.say()

    def _rank(
        self, table: pl.DataFrame, sessions: pl.Series, lengths: np.ndarray, skipped: Skipped, bar: Any
    ) -> Iterator[pl.DataFrame]:
        """table: the items of whole sessions; sessions: (S,) their ids; lengths: (S,), the rows of each."""
        rows = table.join(self._rows, on=ITEM, how="left", maintain_order="left")["row"].cast(pl.Int64)
        unknown = rows.is_null().to_numpy()
        if unknown.any():
            first = int(unknown.argmax())
            example = f"{table[ITEM][first]!r} in session {table[SESSION][first]!r}"
            if self.strict:
                raise DataError(f"item {example} is not in the catalog")
            skipped.example = skipped.example or example
            lengths = np.add.reduceat(~unknown, np.cumsum(lengths) - lengths, dtype=np.int64)
            skipped.items += int(unknown.sum())
            skipped.sessions += int((lengths == 0).sum())
            sessions, lengths = sessions.filter(pl.Series(lengths > 0)), lengths[lengths > 0]
        items, ends = rows.drop_nulls().to_numpy(writable=True), np.cumsum(lengths)
        tokens = np.cumsum(np.minimum(lengths, self.ranker.config.max_length - 1))
        first = 0
        while first < len(lengths):
            done = tokens[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(tokens, done + self.ranker.config.eval_targets, side="right")))
            begin = ends[first] - lengths[first]
            scores, best = self.ranker.rank(items[begin : ends[last - 1]], lengths[first:last], self.n, self.repeats)
            there = best >= 0
            session, rank = np.nonzero(there)
            yield pl.DataFrame(
                {
                    SESSION: sessions.gather(first + session),
                    "rank": rank + 1,
                    ITEM: self.ids.gather(best[there]),
                    "score": scores[there],
                },
                schema_overrides=OUTPUT,
            )
            bar.update(last - first)
            first = last


def read_sessions(file: Path) -> Iterator[pl.DataFrame]:
    """Pieces of a table of sessions in a file of one of SOURCES; raises DataError for another one, FileError where it
    cannot be read.
    """
    if not file.name.endswith(SOURCES):
        raise DataError(f"{file}: sessions are read from {', '.join(SOURCES)}")
    files.regular_size(file)
    with files.naming(file, "a table that can be read"):
        # Ids are text as it stands: 007 is no 7.
        table = pl.scan_parquet(file) if file.suffix == ".parquet" else pl.scan_csv(file, infer_schema=False)
        names = table.collect_schema().names()
    _need_columns(str(file), names)
    with files.naming(file, "a table that can be read"):
        yield from table.select(SESSION, ITEM).collect_batches(chunk_size=CHUNK, maintain_order=True)


def write_table(pieces: Iterable[pl.DataFrame], file: Path) -> int:
    """Writes a table of `OUTPUT` to a file of one of TARGETS, whole or not at all; returns its number of rows.

    Pieces lie in a temporary folder beside `file` until they are all there.
    """
    check_target(file)
    count = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-", suffix=files.DRAFT) as folder:
        parts = [Path(folder) / "0.parquet"]
        pl.DataFrame(schema=OUTPUT).write_parquet(parts[0])
        for piece in pieces:
            parts.append(Path(folder) / f"{len(parts)}.parquet")
            piece.write_parquet(parts[-1])
            count += len(piece)
        table = pl.scan_parquet(parts)
        sink = table.sink_parquet if file.suffix == ".parquet" else table.sink_csv
        files.write_whole(file, lambda draft: sink(draft))
    return count


def check_target(file: Path) -> None:
    """Raises DataError for a file that is none of TARGETS, FileError where it cannot be written."""
    if file.suffix not in TARGETS or file.is_dir():
        raise DataError(f"{file}: recommendations are written to {' or '.join(TARGETS)}")
    files.check_folder(file.parent)


def read_ids(file: Path) -> list[str]:
    """Item ids, one a line; a first line item_id is a header."""
    lines = [line for line in files.read_text(file).splitlines() if line]
    return lines[1:] if lines[:1] == [ITEM] else lines


def candidates(ids: pl.Series, allow: Iterable[str] | None, exclude: Iterable[str] | None) -> np.ndarray | None:
    """Rows of the catalog that may be recommended, (A,) int64; None for all. The log names ids that are unknown.

    ids: (V,) String, of the catalog. Raises ValueError where none is left.
    """
    if allow is None and exclude is None:
        return None
    chosen = np.ones(len(ids), bool)
    for name, given in (("allow", allow), ("exclude", exclude)):
        if given is not None:
            listed = pl.Series(list(given), dtype=pl.String).unique(maintain_order=True)
            inside = ids.is_in(listed.implode()).to_numpy()
            chosen &= inside if name == "allow" else ~inside
            if missing := len(listed) - int(inside.sum()):
                example = listed.filter(~listed.is_in(ids.implode()))[0]
                _log.warning("%s: %d items are not in the catalog, such as %r", name, missing, example)
    if not chosen.any():
        raise ValueError("allow and exclude leave no item to recommend")
    return np.flatnonzero(chosen)


def _need_columns(where: str, names: list[str]) -> None:
    if missing := [name for name in (SESSION, ITEM) if name not in names]:
        found = f"found {', '.join(map(repr, names)) or 'none'}"
        raise DataError(f"{where}: column {' and '.join(missing)} missing; expected {SESSION} and {ITEM}, {found}")


def _long(table: pl.DataFrame) -> pl.DataFrame:
    """session_id and item_id as text, in a row for each item."""
    _need_columns("sessions", table.columns)
    table = table.select(SESSION, ITEM)
    if isinstance(table.schema[ITEM], pl.List):
        table = table.explode(ITEM)
    for name, kind in table.schema.items():
        if not (kind in (pl.String, pl.Categorical) or kind.is_integer() or kind == pl.Null):
            raise DataError(f"sessions: column {name} is {kind}, expected text or integers")
    return table.select(pl.col(SESSION, ITEM).cast(pl.String))


def _whole_sessions(tables: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The same rows, cut where a session ends."""
    held = pl.DataFrame(schema={SESSION: pl.String, ITEM: pl.String})
    for table in tables:
        held = pl.concat([held, table])
        cut = len(held) - int(_runs(held[SESSION])[1][-1]) if len(held) else 0
        if cut:
            yield held[:cut]
            held = held[cut:]
    if len(held):
        yield held


def _runs(sessions: pl.Series) -> tuple[pl.Series, np.ndarray]:
    """The id of every row -> ids (S,) and lengths (S,) int64 of the runs of equal ones."""
    runs = sessions.rle().struct
    return runs.field("value"), runs.field("len").cast(pl.Int64).to_numpy()
