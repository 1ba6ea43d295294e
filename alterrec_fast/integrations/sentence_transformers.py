"""Hard-negative mining with the arguments and results of sentence-transformers 6.2.0, in bounded memory.

    from alterrec_fast.integrations.sentence_transformers import mine_hard_negatives    # instead of its own

Notation: M pairs of the dataset, each once, ordered by query; Q queries, each once; N negatives.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alterrec_fast.integrations import need
from alterrec_fast.integrations.mining import Limits, Mined, Pairs, Rescorer, Search, Vectors, mine

need("datasets", 'pip install "sentence-transformers==6.2.0" datasets')

import pyarrow as pa  # noqa: E402
from datasets import Dataset  # noqa: E402

FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")
SIMILARITIES = ("cosine", "dot")
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
    exist at a time, 256 MiB, whatever `range_max` and the number of queries.

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

    Warns of a column name that the dataset lacks (stock takes the first or second column then, and so does this), and
    of a cache file that cannot be read, which is made again.

    Raises:
        TypeError: for an argument of another kind, such as one text as `corpus`, and texts that are none.
        ValueError: for an argument out of its range, another similarity, embeddings of a wrong shape, one column as
            anchor and positive, and a column that has the name of one of the result's.
    """
    output_format, output_scores, absolute_margin = _with_deprecated(
        output_format, output_scores, absolute_margin, as_triplets, margin
    )
    limits = Limits(absolute_margin, relative_margin, max_score, min_score)
    if include_positives:
        if (range_min, range_max, limits, sampling_strategy) != (0, None, Limits(None, None, None, None), "top"):
            warnings.warn("ranges, limits and random choice may drop the positives again", stacklevel=2)
        if output_format != "n-tuple":
            warnings.warn("include_positives sets output_format to 'n-tuple', which keeps the order", stacklevel=2)
        output_format = "n-tuple"
    _check_choices(output_format, sampling_strategy, limits)
    _check_counts(range_min, range_max, num_negatives, batch_size, faiss_batch_size)
    _check_sources(dataset, model, embeddings)
    anchor, positive = _columns(dataset, anchor_column_name, positive_column_name)
    _check_names(anchor, positive, output_format, output_scores, num_negatives)
    kinds = (str,) if embeddings is None else (str, int)  # ids are texts enough for who has embeddings
    pairs = Pairs.of(
        _texts_of(f"dataset[{anchor!r}]", dataset[anchor], kinds),
        _texts_of(f"dataset[{positive!r}]", dataset[positive], kinds),
        None if corpus is None else _texts_of("corpus", corpus, kinds),
    )
    if range_max is None:
        unlimited = Limits(None, None, None, None if cross_encoder is not None else min_score)
        range_max = range_min + num_negatives * (1 if limits == unlimited else 10) + pairs.most_positives
        if verbose:
            print(f"range_max is {range_max}, from range_min, num_negatives and the number of positives.")
    if range_min < 0 or range_min >= range_max:
        raise ValueError(f"expected 0 <= range_min < range_max, got range_min={range_min} and range_max={range_max}")
    if num_negatives > range_max - range_min:
        raise ValueError(
            f"num_negatives must be at most range_max - range_min = {range_max - range_min}, got {num_negatives}"
        )

    chosen = similarity or getattr(model, "similarity_fn_name", None) or "cosine"
    if chosen not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {chosen!r}")
    if embeddings is None:
        with _pool(model, use_multi_process) as pool:
            encoder = _Encoder(model, batch_size, pool, cache_folder)
            query = encoder("query", model.encode_query, pairs.queries, query_prompt_name, query_prompt)
            document = encoder("corpus", model.encode_document, pairs.documents, corpus_prompt_name, corpus_prompt)
    else:
        query, document = pairs.pick(*embeddings, has_corpus=corpus is not None)
    vectors = Vectors.of(query, document, chosen, getattr(model, "device", None))

    search = Search(range_min, range_max, num_negatives, sampling_strategy, include_positives, faiss_batch_size)
    rescores = cross_encoder is not None and limits.any
    with _pool(cross_encoder, use_multi_process if rescores else False) as pool:
        mined = mine(
            pairs, vectors, limits, Rescorer(cross_encoder, batch_size, pool, pairs) if rescores else None, search
        )
    if verbose:
        print(_summary(mined, pairs, num_negatives))
    return Dataset.from_dict(_table(mined, pairs, anchor, positive, output_format, output_scores))


