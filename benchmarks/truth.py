"""Inputs of every op, and what is true of them: float64, written out from the definitions, on a subsample.

Nothing here uses the package's ops, so that ours are judged like the others (`verdicts.py`). Truths hold `rows`, the
sessions that are compared (of the first batch), and `product`, their scores of the first items, by which the plain
product is judged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from alterrec_fast.benchmarks.worker import BATCHES, Shape, Tensors
from torch import Tensor

ROWS = 8  # sessions compared
COLUMNS = 64  # items whose gradient is compared
PRODUCT_ITEMS = 1000
BLOCK = 64 << 20  # float64 numbers held at a time, more or less


# --- inputs ---


def make_ranking(shape: Shape) -> Tensors:
    """query (4, B, d) and catalog (V, d), standard normal."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(BATCHES, shape.sessions, shape.width, generator=generator)
    catalog = torch.randn(shape.items, shape.width, generator=generator)
    return {"query": query.to(_dtype(shape)), "catalog": catalog.to(_dtype(shape))}


def make_loss(shape: Shape) -> Tensors:
    """Logits of order one, target (4, B), and where the shape asks for negatives, `negatives` (B, n) or (n,) int64.

    With ranks given, the negatives are distinct and ascending, as a slice's are; else drawn with repeats.
    """
    inputs = make_ranking(shape)
    generator = torch.Generator().manual_seed(2)
    inputs["catalog"] = inputs["catalog"] / shape.width**0.5
    inputs["target"] = torch.randint(shape.items, (BATCHES, shape.sessions), generator=generator)
    if shape.stop:
        size = shape.stop - shape.start
        run = shape.items // size  # one item from each of `size` runs of the catalog
        drawn = torch.randint(run, (shape.sessions, size), generator=generator)
        inputs["negatives"] = drawn + torch.arange(size) * shape.items // size
    elif shape.negatives:
        size = (shape.negatives,) if shape.shared else (shape.sessions, shape.negatives)
        inputs["negatives"] = torch.randint(shape.items, size, generator=generator)
    return inputs


def make_step(shape: Shape) -> Tensors:
    """As make_loss, with a teacher that ranks: teacher_query (4, B, d) and teacher_catalog (V, d)."""
    generator = torch.Generator().manual_seed(3)
    inputs = make_ranking(shape)
    inputs["catalog"] = inputs["catalog"] / shape.width**0.5
    inputs["target"] = torch.randint(shape.items, (BATCHES, shape.sessions), generator=generator)
    for name in ("query", "catalog"):
        inputs[f"teacher_{name}"] = torch.randn(inputs[name].shape, generator=generator).to(_dtype(shape))
    return inputs


def _dtype(shape: Shape) -> torch.dtype:
    return torch.bfloat16 if shape.precision == "bf16" else torch.float32


# --- truths ---


