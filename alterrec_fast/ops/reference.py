"""The specification: every op in plain PyTorch, in row blocks so that it runs at any size.

Engines must return what these return: identical sets, and losses and gradients up to rounding. Arguments have been
checked by the public functions; here are the values, which are only known once the scores are. float64 inputs are
computed in float64, for gradcheck. Notation: B sessions, V items, d width, P positives, N negatives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alterrec_fast.ops.checks import check_ids_in
from alterrec_fast.ops.slices import RankSlice, pack_bits, uses_bits

P = ParamSpec("P")
R = TypeVar("R")

BLOCK_BYTES = 64 << 20  # what the scores of one row block may take


class _Round(torch.autograd.Function):
    """Rounds to bfloat16 and widens again; the gradient passes unrounded, in the input's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return x.to(torch.bfloat16).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to(ctx.dtype)


class _TouchedRows(torch.autograd.Function):
    """catalog[ids] for unique ids, whose gradient is sparse: the touched rows alone, coalesced."""

    @staticmethod
    def forward(ctx: Any, catalog: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = catalog.shape
        return catalog.index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        return torch.sparse_coo_tensor(
            ids.unsqueeze(0), grad, ctx.shape, check_invariants=False, is_coalesced=True
        ), None


def widen(x: Tensor, precision: str) -> Tensor:
    """The operand of a product: float32 values, rounded to bfloat16 first where precision says so; float64 stays."""
    if precision == "fp64":
        return x
    return _Round.apply(x) if precision == "bf16" else x.float()


def _without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Autocast decides the precision of an op, which `widen` applies; it must not touch the arithmetic below that."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


@_without_autocast
def rank_slice_ref(
    query: Tensor,
    catalog: Tensor,
    start: int,
    stop: int,
    top: int,
    exclude: tuple[Tensor, Tensor],
    bias: Tensor | None,
    first_item: int,
    precision: str,
    check: bool,
) -> RankSlice:
    """Ranks [start, stop) of every session; see `rank_slice`."""
    b, v = query.shape[0], catalog.shape[0]
    as_bits = uses_bits(v, stop - start)
    members, tops, thresholds = [], [], []
    for begin, end in _blocks(b, v):
        scores = _scores(query[begin:end], catalog, bias, first_item, precision, check, begin)  # (b, V - first_item)
        ranked = scores.topk(stop, dim=1).values  # (b, stop), best first
        inside = _top_set(scores, ranked, stop) & ~_top_set(scores, ranked, start)
        thresholds.append(_thresholds(ranked, start))
        tops.append(_best(scores, top)[1] + first_item)
        mask = F.pad(inside, (first_item, 0))
        mask &= ~_excluded(exclude, begin, end, v)
        members.append(pack_bits(mask) if as_bits else _ids(mask, stop - start))
    device = query.device
    empty = torch.empty(0, 0, device=device)
    joined = torch.cat(members) if members else _no_members(v, stop - start, device)
    return RankSlice(
        bits=joined if as_bits else None,
        ids=None if as_bits else joined,
        top=torch.cat(tops) if tops else empty.new_empty(0, top, dtype=torch.int64),
        thresholds=torch.cat(thresholds).float() if thresholds else empty.new_empty(0, 2),
        exclude_values=exclude[0],
        exclude_offsets=exclude[1],
        num_items=v,
        first_item=first_item,
        size=stop - start,
    )


@_without_autocast
def top_k_ref(
    query: Tensor,
    catalog: Tensor,
    k: int,
    exclude: tuple[Tensor, Tensor],
    bias: Tensor | None,
    first_item: int,
    precision: str,
    check: bool,
) -> tuple[Tensor, Tensor]:
    """The k best items of every session that are not excluded; see `top_k`."""
    b, v = query.shape[0], catalog.shape[0]
    values = [query.new_empty(0, k, dtype=torch.float32)]
    items = [torch.empty(0, k, dtype=torch.int64, device=query.device)]
    for begin, end in _blocks(b, v):
        scores = _scores(query[begin:end], catalog, bias, first_item, precision, check, begin)
        scores.masked_fill_(_excluded(exclude, begin, end, v)[:, first_item:], -math.inf)
        value, item = _best(scores, k)
        values.append(value.float())
        items.append(torch.where(value == -math.inf, -1, item + first_item))
    return torch.cat(values), torch.cat(items)


@_without_autocast
def slice_cross_entropy_ref(
    query: Tensor,
    catalog: Tensor,
    target: Tensor,
    neg: RankSlice | None,
    positives: Tensor | None,
    positive_weight: float,
    temperature: float,
    bias: Tensor | None,
    first_item: int,
    ignore_index: int,
    precision: str,
    check: bool,
) -> Tensor:
    """The loss of every row, (B,); zero where the target is ignored. See `slice_cross_entropy`."""
    b, v = query.shape[0], catalog.shape[0]
    q, e = widen(query, precision), widen(catalog, precision)
    offset = None if bias is None else bias.to(e.dtype)

    def block(q: Tensor, e: Tensor, offset: Tensor | None, begin: int, end: int) -> Tensor:
        y = (q @ e.T if offset is None else torch.addmm(offset, q, e.T)) / temperature  # (b, V)
        member = _negatives(neg, begin, end, v, first_item, y.device)
        if check:
            _check_finite(y[:, first_item:], begin)
        wanted = _positive_ids(target, positives, begin, end, ignore_index)  # (b, 1 + P)
        member = member.scatter(1, wanted[:, :1].clamp(min=0), False)  # the target never is a negative
        logits = y.gather(1, wanted.clamp(min=0))
        return _row_loss(y, member, logits, wanted, positive_weight)

    if check:
        check_ids_in("target", target, first_item, v, ignore_index)
        if positives is not None:
            check_ids_in("positives", positives, first_item, v, -1)
    blocks = list(_blocks(b, v)) or [(0, 0)]  # over no rows the loss still has zero gradients
    return torch.cat([_bounded(block, len(blocks), q[i:j], e, offset, i, j) for i, j in blocks])


@_without_autocast
def sampled_softmax_ref(
    query: Tensor,
    catalog: Tensor,
    target: Tensor,
    neg: Tensor,
    log_q: Tensor | None,
    positives: Tensor | None,
    positive_weight: float,
    temperature: float,
    bias: Tensor | None,
    ignore_index: int,
    sparse_grad: bool,
    precision: str,
    check: bool,
) -> Tensor:
    """The loss of every row, (B,); zero where the target is ignored. See `sampled_softmax`."""
    b, v = query.shape[0], catalog.shape[0]
    if check:
        check_ids_in("target", target, 0, v, ignore_index)
        check_ids_in("neg", neg if neg.ndim == 2 else neg.unsqueeze(1), 0, v, -1)
        if positives is not None:
            check_ids_in("positives", positives, 0, v, -1)
    wanted = _positive_ids(target, positives, 0, b, ignore_index)  # (B, 1 + P)
    touched, place = torch.cat([wanted.flatten(), neg.flatten().long()]).clamp(min=0).unique(return_inverse=True)
    rows = _TouchedRows.apply(catalog, touched) if sparse_grad else catalog.index_select(0, touched)
    rows, q = widen(rows, precision), widen(query, precision)
    shift = torch.zeros(touched.numel(), dtype=q.dtype, device=q.device)  # what is added to q . e
    if bias is not None:
        shift = shift + bias.index_select(0, touched).to(q.dtype)
    minus = None if log_q is None else log_q.index_select(0, touched).to(q.dtype)
    place_wanted, place_neg = place[: wanted.numel()].view_as(wanted), place[wanted.numel() :].view_as(neg)

    def logits(q: Tensor, rows: Tensor, shift: Tensor, minus: Tensor | None, place: Tensor) -> Tensor:
        dots = q @ rows[place].T if place.ndim == 1 else torch.einsum("bd,bnd->bn", q, rows[place])
        y = (dots + shift[place]) / temperature
        return y if minus is None else y - minus[place]

    def block(q: Tensor, rows: Tensor, shift: Tensor, minus: Tensor | None, begin: int, end: int) -> Tensor:
        ids = neg if neg.ndim == 1 else neg[begin:end]
        y = logits(q, rows, shift, minus, place_neg if neg.ndim == 1 else place_neg[begin:end])  # (b, n)
        want = wanted[begin:end]
        member = (ids >= 0) & (ids != want[:, :1])
        best = logits(q, rows, shift, minus, place_wanted[begin:end])
        if check:
            _check_finite(torch.cat([y, best], 1), begin)
        return _row_loss(y, member, best, want, positive_weight)

    width = neg.shape[0] if neg.ndim == 1 else neg.shape[1] * query.shape[1]
    blocks = list(_blocks(b, width)) or [(0, 0)]
    return torch.cat([_bounded(block, len(blocks), q[i:j], rows, shift, minus, i, j) for i, j in blocks])


def _blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_BYTES // (4 * max(1, width)))
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def _bounded(block: Callable[..., Tensor], blocks: int, *args: Any) -> Tensor:
    """One row block of a loss; where there are several, its scores are computed again in the backward pass."""
    if blocks == 1 or not torch.is_grad_enabled():
        return block(*args)
    result: Tensor = checkpoint(block, *args, use_reentrant=False)
    return result


def _scores(
    query: Tensor, catalog: Tensor, bias: Tensor | None, first_item: int, precision: str, check: bool, row: int
) -> Tensor:
    """(b, V - first_item) scores of the items that are ranked, in float32 (float64 for float64 inputs)."""
    with torch.no_grad():
        q, e = widen(query, precision), widen(catalog[first_item:], precision)
        scores = q @ e.T
        if bias is not None:
            scores += bias[first_item:].to(scores.dtype)
        if check:
            _check_finite(scores, row)
        return scores


def _check_finite(scores: Tensor, row: int) -> None:
    finite = torch.isfinite(scores)
    if not finite.all():
        where = (~finite).nonzero()[0]
        raise ValueError(
            f"scores: row {row + int(where[0])} has a score of {float(scores[tuple(where)])}, expected a finite one"
        )


def _top_set(scores: Tensor, ranked: Tensor, k: int) -> Tensor:
    """(b, V) bool, the items of ranks [0, k): score descending, ties by lower id.

    ranked: (b, at least k), the first scores in order.
    """
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = ranked[:, k - 1 : k]
    above, tied = scores > last, scores == last
    return above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))


