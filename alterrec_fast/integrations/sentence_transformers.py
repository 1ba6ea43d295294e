"""Hard-negative mining with the arguments and results of sentence-transformers 6.2.0, in bounded memory.

    from alterrec_fast.integrations.sentence_transformers import mine_hard_negatives    # instead of its own

Notation: M pairs of the dataset, each once, ordered by query; Q queries and V documents, each text once; K candidates
of a query; N negatives.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alterrec_fast.integrations import need
from alterrec_fast.ops import top_k

need("datasets", 'pip install "sentence-transformers==6.2.0" datasets')

import pyarrow as pa  # noqa: E402
from datasets import Dataset  # noqa: E402

FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")
SIMILARITIES = ("cosine", "dot")
CANDIDATE_BYTES = 256 << 20  # what the candidates of one block of queries may take
BYTES_EACH = 48  # of one candidate: score, id, their sorted copies, masks
TEXTS_AT_ONCE = 1 << 16  # of a column under construction


def mine_hard_negatives(
    dataset: Dataset,
    model: Any = None,
    anchor_column_name: str | None = None,
    positive_column_name: str | None = None,
    corpus: list[str] | None = None,
    cross_encoder: Any = None,
    range_min: int = 0,
    range_max: int | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    num_negatives: int = 3,
    sampling_strategy: str = "top",
    query_prompt_name: str | None = None,
    query_prompt: str | None = None,
    corpus_prompt_name: str | None = None,
    corpus_prompt: str | None = None,
    include_positives: bool = False,
    output_format: str = "triplet",
    output_scores: bool = False,
    batch_size: int = 32,
    faiss_batch_size: int = 16384,
    use_faiss: bool = False,
    use_multi_process: list[str] | bool = False,
    verbose: bool = True,
    cache_folder: str | None = None,
    as_triplets: bool | None = None,
    margin: float | None = None,
    *,
    embeddings: tuple[Any, Any] | None = None,
    similarity: str | None = None,
) -> Dataset:
    """Hard negatives for a dataset of (anchor, positive) pairs: a drop-in for ``mine_hard_negatives``.

    Every argument up to `margin` means what it does in sentence-transformers 6.2.0, and the negatives are the same, in
    the same order, but for candidates of equal score, whose order stock leaves open; with ``random.seed`` so are those
    of ``sampling_strategy="random"``. The search is exact, and of the scores only the candidates of a block of queries
    exist at a time, `CANDIDATE_BYTES`, whatever `range_max` and the number of queries.

    Args:
        dataset: a datasets.Dataset with a column of anchors and one of positives.
        model: a SentenceTransformer, or None where `embeddings` are given.
        use_faiss: has no effect: the search here is the package's own.
        faiss_batch_size: the most queries that are searched at once.
        verbose: whether to print a summary of what was mined.
        embeddings: (anchors, documents), (B, d) and (C, d) arrays or tensors of any float dtype: a row for each row of
            the dataset, and a row for each text of `corpus` followed by each positive of the dataset. Without `corpus`
            the documents are the positives; with one that holds every positive, its own rows are enough.
        similarity: "cosine" or "dot" (which takes `embeddings` as they are); None: the model's, cosine without a model.

    Returns:
        A datasets.Dataset in the `output_format`, as stock returns it.

    Raises:
        ValueError: for an argument out of its range, another similarity, embeddings of a wrong shape.
    """
    if as_triplets is not None:
        warnings.warn("as_triplets is deprecated: use output_format", FutureWarning, stacklevel=2)
        output_format = "triplet" if as_triplets else "n-tuple"
    if margin is not None:
        warnings.warn("margin is deprecated: use absolute_margin", FutureWarning, stacklevel=2)
        absolute_margin = margin
    if output_format == "n-tuple-scores":
        warnings.warn('"n-tuple-scores" is deprecated: use output_scores', FutureWarning, stacklevel=2)
        output_format, output_scores = "n-tuple", True
    if include_positives:
        unlike = (range_min, range_max, max_score, min_score, absolute_margin, relative_margin, sampling_strategy)
        if unlike != (0, None, None, None, None, None, "top"):
            warnings.warn("ranges, limits and random choice may drop the positives again", stacklevel=2)
        if output_format != "n-tuple":
            warnings.warn("include_positives sets output_format to 'n-tuple', which keeps the order", stacklevel=2)
        output_format = "n-tuple"
    if output_format not in FORMATS:
        raise ValueError(f"output_format must be one of {', '.join(FORMATS)}, got {output_format!r}")
    if sampling_strategy not in ("top", "random"):
        raise ValueError(f"sampling_strategy must be 'top' or 'random', got {sampling_strategy!r}")
    if len(dataset) == 0:
        raise ValueError("dataset must have at least one row, got none")
    if faiss_batch_size <= 0:
        raise ValueError(f"faiss_batch_size must be at least 1, got {faiss_batch_size}")
    if num_negatives < 1:
        raise ValueError(f"num_negatives must be at least 1, got {num_negatives}")
    if model is None and embeddings is None:
        raise ValueError("expected a model, or embeddings=(anchors, documents), got neither")

    anchor, positive = _columns(dataset, anchor_column_name, positive_column_name)
    pairs = _Pairs.of(list(dataset[anchor]), list(dataset[positive]), corpus)
    limits = _Limits(absolute_margin, relative_margin, max_score, min_score)
    if range_max is None:
        some_drop_out = limits.margins or max_score is not None or (cross_encoder is not None and min_score is not None)
        range_max = range_min + num_negatives * (10 if some_drop_out else 1) + pairs.most_positives
        if verbose:
            print(f"range_max is {range_max}, from range_min, num_negatives and the number of positives.")
    if range_min < 0 or range_min >= range_max:
        raise ValueError(f"expected 0 <= range_min < range_max, got range_min={range_min} and range_max={range_max}")
    if num_negatives > range_max - range_min:
        raise ValueError(
            f"num_negatives must be at most range_max - range_min = {range_max - range_min}, got {num_negatives}"
        )

    wanted = similarity or getattr(model, "similarity_fn_name", None) or "cosine"
    if wanted not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {wanted!r}")
    if embeddings is None:
        with _pool(model, use_multi_process) as pool:
            encoder = _Encoder(model, batch_size, pool, cache_folder)
            query = encoder("query", model.encode_query, pairs.queries, query_prompt_name, query_prompt)
            document = encoder("corpus", model.encode_document, pairs.documents, corpus_prompt_name, corpus_prompt)
    else:
        query, document = pairs.pick(*embeddings, has_corpus=corpus is not None)
    vectors = _Vectors.of(query, document, wanted, getattr(model, "device", None))

    rescores = cross_encoder is not None and limits.any
    with _pool(cross_encoder, use_multi_process if rescores else False) as pool:
        mined = _mine(
            pairs,
            vectors,
            limits,
            _Rescorer(cross_encoder, batch_size, pool, pairs) if rescores else None,
            range_min,
            range_max,
            num_negatives,
            sampling_strategy,
            include_positives,
            faiss_batch_size,
        )
    if verbose:
        print(_summary(mined, pairs, num_negatives))
    return Dataset.from_dict(_table(mined, pairs, anchor, positive, output_format, output_scores))


def _columns(dataset: Dataset, anchor: str | None, positive: str | None) -> tuple[str, str]:
    """The names of both columns: those asked for where they exist, else the first and the second."""
    names = dataset.column_names
    if not anchor or anchor not in names:
        anchor = names[0]
    if not positive or positive not in names:
        if len(names) < 2:
            raise ValueError(f"dataset must have a column of anchors and one of positives, got {names}")
        positive = names[1]
    return anchor, positive


@dataclass(frozen=True)
class _Pairs:
    """The texts of a dataset, each once, and which belong together."""

    queries: list[str]
    documents: list[str]
    query_rows: Tensor  # (Q,) the dataset's row where each query first stands
    document_rows: Tensor  # (V,) the place of each document among corpus, then positives
    query_of: Tensor  # (M,) int64, rising
    positive_of: Tensor  # (M,) int64
    offsets: Tensor  # (Q + 1,) where the pairs of each query stand
    most_positives: int  # of one query, with repeats
    num_rows: int  # of the dataset
    num_texts: int  # corpus and positives, with repeats

    @classmethod
    def of(cls, anchors: list[str], positives: list[str], corpus: list[str] | None) -> _Pairs:
        texts = positives if corpus is None else list(corpus) + positives
        first_query, first_document = _first_places(anchors), _first_places(texts)
        query_at = {text: i for i, text in enumerate(first_query)}
        document_at = {text: i for i, text in enumerate(first_document)}
        linked = dict.fromkeys(
            (query_at[a], document_at[p]) for a, p in zip(anchors, positives, strict=True)
        )  # in the order of the dataset, each pair once
        pairs = torch.tensor(sorted(linked, key=lambda pair: pair[0]))  # sorting is stable
        counts = torch.bincount(pairs[:, 0], minlength=len(query_at))
        return cls(
            queries=list(first_query),
            documents=list(first_document),
            query_rows=torch.tensor(list(first_query.values())),
            document_rows=torch.tensor(list(first_document.values())),
            query_of=pairs[:, 0].contiguous(),
            positive_of=pairs[:, 1].contiguous(),
            offsets=F.pad(counts.cumsum(0), (1, 0)),
            most_positives=max(Counter(anchors).values()),
            num_rows=len(anchors),
            num_texts=len(texts),
        )

    def pick(self, anchors: Any, documents: Any, has_corpus: bool) -> tuple[Tensor, Tensor]:
        """Of embeddings for all rows and texts those of each query (Q, d) and of each document (V, d)."""
        anchors, documents = torch.as_tensor(anchors), torch.as_tensor(documents)
        for name, given in (("anchors", anchors), ("documents", documents)):
            if given.ndim != 2 or not given.is_floating_point():
                raise ValueError(f"embeddings: {name} must be 2-D floats, got {tuple(given.shape)} {given.dtype}")
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


def _first_places(texts: list[str]) -> dict[str, int]:
    """Each text once, in order, with the place where it first stands."""
    places: dict[str, int] = {}
    for place, text in enumerate(texts):
        places.setdefault(text, place)
    return places


def _select(rows: Tensor, wanted: Tensor) -> Tensor:
    """rows[wanted], without a copy where that is all of them in order."""
    if wanted.numel() == rows.shape[0]:
        return rows  # first places rise, so that as many as there are rows are all rows
    return rows[wanted.to(rows.device)]


@contextmanager
def _pool(model: Any, use: list[str] | bool) -> Iterator[Any]:
    """The model's worker processes, or None where none are wanted."""
    if not use:
        yield None
        return
    pool = model.start_multi_process_pool(target_devices=None if isinstance(use, bool) else use)
    try:
        yield pool
    finally:
        model.stop_multi_process_pool(pool)