def ranking_truth(shape: Shape, inputs: Tensors) -> Tensors:
    """scores (8, V) float64 of the sessions compared; those at the slice's first and last rank; its size."""
    rows = _rows(shape)
    query, catalog = inputs["query"][0][rows].double(), inputs["catalog"]
    step = max(1, BLOCK // shape.width)
    scores = torch.cat([query @ part.double().T for part in catalog.split(step)], 1)
    ranked = scores.topk(shape.stop).values
    return {
        "rows": rows,
        "scores": scores,
        "first": ranked[:, shape.start],
        "last": ranked[:, shape.stop - 1],
        "size": torch.tensor(shape.stop - shape.start),
        "product": scores[:, :PRODUCT_ITEMS].clone(),
    }


def loss_truth(shape: Shape, inputs: Tensors) -> Tensors:
    """loss, and its gradients: of the queries of `rows`, and of the items `columns` of the catalog."""
    if "negatives" not in inputs:
        return _dense(shape, inputs, None)
    if shape.stop:
        return _dense(shape, inputs, lambda begin, end: inputs["negatives"][begin:end])
    return _gathered(shape, inputs)


def step_truth(shape: Shape, inputs: Tensors) -> Tensors:
    """As loss_truth, the negatives being ranks [start, stop) of the teacher; `whole_*` are of ranks [0, stop)."""
    teacher = inputs["teacher_catalog"].double()

    def ranks(start: int, begin: int, end: int) -> Tensor:
        scores: Tensor = inputs["teacher_query"][0][begin:end].double() @ teacher.T
        return scores.topk(shape.stop).indices[:, start:]

    found = _dense(shape, inputs, partial(ranks, shape.start))
    whole = _dense(shape, inputs, partial(ranks, 0))
    return found | {f"whole_{name}": whole[name] for name in ("loss", "grad_query", "grad_catalog")}


def _rows(shape: Shape) -> Tensor:
    return torch.arange(0, shape.sessions, max(1, shape.sessions // ROWS))[:ROWS]


def _dense(shape: Shape, inputs: Tensors, negatives: Callable[[int, int], Tensor] | None) -> Tensors:
    """Softmax over the target and the negatives of sessions [begin, end), or over all items; mean loss."""
    query, catalog, target = inputs["query"][0].double(), inputs["catalog"].double(), inputs["target"][0]
    columns = torch.cat([target[: COLUMNS // 2], torch.arange(COLUMNS // 2) * shape.items // COLUMNS]).unique()
    rows = _rows(shape)
    losses, pulls, grad_query = [], [], []
    block = max(1, BLOCK // shape.items)
    for begin in range(0, shape.sessions, block):
        end = min(begin + block, shape.sessions)
        logits = query[begin:end] @ catalog.T
        own = target[begin:end, None]
        if negatives is not None:
            left_out = torch.ones(logits.shape, dtype=torch.bool)
            left_out.scatter_(1, negatives(begin, end), False).scatter_(1, own, False)
            logits.masked_fill_(left_out, -torch.inf)
        log_all = logits.logsumexp(1, keepdim=True)
        losses.append(log_all - logits.gather(1, own))
        pull = (logits - log_all).exp_()
        pull.scatter_add_(1, own, torch.full(own.shape, -1.0, dtype=torch.float64))
        pulls.append(pull[:, columns])
        grad_query.append(pull[rows[(rows >= begin) & (rows < end)] - begin] @ catalog)
    return {
        "rows": rows,
        "columns": columns,
        "loss": torch.cat(losses).mean(),
        "grad_query": torch.cat(grad_query) / shape.sessions,
        "grad_catalog": torch.cat(pulls).T @ query / shape.sessions,
        "product": query[rows] @ catalog[:PRODUCT_ITEMS].T,
    }


def _gathered(shape: Shape, inputs: Tensors) -> Tensors:
    """Softmax over the target and its negatives, of which a repeated one counts each time and the target none."""
    query, catalog, target = inputs["query"][0].double(), inputs["catalog"], inputs["target"][0]
    negatives = inputs["negatives"].expand(shape.sessions, -1)
    columns = torch.cat([target[: COLUMNS // 2], negatives[0, : COLUMNS // 2]]).unique()
    rows = _rows(shape)
    losses, grad_query = [], []
    grad_catalog = torch.zeros(len(columns), shape.width, dtype=torch.float64)
    block = max(1, BLOCK // ((negatives.shape[1] + 1) * shape.width))
    for begin in range(0, shape.sessions, block):
        end = min(begin + block, shape.sessions)
        own = target[begin:end, None]
        ids = torch.cat([own, negatives[begin:end]], 1)
        vectors = catalog[ids].double()  # (b, n + 1, d)
        logits = (vectors @ query[begin:end, :, None]).squeeze(2)
        logits[:, 1:].masked_fill_(ids[:, 1:] == own, -torch.inf)
        losses.append(logits.logsumexp(1) - logits[:, 0])
        pull = logits.softmax(1)
        pull[:, 0] -= 1.0
        hits = torch.stack([(pull * (ids == column)).sum(1) for column in columns])  # (columns, b)
        grad_catalog += hits @ query[begin:end]
        inside = rows[(rows >= begin) & (rows < end)] - begin
        grad_query.append((pull[inside, None] @ vectors[inside]).squeeze(1))
    return {
        "rows": rows,
        "columns": columns,
        "loss": torch.cat(losses).mean(),
        "grad_query": torch.cat(grad_query) / shape.sessions,
        "grad_catalog": grad_catalog / shape.sessions,
        "product": query[rows] @ catalog[:PRODUCT_ITEMS].double().T,
    }