def _with_deprecated(
    output_format: str,
    output_scores: bool,
    absolute_margin: float | None,
    as_triplets: bool | None,
    margin: float | None,
) -> tuple[str, bool, float | None]:
    """output_format, output_scores and absolute_margin, with what stock's deprecated names say of them."""
    if as_triplets is not None:
        warnings.warn("as_triplets is deprecated: use output_format", FutureWarning, stacklevel=3)
        output_format = "triplet" if as_triplets else "n-tuple"
    if margin is not None:
        warnings.warn("margin is deprecated: use absolute_margin", FutureWarning, stacklevel=3)
        absolute_margin = margin
    if output_format == "n-tuple-scores":
        warnings.warn('"n-tuple-scores" is deprecated: use output_scores', FutureWarning, stacklevel=3)
        output_format, output_scores = "n-tuple", True
    return output_format, output_scores, absolute_margin


def _check_choices(output_format: str, sampling_strategy: str, limits: Limits) -> None:
    if output_format not in FORMATS:
        raise ValueError(f"output_format must be one of {', '.join(FORMATS)}, got {output_format!r}")
    if sampling_strategy not in ("top", "random"):
        raise ValueError(f"sampling_strategy must be 'top' or 'random', got {sampling_strategy!r}")
    for name, value in vars(limits).items():
        if value is not None and not isinstance(value, Real):
            raise TypeError(f"{name} must be a number or None, got {value!r}")


def _check_counts(
    range_min: int, range_max: int | None, num_negatives: int, batch_size: int, faiss_batch_size: int
) -> None:
    for name, value, least in (
        ("range_min", range_min, None),
        ("range_max", range_max, None),
        ("num_negatives", num_negatives, 1),
        ("batch_size", batch_size, 1),
        ("faiss_batch_size", faiss_batch_size, 1),
    ):
        if name == "range_max" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if least is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_sources(dataset: Any, model: Any, embeddings: Any) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset must be a datasets.Dataset, such as one split of a DatasetDict, got a {type(dataset).__name__}"
        )
    if len(dataset) == 0:
        raise ValueError("dataset must have at least one row, got none")
    if model is None and embeddings is None:
        raise ValueError("expected a model, or embeddings=(anchors, documents), got neither")
    if embeddings is None and not hasattr(model, "encode_query"):
        raise TypeError(f"model must be a SentenceTransformer, got a {type(model).__name__}")
    if embeddings is not None and not (isinstance(embeddings, tuple | list) and len(embeddings) == 2):
        raise TypeError(f"embeddings must be a pair (anchors, documents), got a {type(embeddings).__name__}")


def _columns(dataset: Dataset, anchor: str | None, positive: str | None) -> tuple[str, str]:
    """The names of both columns: those asked for where they exist, else the first and the second."""
    names = dataset.column_names
    if len(names) < 2:
        raise ValueError(f"dataset must have a column of anchors and one of positives, got {names}")
    columns = []
    for argument, name, place in (("anchor_column_name", anchor, 0), ("positive_column_name", positive, 1)):
        if name and name not in names:
            warnings.warn(f"{argument}: dataset has no column {name!r}; {names[place]!r} is taken", stacklevel=3)
        columns.append(name if name and name in names else names[place])
    if columns[0] == columns[1]:
        raise ValueError(
            f"anchor and positive must be two columns, got {columns[0]!r} for both of {names}: name both by "
            "anchor_column_name and positive_column_name"
        )
    return columns[0], columns[1]


def _check_names(anchor: str, positive: str, output_format: str, output_scores: bool, num_negatives: int) -> None:
    """Raises ValueError where a column of the result would overwrite the anchors or positives."""
    scores = {"labeled-pair": "score"}.get(output_format, "scores")
    labels = {"labeled-pair": {"label"}, "labeled-list": {"labels"}}.get(output_format, set())
    made = {scores} if output_scores else labels
    if output_format == "triplet":
        made = made | {"negative"}
    elif output_format == "n-tuple":
        made = made | {f"negative_{n + 1}" for n in range(num_negatives)}
    for name in (anchor, positive):
        if name in made:
            raise ValueError(
                f"the dataset's column {name!r} has the name of a column that output_format={output_format!r} makes: "
                f"rename it, as by dataset.rename_column({name!r}, ...)"
            )