def _thresholds(ranked: Tensor, start: int) -> Tensor:
    """ranked (b, stop) -> (b, 2), the scores at ranks start and stop - 1; (+inf, -inf) where the slice is empty."""
    if start == ranked.shape[1]:
        return ranked.new_tensor([math.inf, -math.inf]).expand(ranked.shape[0], 2)
    return ranked[:, [start, -1]]


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns, each (b, k), of ranks [0, k), best first."""
    column = _ids(_top_set(scores, scores.topk(k, dim=1).values, k), k).long()
    ordered = scores.gather(1, column).sort(dim=1, descending=True, stable=True)
    return ordered.values, column.gather(1, ordered.indices)


def _ids(mask: Tensor, width: int) -> Tensor:
    """(b, V) bool with at most `width` set a row -> (b, width) int32 columns, ascending, filled up with -1."""
    out = torch.full((mask.shape[0], width), -1, dtype=torch.int32, device=mask.device)
    row, column = mask.nonzero(as_tuple=True)
    place = mask.cumsum(1)[row, column] - 1
    out[row, place] = column.int()
    return out


def _no_members(num_items: int, size: int, device: torch.device) -> Tensor:
    mask = torch.zeros(0, num_items, dtype=torch.bool, device=device)
    return pack_bits(mask) if uses_bits(num_items, size) else _ids(mask, size)


def _excluded(exclude: tuple[Tensor, Tensor], begin: int, end: int, num_items: int) -> Tensor:
    """(end - begin, V) bool, the excluded items of these rows."""
    values, offsets = exclude
    bounds = offsets[begin : end + 1]
    row = torch.arange(end - begin, device=values.device).repeat_interleave(bounds.diff())
    item = values[bounds[0] : bounds[-1]]
    out = torch.zeros(end - begin, num_items, dtype=torch.bool, device=values.device)
    out[row[item >= 0], item[item >= 0]] = True
    return out


def _negatives(
    neg: RankSlice | None, begin: int, end: int, num_items: int, first_item: int, device: torch.device
) -> Tensor:
    """(end - begin, V) bool; without a slice every item from first_item on."""
    if neg is not None:
        return neg.mask_rows(begin, end)
    mask = torch.ones(end - begin, num_items, dtype=torch.bool, device=device)
    mask[:, :first_item] = False
    return mask


def _positive_ids(target: Tensor, positives: Tensor | None, begin: int, end: int, ignore_index: int) -> Tensor:
    """(b, 1 + P) int64: target and positives; -1 for none, in a whole row where the target is ignored."""
    first = target[begin:end].long().unsqueeze(1)
    ignored = first == ignore_index
    ids = first if positives is None else torch.cat([first, positives[begin:end].long()], 1)
    return ids.masked_fill(ignored, -1)


def _row_loss(y: Tensor, member: Tensor, logits: Tensor, wanted: Tensor, positive_weight: float) -> Tensor:
    """softplus(Z - y_t) + weight * sum_k softplus(Z - y_k), Z the log-sum-exp of the members (AlterRec, Eqs. 8 to 11).

    y (b, N) with member (b, N) bool; logits (b, 1 + P) of target and positives, wanted their ids, -1 for none.
    """
    some = member.any(1, keepdim=True)
    # A row without negatives has zero loss; masking it before the log-sum-exp keeps NaN out of its gradient.
    z = y.masked_fill(~member & some, -math.inf).logsumexp(1, keepdim=True)
    losses = -F.logsigmoid(logits - z)  # softplus(z - y), exact at both ends
    weight = torch.full_like(losses, positive_weight)
    weight[:, 0] = 1.0
    counted = (wanted >= 0) & (wanted[:, :1] >= 0) & some
    return torch.where(counted, losses * weight, 0.0).sum(1)


def reduce_loss(rows: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """rows (B,), zero where the target is ignored -> (B,) or a scalar; the mean is over the rows not ignored."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / (target != ignore_index).sum().clamp(min=1)
