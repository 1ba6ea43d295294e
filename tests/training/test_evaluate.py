"""Metrics held against their textbook definitions, one target at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from alterrec_fast.data.batches import Batch, pack, plan
from alterrec_fast.model.packing import Packing
from alterrec_fast.systems import build
from alterrec_fast.training.config import Config
from alterrec_fast.training.evaluate import ALPHAS, evaluate, group_names, measure, summarise, sweep, training_counts
from tests.model.test_networks import make_sessions


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

    whole = replace(sessions, last_only=True)
    found = measure(rank, whole, counts, (30, 60), max_length=8, batch_targets=16)
    places = [int(np.flatnonzero(ranking[one[-2]] == one[-1])[0]) for one in (whole[i] for i in range(len(whole)))]
    assert np.array_equal(found.hits["fused"].sum(0), np.bincount(np.minimum(places, 20), minlength=21))


def test_evaluate_ranks_each_prefix_as_if_it_were_alone() -> None:
    """Eq. (12) written out, over the last six items of each session, by plain counting; dropout does not act."""
    torch.manual_seed(0)
    config = Config(width=8, max_length=6, alpha=0.3, dropout=0.9, init="xavier", text_session="mean", eval_targets=32)
    recommender = build(config, 90, torch.randn(90, 6)).train()
    sessions = make_sessions(np.random.default_rng(0).integers(2, 15, 40).tolist(), num_items=90)
    found = evaluate(recommender, sessions, training_counts(sessions, 90), config)
    expected = {view: np.zeros(21, np.int64) for view in ("fused", "id", "text")}
    recommender.eval()
    with torch.no_grad():
        vectors = recommender.vectors()
        for session in (sessions[i][-6:].astype(np.int64) for i in range(len(sessions))):
            for end in range(1, len(session)):
                prefix, alone = torch.from_numpy(session[:end]), Packing.of(np.array([end]))
                queries = {name: q[-1] for name, q in recommender.queries(vectors, prefix, alone).items()}
                scores = {name: vectors[name].catalog @ queries[name] for name in ("id", "text")}
                scores["fused"] = 0.3 * scores["id"] + 0.7 * scores["text"] / config.temperature_text
                for view, y in scores.items():
                    expected[view][min(20, int((y > y[session[end]]).sum()))] += 1
    for view, hits in expected.items():
        assert np.array_equal(found.hits[view].sum(0), hits), view


def test_a_sweep_measures_the_fused_score_at_each_alpha() -> None:
    """As a recommender that is fused so; the views at 0, 1 and the run's alpha are taken as they are given."""
    torch.manual_seed(0)
    config = Config(width=8, alpha=0.25, init="xavier", text_session="mean", eval_targets=32)
    recommender = build(config, 90, torch.randn(90, 6))
    sessions = make_sessions(np.random.default_rng(0).integers(2, 15, 40).tolist(), num_items=90)
    counts = training_counts(sessions, 90)
    marked = {"text": {"hits@20": 0.1}, "id": {"hits@20": 0.2}, "fused": {"hits@20": 0.3}}
    swept = sweep(recommender, sessions, counts, config, marked)
    assert list(map(float, swept)) == sorted([*ALPHAS, 0.25])
    assert [swept[alpha] for alpha in ("0", "1", "0.25")] == list(marked.values())
    found = set()
    for alpha in ALPHAS[1:-1]:
        recommender.fuse(alpha)
        expected = evaluate(recommender, sessions, counts, config).metrics()["fused"]
        assert swept[f"{alpha:g}"] == expected
        found.add(str(expected))
        recommender.fuse(0.25)
        assert evaluate(recommender, sessions, counts, config, alpha).metrics()["fused"] == expected
    assert len(found) > 3


def test_training_counts_cover_items_never_seen() -> None:
    sessions = make_sessions([5, 5], num_items=3)
    counts = training_counts(sessions, 10)
    assert counts.shape == (10,) and counts.sum() == 10