def _texts_of(name: str, texts: Any, kinds: tuple[type, ...]) -> list[Any]:
    """texts as a list; raises TypeError for one text, a mapping, a set or no collection, and for what is no text."""
    if isinstance(texts, str | bytes | Mapping | Set) or not isinstance(texts, Iterable):
        raise TypeError(f"{name} must be a list of texts, got a {type(texts).__name__}")
    listed = list(texts)
    for place, text in enumerate(listed):
        if not isinstance(text, kinds):
            raise TypeError(f"{name} must hold texts, got {text!r:.80} at place {place}")
    return listed


@contextmanager
def _pool(model: Any, use: list[str] | bool) -> Iterator[Any]:
    """The model's worker processes, or None without them."""
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
            if (cached := _read(file, len(texts))) is not None:
                return cached
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
            _write(file, made)
        return torch.as_tensor(made)


def _read(file: Path, rows: int) -> Tensor | None:
    """The embeddings (rows, d) of a cache file; None, with a warning, where it can't be read or is cut off."""
    if not file.exists():
        return None
    try:
        stored = np.load(file, allow_pickle=False)
        if stored.ndim != 2 or stored.shape[0] != rows or stored.dtype.kind != "f":
            raise ValueError(f"expected {rows} rows of floats, got {stored.shape} {stored.dtype}")
    except (EOFError, OSError, ValueError) as error:
        warnings.warn(f"{file} is not read, but made again: {error}", stacklevel=5)
        return None
    return torch.as_tensor(stored)


def _write(file: Path, embeddings: np.ndarray) -> None:
    """All of the file or nothing: a process that is killed leaves no half of it."""
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as stream:
            np.save(stream, embeddings)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _table(
    mined: Mined, pairs: Pairs, anchor: str, positive: str, output_format: str, output_scores: bool
) -> dict[str, Any]:
    """The columns of the result as Arrow arrays."""
    ids, scores = mined.ids[pairs.query_of], mined.scores[pairs.query_of]  # (M, N)
    exists = scores > -torch.inf  # (M, N)
    if output_format == "triplet":
        m, n = exists.nonzero(as_tuple=True)
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
        m = exists.all(1).nonzero().squeeze(1)
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
    m = exists.any(1).nonzero().squeeze(1)
    chosen = F.pad(exists[m], (1, 0), value=True)  # (rows, 1 + N), the positive first
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


def _texts(texts: list[str], places: Tensor) -> pa.ChunkedArray:
    """texts[i] for every i of places (n,), in chunks, since one Arrow array of strings holds 2 GiB at most."""
    return pa.chunked_array([pa.array([texts[i] for i in block.tolist()]) for block in places.split(TEXTS_AT_ONCE)])


def _text_lists(texts: list[str], places: Tensor, per_row: Tensor) -> pa.ChunkedArray:
    """texts[i] for every i of places (n,), in lists of per_row[0], per_row[1], ... of them."""
    rows_at_once = max(1, TEXTS_AT_ONCE // max(1, int(per_row.max()) if per_row.numel() else 1))
    chunks, begin = [], 0
    for counts in per_row.split(rows_at_once):
        end = begin + int(counts.sum())
        flat = pa.array([texts[i] for i in places[begin:end].tolist()])
        chunks.append(pa.ListArray.from_arrays(_offsets(counts), flat))
        begin = end
    return pa.chunked_array(chunks)


def _number_lists(values: Tensor, per_row: Tensor) -> pa.ListArray:
    return pa.ListArray.from_arrays(_offsets(per_row), pa.array(values.numpy()))


def _offsets(counts: Tensor) -> pa.Array:
    return pa.array(F.pad(counts.cumsum(0), (1, 0)).int().numpy())


def _summary(mined: Mined, pairs: Pairs, num_negatives: int) -> str:
    """What was mined, in words."""
    negatives = mined.scores[mined.scores > -torch.inf]
    lines = [
        f"{negatives.numel():,} negatives for {len(pairs.queries):,} queries among {len(pairs.documents):,} documents."
    ]
    for name, scores in (("positives", mined.positive), ("negatives", negatives)):
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
