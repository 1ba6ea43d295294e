"""mine_hard_negatives, stock and ours: 100 negatives of ranks 10 to 5,000 for 5,000 queries over 100,000 embeddings.

A stub model hands both the same embeddings. The time is of the whole call, from embeddings to the finished dataset.
Peak memory is the process's beyond what it held after imports and with embeddings and texts in memory. A last round,
not timed, is over integer-valued embeddings, whose scores are exact in any order of summation.
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

from ..bench_rank import LookUp
from ..harness.worker import Memory
from .processes import call

MODULE = "alterrec_fast.benchmarks.integrations.mining"
QUERIES, DOCUMENTS, WIDTH = 5_000, 100_000, 384
RANGE_MIN, RANGE_MAX, NEGATIVES = 10, 5_000, 100
IMPLEMENTATIONS = {"faiss": "stock, use_faiss=True", "torch": "stock, use_faiss=False", "ours": "ours"}
THREADS = 2
TIE = 1e-5  # ids whose scores are no further apart may stand in for one another


def embeddings(count: int, seed: int, integers: bool = False) -> np.ndarray:
    """(count, WIDTH) float32: of length 1, or integers from -4 to 4, whose dot products are exact in float32."""
    rng = np.random.default_rng(seed)
    if integers:
        return rng.integers(-4, 5, (count, WIDTH)).astype(np.float32)
    drawn = rng.standard_normal((count, WIDTH), dtype=np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def mine(name: str, queries: int, documents: int, neg_file: str, integers: bool = False) -> dict[str, float]:
    """One call of one function; leaves the ids that it chose, (queries, NEGATIVES), in the file."""
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
    np.save(neg_file, ids.reshape(queries, NEGATIVES))
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
    took: dict[str, list[dict[str, float]]] = {name: [] for name in IMPLEMENTATIONS}
    sizes = ("--queries", str(queries), "--documents", str(documents))
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / f"{name}.npy") for name in IMPLEMENTATIONS}

        def run(name: str, kind: str) -> dict[str, float]:
            options = ("--mine", name, *sizes, "--negatives", files[name], "--embeddings", kind)
            answer: dict[str, float] = call(MODULE, *options)
            return answer

        for _ in range(rounds):
            for name in IMPLEMENTATIONS:
                took[name].append(run(name, "real"))
        mined = {name: np.load(file) for name, file in files.items()}
        for name in IMPLEMENTATIONS:
            run(name, "integers")
        exact = {name: np.load(file) for name, file in files.items()}
    seconds, cpu = (
        {name: statistics.median(one[kind] for one in rounds_) for name, rounds_ in took.items()}
        for kind in ("seconds", "cpu")
    )
    rows = []
    for name, title in IMPLEMENTATIONS.items():
        differ = int((mined[name] != mined["torch"]).sum())
        worst = worst_difference(mined[name], mined["torch"], queries, documents)
        if worst > TIE:
            raise SystemExit(f"{title}: ids differ whose scores are {worst} apart, expected {TIE} at most")
        apart = worst_difference(exact[name], exact["torch"], queries, documents, integers=True)
        if apart:
            raise SystemExit(f"{title}: scores of integer-valued embeddings are {apart} apart, expected to be equal")
        mib = f"{max(one['mib'] for one in took[name]):,.0f}"
        times = [f"{seconds[name]:.1f}", f"{seconds[name] / seconds['ours']:.1f}", f"{cpu[name]:.1f}"]
        rows.append([title, *times, mib, f"{differ:,}", f"{worst:.0e}" if differ else ""])
    text = (
        f"`mine_hard_negatives` of sentence-transformers and of `alterrec_fast.integrations.sentence_transformers`: "
        f"{queries:,} queries, {documents:,} embeddings of width {WIDTH} handed over by a stub model, ranks "
        f"{RANGE_MIN} to {min(RANGE_MAX, documents):,}, the {NEGATIVES} top ones, {THREADS} threads; medians of "
        f"{rounds} rounds, a process each. The last columns count the {queries * NEGATIVES:,} negatives whose ids are "
        f"not those of the torch path, and how far their scores are apart at most. Over integer-valued embeddings all "
        f"chose negatives of the same scores in every row."
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
    parser.add_argument("--mine", choices=list(IMPLEMENTATIONS), help="run this one in this process")
    parser.add_argument("--negatives", help="where it leaves the ids")
    parser.add_argument("--embeddings", choices=("real", "integers"), default="real")
    options = parser.parse_args()
    if options.mine:
        sizes, integers = (options.queries, options.documents), options.embeddings == "integers"
        print(json.dumps(mine(options.mine, *sizes, options.negatives, integers)))
        return
    made = sections(options.queries, options.documents, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(made), encoding="utf-8")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
