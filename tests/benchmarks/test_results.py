"""The counting baselines against counts made one pair at a time, and the table that the results command writes."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alterrec_fast.benchmarks.experiments import online_retail
from alterrec_fast.benchmarks.experiments.online_retail import BASELINES, DECAY, ENGINE_ROWS, ROWS
from alterrec_fast.benchmarks.harness.report import END, between_marks

from alterrec_fast.data.batches import pack
from alterrec_fast.data.sessions import Dataset
from alterrec_fast.training.config import METRICS
from tests.model.test_networks import make_sessions

V = 30


def test_markov_ranks_by_direct_successors() -> None:
    train, probe = make_sessions([9] * 200, V, 1), make_sessions([6] * 20, V, 2)
    batch = pack(probe, np.arange(20), 50)
    found = BASELINES["markov"](train, V)(batch)["fused"].numpy()
    pairs = Counter((int(a), int(b)) for s in range(200) for a, b in zip(train[s], train[s][1:], strict=False))
    popular = Counter(np.asarray(train.items).tolist())
    for last, items in zip(batch.items, found, strict=True):
        order = sorted(range(V), key=lambda i: (-pairs[int(last), i], -popular[i]))
        keys = [(pairs[int(last), int(i)], popular[int(i)]) for i in items]
        assert keys == [(pairs[int(last), i], popular[i]) for i in order[:20]]


def test_cooccurrence_ranks_by_decayed_cosines() -> None:
    train, probe = make_sessions([5] * 200, V, 1), make_sessions([6] * 5, V, 2)
    batch = pack(probe, np.arange(5), 50)
    found = BASELINES["co-occurrence"](train, V)(batch)["fused"].numpy()
    holds = np.zeros((200, V))
    for s in range(200):
        holds[s, train[s]] = 1.0
    both = holds.T @ holds
    size = np.sqrt(np.maximum(np.diag(both), 1.0))
    cosine = both / np.outer(size, size)
    np.fill_diagonal(cosine, 0.0)
    begin = 0
    for n in batch.lengths:
        for end in range(begin + 1, begin + n + 1):
            prefix = batch.items[begin:end]
            scores = sum(DECAY ** (len(prefix) - 1 - i) * cosine[item] for i, item in enumerate(prefix))
            best = np.sort(scores)[::-1][:20]
            # Popularity, which breaks ties, may move a score by half the smallest similarity.
            slack = cosine[cosine > 0].min()
            assert np.allclose(np.sort(scores[found[end - 1]])[::-1], best, atol=slack)
        begin += n


def test_the_table_names_every_variant_and_says_where_it_falls_short(shop: Dataset, tmp_path: Path) -> None:
    def metrics(level: float) -> dict[str, Any]:
        return {"test": {view: dict.fromkeys(METRICS, level) for view in ("fused", "id", "text")}}

    levels = {"alterrec": 0.4, "random": 0.5}
    runs = {row.name: [metrics(levels.get(row.name, 0.3)), metrics(levels.get(row.name, 0.3) + 0.02)] for row in ROWS}
    options = argparse.Namespace(width=16, epochs=3, seeds=2, threads=1, jobs=2)
    page = online_retail.results_page(runs, {"markov": dict.fromkeys(METRICS, 0.1)}, shop, options, 5.0)
    assert all(f"| {row.name} |" in page for row in ROWS)
    assert "| alterrec | 41.00 ± 1.41 |" in page
    assert "alterrec, hits@20 41.00" in page
    line = next(line for line in page.splitlines() if line.startswith("- alterrec, hits@20"))
    assert "BELOW random (51.00)" in line and "above markov (10.00)" in line and "above id_only (31.00)" in line


def test_engines_are_compared_in_deviations_over_seeds() -> None:
    def seeds(*levels: float) -> list[dict[str, Any]]:
        return [{"test": {"fused": dict.fromkeys(METRICS, level)}} for level in levels]

    runs = {row.name: seeds(0.30, 0.32) for row in ENGINE_ROWS}
    runs["alterrec, bf16"] = seeds(0.33, 0.35)  # 0.03 apart, deviations of 0.0141
    page = online_retail.compared_page(runs, argparse.Namespace(width=16, epochs=3, seeds=2, short=False, engines=True))
    assert "| alterrec, bf16 | 34.00 ± 1.41 |" in page
    assert "- alterrec, native fp32: within one standard deviation of the reference; at most 0.00" in page
    assert "- alterrec, native bf16: BEYOND one standard deviation of the reference; at most 2.12" in page


def test_the_table_goes_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"<!-- a -->\n1\n{END}\n<!-- b -->\nold\n{END}\nafter\n")
    assert between_marks(page, "<!-- b -->", "new") == f"<!-- a -->\n1\n{END}\n<!-- b -->\n\nnew\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="marks"):
        between_marks(page, "<!-- b -->", "new")
