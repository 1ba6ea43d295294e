"""Inputs of the ops, what is true of them in float64, and how far a result is from it.

Truths are written out from the definitions, without this package's ops, so that ours are checked like the others.
Inputs name what is compared: `rows`, sessions of the first batch, and `columns`, items whose gradient is compared.
Everything lies on the case's device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .worker import BATCHES, Case, Tensors

ROWS, COLUMNS = 8, 64
PRODUCT_ITEMS = 1000  # items whose scores are compared where an implementation is a plain product
BLOCK = 64 << 20  # float64 numbers held at a time, about


# --- inputs ---


def embeddings(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """query (BATCHES, B, d) and catalog (V, d) float32; clusters and popularity follow the order of the catalog."""
    v, d = case.items, case.width
    place: Any = {"generator": generator, "device": case.device}
    query = torch.randn(BATCHES, case.sessions, d, **place)
    catalog = torch.randn(v, d, **place)
    if case.data == "clustered":
        centers = torch.randn(100, d, **place)
        catalog = 0.5 * catalog + centers[torch.arange(v, device=case.device) * 100 // v]
        query = 0.5 * query + centers[torch.randint(100, query.shape[:2], **place)]
    elif case.data == "popular":
        common = torch.randn(1, d, **place)
        popularity = -torch.arange(1, v + 1, device=case.device).log()[:, None]  # Zipf's law: a logarithm of the rank
        catalog = catalog * 0.3 + 0.1 * (popularity - popularity.mean()) * common
        query = query + 0.5 * common
    return query, catalog


def make_ranking(case: Case, seed: int = 1) -> Tensors:
    """query (BATCHES, B, d) and catalog (V, d)."""
    query, catalog = embeddings(case, torch.Generator(case.device).manual_seed(seed))
    rows = torch.arange(0, case.sessions, max(1, case.sessions // ROWS), device=case.device)[:ROWS]
    return {"query": query.to(case.torch_dtype), "catalog": catalog.to(case.torch_dtype), "rows": rows}


def make_loss(case: Case) -> Tensors:
    """As make_ranking, with logits of order one, target (BATCHES, B) and, where the case has them, negatives `neg`.

    neg is (B, n) int64, or (n,) where shared. Of a slice they are distinct and ascending, else drawn with repeats.
    """
    inputs = make_ranking(case)
    place: Any = {"generator": torch.Generator(case.device).manual_seed(2), "device": case.device}
    inputs["catalog"] = inputs["catalog"] / case.width**0.5
    inputs["target"] = torch.randint(case.items, (BATCHES, case.sessions), **place)
    half = COLUMNS // 2
    others = torch.arange(half, device=case.device) * case.items // COLUMNS
    if case.stop:
        size = case.stop - case.start  # one item from each of `size` stretches of the catalog
        drawn = torch.randint(case.items // size, (case.sessions, size), **place)
        inputs["neg"] = drawn + torch.arange(size, device=case.device) * case.items // size
    elif case.negatives:
        size_of = (case.negatives,) if case.shared else (case.sessions, case.negatives)
        inputs["neg"] = torch.randint(case.items, size_of, **place)
        others = inputs["neg"].reshape(-1, case.negatives)[0, :half]
    inputs["columns"] = torch.cat([inputs["target"][0, :half], others]).unique()
    return inputs


def make_step(case: Case) -> Tensors:
    """As make_loss, with a teacher whose ranks are the negatives: teacher_query (BATCHES, B, d), teacher_catalog."""
    inputs, teacher = make_loss(case), make_ranking(case, seed=3)
    del inputs["neg"]
    return inputs | {f"teacher_{name}": teacher[name] for name in ("query", "catalog")}


# --- truths ---


def ranking_truth(case: Case, inputs: Tensors) -> Tensors:
    """scores (8, V) of the sessions compared; those at the slice's first and last rank; its size."""
    query = inputs["query"][0][inputs["rows"]].double()
    blocks = inputs["catalog"].split(max(1, BLOCK // case.width))
    scores = torch.cat([query @ block.double().T for block in blocks], 1)
    ranked = scores.topk(case.stop).values
    size = torch.tensor(case.stop - case.start)
    ends = {"first": ranked[:, case.start], "last": ranked[:, case.stop - 1]}
    return {"scores": scores, "size": size, "product": scores[:, :PRODUCT_ITEMS].clone(), **ends}


def loss_truth(case: Case, inputs: Tensors) -> Tensors:
    """The mean loss, and its gradients: of the queries `rows`, and of the items `columns` of the catalog."""
    neg = inputs["neg"].expand(case.sessions, -1) if "neg" in inputs else None
    return _loss_truth(case, inputs, None if neg is None else lambda begin, end: neg[begin:end])


def step_truth(case: Case, inputs: Tensors) -> Tensors:
    """As loss_truth, the negatives being ranks [start, stop) of the teacher."""
    teacher = inputs["teacher_catalog"].double()

    def ranks(begin: int, end: int) -> Tensor:
        scores: Tensor = inputs["teacher_query"][0][begin:end].double() @ teacher.T
        return scores.topk(case.stop).indices[:, case.start :]

    return _loss_truth(case, inputs, ranks)


def _loss_truth(case: Case, inputs: Tensors, neg: Callable[[int, int], Tensor] | None) -> Tensors:
    """Softmax over the target and the negatives of sessions [begin, end), or over all items.

    A repeated negative counts each time, and one that is the target not at all.
    """
    query, catalog, target = inputs["query"][0].double(), inputs["catalog"].double(), inputs["target"][0]
    rows = inputs["rows"]
    losses, dlogits, grad_query = [], [], []
    for begin in range(0, case.sessions, block := max(1, BLOCK // case.items)):
        end = min(begin + block, case.sessions)
        logits = query[begin:end] @ catalog.T
        label = target[begin:end, None]
        lse_of = logits
        if neg is not None:
            ids = neg(begin, end)
            counts = torch.zeros_like(logits).scatter_add_(1, ids, torch.ones_like(ids, dtype=logits.dtype))
            lse_of = logits + counts.scatter_(1, label, 1.0).log_()
        lse = lse_of.logsumexp(1, keepdim=True)
        losses.append(lse - logits.gather(1, label))
        dlogit = (lse_of - lse).exp_()
        dlogit.scatter_add_(1, label, torch.full_like(lse, -1.0))
        dlogits.append(dlogit[:, inputs["columns"]])
        grad_query.append(dlogit[rows[(rows >= begin) & (rows < end)] - begin] @ catalog)
    return {
        "loss": torch.cat(losses).mean(),
        "grad_query": torch.cat(grad_query) / case.sessions,
        "grad_catalog": torch.cat(dlogits).T @ query / case.sessions,
        "product": query[rows] @ catalog[:PRODUCT_ITEMS].T,
    }


# --- errors ---


def product_error(result: Tensors, truth: Tensors) -> float:
    """`product` (8, n), scores of the first items: the largest error over the largest score."""
    exact = truth["product"][:, : result["product"].shape[1]]
    return _relative(result["product"].double() - exact, exact)


def slice_error(result: Tensors, truth: Tensors) -> float:
    """`members` (8, n) int64: how far a score lies beyond those of the first and last rank, over the largest score.

    ValueError where there are too few, too many or repeated members.
    """
    members, scores, size = result["members"], truth["scores"], int(truth["size"])
    _require_shape(members, (len(scores), size))
    if any(len(row.unique()) < size for row in members):
        raise ValueError("wrong: an item is in a slice twice")
    held = scores.gather(1, members)
    beyond = torch.maximum(held.amax(1) - truth["first"], truth["last"] - held.amin(1))
    return _relative(beyond.clamp(min=0.0), scores)


def ranking_error(result: Tensors, truth: Tensors) -> float:
    """`members` (8, k) int64, best first: each one's score against the score of its rank, over the largest score."""
    members, scores, size = result["members"], truth["scores"], int(truth["size"])
    _require_shape(members, (len(scores), size))
    return _relative(scores.gather(1, members) - scores.topk(size).values, scores)


def loss_error(result: Tensors, truth: Tensors) -> float:
    """loss, grad_query and grad_catalog: the largest of the three relative errors, in the 2-norm."""
    names = ("loss", "grad_query", "grad_catalog")
    return max(float((result[name].double() - truth[name]).norm() / truth[name].norm()) for name in names)


def _require_shape(members: Tensor, shape: tuple[int, int]) -> None:
    if members.shape != shape:
        raise ValueError(f"wrong: members of shape {tuple(members.shape)}, expected {shape}")


def _relative(error: Tensor, scale: Tensor) -> float:
    return float(error.abs().max() / scale.abs().max())
