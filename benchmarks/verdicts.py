"""How far a contestant's result is from the truth: one function for each kind of result.

Stands alone, like worker.py: it also runs under other people's interpreters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def compare_product(found: Tensors, truth: Tensors) -> float:
    """`product` (8, n), scores of the first items: the largest error over the largest number."""
    exact = truth["product"][:, : found["product"].shape[1]]
    return _largest(found["product"].double() - exact, exact)


def compare_slice(found: Tensors, truth: Tensors) -> float:
    """`members` (8, n) int64: how far one's score lies beyond those of the first and last rank, over the largest score.

    ValueError where there are too few, too many or repeated members.
    """
    members, scores, size = found["members"], truth["scores"], int(truth["size"])
    if members.shape != (len(scores), size):
        raise ValueError(f"wrong: {tuple(members.shape)} members, expected {(len(scores), size)}")
    if any(len(row.unique()) < size for row in members):
        raise ValueError("wrong: an item is in a slice twice")
    own = scores.gather(1, members)
    beyond = torch.maximum(own.amax(1) - truth["first"], truth["last"] - own.amin(1))
    return _largest(beyond.clamp(min=0.0), scores)


def compare_some(found: Tensors, truth: Tensors) -> float:
    """As compare_slice for contestants that give some of the slice's members."""
    some = truth | {"size": torch.tensor(found["members"].shape[1])}
    return compare_slice(found, some)


def compare_best(found: Tensors, truth: Tensors) -> float:
    """`members` (8, k) int64, best first: each one's score against the score of its rank, over the largest score."""
    scores, size = truth["scores"], int(truth["size"])
    members = found["members"]
    if members.shape != (len(scores), size):
        raise ValueError(f"wrong: {tuple(members.shape)} members, expected {(len(scores), size)}")
    best = scores.topk(size).values
    return _largest(scores.gather(1, members) - best, scores)


def compare_loss(found: Tensors, truth: Tensors, variant: str = "") -> float:
    """loss (), grad_query (B, d), grad_catalog (V, d): the largest of the three relative errors, in the 2-norm."""
    ours = {
        "loss": found["loss"],
        "grad_query": found["grad_query"][truth["rows"]],
        "grad_catalog": found["grad_catalog"].index_select(0, truth["columns"]),
    }
    errors = []
    for name, tensor in ours.items():
        exact = truth[variant + name]
        dense = (tensor.to_dense() if tensor.is_sparse else tensor).double()
        errors.append(float((dense - exact).norm() / exact.norm()))
    return max(errors)


def _largest(error: Tensor, scale: Tensor) -> float:
    return float(error.abs().max() / scale.abs().max())


def compare_pass(found: Tensors, truth: Tensors) -> float:
    """One pass over the sessions: the share of targets that were left out, or trained on twice.

    There is no float64 to compare the loss with, since initial weights and the places of norms differ; ValueError where
    it is not finite.
    """
    if not bool(found["loss"].isfinite()):
        raise ValueError(f"wrong: a loss of {found['loss']}")
    return abs(int(found["targets"]) - int(truth["targets"])) / int(truth["targets"])


def compare_step(found: Tensors, truth: Tensors) -> float:
    """The larger of the loss's relative error and that of the gradients of all parameters together, in the 2-norm."""
    names = truth.keys() - {"rows", "product"}
    if found.keys() != names:
        raise ValueError(f"wrong: {sorted(found.keys() ^ names)} on one side only")
    errors = {name: float((found[name].double() - truth[name]).norm()) for name in names}
    sizes = {name: float(truth[name].norm()) for name in names}
    loss = errors.pop("loss") / sizes.pop("loss")
    return max(loss, math.hypot(*errors.values()) / math.hypot(*sizes.values()))
