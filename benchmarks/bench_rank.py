"""rank_slice and top_k: ranks [start, stop) of the whole catalog, beside the ways people take today.

An implementation is handed queries (BATCHES, B, d) and a catalog (V, d), and gives ids of the slice, or what they can
be read from. What depends on the catalog alone (an index, a padded copy) is made while it is prepared, untimed. A slice
of ranks is a set: implementations that need not sort do not.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alterrec_fast.ops import RankSlice, rank_slice, top_k

from .harness import inputs as data
from .harness.op import ANY_DTYPE, BASELINE, BOTH, GPU, RANKS, Implementation, Op, ours
from .harness.worker import BATCHES, Call, Case, Tensors

ITEM_BLOCK = 1 << 16  # items scored at a time by the implementation that walks the catalog in blocks


# --- plain torch ---


def score_buffer(sessions: int, items: int, like: Tensor) -> Tensor:
    """Memory (sessions, items) for scores, each row at the begin of a cache line.

    Into rows that begin anywhere torch.mm takes up to 1.4 times as long on a CPU.
    """
    stride = -(-items // 32) * 32
    return like.new_empty(sessions * stride).view(sessions, stride)[:, :items]


def padded(x: Tensor) -> Tensor:
    """Tensor cores and AMX take bfloat16 rows of a multiple of 32 numbers; in float32 nothing is gained."""
    return x if x.dtype == torch.float32 else F.pad(x, (0, -x.shape[-1] % 32))


def torch_mm(case: Case, inputs: Tensors) -> Call:
    """The baseline: one product of the case's shape, into memory that exists already.

    Of the whole catalog; where sessions sample negatives, of as many items as one has.
    """
    query, catalog = padded(inputs["query"]), padded(inputs["catalog"])[: case.negatives or case.items].T
    out, rows = score_buffer(case.sessions, catalog.shape[1], query), inputs["rows"]
    return Call(
        lambda i: torch.mm(query[i % BATCHES], catalog, out=out),
        lambda scores: {"product": scores[rows][:, : data.PRODUCT_ITEMS]},
    )


def torch_topk(case: Case, inputs: Tensors, ordered: bool = True) -> Call:
    """mm and topk; unordered, a second topk finds the first `start` ranks among the others."""
    query, catalog = padded(inputs["query"]), padded(inputs["catalog"]).T
    scores, rows = score_buffer(case.sessions, case.items, query), inputs["rows"]

    def run(i: int) -> Any:
        best = torch.mm(query[i % BATCHES], catalog, out=scores).topk(case.stop, sorted=ordered)
        if ordered:
            return best.indices[:, case.start :]
        return best.indices, best.values.topk(case.start, sorted=False).indices

    def read_unordered(result: tuple[Tensor, Tensor]) -> Tensors:
        ids, dropped = (part[rows] for part in result)
        inside = torch.ones_like(ids, dtype=torch.bool).scatter_(1, dropped, False)
        return {"members": ids[inside].view(len(ids), -1)}

    return Call(run, partial(take_rows, rows) if ordered else read_unordered)


def torch_blocks(case: Case, inputs: Tensors) -> Call:
    """mm and topk of one block of items after the other, and topk of what they leave: no B x V matrix."""
    query, blocks = padded(inputs["query"]), padded(inputs["catalog"]).split(ITEM_BLOCK)

    def run(i: int) -> Tensor:
        values, ids = [], []
        for number, block in enumerate(blocks):
            y = torch.mm(query[i % BATCHES], block.T, out=buffers[len(block)])
            best = y.topk(min(case.stop, len(block)), sorted=False)
            values.append(best.values)
            ids.append(best.indices + number * ITEM_BLOCK)
        final = torch.cat(values, 1).topk(case.stop).indices
        return torch.cat(ids, 1).gather(1, final)[:, case.start :]

    buffers = {len(block): score_buffer(case.sessions, len(block), query) for block in blocks}
    return Call(run, partial(take_rows, inputs["rows"]))


# --- ours ---


def our_slice(case: Case, inputs: Tensors, precision: str | None = None) -> Call:
    rows = inputs["rows"].tolist()

    def run(i: int) -> RankSlice:
        query = inputs["query"][i % BATCHES]
        return rank_slice(query, inputs["catalog"], start=case.start, stop=case.stop, precision=precision)

    def read(result: RankSlice) -> Tensors:
        return members_of(torch.cat([result.mask_rows(row, row + 1) for row in rows]))

    return Call(run, read)


def our_top_k(case: Case, inputs: Tensors, precision: str | None = None) -> Call:
    def run(i: int) -> Tensor:
        _, ids = top_k(inputs["query"][i % BATCHES], inputs["catalog"], k=case.stop, precision=precision)
        return ids

    return Call(run, partial(take_rows, inputs["rows"]))


# --- numpy, Faiss, usearch, sentence-transformers ---


def numpy_argpartition(case: Case, inputs: Tensors) -> Call:
    """Scores by torch.mm, faster than numpy's product; both ends in one argpartition, rows in threads."""
    query, catalog = inputs["query"], inputs["catalog"].T
    begin, end = case.items - case.stop, case.items - case.start  # of the slice, in ascending order
    pool, scores = ThreadPoolExecutor(case.threads), score_buffer(case.sessions, case.items, query)
    step = -(-case.sessions // (4 * case.threads))

    def run(i: int) -> list[np.ndarray]:
        y = torch.mm(query[i % BATCHES], catalog, out=scores).numpy()

        def partition(row: int) -> np.ndarray:
            part = y[row : row + step]
            ids = np.argpartition(part, sorted({begin, end - 1}), axis=1)[:, begin:end]
            if case.start:
                return ids
            order = np.argsort(-np.take_along_axis(part, ids, 1), axis=1)
            return np.take_along_axis(ids, order, 1)

        return list(pool.map(partition, range(0, case.sessions, step)))

    return Call(run, lambda parts: take_rows(inputs["rows"], np.concatenate(parts)))


def faiss_flat(case: Case, inputs: Tensors) -> Call:
    """Exact search by inner product, in float32; building the index is not timed."""
    import faiss

    query: Any = inputs["query"].float()
    catalog: Any = inputs["catalog"].float()
    index: Any
    if case.device == "cuda":
        import faiss.contrib.torch_utils

        index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), case.width)
    else:
        faiss.omp_set_num_threads(case.threads)
        index, query, catalog = faiss.IndexFlatIP(case.width), query.numpy(), catalog.numpy()
    index.add(catalog)
    return Call(
        lambda i: index.search(query[i % BATCHES], case.stop)[1][:, case.start :], partial(take_rows, inputs["rows"])
    )


