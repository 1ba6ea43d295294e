"""Counting baselines: what a first-order Markov chain and item co-occurrence reach without any training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from alterrec_fast.data.batches import Batch
from alterrec_fast.data.sessions import Sessions
from alterrec_fast.model.packing import Packing
from alterrec_fast.training.evaluate import DEPTH, Ranker

# Ties in the counts are broken by popularity: it is scaled to less than one count.
TIE = 0.5
# Of 0, 0.5, 0.8 and 1, and of raw counts, conditional probabilities and cosines, the best on validation data.
DECAY = 0.5


def markov(train: Sessions, num_items: int) -> Ranker:
    """Ranks the items by how often they directly followed the prefix's last item in training. A (V, V) matrix."""
    items, v = np.asarray(train.items, np.int64), num_items
    follows = np.ones(len(items), bool)
    follows[np.asarray(train.offsets[1:]) - 1] = False  # a session's last item has no successor
    pairs = items[:-1][follows[:-1]] * v + items[1:][follows[:-1]]
    counts = torch.from_numpy(np.bincount(pairs, minlength=v * v).reshape(v, v)).float()
    scores = counts + _popularity(train, v)

    def rank(batch: Batch) -> dict[str, Tensor]:
        return {"fused": _best(scores[torch.from_numpy(batch.items)])}

    return rank


def cooccurrence(train: Sessions, num_items: int) -> Ranker:
    """Ranks the items by their cosine similarity to the prefix's items over the training sessions (item-based nearest
    neighbours), an item counting DECAY times what its successor does. A (V, V) matrix.
    """
    v = num_items
    together = torch.zeros(v, v)
    for begin in range(0, len(train), 1024):
        end = min(begin + 1024, len(train))
        bounds = np.asarray(train.offsets[begin : end + 1])
        held = torch.zeros(end - begin, v)
        row = np.repeat(np.arange(end - begin), np.diff(bounds))
        held[torch.from_numpy(row), torch.from_numpy(np.asarray(train.items[bounds[0] : bounds[-1]], np.int64))] = 1.0
        together += held.T @ held
    size = together.diagonal().clamp(min=1.0).sqrt()
    together /= size[:, None] * size
    together.fill_diagonal_(0.0)
    popularity = _popularity(train, v) * together[together > 0].min()

    def rank(batch: Batch) -> dict[str, Tensor]:
        packing = Packing.of(batch.lengths)
        rows = together[torch.from_numpy(batch.items)]  # (T, V)
        scores = packing.gather([_decayed_sums(part) for part in packing.spread(rows)])
        return {"fused": _best(scores + popularity)}

    return rank


def _decayed_sums(x: Tensor) -> Tensor:
    """(b, L, V) -> (b, L, V), at each place the sum of x up to it, each step back weighing DECAY times less."""
    sums = [x[:, 0]]
    for place in range(1, x.shape[1]):
        sums.append(sums[-1] * DECAY + x[:, place])
    return torch.stack(sums, 1)


def _popularity(train: Sessions, num_items: int) -> Tensor:
    counts = torch.from_numpy(np.bincount(np.asarray(train.items, np.int64), minlength=num_items)).float()
    return TIE * counts / counts.max().clamp(min=1.0)


def _best(scores: Tensor) -> Tensor:
    """(T, V) scores -> (T, 20) items, best first."""
    return scores.topk(min(DEPTH, scores.shape[1]), dim=1).indices


BASELINES = {"markov": markov, "co-occurrence": cooccurrence}