@dataclass(frozen=True)
class _Encoder:
    """Embeds texts by a SentenceTransformer, through the cache files that stock writes and reads."""

    model: Any
    batch_size: int
    pool: Any
    cache_folder: str | None

    def __call__(
        self, kind: str, encode: Callable[..., Any], texts: list[str], prompt_name: str | None, prompt: str | None
    ) -> Tensor:
        """texts -> (len(texts), d) float32; `kind` names the cache file."""
        file = None
        if self.cache_folder:
            name = self.model.model_card_data.base_model or ""
            content = repr((name, prompt, prompt_name, texts)).encode()
            folder = Path(self.cache_folder)
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{kind}_embeddings_{hashlib.sha256(content, usedforsecurity=False).hexdigest()}.npy"
            if file.exists():
                return torch.as_tensor(np.load(file))
        made = encode(
            texts,
            pool=self.pool,
            batch_size=self.batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=True,
            prompt_name=prompt_name,
            prompt=prompt,
        )
        if file is not None:
            np.save(file, made)
        return torch.as_tensor(made)


@dataclass(frozen=True)
class _Rescorer:
    """Scores by a CrossEncoder in place of those of the vectors."""

    model: Any
    batch_size: int
    pool: Any
    pairs: _Pairs

    def __call__(self, queries: Sequence[int], documents: Sequence[int]) -> Tensor:
        """As many documents as queries -> (n,) float32."""
        texts = [(self.pairs.queries[q], self.pairs.documents[d]) for q, d in zip(queries, documents, strict=True)]
        scores: Tensor = self.model.predict(texts, batch_size=self.batch_size, convert_to_tensor=True, pool=self.pool)
        return scores.float()


