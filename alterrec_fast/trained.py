"""A trained run, opened: recommendations and evaluation of its best epoch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from alterrec_fast.data.sessions import Dataset
from alterrec_fast.errors import FileError, RunError
from alterrec_fast.model.networks import ItemVectors
from alterrec_fast.recommend import CHUNK, OUTPUT, Ranker, Recommendations, candidates, read_sessions
from alterrec_fast.run import (
    CONFIG,
    build_networks,
    data_folder,
    mean_and_deviation,
    read_config,
    seed_runs,
    sentence_features,
    text_encoder,
)
from alterrec_fast.systems import SYSTEMS
from alterrec_fast.training import checkpoint
from alterrec_fast.training.alternate import BEST
from alterrec_fast.training.device import on_this_machine, pick_device
from alterrec_fast.training.evaluate import Evaluation, evaluate, training_counts
from alterrec_fast.training.state import check_same_data

_log = logging.getLogger(__name__)


class TrainedModel:
    """The best epoch of a finished or running run, for recommendations and evaluation."""

    def __init__(self, run: str | Path):
        self.path = seed_runs(run)[0]
        if not (self.path / BEST).exists():
            raise RunError(f"{self.path} holds no trained model ({BEST} is missing); train one with --out {self.path}")
        written = read_config(self.path)
        self.config = on_this_machine(written.replace(out=str(self.path.absolute())))  # the run may have been moved
        device = pick_device(self.config.device)
        tensors, best = checkpoint.load(self.path / BEST, str(device))
        self.config.check_settings(best.get("settings"), self.path / BEST, self.path)
        if not data_folder(self.config).exists():
            raise FileError(f"{self.path / CONFIG}: data = {self.config.data!r} does not exist; name where it is now")
        self.dataset = Dataset.load(data_folder(self.config))
        encoder = text_encoder(self.config)
        check_same_data(self.dataset, best.get("data"), encoder.key if encoder else "", best.get("text"))
        features = sentence_features(self.dataset, encoder)
        self.recommender = build_networks(self.config, self.dataset, features).to(device)
        checkpoint.check_tensors(self.path / BEST, tensors, self.recommender.state_dict())
        self.recommender.load_state_dict(tensors)
        self.recommender.eval()

    @cached_property
    def _vectors(self) -> dict[str, ItemVectors]:
        with torch.no_grad():
            return self.recommender.vectors()

    def recommend(
        self,
        session: Sequence[str],
        n: int = 10,
        repeats: bool = False,
        *,
        allow: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        strict: bool = False,
    ) -> list[Recommendation]:
        """The n best next items after a session of item ids, oldest first, by the fused score.

        Options as in `recommend_pieces`; the log names unknown items. Raises ValueError for a session without a known
        item, with `strict` for an unknown one, or for n below 0.
        """
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        known = self._rows(session)
        unknown = [item for item in session if item not in known]
        what = f"unknown items {', '.join(map(repr, unknown))}" if unknown else "an empty session"
        if not known or (unknown and strict):
            raise ValueError(f"{what}; expected one or more of the {self.dataset.num_items} ids in {self.dataset.path}")
        if unknown:
            _log.warning("%s are skipped", what)
        rows = np.array([known[item] for item in session if item in known])
        scores, best = self._ranker(allow, exclude).rank(rows, np.array([len(rows)]), n, repeats)
        table = self.dataset.items[best[0][best[0] >= 0]]
        titles = table[self.dataset.text_columns[0]] if self.dataset.text_columns else [None] * len(table)
        return [
            Recommendation(item, score, title)
            for item, score, title in zip(table["item_id"], scores[0].tolist(), titles, strict=False)
        ]

    def recommend_many(self, sessions: Any, n: int = 10, **options: Any) -> pl.DataFrame:
        """The n best next items of many sessions, a row each: session_id, rank (from 1), item_id, score.

        All at once; sessions, options and errors as in `recommend_pieces`.
        """
        return pl.concat([pl.DataFrame(schema=OUTPUT), *self.recommend_pieces(sessions, n, **options)])

    def recommend_pieces(
        self,
        sessions: Any,
        n: int = 10,
        *,
        repeats: bool = False,
        allow: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        strict: bool = False,
    ) -> Iterator[pl.DataFrame]:
        """`recommend_many` piece by piece, in memory that does not grow with a file but for 8 bytes a session.

        Args:
            sessions: the path of a file (.parquet, .csv, .csv.gz) or a data frame of polars, pandas or Arrow, with the
                columns session_id and item_id: a row for each item, or for each session where item_id is a list; items
                oldest first, the rows of a session together. Ids are text or integers.
            n: how many items for each session; fewer where fewer may be recommended.
            repeats: also items that the session holds already.
            allow: item ids; only these are recommended.
            exclude: item ids that are not recommended.
            strict: an item that is not in the catalog is an error; else it is skipped, and the log says how many are.
                A session without a known item gets no recommendations.

        Raises DataError for a table of another form, FileError for a file that cannot be read, ValueError where `allow`
        and `exclude` leave nothing or n is below 0.
        """
        ids = self.dataset.items["item_id"]
        recommendations = Recommendations(self._ranker(allow, exclude), ids, n, repeats, strict)
        if isinstance(sessions, str | Path):
            return recommendations.of(read_sessions(Path(sessions)))
        table = sessions if isinstance(sessions, pl.DataFrame) else pl.DataFrame(sessions)
        return recommendations.of(table.iter_slices(CHUNK))

    def _ranker(self, allow: Iterable[str] | None, exclude: Iterable[str] | None) -> Ranker:
        rows = candidates(self.dataset.items["item_id"], allow, exclude)
        return Ranker(self.recommender, self._vectors, self.config, rows)

    def _rows(self, items: Sequence[str]) -> dict[str, int]:
        """The catalog row of each of the items that the catalog has."""
        ids = self.dataset.items["item_id"]
        rows = ids.is_in([str(item) for item in items]).arg_true()
        return dict(zip(ids.gather(rows), rows, strict=True))

    def evaluate(self, split: str = "test", *, alpha: float | None = None) -> Evaluation:
        """Metrics over every prefix of the split's sessions; see `Evaluation`.

        alpha: the weight of the ID scores in the fused score, in place of the run's own. Raises FileError for changed
        data, RunError for an alpha beyond [0, 1] or of a system that is not of an ID and a text network.
        """
        if alpha is not None and not 0.0 <= alpha <= 1.0:
            raise RunError(f"alpha must lie in [0, 1], got {alpha}")
        if alpha is not None and not SYSTEMS[self.config.variant].alternates:
            fit = ", ".join(name for name, system in SYSTEMS.items() if system.alternates)
            raise RunError(f"alpha weighs an ID and a text network ({fit}); {self.path} is of {self.config.variant}")
        self.dataset.verify()
        counts = training_counts(self.dataset.train, self.dataset.num_items)
        return evaluate(self.recommender, self.dataset.split(split), counts, self.config, alpha)


@dataclass(frozen=True)
class Recommendation:
    item: str
    score: float
    title: str | None


def load(run: str | Path) -> TrainedModel:
    """Opens a run directory; of a run over several seeds the first seed's.

    Raises RunError where it holds no trained model; ConfigError for a config.toml that cannot be used here; DataError
    where the data set is not the run's, or the text model cannot be had; FileError for a file of the run or the data
    set that is damaged, missing or foreign.
    """
    return TrainedModel(run)


def evaluate_run(run: str | Path, split: str = "test", *, alpha: float | None = None) -> dict[str, Any]:
    """{split: metrics, "groups": ...} of the best epoch, as in metrics.json; of a run over several seeds their means,
    with the standard deviations beside them under the same names and "_std". alpha: as in `TrainedModel.evaluate`.
    """
    each = [TrainedModel(path).evaluate(split, alpha=alpha) for path in seed_runs(run)]
    results: dict[str, list[Any]] = {split: [one.metrics() for one in each], "groups": [one.groups() for one in each]}
    return mean_and_deviation(results) if len(each) > 1 else {key: values[0] for key, values in results.items()}
