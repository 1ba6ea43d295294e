"""The search behind `mine_hard_negatives`: the best documents of each query, but for those that drop out.

Notation: M pairs of the dataset, each once, ordered by query; Q queries and V documents, each text once; K candidates
of a query; N negatives.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alterrec_fast.ops import top_k

CANDIDATE_BYTES = 256 << 20  # what the candidates of one block of queries may take
BYTES_EACH = 48  # of one candidate: score, id, their sorted copies, masks
PAIRS_AT_ONCE = 1 << 16  # whose vectors are gathered


@dataclass(frozen=True)
class Pairs:
    """The texts of a dataset, each once, and which belong together."""

    queries: list[str]
    documents: list[str]
    query_rows: Tensor  # (Q,) the dataset's row where each query first stands
    document_rows: Tensor  # (V,) the place of each document among corpus, then positives
    query_of: Tensor  # (M,) int64, rising
    positive_of: Tensor  # (M,) int64
    most_positives: int  # of one query, with repeats
    num_rows: int  # of the dataset
    num_texts: int  # corpus and positives, with repeats

    @classmethod
    def of(cls, anchors: list[str], positives: list[str], corpus: list[str] | None) -> Pairs:
        texts = positives if corpus is None else corpus + positives
        first_query, first_document = _first_places(anchors), _first_places(texts)
        query_at = {text: i for i, text in enumerate(first_query)}
        document_at = {text: i for i, text in enumerate(first_document)}
        linked = dict.fromkeys(
            (query_at[a], document_at[p]) for a, p in zip(anchors, positives, strict=True)
        )  # in the order of the dataset, each pair once
        pairs = torch.tensor(sorted(linked, key=lambda pair: pair[0]))  # sorting is stable
        return cls(
            queries=list(first_query),
            documents=list(first_document),
            query_rows=torch.tensor(list(first_query.values())),
            document_rows=torch.tensor(list(first_document.values())),
            query_of=pairs[:, 0].contiguous(),
            positive_of=pairs[:, 1].contiguous(),
            most_positives=max(Counter(anchors).values()),
            num_rows=len(anchors),
            num_texts=len(texts),
        )

    def pick(self, anchors: Any, documents: Any, has_corpus: bool) -> tuple[Tensor, Tensor]:
        """Of embeddings for all rows and texts those of each query (Q, d) and of each document (V, d)."""
        anchors, documents = _matrix("anchors", anchors), _matrix("documents", documents)
        if anchors.shape[0] != self.num_rows:
            raise ValueError(f"embeddings: expected {self.num_rows} anchors, one a row, got {anchors.shape[0]}")
        least = int(self.document_rows.max()) + 1  # corpus alone, where it holds every positive
        enough = documents.shape[0] == self.num_texts or (
            has_corpus and documents.shape[0] == self.num_texts - self.num_rows >= least
        )
        if not enough:
            raise ValueError(
                f"embeddings: expected {self.num_texts} documents, one for each text of corpus and for each positive, "
                f"got {documents.shape[0]}"
            )
        if anchors.shape[1] != documents.shape[1]:
            raise ValueError(f"embeddings: widths differ, got {anchors.shape[1]} and {documents.shape[1]}")
        return _select(anchors, self.query_rows), _select(documents, self.document_rows)


def _matrix(name: str, values: Any) -> Tensor:
    """values as a tensor (n, d) of floats."""
    try:
        matrix = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(values).__name__
        raise TypeError(f"embeddings: {name} must be an array or a tensor, got a {kind} ({error})") from error
    if matrix.ndim != 2 or not matrix.is_floating_point():
        raise ValueError(f"embeddings: {name} must be 2-D floats, got {tuple(matrix.shape)} {matrix.dtype}")
    return matrix


def _first_places(texts: list[str]) -> dict[str, int]:
    """Each text once, in order, with the place where it first stands."""
    places: dict[str, int] = {}
    for place, text in enumerate(texts):
        places.setdefault(text, place)
    return places


def _select(matrix: Tensor, rows: Tensor) -> Tensor:
    """matrix[rows], without a copy where that is all of them in order."""
    if rows.numel() == matrix.shape[0]:
        return matrix  # first places rise, so that as many as there are rows are all rows
    return matrix[rows.to(matrix.device)]


@dataclass(frozen=True)
class Rescorer:
    """Scores by a CrossEncoder in place of those of the vectors."""

    model: Any
    batch_size: int
    pool: Any
    pairs: Pairs

    def __call__(self, queries: Sequence[int], documents: Sequence[int]) -> Tensor:
        """As many documents as queries -> (n,) float32."""
        texts = [(self.pairs.queries[q], self.pairs.documents[d]) for q, d in zip(queries, documents, strict=True)]
        scores: Tensor = self.model.predict(texts, batch_size=self.batch_size, convert_to_tensor=True, pool=self.pool)
        return scores.float()


@dataclass(frozen=True)
class Vectors:
    """Vectors whose dot product is the similarity: query (Q, d), document (V, d), float32."""

    query: Tensor
    document: Tensor

    @classmethod
    def of(cls, query: Tensor, document: Tensor, similarity: str, device: Any) -> Vectors:
        query, document = (x.to(device or x.device, torch.float32) for x in (query, document))
        if similarity == "cosine":
            query, document = F.normalize(query, dim=1), F.normalize(document, dim=1)
        return cls(query.contiguous(), document.contiguous())

    def of_pairs(self, pairs: Pairs) -> Tensor:
        """(M,) the similarity of each query and its positive."""
        device = self.document.device
        blocks = zip(pairs.query_of.split(PAIRS_AT_ONCE), pairs.positive_of.split(PAIRS_AT_ONCE), strict=True)
        return torch.cat([(self.query[q.to(device)] * self.document[p.to(device)]).sum(1) for q, p in blocks])


@dataclass(frozen=True)
class Limits:
    """Which candidates drop out by their score."""

    absolute_margin: float | None
    relative_margin: float | None
    max_score: float | None
    min_score: float | None

    @property
    def any(self) -> bool:
        return any(x is not None for x in (self.absolute_margin, self.relative_margin, self.max_score, self.min_score))

    def apply(self, scores: Tensor, lowest_positive: Tensor) -> None:
        """Sets scores (b, K) of what drops out to -inf; lowest_positive (b,) is the least score of a query's own."""
        bound = lowest_positive.unsqueeze(1)
        if self.absolute_margin is not None:
            scores[scores + self.absolute_margin > bound] = -torch.inf
        if self.relative_margin is not None:
            scores[scores > bound - bound.abs() * self.relative_margin] = -torch.inf
        if self.max_score is not None:
            scores[scores > self.max_score] = -torch.inf
        if self.min_score is not None:
            scores[scores < self.min_score] = -torch.inf