@dataclass(frozen=True)
class _Vectors:
    """Vectors whose dot product is the similarity: query (Q, d), document (V, d), float32."""

    query: Tensor
    document: Tensor

    @classmethod
    def of(cls, query: Tensor, document: Tensor, similarity: str, device: Any) -> _Vectors:
        query, document = (x.to(device or x.device, torch.float32) for x in (query, document))
        if similarity == "cosine":
            query, document = F.normalize(query, dim=1), F.normalize(document, dim=1)
        return cls(query.contiguous(), document.contiguous())

    def of_pairs(self, pairs: _Pairs) -> Tensor:
        """(M,) the similarity of each query and its positive."""
        device = self.document.device
        parts = [
            (self.query[q.to(device)] * self.document[p.to(device)]).sum(1)
            for q, p in zip(pairs.query_of.split(TEXTS_AT_ONCE), pairs.positive_of.split(TEXTS_AT_ONCE), strict=True)
        ]
        return torch.cat(parts)


@dataclass(frozen=True)
class _Limits:
    """Which candidates drop out by their score."""

    absolute_margin: float | None
    relative_margin: float | None
    max_score: float | None
    min_score: float | None

    @property
    def margins(self) -> bool:
        return self.absolute_margin is not None or self.relative_margin is not None

    @property
    def any(self) -> bool:
        return self.margins or self.max_score is not None or self.min_score is not None

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
class _Mined:
    """What was found, on the CPU."""

    ids: Tensor  # (Q, N) int64
    scores: Tensor  # (Q, N) float32, best first; -inf where there is no negative
    positive: Tensor  # (M,) float32, the score of each pair


