"""Contestants of rank_slice and top_k: ranks [start, stop) of the whole catalog, by the ways people take today.

Each is handed float32 or bfloat16 queries (4, B, d) and a catalog (V, d), and gives ids (B, n) of the slice, or what
those can be read from. What belongs to the catalog alone (an index, a padded copy) is made in `prepare`, untimed.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from alterrec_fast.benchmarks.worker import BATCHES, Call, Shape, Tensors
from torch import Tensor

from alterrec_fast.ops import RankSlice, rank_slice, top_k
from alterrec_fast.ops.library import EXTENSION, NO_EXTENSION

PHASES = ("bracket", "stream", "settle")
ITEM_BLOCK = 1 << 16  # items scored at a time by the contestant that goes through the catalog in blocks


def product(shape: Shape, inputs: Tensors) -> Call:
    """The floor: torch.mm into memory that is there already, at the width at which it is fastest."""
    query, catalog = padded(inputs["query"]), padded(inputs["catalog"])
    out = room(shape.sessions, shape.items, query.dtype)

    def run(i: int) -> Tensor:
        return torch.mm(query[i % BATCHES], catalog.T, out=out)

    return Call(run, lambda y, rows: {"product": y[rows][:, :1000]})


def padded(x: Tensor) -> Tensor:
    """Matrix units take bfloat16 rows of a multiple of 32 numbers; in float32 nothing is gained."""
    return x if x.dtype == torch.float32 else F.pad(x, (0, -x.shape[-1] % 32))


def room(sessions: int, items: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory (B, V) for scores, rows at the begin of cache lines: without, torch.mm takes up to 1.4 times as long."""
    return rows_in(torch.empty(sessions * _whole_lines(items), dtype=dtype), sessions, items)


def rows_in(flat: Tensor, sessions: int, items: int) -> Tensor:
    """The begin of `flat` as such a matrix."""
    stride = _whole_lines(items)
    return flat[: sessions * stride].view(sessions, stride)[:, :items]


