"""mine_hard_negatives, stock and ours: 100 negatives of ranks 10 to 5,000 for 5,000 queries over 100,000 embeddings.

A stub model hands both the same embeddings. The time is of the whole call, from embeddings to the finished dataset.
Peak memory is the process's beyond what it held after imports and with embeddings and texts there. A last round, not
timed, is over integer-valued embeddings, whose scores are exact in any order of summation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alterrec_fast.benchmarks.own_process import Memory, call
from torch import Tensor

QUERIES, DOCUMENTS, WIDTH = 5_000, 100_000, 384
RANGE_MIN, RANGE_MAX, NEGATIVES = 10, 5_000, 100
CONTESTANTS = {"faiss": "stock, use_faiss=True", "torch": "stock, use_faiss=False", "ours": "ours"}
THREADS = 2
TIE = 1e-5  # ids whose scores are no further apart may stand in for one another


class Stub:
    """Looks its embeddings up instead of computing them."""

    device = torch.device("cpu")
    similarity_fn_name = "dot"

    def __init__(self, queries: np.ndarray, documents: np.ndarray):
        self.queries, self.documents = queries, documents

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
        return self.queries[[int(text[1:]) for text in texts]]

    def encode_document(self, texts: list[str], **_: Any) -> np.ndarray:
        return self.documents[[int(text[1:]) for text in texts]]

    def similarity(self, a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> Tensor:
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)

    def get_embedding_dimension(self) -> int:
        return WIDTH


def embeddings(count: int, seed: int, integers: bool = False) -> np.ndarray:
    """(count, WIDTH) float32: of length 1, or integers from -4 to 4, whose dot products are exact in float32."""
    rng = np.random.default_rng(seed)
    if integers:
        return rng.integers(-4, 5, (count, WIDTH)).astype(np.float32)
    drawn = rng.standard_normal((count, WIDTH), dtype=np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def contestant(
    name: str, queries: int, documents: int, negatives_file: str, integers: bool = False
) -> dict[str, float]:
    """One call of one function; leaves the ids that it chose, (queries, NEGATIVES), in the file."""
    from datasets import Dataset

    torch.set_num_threads(THREADS)
    if name == "faiss":
        import faiss

        faiss.omp_set_num_threads(THREADS)
    library = import_module(
        "alterrec_fast.integrations.sentence_transformers" if name == "ours" else "sentence_transformers.util"
    )
    model = Stub(embeddings(queries, 0, integers), embeddings(documents, 1, integers))
    corpus = [f"d{i}" for i in range(documents)]
    pairs = Dataset.from_dict({"query": [f"q{i}" for i in range(queries)], "answer": corpus[:queries]})
    memory, begin, cpu = Memory(), time.perf_counter(), time.process_time()
    mined = library.mine_hard_negatives(
        pairs,
        model,
        corpus=corpus,
        range_min=RANGE_MIN,
        range_max=min(RANGE_MAX, documents),
        num_negatives=NEGATIVES,
        sampling_strategy="top",
        use_faiss=name == "faiss",
        verbose=False,
    )
    took = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu, "mib": memory.peak_mib()}
    ids = np.array([int(text[1:]) for text in mined["negative"]], dtype=np.int64)
    np.save(negatives_file, ids.reshape(queries, NEGATIVES))
    return took


def worst_difference(
    ours: np.ndarray, theirs: np.ndarray, queries: int, documents: int, integers: bool = False
) -> float:
    """The largest difference of score where the ids (queries, NEGATIVES) differ."""
    row, place = (ours != theirs).nonzero()
    query, document = embeddings(queries, 0, integers), embeddings(documents, 1, integers)
    scores = [(query[row] * document[ids[row, place]]).sum(1, dtype=np.float64) for ids in (ours, theirs)]
    return float(np.abs(scores[0] - scores[1]).max(initial=0.0))


def sections(queries: int, documents: int, rounds: int) -> list[dict[str, Any]]:
    took: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    sizes = ("--queries", str(queries), "--documents", str(documents))
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / f"{name}.npy") for name in CONTESTANTS}

        def run(name: str, kind: str) -> dict[str, float]:
            options = ("--contestant", name, *sizes, "--negatives", files[name], "--embeddings", kind)
            answer: dict[str, float] = call("alterrec_fast.benchmarks.integrations_mining", *options)
            return answer

        for _ in range(rounds):
            for name in CONTESTANTS:
                took[name].append(run(name, "real"))
        found = {name: np.load(file) for name, file in files.items()}
        for name in CONTESTANTS:
            run(name, "integers")
        exact = {name: np.load(file) for name, file in files.items()}
    seconds, cpu = (
        {name: statistics.median(one[kind] for one in rounds_) for name, rounds_ in took.items()}
        for kind in ("seconds", "cpu")
    )
    rows = []
    for name, title in CONTESTANTS.items():
        differ = int((found[name] != found["torch"]).sum())
        worst = worst_difference(found[name], found["torch"], queries, documents)
        if worst > TIE:
            raise SystemExit(f"{title}: ids differ whose scores are {worst} apart, expected {TIE} at most")
        apart = worst_difference(exact[name], exact["torch"], queries, documents, integers=True)
        if apart:
            raise SystemExit(f"{title}: scores of integer-valued embeddings are {apart} apart, expected to be equal")
        rows.append(
            [
                title,
                f"{seconds[name]:.1f}",
                f"{seconds[name] / seconds['ours']:.1f}",
                f"{cpu[name]:.1f}",
                f"{max(one['mib'] for one in took[name]):,.0f}",
                f"{differ:,}",
                f"{worst:.0e}" if differ else "",
            ]
        )
    text = (
        f"`mine_hard_negatives` of sentence-transformers and of `alterrec_fast.integrations.sentence_transformers`: "
        f"{queries:,} queries, {documents:,} embeddings of width {WIDTH} handed over by a stub model, ranks "
        f"{RANGE_MIN} to {min(RANGE_MAX, documents):,}, the {NEGATIVES} top ones, {THREADS} threads; medians of "
        f"{rounds} rounds, a process each. The last columns count the {queries * NEGATIVES:,} negatives whose ids are "
        f"not those of the torch path, and how far their scores are apart at most. Over integer-valued embeddings all "
        f"found the same scores in every row."
    )
    header = ["", "seconds", "times ours", "CPU seconds", "peak MiB", "other ids", "scores apart"]
    return [{"heading": "sentence-transformers: mining", "text": text, "header": header, "rows": rows}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--raw", type=Path, help="not used here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--contestant", choices=list(CONTESTANTS), help="run this one in this process")
    parser.add_argument("--negatives", help="where it leaves the ids")
    parser.add_argument("--embeddings", choices=("real", "integers"), default="real")
    options = parser.parse_args()
    if options.contestant:
        sizes, integers = (options.queries, options.documents), options.embeddings == "integers"
        print(json.dumps(contestant(options.contestant, *sizes, options.negatives, integers)))
        return
    made = sections(options.queries, options.documents, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(made), encoding="utf-8")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