def _mine(
    pairs: _Pairs,
    vectors: _Vectors,
    limits: _Limits,
    rescore: _Rescorer | None,
    range_min: int,
    range_max: int,
    num_negatives: int,
    strategy: str,
    include_positives: bool,
    most_queries: int,
) -> _Mined:
    """Ranks [range_min, range_max) of the candidates that do not drop out, and of those the first ones or random ones.

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
    ids = torch.empty(len(pairs.queries), num_negatives, dtype=torch.int64)
    scores = torch.empty(len(pairs.queries), num_negatives)
    enough = range_min + num_negatives
    deepest = min(range_max + pairs.most_positives, len(pairs.documents))
    first_are_enough = strategy == "top" and rescore is None
    depth = min(enough + pairs.most_positives, deepest) if first_are_enough else deepest
    waiting = torch.arange(len(pairs.queries))
    while waiting.numel():
        at_once = max(1, min(most_queries, CANDIDATE_BYTES // (BYTES_EACH * max(depth, enough))))
        short_of = []
        for rows in waiting.split(at_once):
            there = rows.to(device)
            found, items = top_k(vectors.query[there], vectors.document, depth, precision="fp32")
            last = found[:, -1].clone()
            if rescore is not None:
                lines = zip(rows.tolist(), items.tolist(), strict=True)
                found = torch.stack([rescore([row] * depth, line) for row, line in lines]).to(device)
            if not include_positives:
                found[_is_positive(pairs, there, items)] = -torch.inf
            limits.apply(found, lowest[there])
            found, order = found.sort(dim=1, descending=True, stable=True)
            items = items.gather(1, order)
            missing = max(0, enough - depth)  # columns, where the catalog is smaller than what is asked for
            found, items = F.pad(found, (0, missing), value=-torch.inf), F.pad(items, (0, missing))
            place = _places(found, range_min, range_max, num_negatives, strategy)
            ids[rows], scores[rows] = items.gather(1, place).cpu(), found.gather(1, place).cpu()
            if depth < deepest:
                short = found[:, enough - 1] == -torch.inf
                if limits.min_score is not None:
                    short &= last >= limits.min_score  # below it nothing further can stay
                short_of.append(rows[short.cpu()])
        waiting = torch.cat(short_of) if short_of else waiting[:0]
        depth = min(4 * depth, deepest)
    return _Mined(ids, scores, positive.cpu())


def _is_positive(pairs: _Pairs, rows: Tensor, items: Tensor) -> Tensor:
    """items (b, K) of the queries `rows` (b,) -> (b, K) bool."""
    stride = len(pairs.documents)
    own = (pairs.query_of * stride + pairs.positive_of).to(items.device)
    return torch.isin(rows.unsqueeze(1) * stride + items, own)


def _places(scores: Tensor, range_min: int, range_max: int, num_negatives: int, strategy: str) -> Tensor:
    """(b, N) columns of scores (b, K), which are sorted: of the ranks [range_min, range_max) the first, or random ones
    among those that have a score, in order."""
    if strategy == "top":
        return torch.arange(range_min, range_min + num_negatives, device=scores.device).expand(scores.shape[0], -1)
    options = (scores[:, range_min:range_max] > -torch.inf).sum(1).clamp(min=num_negatives)
    drawn = [random.sample(range(number), k=num_negatives) for number in options.tolist()]
    return torch.tensor(drawn).to(scores.device).sort(1).values + range_min


def _table(
    mined: _Mined, pairs: _Pairs, anchor: str, positive: str, output_format: str, output_scores: bool
) -> dict[str, Any]:
    """The columns of the result as Arrow arrays."""
    ids, scores = mined.ids[pairs.query_of], mined.scores[pairs.query_of]  # (M, N)
    there = scores > -torch.inf
    if output_format == "triplet":
        m, n = there.nonzero(as_tuple=True)
        table = {
            anchor: _texts(pairs.queries, pairs.query_of[m]),
            positive: _texts(pairs.documents, pairs.positive_of[m]),
            "negative": _texts(pairs.documents, ids[m, n]),
        }
        if output_scores:
            both = torch.stack([mined.positive[m], scores[m, n]], 1).double()
            table["scores"] = _number_lists(both.flatten(), torch.full((m.numel(),), 2))
        return table
    if output_format == "n-tuple":
        m = there.all(1).nonzero().squeeze(1)
        table = {
            anchor: _texts(pairs.queries, pairs.query_of[m]),
            positive: _texts(pairs.documents, pairs.positive_of[m]),
            **{f"negative_{n + 1}": _texts(pairs.documents, ids[m, n]) for n in range(ids.shape[1])},
        }
        if output_scores:
            every = torch.cat([mined.positive[m].unsqueeze(1), scores[m]], 1).double()
            table["scores"] = _number_lists(every.flatten(), torch.full((m.numel(),), every.shape[1]))
        return table
    if output_format == "labeled-pair":  # of each query first its positives, then its negatives
        q, n = (mined.scores > -torch.inf).nonzero(as_tuple=True)
        order = torch.cat([pairs.query_of, q]).argsort(stable=True)
        table = {
            anchor: _texts(pairs.queries, torch.cat([pairs.query_of, q])[order]),
            positive: _texts(pairs.documents, torch.cat([pairs.positive_of, mined.ids[q, n]])[order]),
        }
        if output_scores:
            table["score"] = pa.array(torch.cat([mined.positive, mined.scores[q, n]])[order].double().numpy())
        else:
            table["label"] = pa.array((order < pairs.query_of.numel()).long().numpy())
        return table
    m = there.any(1).nonzero().squeeze(1)
    chosen = F.pad(there[m], (1, 0), value=True)  # (rows, 1 + N), the positive first
    per_row = chosen.sum(1)
    every = torch.cat([pairs.positive_of[m].unsqueeze(1), ids[m]], 1)
    table = {
        anchor: _texts(pairs.queries, pairs.query_of[m]),
        positive: _text_lists(pairs.documents, every[chosen], per_row),
    }
    if output_scores:
        values = torch.cat([mined.positive[m].unsqueeze(1), scores[m]], 1)
        table["scores"] = _number_lists(values[chosen].double(), per_row)
    else:
        first = torch.arange(chosen.shape[1]).expand_as(chosen)[chosen] == 0
        table["labels"] = _number_lists(first.long(), per_row)
    return table


def _texts(texts: list[str], wanted: Tensor) -> pa.ChunkedArray:
    """texts[i] for every i of wanted (n,), in chunks, since one Arrow array of strings holds 2 GiB at most."""
    return pa.chunked_array([pa.array([texts[i] for i in part.tolist()]) for part in wanted.split(TEXTS_AT_ONCE)])


def _text_lists(texts: list[str], wanted: Tensor, per_row: Tensor) -> pa.ChunkedArray:
    """texts[i] for every i of wanted (n,), in lists of per_row[0], per_row[1], ... of them."""
    rows_at_once = max(1, TEXTS_AT_ONCE // max(1, int(per_row.max()) if per_row.numel() else 1))
    chunks, begin = [], 0
    for counts in per_row.split(rows_at_once):
        end = begin + int(counts.sum())
        flat = pa.array([texts[i] for i in wanted[begin:end].tolist()])
        chunks.append(pa.ListArray.from_arrays(_offsets(counts), flat))
        begin = end
    return pa.chunked_array(chunks)


def _number_lists(values: Tensor, per_row: Tensor) -> pa.ListArray:
    return pa.ListArray.from_arrays(_offsets(per_row), pa.array(values.numpy()))


def _offsets(counts: Tensor) -> pa.Array:
    return pa.array(F.pad(counts.cumsum(0), (1, 0)).int().numpy())


def _summary(mined: _Mined, pairs: _Pairs, num_negatives: int) -> str:
    """What was found, in words."""
    found = mined.scores[mined.scores > -torch.inf]
    lines = [
        f"{found.numel():,} negatives for {len(pairs.queries):,} queries among {len(pairs.documents):,} documents."
    ]
    for name, scores in (("positives", mined.positive), ("negatives", found)):
        if scores.numel():
            mean, low, high = (float(x) for x in (scores.mean(), scores.min(), scores.max()))
            lines.append(f"Scores of {name}: mean {mean:.4f}, from {low:.4f} to {high:.4f}.")
    short = int((mined.scores == -torch.inf).any(1).sum())
    if short:
        lines.append(
            f"{short:,} queries have fewer than {num_negatives}: a larger range_max, a smaller range_min or weaker "
            "limits on the scores would find more."
        )
    return "\n".join(lines)