def _whole_lines(items: int) -> int:
    """Numbers that a row takes; of bfloat16 as many as fill two lines."""
    return -(-items // 32) * 32


# --- ours ---


def our_slice(shape: Shape, inputs: Tensors, precision: str | None = None) -> Call:
    before = _phases()

    def run(i: int) -> RankSlice:
        query = inputs["query"][i % BATCHES]
        return rank_slice(query, inputs["catalog"], start=shape.start, stop=shape.stop, precision=precision)

    def read(found: RankSlice, rows: Tensor) -> Tensors:
        return members_of(torch.cat([found.mask_rows(row, row + 1) for row in rows.tolist()]))

    def phases() -> dict[str, float]:
        return {name: now - before[name] for name, now in _phases().items()}

    return Call(run, read, phases)


def _phases() -> dict[str, float]:
    """Seconds that the native engine has spent in each phase of streamed catalogs; nothing where it is not built."""
    if NO_EXTENSION:
        return {}
    counters = __import__(EXTENSION, fromlist=["counters"]).counters()
    return {name: counters[f"{name}_ns"] * 1e-9 for name in PHASES}


def our_best(shape: Shape, inputs: Tensors, precision: str | None = None) -> Call:
    def run(i: int) -> Tensor:
        return top_k(inputs["query"][i % BATCHES], inputs["catalog"], k=shape.stop, precision=precision)[1]

    return Call(run, take_rows)


# --- torch ---


def torch_topk(shape: Shape, inputs: Tensors, ordered: bool = True) -> Call:
    """mm and topk; unordered, the first ranks are found among the others by a second topk over those alone."""
    query, catalog = padded(inputs["query"]), padded(inputs["catalog"])
    scores = room(shape.sessions, shape.items, query.dtype)

    def run(i: int) -> Any:
        best = torch.mm(query[i % BATCHES], catalog.T, out=scores).topk(shape.stop, sorted=ordered)
        if ordered:
            return best.indices[:, shape.start :]
        return best.indices, best.values.topk(shape.start, sorted=False).indices

    def read_unordered(found: tuple[Tensor, Tensor], rows: Tensor) -> Tensors:
        ids, dropped = found
        keep = torch.ones(ids.shape, dtype=torch.bool).scatter_(1, dropped, False)
        return {"members": torch.stack([ids[row][keep[row]] for row in rows])}

    return Call(run, take_rows if ordered else read_unordered)


def torch_kthvalue(shape: Shape, inputs: Tensors) -> Call:
    """The two boundary scores by kthvalue, and a comparison with them: a mask (B, V)."""
    query, catalog = padded(inputs["query"]), padded(inputs["catalog"])
    items = shape.items
    scores = room(shape.sessions, items, query.dtype)

    def run(i: int) -> Tensor:
        y = torch.mm(query[i % BATCHES], catalog.T, out=scores)
        inside = y >= y.kthvalue(items - shape.stop + 1, keepdim=True).values
        if shape.start:
            inside &= y < y.kthvalue(items - shape.start + 1, keepdim=True).values
        return inside

    return Call(run, lambda mask, rows: members_of(mask[rows]))


def torch_blocks(shape: Shape, inputs: Tensors) -> Call:
    """mm and topk of one block of items after the other, and topk of what they leave: no B x V matrix."""
    query, catalog = padded(inputs["query"]), padded(inputs["catalog"])
    scores = torch.empty(shape.sessions * _whole_lines(min(shape.items, ITEM_BLOCK)), dtype=query.dtype)

    def run(i: int) -> Tensor:
        values, ids = [], []
        for begin in range(0, shape.items, ITEM_BLOCK):
            block = catalog[begin : begin + ITEM_BLOCK]
            y = torch.mm(query[i % BATCHES], block.T, out=rows_in(scores, shape.sessions, len(block)))
            best = y.topk(min(shape.stop, y.shape[1]), sorted=False)
            values.append(best.values)
            ids.append(best.indices + begin)
        final = torch.cat(values, 1).topk(shape.stop).indices
        return torch.cat(ids, 1).gather(1, final)[:, shape.start :]

    return Call(run, take_rows)


# --- numpy, Faiss, usearch, sentence-transformers ---


def numpy_argpartition(shape: Shape, inputs: Tensors) -> Call:
    """Scores by torch.mm, faster than numpy's product; both boundaries in one argpartition, rows in threads."""
    query, catalog = inputs["query"], inputs["catalog"]
    items, size = shape.items, shape.stop - shape.start
    pivots = sorted({items - shape.stop, items - shape.start - 1})
    pool = ThreadPoolExecutor(shape.threads)

    scores = room(shape.sessions, items)
    step = -(-shape.sessions // (4 * shape.threads))

    def run(i: int) -> list[np.ndarray]:
        y = torch.mm(query[i % BATCHES], catalog.T, out=scores).numpy()

        def part(begin: int) -> np.ndarray:
            last, own = items - shape.start, y[begin : begin + step]
            ids = np.argpartition(own, pivots, axis=1)[:, last - size : last]
            if shape.start:
                return ids
            order = np.argsort(-np.take_along_axis(own, ids, 1), axis=1)
            return np.take_along_axis(ids, order, 1)

        return list(pool.map(part, range(0, shape.sessions, step)))

    return Call(run, lambda parts, rows: {"members": torch.from_numpy(np.concatenate(parts))[rows]})


def faiss_flat(shape: Shape, inputs: Tensors) -> Call:
    import faiss

    faiss.omp_set_num_threads(shape.threads)
    index = faiss.IndexFlatIP(shape.width)
    index.add(inputs["catalog"].numpy())
    query = inputs["query"].numpy()

    def run(i: int) -> np.ndarray:
        ids: np.ndarray = index.search(query[i % BATCHES], shape.stop)[1]
        return ids[:, shape.start :]

    return Call(run, take_numpy_rows)


def usearch_exact(shape: Shape, inputs: Tensors) -> Call:
    from usearch.compiled import MetricKind
    from usearch.index import search

    query, catalog = inputs["query"].numpy(), inputs["catalog"].numpy()

    def run(i: int) -> np.ndarray:
        found = search(catalog, query[i % BATCHES], shape.stop, MetricKind.IP, exact=True, threads=shape.threads)
        ids: np.ndarray = found.keys[:, shape.start :].astype(np.int64)
        return ids

    return Call(run, take_numpy_rows)


def semantic_search(shape: Shape, inputs: Tensors) -> Call:
    """sentence-transformers' search, with queries and items in one chunk each, its fastest setting here."""
    from sentence_transformers.util import dot_score
    from sentence_transformers.util import semantic_search as search

    query, catalog = inputs["query"], inputs["catalog"]

    def run(i: int) -> list[list[dict[str, Any]]]:
        return search(query[i % BATCHES], catalog, shape.sessions, shape.items, shape.stop, dot_score)

    def read(found: list[list[dict[str, Any]]], rows: Tensor) -> Tensors:
        ids = [[hit["corpus_id"] for hit in found[row]] for row in rows.tolist()]
        return {"members": torch.tensor(ids)[:, shape.start :]}

    return Call(run, read)


MINED = 16  # negatives of each query that mine_hard_negatives draws from the slice


class _LookUp:
    """Stands for a sentence-transformers model whose embeddings are there already, so that mining alone is timed."""

    device = torch.device("cpu")

    def __init__(self, vectors: dict[str, Tensor]):
        self.vectors = vectors  # of "query" and of "item" texts, which end in their numbers

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
        return self._look_up("query", texts)

    def encode_document(self, texts: list[str], **_: Any) -> np.ndarray:
        return self._look_up("item", texts)

    def similarity(self, a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> Tensor:
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)

    def _look_up(self, kind: str, texts: list[str]) -> np.ndarray:
        vectors: np.ndarray = self.vectors[kind][[int(text.split()[1]) for text in texts]].numpy()
        return vectors


def mine_hard_negatives(shape: Shape, inputs: Tensors) -> Call:
    """sentence-transformers' mining over the same ranks, of which it draws 16 negatives for each query.

    A query's positive, which mining leaves out of its ranks, is the item that scores lowest, so that ranks are ours.
    """
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives as mine

    catalog = inputs["catalog"]
    corpus = [f"item {j}" for j in range(shape.items)]
    batches = []
    for query in inputs["query"]:
        worst = (query @ catalog.T).argmin(1).tolist()
        pairs = {"anchor": [f"query {b}" for b in range(shape.sessions)], "positive": [corpus[j] for j in worst]}
        batches.append((Dataset.from_dict(pairs), _LookUp({"query": query, "item": catalog})))

    def run(i: int) -> Any:
        pairs, model = batches[i % BATCHES]
        return mine(
            pairs,
            model,
            corpus=corpus,
            range_min=shape.start,
            range_max=shape.stop,
            num_negatives=MINED,
            sampling_strategy="random",
            output_format="n-tuple",
            verbose=False,
        )

    def read(found: Any, rows: Tensor) -> Tensors:
        columns = [found[f"negative_{j + 1}"] for j in range(MINED)]
        ids = [[int(column[row].split()[1]) for column in columns] for row in rows.tolist()]
        return {"members": torch.tensor(ids)}

    return Call(run, read)


# --- what they give, as what is compared ---


def take_rows(ids: Tensor, rows: Tensor) -> Tensors:
    return {"members": ids[rows]}


def take_numpy_rows(ids: np.ndarray, rows: Tensor) -> Tensors:
    return {"members": torch.from_numpy(ids[rows.numpy()])}


def members_of(mask: Tensor) -> Tensors:
    """(8, V) bool -> the ids; ValueError where rows differ in their number, which no slice does."""
    counts = mask.sum(1)
    if len(counts.unique()) > 1:
        raise ValueError(f"wrong: slices of {counts.min()} to {counts.max()} items")
    return {"members": mask.nonzero()[:, 1].view(len(mask), -1)}
