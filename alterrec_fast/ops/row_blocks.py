"""The pieces that a loss over a catalog falls apart into, each over a block of the catalog's rows: the specification.

`slice_cross_entropy` over the whole catalog is `partition` of every block, `join`, and `gradients` of every block, in
plain PyTorch here. Ids count from the catalog's start; a block knows its first row. docs/architecture.md, "Row blocks".
Notation: B sessions, V items, n items of a block from item o on, d width, P positives.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from alterrec_fast.ops.reference import (
    check_finite,
    counts,
    log_sum_exp,
    masked_items,
    positive_ids,
    positive_weights,
    row_losses,
    widen,
)
from alterrec_fast.ops.slice_cross_entropy import SliceLoss
from alterrec_fast.ops.slices import unpack_bits


class Partition(NamedTuple):
    """What some blocks tell of the softmax of each session."""

    lse: Tensor  # (B,) log-sum-exp of the blocks' negatives, -inf where there is none
    logits: Tensor  # (B, 1 + P) of target and positives, -inf where they lie elsewhere or are none
    mean: Tensor  # (B, d), the negatives' mean embedding under the softmax, zero where there is none


class Block(NamedTuple):
    """What the pieces are given: a problem without its catalog, and a block of that."""

    problem: SliceLoss  # its catalog is not looked at
    vectors: Tensor  # (n, d)
    first: int  # o
    check: bool = False  # whether a score that is not finite raises

    @property
    def precision(self) -> str:
        return "fp64" if self.vectors.dtype == torch.float64 else self.problem.precision

    @property
    def query(self) -> Tensor:
        """(B, d) as products see it; zeros where the target is ignored."""
        ignored = (self.problem.target == self.problem.ignore_index).unsqueeze(1)
        return widen(self.problem.query, self.precision).masked_fill(ignored, 0.0)

    @property
    def embeddings(self) -> Tensor:
        """(n, d) as products see them."""
        return widen(self.vectors, self.precision)


def partition(x: Block) -> Partition:
    """The block's part of every session's softmax. Raises ValueError for a score that is not finite, if it checks."""
    y, member = _logits(x)
    lse = log_sum_exp(y, member)
    softmax = (y - lse.masked_fill(lse == -math.inf, 0.0)).exp().masked_fill(~member, 0.0)
    ids, inside = _positions(x)
    logits = y.new_full((y.shape[0], y.shape[1] + 1), -math.inf)  # the last column is for what lies elsewhere
    logits[:, :-1] = y
    return Partition(lse.squeeze(1), logits.gather(1, ids.masked_fill(~inside, y.shape[1])), softmax @ x.embeddings)


def join(a: Partition, b: Partition) -> Partition:
    """The partition of two blocks, or of two groups of blocks, that have no row in common."""
    lse = torch.logaddexp(a.lse, b.lse)
    none = lse == -math.inf
    shift = lse.masked_fill(none, 0.0)
    of_a, of_b = ((x.lse - shift).exp().unsqueeze(1) for x in (a, b))
    return Partition(lse, torch.maximum(a.logits, b.logits), of_a * a.mean + of_b * b.mean)


def losses(problem: SliceLoss, whole: Partition) -> Tensor:
    """(B,) from the partition of all blocks."""
    return row_losses(whole.lse.unsqueeze(1), whole.logits, _pos_ids(problem), problem.positive_weight)


class Weights(NamedTuple):
    """The gradients of the logits: negatives * exp(y - lse) of a negative y, `positives` of targets and positives."""

    negatives: Tensor  # (B,)
    positives: Tensor  # (B, 1 + P)


def weights(problem: SliceLoss, lse: Tensor, logits: Tensor, grad_losses: Tensor) -> Weights:
    """From what the partition of all blocks holds, and the gradient of each row's loss (B,)."""
    lse = lse.unsqueeze(1)
    counted = counts(lse, _pos_ids(problem))
    pull = torch.sigmoid(lse.masked_fill(~counted, 0.0) - logits.masked_fill(~counted, 0.0))
    pull = (pull * positive_weights(pull, problem.positive_weight)).masked_fill(~counted, 0.0)
    pull = pull * grad_losses.to(pull.dtype).unsqueeze(1)
    return Weights(pull.sum(1), -pull)


def gradients(x: Block, lse: Tensor, by: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the block's rows (n, d), complete; the block's part of the queries' (B, d); the bias's (n,).

    lse: (B,), of all blocks.
    """
    y, member = _logits(x)
    lse = lse.unsqueeze(1)
    p = (y - lse.masked_fill(lse == -math.inf, 0.0)).exp().masked_fill(~member, 0.0) * by.negatives.unsqueeze(1)
    ids, inside = _positions(x)
    p = p.scatter_add(1, ids.masked_fill(~inside, 0), by.positives.masked_fill(~inside, 0.0)) if y.shape[1] else p
    p = p / x.problem.temperature
    return p.T @ x.query, p @ x.embeddings, p.sum(0)


def query_gradient(problem: SliceLoss, mean: Tensor, pos_vectors: Tensor, by: Weights) -> Tensor:
    """(B, d), from the mean of all blocks and the vectors (B, 1 + P, d) of target and positives, any where they are
    none."""
    of_positives = torch.einsum("bp,bpd->bd", by.positives, pos_vectors)
    return (by.negatives.unsqueeze(1) * mean + of_positives) / problem.temperature


def _logits(x: Block) -> tuple[Tensor, Tensor]:
    """Logits (B, n), and which of them are of negatives."""
    p, stop = x.problem, x.first + x.vectors.shape[0]
    bias = None if p.bias is None else p.bias.detach()[x.first : stop]
    masked = masked_items(bias, x.vectors.shape[0], x.vectors.device)
    y = x.query @ x.embeddings.T
    if bias is not None:
        y = y + bias.to(y.dtype).masked_fill(masked, 0.0)
    y = (y / p.temperature).masked_fill(masked, -math.inf)
    member = _members(p, x.first, stop) & ~masked
    if x.check:
        skipped = masked | (torch.arange(x.first, stop, device=y.device) < p.first_item)
        check_finite(y, skipped | (p.target == p.ignore_index).unsqueeze(1), 0)
    ids, inside = _positions(x)
    target, here = ids[:, :1], inside[:, :1]
    if y.shape[1]:  # the target never is a negative
        member = member.scatter(1, target.masked_fill(~here, 0), member[:, :1].where(~here, False))
    return y, member


def _members(p: SliceLoss, first: int, stop: int) -> Tensor:
    """(B, n) bool, before targets and masked items are taken out."""
    b, n = p.query.shape[0], stop - first
    if p.members is None:
        ranked = torch.arange(first, stop, device=p.query.device) >= p.first_item
        return ranked.expand(b, n)
    if p.members.dtype == torch.uint8:
        bits = unpack_bits(p.members[:, first // 8 : -(-stop // 8)], stop - first // 8 * 8)
        return bits[:, first % 8 :]
    place = p.members.long() - first
    outside = (place < 0) | (place >= n)
    mask = torch.zeros(b, n + 1, dtype=torch.bool, device=p.query.device)
    return mask.scatter_(1, place.masked_fill(outside, n), True)[:, :n]


def _pos_ids(p: SliceLoss) -> Tensor:
    return positive_ids(p.target, p.positives, 0, p.query.shape[0], p.ignore_index)


def _positions(x: Block) -> tuple[Tensor, Tensor]:
    """(B, 1 + P) of target and positives: their places in the block, and whether they lie in it."""
    place = _pos_ids(x.problem) - x.first  # negative for none
    return place, (place >= 0) & (place < x.vectors.shape[0])
