"""Mining against the real mine_hard_negatives, by a stub model that hands out embeddings made here."""

from __future__ import annotations

import inspect
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives as stock
from torch import Tensor
from torch.nn.functional import normalize

from alterrec_fast.integrations import sentence_transformers as module
from alterrec_fast.integrations.sentence_transformers import mine_hard_negatives
from tests.conftest import integers

ROWS, EXTRA, D = 60, 300, 6


class Stub:
    """Has an embedding for each text, as a SentenceTransformer that was given them."""

    device = torch.device("cpu")
    similarity_fn_name = "dot"
    model_card_data = SimpleNamespace(base_model="stub")

    def __init__(self, vectors: dict[str, Tensor]):
        self.vectors = vectors
        self.calls = 0

    def encode_query(self, texts: list[str], **options: Any) -> np.ndarray:
        assert options["normalize_embeddings"] and options["convert_to_numpy"]
        self.calls += 1
        return torch.stack([self.vectors[text] for text in texts]).numpy()

    encode_document = encode_query

    def similarity(self, a: Any, b: Any) -> Tensor:
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> Tensor:
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)

    def get_embedding_dimension(self) -> int:
        return D


class Judge:
    """A cross-encoder whose scores do not follow the vectors, and never tie."""

    def predict(self, texts: list[tuple[str, str]], **_: Any) -> Tensor:
        return torch.tensor([crc32(f"{a} {b}".encode()) % 2**24 for a, b in texts]) / 2**24


def problem(real: bool) -> tuple[Dataset, list[str], Stub]:
    """A dataset with repeated queries, repeated positives and a repeated pair; a corpus with repeats."""
    picks = random.Random(0)
    anchors = [f"q{picks.randrange(45)}" for _ in range(ROWS)]
    positives = [f"d{picks.randrange(EXTRA + 20)}" for _ in range(ROWS)]
    anchors[7], positives[7] = anchors[3], positives[3]
    corpus = [f"d{i}" for i in range(EXTRA)] + ["d5", "d6"]
    texts = sorted(set(anchors) | set(positives) | set(corpus))
    drawn = torch.randn(len(texts), D, generator=torch.Generator().manual_seed(0))
    vectors = normalize(drawn, dim=1) if real else integers(len(texts), D, 0)
    stub = Stub(dict(zip(texts, vectors, strict=True)))
    return Dataset.from_dict({"id": list(range(ROWS)), "query": anchors, "answer": positives}), corpus, stub


def mine(function: Any, dataset: Dataset, corpus: list[str] | None, stub: Stub | None, **options: Any) -> Dataset:
    names = {"anchor_column_name": "query", "positive_column_name": "answer", "corpus": corpus, "verbose": False}
    random.seed(0)
    return function(dataset, stub, **{**names, **options})


def assert_same(ours: Dataset, theirs: Dataset, stub: Stub, tolerance: float) -> None:
    """Equal but for negatives of one score (within the tolerance), which may stand in for one another."""
    assert ours.features == theirs.features and len(ours) == len(theirs)
    found, expected = ours.to_dict(), theirs.to_dict()
    assert found.keys() == expected.keys() and found["query"] == expected["query"]

    def scores(column: list[Any]) -> Tensor:
        """Of each query's negatives, or lists of negatives."""
        rows = [[text] if isinstance(text, str) else text for text in column]
        assert all(len(set(row)) == len(row) for row in rows)
        vectors = torch.stack([stub.vectors[text] for row in rows for text in row])
        queries = torch.stack([stub.vectors[q] for q, row in zip(found["query"], rows, strict=True) for _ in row])
        return (vectors * queries).sum(1)

    for name in found.keys() - {"query"}:
        if name in ("score", "scores", "label", "labels"):
            flat = [np.hstack(table[name] or [[]]) for table in (found, expected)]
            np.testing.assert_allclose(*flat, rtol=0, atol=tolerance)
        elif found[name] != expected[name]:
            torch.testing.assert_close(scores(found[name]), scores(expected[name]), rtol=0, atol=tolerance)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"range_min": 5, "range_max": 100, "num_negatives": 20},
    {"range_min": 3, "max_score": 4.0, "num_negatives": 4},
    {"absolute_margin": 2.0, "min_score": -3.0, "num_negatives": 6},
    {"relative_margin": 0.3, "range_max": 250, "num_negatives": 30},
    {"relative_margin": 0.1, "absolute_margin": 1.0, "max_score": 2.0, "min_score": 0.0, "range_max": 400},
    {"range_min": 300, "range_max": 5000, "num_negatives": 40},  # beyond the corpus
    {"range_min": 2, "range_max": 50, "num_negatives": 5, "sampling_strategy": "random"},
    {"max_score": 1.0, "range_max": 300, "num_negatives": 9, "sampling_strategy": "random"},
    {"min_score": 5.0, "range_max": 60, "num_negatives": 9, "sampling_strategy": "random"},
    {"include_positives": True, "num_negatives": 10, "range_max": 30},
    {"cross_encoder": Judge(), "max_score": 0.8, "range_max": 60, "num_negatives": 7},
    {"cross_encoder": Judge(), "absolute_margin": 0.1, "range_max": 60, "sampling_strategy": "random"},
]


