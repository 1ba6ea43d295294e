"""Ranking metrics over every prefix of every session, of the fused score and of its parts, and by long-tail group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alterrec_fast.data.batches import Batch, pack, plan
from alterrec_fast.data.sessions import Sessions
from alterrec_fast.model.networks import Recommender, View
from alterrec_fast.model.packing import Packing
from alterrec_fast.ops import top_k
from alterrec_fast.systems import SYSTEMS
from alterrec_fast.training.config import Config

DEPTH = 20  # the deepest rank that a metric looks at
VIEWS = ("fused", "id", "text")
ALPHAS = tuple(n / 10 for n in range(11))  # of a sweep
CHUNK = 1 << 24  # interactions counted at a time

Ranker = Callable[[Batch], dict[str, Tensor]]  # a batch -> for each view the items of ranks 0..19, (T, 20), best first


@dataclass(frozen=True)
class Evaluation:
    """What was found at each rank: hits[view][g, r] targets of group g at rank r, column 20 for those below."""

    hits: dict[str, np.ndarray]
    group_edges: tuple[int, ...]

    def metrics(self) -> dict[str, dict[str, float] | None]:
        """Fractions for fused, id and text; None for a part that the model does not have."""
        return {view: summarise(self.hits[view].sum(0)) if view in self.hits else None for view in VIEWS}

    def groups(self) -> dict[str, dict[str, Any]]:
        """The same by the target's count in training, with the group's number and share of targets."""
        total = self.hits["fused"].sum()
        out: dict[str, dict[str, Any]] = {}
        for g, name in enumerate(group_names(self.group_edges)):
            targets = int(self.hits["fused"][g].sum())
            out[name] = {"targets": targets, "share": targets / max(1, int(total))}
            for view in VIEWS:
                measured = view in self.hits and targets > 0
                out[name][view] = summarise(self.hits[view][g]) if measured else None
        return out


def summarise(hits: np.ndarray) -> dict[str, float]:
    """hits (21,): targets found at ranks 0..19, and the rest -> hits@k, ndcg@k and mrr@20 as fractions."""
    total = max(1.0, float(hits.sum()))
    rank = np.arange(DEPTH)
    gain = hits[:DEPTH] / np.log2(rank + 2)  # one relevant item, so the ideal gain is 1
    out = {f"hits@{k}": float(hits[:k].sum() / total) for k in (10, 20)}
    out |= {f"ndcg@{k}": float(gain[:k].sum() / total) for k in (10, 20)}
    return out | {"mrr@20": float((hits[:DEPTH] / (rank + 1)).sum() / total)}


def group_names(edges: tuple[int, ...]) -> list[str]:
    """For edges (30, 100): "0-30", "31-100", "101+"."""
    starts = [0, *(edge + 1 for edge in edges)]
    return [f"{start}-{edge}" for start, edge in zip(starts, edges, strict=False)] + [f"{starts[-1]}+"]


def training_counts(train: Sessions, num_items: int) -> np.ndarray:
    """(V,) int64, how often each item occurs in training."""
    counts = np.zeros(num_items, np.int64)
    for begin in range(0, len(train.items), CHUNK):  # bincount makes a copy of 8 bytes an item
        counts += np.bincount(train.items[begin : begin + CHUNK], minlength=num_items)
    return counts


def measure(
    rank: Ranker,
    sessions: Sessions,
    counts: np.ndarray,
    group_edges: tuple[int, ...],
    max_length: int,
    batch_targets: int,
) -> Evaluation:
    """Ranks every prefix of every session with `rank` and counts where the targets stand, where the sessions are
    last_only those of whole sessions; items already in the session are not removed from the ranking.
    """
    hits: dict[str, np.ndarray] = {}
    shape = (len(group_edges) + 1, DEPTH + 1)
    for which in plan(sessions, max_length, batch_targets):
        batch = pack(sessions, which, max_length)
        counted = np.cumsum(batch.lengths) - 1 if sessions.last_only else np.arange(len(batch.targets))
        targets = batch.targets[counted]
        group = np.searchsorted(group_edges, counts[targets])
        for view, items in rank(batch).items():
            match = items.cpu().numpy()[counted] == targets[:, None]  # (T, 20)
            place = np.where(match.any(1), match.argmax(1), DEPTH)
            flat = np.bincount(group * (DEPTH + 1) + place, minlength=shape[0] * shape[1])
            hits[view] = hits.get(view, np.zeros(shape, np.int64)) + flat.reshape(shape)
    return Evaluation(hits or {"fused": np.zeros(shape, np.int64)}, group_edges)


def evaluate(
    recommender: Recommender, sessions: Sessions, counts: np.ndarray, config: Config, alpha: float | None = None
) -> Evaluation:
    """Every view of the recommender on one split; the recommender is left in eval mode.

    alpha: the weight of the ID scores, of two networks; None: as the recommender fuses them.
    """

    def views(made: dict[str, View]) -> dict[str, View]:
        return made if alpha is None else made | {"fused": recommender.at(made["fused"], alpha)}

    result = _evaluate(recommender, sessions, counts, config, views)
    for view in SYSTEMS[config.variant].views:  # of a single network, which repeats the fused numbers
        result.hits.setdefault(view, result.hits["fused"])
    return result


def sweep(
    recommender: Recommender,
    sessions: Sessions,
    counts: np.ndarray,
    config: Config,
    measured: Mapping[str, Any],
) -> dict[str, dict[str, float]]:
    """The fused score's metrics at each of ALPHAS and at config.alpha, of two networks, by alpha in rising order.

    measured: the metrics of every view, of which those at alpha 0 (text), 1 (ID) and config.alpha (fused) are taken.
    """
    known = {0.0: measured["text"], 1.0: measured["id"], config.alpha: measured["fused"]}
    names = {alpha: f"{alpha:.15g}" for alpha in sorted({*ALPHAS, config.alpha})}

    def views(made: dict[str, View]) -> dict[str, View]:
        return {name: recommender.at(made["fused"], alpha) for alpha, name in names.items() if alpha not in known}

    hits = _evaluate(recommender, sessions, counts, config, views).hits
    return {name: known[alpha] if alpha in known else summarise(hits[name].sum(0)) for alpha, name in names.items()}


def _evaluate(
    recommender: Recommender,
    sessions: Sessions,
    counts: np.ndarray,
    config: Config,
    choose: Callable[[dict[str, View]], dict[str, View]],
) -> Evaluation:
    """What `choose` makes of the recommender's views, on one split."""
    recommender.eval()
    with torch.no_grad():
        vectors = recommender.vectors()
        views = choose(recommender.views(vectors))
        device = next(iter(vectors.values())).catalog.device

        def rank(batch: Batch) -> dict[str, Tensor]:
            packing = Packing.of(batch.lengths, device)
            queries = recommender.queries(vectors, torch.from_numpy(batch.items).to(device), packing)
            out = {}
            for name, view in views.items():
                depth = min(DEPTH, view.catalog.shape[0])
                out[name] = top_k(view.query(queries), view.catalog, k=depth, backend=config.backend)[1]
            return out

        return measure(rank, sessions, counts, config.group_edges, config.max_length, config.eval_targets)
