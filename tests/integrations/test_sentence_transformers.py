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
from datasets import Dataset, DatasetDict
from sentence_transformers.util import mine_hard_negatives as stock
from torch import Tensor
from torch.nn.functional import normalize

from alterrec_fast.integrations import mining
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


class CrossEncoder:
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
    {"cross_encoder": CrossEncoder(), "max_score": 0.8, "range_max": 60, "num_negatives": 7},
    {"cross_encoder": CrossEncoder(), "absolute_margin": 0.1, "range_max": 60, "sampling_strategy": "random"},
]


@pytest.mark.parametrize(
    ("output_format", "number"),
    [("triplet", number) for number in range(len(OPTIONS))]
    + [(form, number) for form in ("n-tuple", "labeled-pair", "labeled-list") for number in (1, 3, 8, 10, 11)],
)
def test_the_same_as_stock(output_format: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On integer embeddings to the last bit, with ties everywhere."""
    options = OPTIONS[number]
    monkeypatch.setattr(mining, "CANDIDATE_BYTES", mining.BYTES_EACH * 1000)  # a few queries at a time
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", 64)
    monkeypatch.setattr(mining, "PAIRS_AT_ONCE", 64)
    rescored = "cross_encoder" in options  # its scores are of both texts, so that no other text may stand in
    dataset, corpus, stub = problem(real=rescored)
    given = {**options, "output_format": output_format, "output_scores": number % 3 > 0}
    theirs = mine(stock, dataset, corpus, stub, **given)
    ours = mine(mine_hard_negatives, dataset, corpus, stub, **given)
    if rescored:
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


def test_a_cut_off_cache_file_is_named_and_made_again(tmp_path: Path) -> None:
    """As a process leaves it that is killed while stock writes; ours appears as a whole."""
    dataset, corpus, stub = problem(real=True)
    options = {"output_scores": True, "cache_folder": str(tmp_path)}
    expected = mine(mine_hard_negatives, dataset, corpus, stub, **options)
    files = sorted(tmp_path.iterdir())
    whole = [file.read_bytes() for file in files]
    assert [file.suffix for file in files] == [".npy", ".npy"] and stub.calls == 2
    for damage in (lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"text"):
        for file, data in zip(files, whole, strict=True):
            file.write_bytes(damage(data))
        with pytest.warns(UserWarning, match=r"_embeddings_\w+\.npy is not read, but made again") as warned:
            again = mine(mine_hard_negatives, dataset, corpus, stub, **options)
        assert len(warned) == 2 and again.to_dict() == expected.to_dict()
        assert [file.read_bytes() for file in sorted(tmp_path.iterdir())] == whole
    np.save(files[0], np.ones((3, D), dtype=np.float32))  # of other texts
    with pytest.warns(UserWarning, match=rf"expected \d+ rows of floats, got \(3, {D}\)"):
        assert mine(mine_hard_negatives, dataset, corpus, stub, **options).to_dict() == expected.to_dict()


def failing(*_: Any, **__: Any) -> None:
    raise OSError("no space left")


def test_a_cache_that_cannot_be_written_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, corpus, stub = problem(real=True)
    monkeypatch.setattr(np, "save", failing)
    with pytest.raises(OSError, match="no space left"):
        mine(mine_hard_negatives, dataset, corpus, stub, cache_folder=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["a text", {"d1": 0, "d2": 1}, {"d1", "d2"}, b"bytes", 7])
def test_a_corpus_of_another_kind_is_not_taken_apart(form: Any) -> None:
    dataset, _, stub = problem(real=False)
    with pytest.raises(TypeError, match=rf"corpus must be a list of texts, got a {type(form).__name__}"):
        mine(mine_hard_negatives, dataset, form, stub)
    with pytest.raises(TypeError):
        mine(stock, dataset, form, stub)


def test_what_is_no_text_is_named_with_its_place() -> None:
    dataset, corpus, stub = problem(real=False)
    for entry in (None, 3, ["d1"], {"text": "d1"}):
        with pytest.raises(TypeError, match=r"corpus must hold texts, got .* at place 2"):
            mine(mine_hard_negatives, dataset, [*corpus[:2], entry], stub)
    gaps = Dataset.from_dict({"query": ["q1", None], "answer": ["d1", "d2"]})
    with pytest.raises(TypeError, match=r"dataset\['query'\] must hold texts, got None at place 1"):
        mine(mine_hard_negatives, gaps, corpus, stub)


def test_ids_are_texts_enough_where_embeddings_are_given() -> None:
    ids = Dataset.from_dict({"query": [1, 2, 3], "answer": [11, 12, 13]})
    both = (torch.eye(3), torch.eye(3))
    mined = mine_hard_negatives(ids, embeddings=both, num_negatives=2, verbose=False)
    assert mined.column_names == ["query", "answer", "negative"] and len(mined) == 6


def test_one_column_is_not_anchor_and_positive() -> None:
    """As where the positive is the first column, and only one of both is named. Stock raises a KeyError."""
    dataset, corpus, stub = problem(real=False)
    swapped = dataset.select_columns(["answer", "query"])
    for given in ({"anchor_column_name": "query"}, {"positive_column_name": "answer"}):
        names = {"anchor_column_name": None, "positive_column_name": None, **given}
        with pytest.raises(ValueError, match=r"anchor and positive must be two columns, got '.*' for both of .*: name"):
            mine(mine_hard_negatives, swapped, corpus, stub, **names)
        with pytest.raises(KeyError):
            mine(stock, swapped, corpus, stub, **names)
    expected = mine(mine_hard_negatives, dataset, corpus, stub)
    assert mine(mine_hard_negatives, swapped, corpus, stub).to_dict() == expected.to_dict()


def test_a_column_that_is_not_there_is_warned_of() -> None:
    dataset, corpus, stub = problem(real=False)
    pairs = dataset.select_columns(["query", "answer"])
    names = {"anchor_column_name": "question", "positive_column_name": "answer"}
    with pytest.warns(UserWarning, match="anchor_column_name: dataset has no column 'question'; 'query' is taken"):
        found = mine(mine_hard_negatives, pairs, corpus, stub, **names)
    assert_same(found, mine(stock, pairs, corpus, stub, **names), stub, 0.0)


@pytest.mark.parametrize(
    ("column", "options"),
    [
        ("negative", {}),
        ("scores", {"output_scores": True}),
        ("negative_2", {"output_format": "n-tuple"}),
        ("scores", {"output_format": "n-tuple", "output_scores": True}),
        ("label", {"output_format": "labeled-pair"}),
        ("score", {"output_format": "labeled-pair", "output_scores": True}),
        ("labels", {"output_format": "labeled-list"}),
        ("scores", {"output_format": "labeled-list", "output_scores": True}),
    ],
)
def test_no_column_is_overwritten(column: str, options: dict[str, Any]) -> None:
    dataset, corpus, stub = problem(real=False)
    for given in ("query", "answer"):
        renamed = dataset.rename_column(given, column)
        argument = {"query": "anchor_column_name", "answer": "positive_column_name"}[given]
        with pytest.raises(ValueError, match=f"column '{column}' has the name of a column that output_format="):
            mine(mine_hard_negatives, renamed, corpus, stub, **{argument: column}, **options)


@pytest.mark.parametrize(
    ("column", "output_format"), [("label", "triplet"), ("negative", "labeled-pair"), ("labels", "n-tuple")]
)
def test_names_that_the_format_does_not_make_are_free(column: str, output_format: str) -> None:
    dataset, corpus, stub = problem(real=False)
    renamed = dataset.rename_column("answer", column)
    options = {"positive_column_name": column, "output_format": output_format}
    found = mine(mine_hard_negatives, renamed, corpus, stub, **options)
    assert found.column_names == mine(stock, renamed, corpus, stub, **options).column_names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"range_min": 1.0}, r"range_min must be an integer, got 1\.0"),
        ({"range_max": "9"}, "range_max must be an integer, got '9'"),
        ({"num_negatives": True}, "num_negatives must be an integer, got True"),
        ({"faiss_batch_size": None}, "faiss_batch_size must be an integer, got None"),
        ({"max_score": "0.8"}, "max_score must be a number or None, got '0.8'"),
        ({"relative_margin": [0.1]}, "relative_margin must be a number or None, got"),
        ({"stub": "all-MiniLM-L6-v2"}, "model must be a SentenceTransformer, got a str"),
        ({"embeddings": torch.ones(60, 2)}, r"embeddings must be a pair \(anchors, documents\), got a Tensor"),
        ({"embeddings": (torch.ones(60, 2),)}, "embeddings must be a pair"),
        ({"embeddings": ("a", "b")}, "embeddings: anchors must be an array or a tensor, got a str"),
        ({"dataset": [{"query": "q1", "answer": "d1"}]}, "dataset must be a datasets.Dataset, .*, got a list"),
        ({"dataset": DatasetDict()}, "such as one split of a DatasetDict, got a DatasetDict"),
    ],
)
def test_a_wrong_kind_is_named_with_its_argument(options: dict[str, Any], message: str) -> None:
    dataset, corpus, stub = problem(real=False)
    with pytest.raises(TypeError, match=message):
        mine(mine_hard_negatives, **{"dataset": dataset, "corpus": corpus, "stub": stub, **options})


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