def usearch_exact(case: Case, inputs: Tensors) -> Call:
    from usearch.compiled import MetricKind
    from usearch.index import search

    query, catalog = inputs["query"].numpy(), inputs["catalog"].numpy()

    def run(i: int) -> np.ndarray:
        matches = search(catalog, query[i % BATCHES], case.stop, MetricKind.IP, exact=True, threads=case.threads)
        ids: np.ndarray = matches.keys[:, case.start :].astype(np.int64)
        return ids

    return Call(run, partial(take_rows, inputs["rows"]))


def semantic_search(case: Case, inputs: Tensors) -> Call:
    """sentence-transformers' search, with queries and items in one chunk each, its fastest setting here."""
    from sentence_transformers.util import dot_score
    from sentence_transformers.util import semantic_search as search

    query, catalog = inputs["query"], inputs["catalog"]

    def run(i: int) -> list[list[dict[str, Any]]]:
        return search(query[i % BATCHES], catalog, case.sessions, case.items, case.stop, dot_score)

    def read(result: list[list[dict[str, Any]]]) -> Tensors:
        ids = [[hit["corpus_id"] for hit in result[row]] for row in inputs["rows"].tolist()]
        return {"members": torch.tensor(ids)[:, case.start :]}

    return Call(run, read)


# --- what is compared ---


def take_rows(rows: Tensor, ids: Tensor | np.ndarray) -> Tensors:
    return {"members": torch.as_tensor(ids)[rows]}


def members_of(mask: Tensor) -> Tensors:
    """(8, V) bool -> the ids; ValueError where rows differ in their number, which no slice does."""
    counts = mask.sum(1)
    if len(counts.unique()) > 1:
        raise ValueError(f"wrong: slices of {counts.min()} to {counts.max()} items")
    return {"members": mask.nonzero()[:, 1].view(len(mask), -1)}


# --- the tables ---