@dataclass(frozen=True)
class Search:
    """Which candidates are taken: of ranks [range_min, range_max) the first, or random ones."""

    range_min: int
    range_max: int
    num_negatives: int
    strategy: str  # "top" or "random"
    include_positives: bool
    most_queries: int  # searched at once

    def places(self, scores: Tensor) -> Tensor:
        """(b, N) columns of scores (b, K), which are sorted: the first of the ranks, or random ones among those that
        have a score, in order."""
        if self.strategy == "top":
            first = torch.arange(self.range_min, self.range_min + self.num_negatives, device=scores.device)
            return first.expand(scores.shape[0], -1)
        options = (scores[:, self.range_min : self.range_max] > -torch.inf).sum(1).clamp(min=self.num_negatives)
        drawn = [random.sample(range(number), k=self.num_negatives) for number in options.tolist()]
        return torch.tensor(drawn).to(scores.device).sort(1).values + self.range_min


@dataclass(frozen=True)
class Mined:
    """The negatives and their scores, on the CPU."""

    ids: Tensor  # (Q, N) int64
    scores: Tensor  # (Q, N) float32, best first; -inf where there is no negative
    positive: Tensor  # (M,) float32, the score of each pair


def mine(pairs: Pairs, vectors: Vectors, limits: Limits, rescore: Rescorer | None, search: Search) -> Mined:
    """The negatives of each query.

    The candidates of a query are its range_max + most_positives best documents, as in stock. Of "top" the first few of
    them are mostly enough, so that few are looked for; queries that lost too many are searched again, 4 times as deep.
    """
    device = vectors.document.device
    if rescore is None:
        positive = vectors.of_pairs(pairs)
    else:
        positive = rescore(pairs.query_of.tolist(), pairs.positive_of.tolist()).to(device)
    lowest = torch.full((len(pairs.queries),), torch.inf, device=device)
    lowest.scatter_reduce_(0, pairs.query_of.to(device), positive, "amin")
    ids = torch.empty(len(pairs.queries), search.num_negatives, dtype=torch.int64)
    scores = torch.empty(len(pairs.queries), search.num_negatives)
    enough = search.range_min + search.num_negatives
    deepest = min(search.range_max + pairs.most_positives, len(pairs.documents))
    first_are_enough = search.strategy == "top" and rescore is None
    depth = min(enough + pairs.most_positives, deepest) if first_are_enough else deepest
    waiting = torch.arange(len(pairs.queries))
    while waiting.numel():
        at_once = max(1, min(search.most_queries, CANDIDATE_BYTES // (BYTES_EACH * max(depth, enough))))
        too_few = []
        for rows in waiting.split(at_once):
            candidates, items, last = _candidates(pairs, vectors, limits, rescore, search, lowest, rows, depth)
            missing = max(0, enough - depth)  # columns, where the catalog is smaller than what is asked for
            candidates, items = F.pad(candidates, (0, missing), value=-torch.inf), F.pad(items, (0, missing))
            place = search.places(candidates)
            ids[rows], scores[rows] = items.gather(1, place).cpu(), candidates.gather(1, place).cpu()
            if depth < deepest:
                short = candidates[:, enough - 1] == -torch.inf
                if limits.min_score is not None:
                    short &= last >= limits.min_score  # below it nothing further can stay
                too_few.append(rows[short.cpu()])
        waiting = torch.cat(too_few) if too_few else waiting[:0]
        depth = min(4 * depth, deepest)
    return Mined(ids, scores, positive.cpu())


def _candidates(
    pairs: Pairs,
    vectors: Vectors,
    limits: Limits,
    rescore: Rescorer | None,
    search: Search,
    lowest: Tensor,
    rows: Tensor,
    depth: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `depth` best documents of the queries `rows` (b,), sorted by score: scores (b, K), -inf for what drops out,
    documents (b, K), and the score by the vectors of the last one (b,)."""
    here = rows.to(vectors.document.device)
    scores, items = top_k(vectors.query[here], vectors.document, k=depth, precision="fp32")
    last = scores[:, -1].clone()
    if rescore is not None:
        lines = zip(rows.tolist(), items.tolist(), strict=True)
        scores = torch.stack([rescore([row] * depth, line) for row, line in lines]).to(here.device)
    if not search.include_positives:
        stride = len(pairs.documents)
        positives = (pairs.query_of * stride + pairs.positive_of).to(items.device)
        scores[torch.isin(here.unsqueeze(1) * stride + items, positives)] = -torch.inf
    limits.apply(scores, lowest[here])
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores, items.gather(1, order), last
