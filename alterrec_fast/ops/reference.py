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

from alterrec_fast.ops.checks import check_ids_in, check_loss_ids, check_temperature_value
from alterrec_fast.ops.dispatch import FORMATS, transformed
from alterrec_fast.ops.slices import RankSlice, pack_bits, uses_bits

P = ParamSpec("P")
R = TypeVar("R")

BLOCK_BYTES = 64 << 20  # what the scores of one row block may take
_DTYPES = {name: dtype for dtype, name in FORMATS.items()}


class _Round(torch.autograd.Function):
    """Rounds to a 16-bit dtype and widens again; the gradient passes unrounded, in the input's dtype."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, to: torch.dtype) -> Tensor:
        return x.to(to).float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.float()


class _TouchedRows(torch.autograd.Function):
    """catalog[ids] for unique ids, whose gradient is sparse: the touched rows alone, coalesced. Where it needs a
    gradient itself it is dense, since torch differentiates few functions of sparse tensors."""

    @staticmethod
    def forward(catalog: Tensor, ids: Tensor) -> Tensor:
        return catalog.index_select(0, ids)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad.new_zeros(ctx.shape).index_add(0, ids, grad), None
        return torch.sparse_coo_tensor(
            ids.unsqueeze(0), grad, ctx.shape, check_invariants=False, is_coalesced=True
        ), None


def widen(x: Tensor, precision: str) -> Tensor:
    """The operand of a product: float32 values, rounded to a 16-bit format first where precision names one; float64
    stays."""
    if precision == "fp64":
        return x
    return x.float() if precision == "fp32" else _Round.apply(x, _DTYPES[precision])


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Autocast decides the precision of an op, which `widen` applies; it must not touch the arithmetic below that."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


@without_autocast
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
        tops.append(_best(scores, top, first_item)[1])
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


@without_autocast
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
        value, item = _best(scores, k, first_item)
        values.append(value.float())
        items.append(item)
    return torch.cat(values), torch.cat(items)


@without_autocast
def slice_cross_entropy_ref(
    query: Tensor,
    catalog: Tensor,
    target: Tensor,
    neg: RankSlice | None,
    positives: Tensor | None,
    positive_weight: float,
    temperature: float | Tensor,
    bias: Tensor | None,
    first_item: int,
    ignore_index: int,
    precision: str,
    check: bool,
) -> Tensor:
    """The loss of every row, (B,); zero where the target is ignored. See `slice_cross_entropy`."""
    b, v = query.shape[0], catalog.shape[0]
    ignored = (target == ignore_index).unsqueeze(1)  # (B, 1)
    q, e = widen(query, precision).masked_fill(ignored, 0.0), widen(catalog, precision)
    masked = masked_items(bias, v, e.device)
    offset = None if bias is None else bias.to(e.dtype).masked_fill(masked, 0.0)

    def block(q: Tensor, e: Tensor, offset: Tensor | None, begin: int, end: int) -> Tensor:
        y = (q @ e.T if offset is None else torch.addmm(offset, q, e.T)) / temperature  # (b, V)
        y = y.masked_fill(masked, -math.inf)
        member = _negatives(neg, begin, end, v, first_item, y.device) & ~masked
        if check:
            check_finite(y[:, first_item:], masked[first_item:] | ignored[begin:end], begin)
        pos_ids = positive_ids(target, positives, begin, end, ignore_index)  # (b, 1 + P)
        member = member.scatter(1, pos_ids[:, :1].clamp(min=0), False)  # the target never is a negative
        logits = y.gather(1, pos_ids.clamp(min=0))
        return row_losses(log_sum_exp(y, member), logits, pos_ids, positive_weight)

    if check:
        check_temperature_value(temperature)
        check_loss_ids(target, positives, bias, first_item, v, ignore_index)
        if neg is not None and neg.ids is not None:
            check_ids_in("neg.ids", neg.ids, first_item, v, -1)
    blocks = list(_blocks(b, v)) or [(0, 0)]  # over no rows the loss still has zero gradients
    return torch.cat([_bounded(block, len(blocks), q[i:j], e, offset, i, j) for i, j in blocks])


@without_autocast
def sampled_softmax_ref(
    query: Tensor,
    catalog: Tensor,
    target: Tensor,
    neg: Tensor,
    log_q: Tensor | None,
    positives: Tensor | None,
    positive_weight: float,
    temperature: float | Tensor,
    bias: Tensor | None,
    ignore_index: int,
    sparse_grad: bool,
    precision: str,
    check: bool,
) -> Tensor:
    """The loss of every row, (B,); zero where the target is ignored. See `sampled_softmax`."""
    b, v = query.shape[0], catalog.shape[0]
    if check:
        check_temperature_value(temperature)
        check_loss_ids(target, positives, bias, 0, v, ignore_index)
        check_ids_in("neg", neg if neg.ndim == 2 else neg.unsqueeze(1), 0, v, -1)
    ignored = (target == ignore_index).unsqueeze(1)  # (B, 1)
    pos_ids = positive_ids(target, positives, 0, b, ignore_index)  # (B, 1 + P)
    touched, place = torch.cat([pos_ids.flatten(), neg.flatten().long()]).clamp(min=0).unique(return_inverse=True)
    rows = _TouchedRows.apply(catalog, touched) if sparse_grad else catalog.index_select(0, touched)
    rows, q = widen(rows, precision), widen(query, precision).masked_fill(ignored, 0.0)
    masked = masked_items(bias, v, q.device)[touched]
    shift = torch.zeros(touched.numel(), dtype=q.dtype, device=q.device)  # what is added to q . e
    if bias is not None:
        shift = shift + bias.index_select(0, touched).to(q.dtype).masked_fill(masked, 0.0)
    minus = None if log_q is None else log_q.index_select(0, touched).to(q.dtype)
    place_pos, place_neg = place[: pos_ids.numel()].view_as(pos_ids), place[pos_ids.numel() :].view_as(neg)

    def logits(q: Tensor, rows: Tensor, shift: Tensor, minus: Tensor | None, place: Tensor) -> Tensor:
        dots = q @ rows[place].T if place.ndim == 1 else torch.einsum("bd,bnd->bn", q, rows[place])
        y = (dots + shift[place]) / temperature
        return (y if minus is None else y - minus[place]).masked_fill(masked[place], -math.inf)

    def block(q: Tensor, rows: Tensor, shift: Tensor, minus: Tensor | None, begin: int, end: int) -> Tensor:
        ids, places = (neg, place_neg) if neg.ndim == 1 else (neg[begin:end], place_neg[begin:end])
        y = logits(q, rows, shift, minus, places)  # (b, n)
        pos = pos_ids[begin:end]
        member = (ids >= 0) & (ids != pos[:, :1]) & ~masked[places]
        pos_logits = logits(q, rows, shift, minus, place_pos[begin:end])
        if check:
            check_finite(torch.cat([y, pos_logits], 1), torch.cat([~member, pos < 0], 1), begin)
        return row_losses(log_sum_exp(y, member), pos_logits, pos, positive_weight)

    width = neg.shape[0] if neg.ndim == 1 else neg.shape[1] * query.shape[1]
    blocks = list(_blocks(b, width)) or [(0, 0)]
    return torch.cat([_bounded(block, len(blocks), q[i:j], rows, shift, minus, i, j) for i, j in blocks])


def _blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_BYTES // (4 * max(1, width)))
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def _bounded(block: Callable[..., Tensor], blocks: int, *args: Any) -> Tensor:
    """One row block of a loss; where there are several, its scores are computed again in the backward pass."""
    if blocks == 1 or not torch.is_grad_enabled() or transformed():  # torch.func knows no checkpoints
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
        masked = masked_items(bias, catalog.shape[0], scores.device)[first_item:]
        if check:
            check_finite(scores, masked, row)
        return scores.masked_fill_(masked, -math.inf)


def masked_items(bias: Tensor | None, num_items: int, device: torch.device) -> Tensor:
    """(V,) bool, the items that are never candidates: their bias is -inf."""
    return torch.zeros(num_items, dtype=torch.bool, device=device) if bias is None else bias.detach() == -math.inf


def check_finite(scores: Tensor, skipped: Tensor, row: int) -> None:
    """Raises ValueError with the row where a score that is not `skipped` (bool, broadcast) is not finite."""
    finite = torch.isfinite(scores) | skipped
    if not finite.all():
        where = (~finite).nonzero()[0]
        raise ValueError(
            f"scores: row {row + int(where[0])} has a score of {float(scores[tuple(where)])}, expected a finite one"
        )


def _top_set(scores: Tensor, ranked: Tensor, k: int) -> Tensor:
    """(b, V) bool, the items of ranks [0, k): score descending, ties by lower id; scores of -inf have no rank.

    ranked: (b, at least k), the first scores in order.
    """
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = ranked[:, k - 1 : k]
    above, tied = scores > last, scores == last
    return above | (tied & (scores > -math.inf) & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))


def _thresholds(ranked: Tensor, start: int) -> Tensor:
    """ranked (b, stop) -> (b, 2), the scores at ranks start and stop - 1, -inf where there are fewer candidates;
    (+inf, -inf) where the slice is empty."""
    if start == ranked.shape[1]:
        return ranked.new_tensor([math.inf, -math.inf]).expand(ranked.shape[0], 2)
    return ranked[:, [start, -1]]


def _best(scores: Tensor, k: int, first_item: int) -> tuple[Tensor, Tensor]:
    """Scores and items, each (b, k), of ranks [0, k), best first, filled up with -inf and -1.

    scores: (b, V - first_item).
    """
    column = _ids(_top_set(scores, scores.topk(k, dim=1).values, k), k).long()
    if k == 0:
        return scores[:, :0], column
    none = column < 0
    ranked = scores.gather(1, column.clamp(min=0)).masked_fill(none, -math.inf)
    ordered = ranked.sort(dim=1, descending=True, stable=True)
    return ordered.values, (column + first_item).masked_fill(none, -1).gather(1, ordered.indices)


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


def positive_ids(target: Tensor, positives: Tensor | None, begin: int, end: int, ignore_index: int) -> Tensor:
    """(b, 1 + P) int64: target and positives; -1 for none, in a whole row where the target is ignored."""
    first = target[begin:end].long().unsqueeze(1)
    ignored = first == ignore_index
    ids = first if positives is None else torch.cat([first, positives[begin:end].long()], 1)
    return ids.masked_fill(ignored, -1)


def log_sum_exp(y: Tensor, member: Tensor) -> Tensor:
    """(b, 1) of the members among y (b, N), -inf where there is none."""
    has_negatives = member.any(1, keepdim=True)
    # Zeros in place of the logits of a row without negatives keep NaN out of its gradient.
    lse = y.masked_fill(~member, -math.inf).masked_fill(~has_negatives, 0.0).logsumexp(1, keepdim=True)
    return lse.masked_fill(~has_negatives, -math.inf)


def row_losses(lse: Tensor, logits: Tensor, pos_ids: Tensor, positive_weight: float) -> Tensor:
    """softplus(lse - y_t) + weight * sum_k softplus(lse - y_k), lse that of the members (AlterRec, Eqs. 8 to 11).

    lse (b, 1), logits (b, 1 + P) of target and positives, pos_ids their ids, -1 for none. A row without negatives has
    zero loss.
    """
    counted = counts(lse, pos_ids)
    # softplus(lse - logits), exact at both ends
    losses = -F.logsigmoid(logits.masked_fill(~counted, 0.0) - lse.masked_fill(lse == -math.inf, 0.0))
    return torch.where(counted, losses * positive_weights(losses, positive_weight), 0.0).sum(1)


def counts(lse: Tensor, pos_ids: Tensor) -> Tensor:
    """(b, 1 + P) bool, the targets and positives that have a loss."""
    return (pos_ids >= 0) & (pos_ids[:, :1] >= 0) & (lse != -math.inf)


def positive_weights(like: Tensor, positive_weight: float) -> Tensor:
    weight = torch.full_like(like, positive_weight)
    weight[:, 0] = 1.0
    return weight
