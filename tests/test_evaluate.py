"""Metrics held against their textbook definitions, one target at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alterrec_fast.data.batches import Batch, pack, plan
from alterrec_fast.training.evaluate import group_names, measure, summarise, training_counts
from tests.test_model import make_sessions


def test_metrics_of_known_ranks() -> None:
    hits = np.zeros(21, np.int64)
    hits[[0, 9, 10, 20]] = 1  # found first, tenth, eleventh, and not at all
    expected = {
        "hits@10": 2 / 4,
        "hits@20": 3 / 4,
        "ndcg@10": (1 + 1 / math.log2(11)) / 4,
        "ndcg@20": (1 + 1 / math.log2(11) + 1 / math.log2(12)) / 4,
        "mrr@20": (1 + 1 / 10 + 1 / 11) / 4,
    }
    assert summarise(hits) == pytest.approx(expected)
    assert summarise(np.zeros(21, np.int64)) == dict.fromkeys(expected, 0.0)


def test_group_names() -> None:
    assert group_names((30, 100, 300)) == ["0-30", "31-100", "101-300", "301+"]
    assert group_names(()) == ["0+"]


def test_measure_counts_every_target_in_its_group() -> None:
    rng = np.random.default_rng(0)
    sessions = make_sessions(rng.integers(2, 15, 60).tolist(), num_items=40)
    counts = np.arange(40) * 3
    ranking = np.array([rng.permutation(40) for _ in range(40)])  # the ranking after each last item

    def rank(batch: Batch) -> dict[str, torch.Tensor]:
        return {"fused": torch.from_numpy(ranking[batch.items][:, :20])}

    found = measure(rank, sessions, counts, (30, 60), max_length=8, batch_targets=16)
    hits = np.zeros((3, 21), np.int64)
    for which in plan(sessions, 8, 16):
        batch = pack(sessions, which, 8)
        for last, target in zip(batch.items, batch.targets, strict=True):
            place = int(np.flatnonzero(ranking[last] == target)[0])
            group = 0 if counts[target] <= 30 else 1 if counts[target] <= 60 else 2
            hits[group, min(place, 20)] += 1
    assert np.array_equal(found.hits["fused"], hits)
    assert found.metrics()["id"] is None
    shares = [group["share"] for group in found.groups().values()]
    assert shares == pytest.approx(list(hits.sum(1) / hits.sum()))


def test_training_counts_cover_items_never_seen() -> None:
    sessions = make_sessions([5, 5], num_items=3)
    counts = training_counts(sessions, 10)
    assert counts.shape == (10,) and counts.sum() == 10