TABLE = ("",)
UNSORTED = partial(torch_topk, ordered=False)
BASE = Implementation(
    BASELINE,
    torch_mm,
    error=data.product_error,
    tolerance=RANKS,
    dtypes=ANY_DTYPE,
    figures=("", "V", "threads"),
    devices=BOTH,
)
RANK_SLICE = (
    BASE,
    *ours(our_slice, RANKS, devices=BOTH),
    Implementation("mm, topk", torch_topk, dtypes=ANY_DTYPE, devices=BOTH),
    Implementation("mm, topk unsorted", UNSORTED, dtypes=ANY_DTYPE, figures=("", "V", "threads"), devices=BOTH),
    Implementation("mm, numpy argpartition", numpy_argpartition, "numpy", figures=TABLE),
    Implementation("Faiss IndexFlatIP", faiss_flat, "faiss-cpu", modules=("faiss",)),
    Implementation("Faiss GPU", faiss_flat, "faiss-gpu", dtypes=ANY_DTYPE, devices=GPU),
    Implementation("usearch exact", usearch_exact, "usearch", figures=TABLE, modules=("usearch.index",)),
)
TOP_K = (
    BASE,
    *ours(our_top_k, RANKS, devices=BOTH),
    Implementation("mm, topk", torch_topk, dtypes=ANY_DTYPE, figures=("", "V", "threads"), devices=BOTH),
    Implementation("mm, topk in blocks", torch_blocks, dtypes=ANY_DTYPE, devices=BOTH),
    *(one for one in RANK_SLICE if one.prepare in (numpy_argpartition, faiss_flat, usearch_exact)),
    Implementation(
        "semantic_search", semantic_search, "sentence-transformers", figures=TABLE,
        modules=("sentence_transformers.util",),
    ),
)  # fmt: skip

FRENCH = Case(40_258, 300)  # the paper's Amazon-French
SHOP = Case(3_800, 128, sessions=500)  # about Online Retail
SLICED, SHOP_SLICED = replace(FRENCH, start=20, stop=20_000), replace(SHOP, start=6, stop=1_800)
BEST_20 = replace(FRENCH, stop=20)
SCALED = Case(40_258, 128, figure="threads")
QUICK_CURVE, FULL_CURVE = (10_000, 160_000), (40_000, 400_000, 1_000_000)
LARGE = (1_000_000, 10_000_000)


def curve(sizes: tuple[int, ...], **more: Any) -> tuple[Case, ...]:
    """Cases of figures over V."""
    return tuple(Case(items, 128, figure="V", **more) for items in sizes)


def slice_curve(sizes: tuple[int, ...]) -> tuple[Case, ...]:
    return tuple(case for items in sizes for case in curve((items,), start=20, stop=min(20_000, items // 2)))


def on_gpu(**more: Any) -> tuple[Case, ...]:
    """The paper's size at its own and at a padded width, and huge catalogs; bfloat16 and float32."""
    sizes = [(40_258, 300), (40_258, 320), *((items, 128) for items in LARGE)]
    cases = [Case(items, width, dtype=dtype, device="cuda", **more) for items, width in sizes for dtype in ANY_DTYPE]
    return tuple(case for case in cases if (case.items, case.dtype) != (LARGE[-1], "fp32"))


OPS = (
    Op(
        "rank_slice", "Ranks [start, stop) of the whole catalog, as a set", 1,
        data.make_ranking, data.ranking_truth, data.slice_error, RANKS, RANK_SLICE,
        quick=(SLICED, replace(SLICED, dtype="bf16"), *slice_curve(QUICK_CURVE)),
        full=(
            SHOP_SLICED, replace(SLICED, data="clustered"), replace(SLICED, data="popular"), *slice_curve(FULL_CURVE),
        ),
        gpu=on_gpu(start=20, stop=20_000),
        threads=replace(SCALED, start=20, stop=20_000),
    ),
    Op(
        "top_k", "The best items of the whole catalog, in order", 1,
        data.make_ranking, data.ranking_truth, data.ranking_error, RANKS, TOP_K,
        quick=(BEST_20, *curve((10_000, 40_000), stop=20)),
        full=(replace(SHOP, stop=20), replace(BEST_20, dtype="bf16"), *curve((160_000, 400_000, 1_000_000), stop=20)),
        gpu=on_gpu(stop=20),
        threads=replace(SCALED, stop=20),
    ),
)  # fmt: skip