@pytest.mark.parametrize(
    ("output_format", "number"),
    [("triplet", number) for number in range(len(OPTIONS))]
    + [(form, number) for form in ("n-tuple", "labeled-pair", "labeled-list") for number in (1, 3, 8, 10, 11)],
)
def test_the_same_as_stock(output_format: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On integer embeddings to the last bit, with ties everywhere."""
    options = OPTIONS[number]
    monkeypatch.setattr(module, "CANDIDATE_BYTES", module.BYTES_EACH * 1000)  # a few queries at a time
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", 64)
    judged = "cross_encoder" in options  # its scores are of both texts, so that no other text may stand in
    dataset, corpus, stub = problem(real=judged)
    given = {**options, "output_format": output_format, "output_scores": number % 3 > 0}
    theirs = mine(stock, dataset, corpus, stub, **given)
    ours = mine(mine_hard_negatives, dataset, corpus, stub, **given)
    if judged:
        assert ours.to_dict() == theirs.to_dict()
    assert_same(ours, theirs, stub, 0.0)
    assert len(ours) > 0 or options.get("range_min") == 300


@pytest.mark.parametrize("strategy", ["top", "random"])
def test_the_same_as_stock_on_real_embeddings(strategy: str) -> None:
    dataset, corpus, stub = problem(real=True)
    options = {"range_min": 4, "range_max": 120, "num_negatives": 25, "relative_margin": 0.05, "output_scores": True}
    for given in ({"corpus": corpus}, {"corpus": None}):
        calls = {**options, **given, "sampling_strategy": strategy}
        theirs = mine(stock, dataset, stub=stub, **calls)
        assert_same(mine(mine_hard_negatives, dataset, stub=stub, **calls), theirs, stub, 1e-5)


def test_embeddings_that_are_there_already() -> None:
    dataset, corpus, stub = problem(real=True)
    anchors = torch.stack([stub.vectors[text] for text in dataset["query"]])
    answers = torch.stack([stub.vectors[text] for text in dataset["answer"]])
    documents = torch.stack([stub.vectors[text] for text in corpus])
    expected = mine(mine_hard_negatives, dataset, corpus, stub, num_negatives=7, output_scores=True)
    both = (anchors, torch.cat([documents, answers]))
    for model in (None, stub):
        found = mine(mine_hard_negatives, dataset, corpus, model, num_negatives=7, output_scores=True, embeddings=both)
        assert_same(found, expected, stub, 1e-6)
    assert stub.calls == 2
    scaled = tuple((3.7 * x).double().numpy() for x in both)  # cosine does not mind
    found = mine(mine_hard_negatives, dataset, corpus, None, num_negatives=7, output_scores=True, embeddings=scaled)
    assert_same(found, expected, stub, 1e-6)
    found = mine(mine_hard_negatives, dataset, corpus, None, embeddings=scaled, similarity="dot", output_scores=True)
    assert float(np.max(found["scores"])) > 5
    alone = mine(mine_hard_negatives, dataset, None, None, embeddings=(anchors, answers), output_scores=True)
    assert_same(alone, mine(stock, dataset, None, stub, output_scores=True), stub, 1e-5)
    everything = [*corpus, *dataset["answer"]]
    found = mine(mine_hard_negatives, dataset, everything, None, num_negatives=7, output_scores=True, embeddings=both)
    assert_same(found, expected, stub, 1e-6)


def test_stocks_cache_files_are_used_both_ways(tmp_path: Path) -> None:
    dataset, corpus, stub = problem(real=True)
    options = {"output_scores": True, "cache_folder": str(tmp_path / "cache"), "query_prompt": "query: "}
    theirs = mine(stock, dataset, corpus, stub, **options)
    assert stub.calls == 2
    assert_same(mine(mine_hard_negatives, dataset, corpus, stub, **options), theirs, stub, 1e-5)
    assert stub.calls == 2
    options["cache_folder"] = str(tmp_path / "other")
    for function in (mine_hard_negatives, mine_hard_negatives, stock):
        assert_same(mine(function, dataset, corpus, stub, **options), theirs, stub, 1e-5)
    assert stub.calls == 4


def test_arguments_of_stock_and_its_deprecated_names() -> None:
    ours, theirs = (inspect.signature(f).parameters for f in (mine_hard_negatives, stock))
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == (None if name == "model" else parameter.default)
    dataset, corpus, stub = problem(real=False)
    expected = mine(mine_hard_negatives, dataset, corpus, stub, absolute_margin=1.0, output_format="n-tuple")
    with pytest.warns(FutureWarning, match="use "):
        found = mine(mine_hard_negatives, dataset, corpus, stub, margin=1.0, as_triplets=False)
    assert found.to_dict() == expected.to_dict()
    with pytest.warns(FutureWarning, match="use output_scores"):
        found = mine(mine_hard_negatives, dataset, corpus, stub, output_format="n-tuple-scores")
    assert "scores" in found.column_names


def test_positives_among_the_negatives_come_with_stocks_warnings() -> None:
    dataset, corpus, stub = problem(real=False)
    with pytest.warns(UserWarning) as found:
        mine(mine_hard_negatives, dataset, corpus, stub, include_positives=True, max_score=90.0)
    assert [str(one.message).split()[0] for one in found] == ["ranges,", "include_positives"]


def test_a_summary_says_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    dataset, corpus, stub = problem(real=False)
    mine(mine_hard_negatives, dataset, corpus, stub, num_negatives=200, max_score=-2.0, range_max=300, verbose=True)
    printed = capsys.readouterr().out
    queries = len(set(dataset["query"]))
    assert f"negatives for {queries} queries among " in printed and "Scores of negatives: mean -" in printed
    assert "queries have fewer than 200: a larger range_max" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ({"range_min": -1}, "expected 0 <= range_min < range_max, got range_min=-1"),
        ({"range_min": 9, "range_max": 9}, "got range_min=9 and range_max=9"),
        ({"range_min": 5, "range_max": 9, "num_negatives": 5}, "at most range_max - range_min = 4, got 5"),
        ({"output_format": "rows"}, "output_format must be one of triplet, .*, got 'rows'"),
        ({"sampling_strategy": "best"}, "sampling_strategy must be 'top' or 'random', got 'best'"),
        ({"faiss_batch_size": 0}, "faiss_batch_size must be at least 1, got 0"),
        ({"similarity": "euclidean"}, "similarity must be one of cosine, dot, got 'euclidean'"),
        ({"stub": None}, r"expected a model, or embeddings=\(anchors, documents\), got neither"),
        ({"embeddings": (torch.ones(9, 2), torch.ones(9, 2))}, "expected 60 anchors, one a row, got 9"),
        ({"embeddings": (torch.ones(60, 2), torch.ones(9, 2))}, "expected 362 documents, .*, got 9"),
        ({"embeddings": (torch.ones(60, 2), torch.ones(302, 2))}, "expected 362 documents, .*, got 302"),
        ({"embeddings": (torch.ones(60, 2), torch.ones(362, 3))}, "widths differ, got 2 and 3"),
        ({"embeddings": (torch.ones(60, 2).long(), torch.ones(362, 2))}, r"anchors must be 2-D floats, got \(60, 2\) "),
    ],
)
def test_errors_name_the_value_and_what_was_expected(options: dict[str, Any], message: str) -> None:
    dataset, corpus, stub = problem(real=False)
    with pytest.raises(ValueError, match=message):
        mine(mine_hard_negatives, dataset, corpus, **{"stub": stub, **options})


def test_a_dataset_without_rows_or_without_positives() -> None:
    with pytest.raises(ValueError, match="at least one row, got none"):
        mine_hard_negatives(Dataset.from_dict({"query": [], "answer": []}), Stub({}))
    with pytest.raises(ValueError, match=r"a column of anchors and one of positives, got \['query'\]"):
        mine_hard_negatives(Dataset.from_dict({"query": ["a"]}), Stub({}))
