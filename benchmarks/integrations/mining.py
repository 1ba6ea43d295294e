"""mine_hard_negatives, stock and ours: 100 negatives of ranks 10 to 5,000 for 5,000 queries over 100,000 embeddings.

A stub model hands both the same embeddings. The time is of the whole call, from embeddings to the finished dataset.
Peak memory is the process's beyond what it held after imports and with embeddings and texts in memory. A last round,
not timed, is over integer-valued embeddings, whose scores are exact in any order of summation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..harness.worker import Memory

QUERIES, DOCUMENTS, WIDTH = 5_000, 100_000, 384
RANGE_MIN, RANGE_MAX, NEGATIVES = 10, 5_000, 100
IMPLEMENTATIONS = {"faiss": "stock, use_faiss=True", "torch": "stock, use_faiss=False", "ours": "ours"}
THREADS, ROUNDS = 2, 3
KINDS = ("real", "integers")  # of embeddings
TIE = 1e-5  # ids whose scores are no further apart may stand in for one another


class LookUp:
    """Stands in for a sentence-transformers model: embeddings are looked up by the number that ends a text."""

    device = torch.device("cpu")
    similarity_fn_name = "dot"

    def __init__(self, query: np.ndarray, document: np.ndarray):
        self.query, self.document = query, document

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
        return self.query[[int(text.split()[1]) for text in texts]]

    def encode_document(self, texts: list[str], **_: Any) -> np.ndarray:
        return self.document[[int(text.split()[1]) for text in texts]]

    def similarity(self, a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> Tensor:
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)

    def get_embedding_dimension(self) -> int:
        return int(self.query.shape[1])


def embeddings(count: int, seed: int, integers: bool = False) -> np.ndarray:
    """(count, WIDTH) float32: of length 1, or integers from -4 to 4, whose dot products are exact in float32."""
    rng = np.random.default_rng(seed)
    if integers:
        return rng.integers(-4, 5, (count, WIDTH)).astype(np.float32)
    drawn = rng.standard_normal((count, WIDTH), dtype=np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def measure(name: str, queries: int, documents: int, folder: str, integers: bool) -> dict[str, float]:
    """One call of one function; leaves the ids that it chose, (queries, NEGATIVES), in the folder."""
    from datasets import Dataset

    torch.set_num_threads(THREADS)
    if name == "faiss":
        import faiss

        faiss.omp_set_num_threads(THREADS)
    library = import_module(
        "alterrec_fast.integrations.sentence_transformers" if name == "ours" else "sentence_transformers.util"
    )
    model = LookUp(embeddings(queries, 0, integers), embeddings(documents, 1, integers))
    corpus = [f"document {i}" for i in range(documents)]
    pairs = Dataset.from_dict({"query": [f"query {i}" for i in range(queries)], "answer": corpus[:queries]})
    ranks = {"range_min": RANGE_MIN, "range_max": min(RANGE_MAX, documents), "num_negatives": NEGATIVES}
    memory, begin, cpu = Memory(), time.perf_counter(), time.process_time()
    mined = library.mine_hard_negatives(
        pairs, model, corpus=corpus, **ranks, sampling_strategy="top", use_faiss=name == "faiss", verbose=False
    )
    took = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu, "mib": memory.peak_mib()}
    ids = np.array([int(text.split()[1]) for text in mined["negative"]], dtype=np.int64)
    np.save(Path(folder) / f"{name}.npy", ids.reshape(queries, NEGATIVES))
    return took


def worst_difference(ours: np.ndarray, theirs: np.ndarray, integers: bool) -> float:
    """The largest difference of score where the ids (queries, NEGATIVES) differ."""
    row, place = (ours != theirs).nonzero()
    query, document = embeddings(QUERIES, 0, integers), embeddings(DOCUMENTS, 1, integers)
    scores = [(query[row] * document[ids[row, place]]).sum(1, dtype=np.float64) for ids in (ours, theirs)]
    return float(np.abs(scores[0] - scores[1]).max(initial=0.0))


def sections(_raw: Path, folder: Path, run: Callable[..., dict[str, float]]) -> list[dict[str, Any]]:
    took: dict[str, list[dict[str, float]]] = {name: [] for name in IMPLEMENTATIONS}
    ids = {}
    for kind in (*["real"] * ROUNDS, "integers"):
        for name in IMPLEMENTATIONS:
            answer = run(
                name=name, queries=QUERIES, documents=DOCUMENTS, folder=str(folder), integers=kind == "integers"
            )
            ids[name, kind] = np.load(folder / f"{name}.npy")
            if kind == "real":
                took[name].append(answer)
    rows = []
    for name, title in IMPLEMENTATIONS.items():
        worst = {kind: worst_difference(ids[name, kind], ids["torch", kind], kind == "integers") for kind in KINDS}
        if worst["real"] > TIE:
            raise SystemExit(f"{title}: ids differ whose scores are {worst['real']} apart, expected {TIE} at most")
        if worst["integers"]:
            raise SystemExit(f"{title}: scores of integer-valued embeddings are {worst['integers']} apart, expected 0")
        seconds, cpu = (statistics.median(one[key] for one in took[name]) for key in ("seconds", "cpu"))
        ours = statistics.median(one["seconds"] for one in took["ours"])
        differ, mib = int((ids[name, "real"] != ids["torch", "real"]).sum()), max(one["mib"] for one in took[name])
        apart = f"{worst['real']:.0e}" if differ else ""
        rows.append(
            [title, f"{seconds:.1f}", f"{seconds / ours:.1f}", f"{cpu:.1f}", f"{mib:,.0f}", f"{differ:,}", apart]
        )
    text = (
        f"`mine_hard_negatives` of sentence-transformers and of `alterrec_fast.integrations.sentence_transformers`: "
        f"{QUERIES:,} queries, {DOCUMENTS:,} embeddings of width {WIDTH} handed over by a stub model, ranks "
        f"{RANGE_MIN} to {min(RANGE_MAX, DOCUMENTS):,}, the {NEGATIVES} top ones, {THREADS} threads; medians of "
        f"{ROUNDS} rounds, a process each. The last columns count the {QUERIES * NEGATIVES:,} negatives whose ids are "
        f"not those of the torch path, and how far their scores are apart at most. Over integer-valued embeddings all "
        f"chose negatives of the same scores in every row."
    )
    header = ["", "seconds", "times ours", "CPU seconds", "peak MiB", "other ids", "scores apart"]
    return [{"heading": "sentence-transformers: mining", "text": text, "header": header, "rows": rows}]
