"""What both losses do around their ops, in plain PyTorch for every engine: rows out of sequences, the temperature as a
tensor, label smoothing, class weights and the reduction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alterrec_fast.ops import checks
from alterrec_fast.ops.reference import widen, without_autocast

MEAN_ROWS = 8192  # rows of a 16-bit catalog that are widened at once


def flat_rows(query: Tensor, target: Tensor, positives: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """query (B, L, d), target (B, L), positives (B, L, P) or None -> the same in B L rows.

    Raises TypeError for what is no tensor and ValueError where shapes differ.
    """
    b, length = query.shape[:2]
    checks.check_tensor("target", target)
    if target.shape != (b, length):
        raise ValueError(f"target must be ({b}, {length}), as the query is, got {tuple(target.shape)}")
    if positives is not None:
        checks.check_tensor("positives", positives)
        if positives.ndim != 3 or positives.shape[:2] != (b, length):
            raise ValueError(f"positives must be ({b}, {length}, P), as the query is, got {tuple(positives.shape)}")
        positives = positives.flatten(0, 1)
    return query.flatten(0, 1), target.flatten(), positives


def split_temperature(temperature: float | Tensor, query: Tensor) -> tuple[float, Tensor | None]:
    """A number, and None; or 1 and, in its place, a tensor of the dtype that logits have.

    Raises ValueError for a tensor on another device.
    """
    if not isinstance(temperature, Tensor):
        return temperature, None
    if temperature.device != query.device:
        raise ValueError(f"temperature must be on {query.device}, got {temperature.device}")
    return 1.0, temperature.reshape(()).to(torch.float64 if query.dtype == torch.float64 else torch.float32)


def gradient_dtypes(p: Any, needs: list[bool]) -> tuple[torch.dtype, torch.dtype]:
    """Of the query's and the bias's gradients, as a backward op returns them."""
    if needs[3]:
        return torch.float32, torch.float32
    return p.query.dtype, torch.float32 if p.bias is None else p.bias.dtype


def with_temperature(p: Any, query: Tensor, catalog: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients, query's and bias's in float32 -> these in their inputs' dtypes, and the temperature's.

    Logits are (q . e + bias) / temperature, so that its gradient is -(sum q . dq + sum bias * dbias) / temperature.
    """
    ignored = (p.target == p.ignore_index).unsqueeze(1)  # may hold anything
    total = (widen(p.query, p.precision).masked_fill(ignored, 0.0).double() * query).sum()
    if p.bias is not None:
        total = total + (p.bias.masked_fill(p.bias == -torch.inf, 0.0).double() * bias).sum()
        bias = bias.to(p.bias.dtype)
    return query.to(p.query.dtype), catalog, bias, (-total / p.temperature_tensor).to(p.temperature_tensor.dtype)


def finish_loss(
    p: Any,
    losses: Tensor,
    reduction: str,
    shape: torch.Size,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """losses (B,), 0 where the target is ignored -> a scalar, or `shape` for "none".

    The mean is over the rows not ignored, or over the weights (V,) of their targets; 0 over none.
    """
    weights = None if weight is None else _class_weights(weight.detach(), p.target, p.ignore_index).to(losses.dtype)
    rows = losses if weights is None else losses * weights
    if label_smoothing:
        mean_losses = _mean_losses(p, losses, None if weight is None else weight.detach())
        rows = (1.0 - label_smoothing) * rows + label_smoothing * mean_losses
    if reduction == "none":
        return rows.view(shape)
    if reduction == "sum":
        return rows.sum()
    if weights is None:
        total: Tensor = (p.target != p.ignore_index).sum().clamp(min=1)
    else:
        total = weights.sum()
        total = total.masked_fill(total == 0.0, torch.inf)  # smoothing gives rows without weight a loss
    return rows.sum() / total


def _class_weights(weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """(B,) weights of the targets, 0 where they are ignored; ids beyond the catalog, which only a check forbids, get
    some weight."""
    chosen = weight.index_select(0, target.long().clamp(0, weight.shape[0] - 1))
    return chosen.masked_fill(target == ignore_index, 0.0)


@without_autocast
def _mean_losses(p: Any, losses: Tensor, weight: Tensor | None) -> Tensor:
    """The full softmax's losses (B,) -> of every row the mean loss of all C classes, sum_c weight_c (lse - y_c) / C.

    Items before first_item, and those whose bias is -inf, are no classes. No scores are needed: lse is
    losses + y_target, and the mean of weight_c y_c is the score of the catalog's weighted mean.
    """
    v, precision, bias = p.catalog.shape[0], p.precision, p.bias
    temperature = p.temperature if p.temperature_tensor is None else p.temperature_tensor
    ignored = p.target == p.ignore_index
    share = torch.ones(v, dtype=losses.dtype, device=losses.device)  # of each class in the mean
    share[: p.first_item] = 0.0
    if bias is not None:
        masked = bias.detach() == -torch.inf
        share, bias = share.masked_fill(masked, 0.0), bias.to(losses.dtype).masked_fill(masked, 0.0)
    classes = share.sum().clamp(min=1.0)
    if weight is not None:
        share = share * weight.to(losses.dtype)
    share = share / classes
    query = widen(p.query.masked_fill(ignored.unsqueeze(1), 0.0), precision)
    items = p.target.long().clamp(0, v - 1)
    target_scores = (query * widen(p.catalog.index_select(0, items), precision)).sum(1)
    mean_scores = query @ _weighted_sum(p.catalog, share)
    if bias is not None:
        target_scores, mean_scores = target_scores + bias.index_select(0, items), mean_scores + share @ bias
    means: Tensor = share.sum() * (losses + target_scores / temperature) - mean_scores / temperature
    return means.masked_fill(ignored, 0.0)


def _weighted_sum(catalog: Tensor, weights: Tensor) -> Tensor:
    """weights @ catalog, in the weights' dtype, without a wide copy of a 16-bit catalog."""
    if catalog.dtype == weights.dtype:
        return weights @ catalog
    total = weights.new_zeros(catalog.shape[1])
    for rows, part in zip(catalog.split(MEAN_ROWS), weights.split(MEAN_ROWS), strict=True):
        total = total + part @ rows.to(weights.dtype)
    return total
