"""slice_cross_entropy: softmax cross-entropy of targets against a set of negatives, in tiles of scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from alterrec_fast.ops import checks, dispatch
from alterrec_fast.ops.checks import check_loss_ids, check_temperature_value, plain_strides
from alterrec_fast.ops.library import Op
from alterrec_fast.ops.losses import finish_loss, flat_rows, gradient_dtypes, split_temperature, with_temperature
from alterrec_fast.ops.reference import slice_cross_entropy_ref
from alterrec_fast.ops.slices import RankSlice


def slice_cross_entropy(
    query: Tensor,
    catalog: Tensor,
    target: Tensor,
    neg: RankSlice | None = None,
    *,
    positives: Tensor | None = None,
    positive_weight: float = 1.0,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    first_item: int = 0,
    reduction: str = "mean",
    ignore_index: int = -100,
    max_saved_bytes: int = 256 << 20,
    precision: str | None = None,
    check: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of each target, and of extra positives, against the same negatives.

    With y_i = (q . e_i + bias_i) / temperature and Z = logsumexp of y over the negatives N, the row's loss is
    ``softplus(Z - y_t) + positive_weight * sum_k softplus(Z - y_k)``: AlterRec, Eqs. (8) to (11), one Z for all
    positives. N is `neg` without the target; without `neg` every item from first_item on but the target, which is
    ``F.cross_entropy((query @ catalog.T + bias) / temperature, target)``. A row without negatives has zero loss.

    Gradients have gradients (``create_graph=True``), and torch.func transforms and forward mode work: the reference
    engine computes those.

    Args:
        query: (B, d), or (B, L, d) for sequences, float32, bfloat16 or float16, any strides; gets a gradient.
        catalog: (V, d) float32, bfloat16 or float16, any strides; gets a gradient.
        target: (B,), or (B, L), int32 or int64.
        neg: the negatives, of B (or B L) rows over V items, or None for all items.
        positives: (B, P), or (B, L, P), int32 or int64, -1 is none. A positive may equal the target, repeat, or be a
            negative as well.
        positive_weight: what a positive counts against the target (beta in the paper); a number.
        temperature: above 0; a number, or a tensor of one float on the queries' device, which gets a gradient.
        bias: (V,); gets a gradient. An item with -inf is no negative and gets a gradient of zero; as a target or
            positive it is an error. +inf and NaN are errors.
        label_smoothing: in [0, 1], as in ``F.cross_entropy``, over the items from first_item on whose bias is not -inf.
            Above 0 it needs the softmax of one target over all items: with `neg` or `positives` it raises.
        weight: (V,) float, from 0 up, no gradient; the weight of a row by its target, and in label smoothing that of
            each item, as in ``F.cross_entropy``.
        first_item: rows before it are padding: no negatives (`neg` must be made with this first_item or more), and no
            targets.
        reduction: "mean" over the rows whose target is not ignore_index, divided by their weights' sum where there are
            weights (0 over none), "sum", or "none" for the target's shape.
        ignore_index: a target that stands for no row: its query is not looked at, may hold anything, and gets a
            gradient of zero.
        max_saved_bytes: the native engine keeps at most so much of the logits for the backward pass, which computes the
            others again; 0 keeps none. It changes speed and memory only, and other engines do not look at it.
        precision, check, backend: as in `rank_slice`. An engine need not score, and so not check, items that are no
            row's negatives.

    Raises:
        TypeError, ValueError, BackendError: as `rank_slice` does; ValueError also for ids beyond the catalog and,
            with the row, for a target or positive whose bias is -inf.
    """
    x = checked_problem(
        query,
        catalog,
        target,
        neg,
        positives=positives,
        positive_weight=positive_weight,
        temperature=temperature,
        bias=bias,
        label_smoothing=label_smoothing,
        weight=weight,
        first_item=first_item,
        reduction=reduction,
        ignore_index=ignore_index,
        max_saved_bytes=max_saved_bytes,
        precision=precision,
        check=check,
        backend=backend,
    )
    p = x.problem
    if x.engine == "reference":
        losses = _reference(p, neg, x.check)
    else:
        saved_size = 0
        if dispatch.needs_gradient(query, catalog, bias, p.temperature_tensor):
            bounded = torch.sym_min(
                max_saved_bytes, saved_by_native(p.query.shape[0], p.query.shape[1], catalog.shape[0])
            )
            saved_size = bounded if x.engine == "native" else _saved_by_triton(p)
        losses = _op(_Forward(p, saved_size, x.check), x.engine)[0]
    return finish_loss(p, losses, reduction, query.shape[:-1], weight, label_smoothing)


class Checked(NamedTuple):
    """A call's problem and choices, once its arguments are checked."""

    problem: SliceLoss
    engine: str
    check: bool


def checked_problem(
    query: Tensor,
    catalog: Tensor,
    target: Tensor,
    neg: RankSlice | None,
    *,
    positives: Tensor | None,
    positive_weight: float,
    temperature: float | Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    weight: Tensor | None,
    first_item: int,
    reduction: str,
    ignore_index: int,
    max_saved_bytes: int,
    precision: str | None,
    check: bool | None,
    backend: str | None,
) -> Checked:
    """The arguments of `slice_cross_entropy`, checked but for values."""
    checks.check_tensor("query", query)
    if query.ndim == 3:
        query, target, positives = flat_rows(query, target, positives)
    engine = dispatch.choose_backend(backend, query, "slice_cross_entropy")
    checks.check_matrices(query, catalog, bias, first_item, engine)
    checks.check_loss(temperature, positive_weight, reduction)
    b, v = query.shape[0], catalog.shape[0]
    checks.check_ids("target", target, b, (1,), query.device)
    if positives is not None:
        checks.check_ids("positives", positives, b, (2,), query.device)
    checks.check_integer("ignore_index", ignore_index)
    checks.check_integer("max_saved_bytes", max_saved_bytes)
    if max_saved_bytes < 0:
        raise ValueError(f"max_saved_bytes must be at least 0, got {max_saved_bytes}")
    if neg is not None:
        if not isinstance(neg, RankSlice):
            raise TypeError(f"neg must be a RankSlice or None, got {checks.kind_of(neg)}; sampled_softmax takes ids")
        if (neg.batch_size, neg.num_items) != (b, v):
            raise ValueError(f"neg must be of {b} rows over {v} items, got {neg.batch_size} over {neg.num_items}")
        if neg.device != query.device:
            raise ValueError(f"neg must be on {query.device}, got {neg.device}")
        if neg.first_item < first_item:
            raise ValueError(f"neg must be made with first_item {first_item} or more, as here, got {neg.first_item}")
    if weight is not None:
        checks.check_vector("weight", weight, v, query.device)
    if label_smoothing != 0.0:
        checks.check_smoothing(label_smoothing, neg is not None, positives is not None)
    arithmetic, checked = dispatch.choose_precision(precision, query, catalog), dispatch.choose_check(check, query)
    members = None if neg is None else neg.ids if neg.bits is None else neg.bits
    problem = SliceLoss(
        query,
        catalog,
        target,
        members,
        positives,
        positive_weight,
        *split_temperature(temperature, query),
        bias,
        first_item,
        ignore_index,
        arithmetic,
    )
    return Checked(problem, engine, checked)


class SliceLoss(NamedTuple):
    """What forward and backward pass are given."""

    query: Tensor
    catalog: Tensor
    target: Tensor
    members: Tensor | None  # (B, W) uint8 bits or (B, n) int32 ids of a RankSlice; None: all items
    positives: Tensor | None
    positive_weight: float
    temperature: float
    temperature_tensor: Tensor | None  # () float32, in temperature's place
    bias: Tensor | None
    first_item: int
    ignore_index: int
    precision: str

    @property
    def ids(self) -> Tensor | None:
        """The members where they are ids."""
        return None if self.members is None or self.members.dtype == torch.uint8 else self.members


class _Forward(NamedTuple):
    problem: SliceLoss
    saved_size: int  # bytes of logits that may be saved for the backward pass
    check: bool


class _Backward(NamedTuple):
    grad_losses: Tensor  # (B,)
    problem: SliceLoss
    lse: Tensor  # (B,) log-sum-exp of the negatives' logits
    saved: Tensor  # uint8
    needs: list[bool]  # the gradients of query, catalog, bias; and whether query's and bias's are in float32


def saved_by_native(rows: int, width: int, items: int) -> int:
    """The most that the native engine can use: float32 logits of whole tiles of 512 items with a scale for each tile
    and row; for a slice of ids, a softmax over them and a mean embedding."""
    return rows * (-(-items // 512) * (512 + 1) + width) * 4


def _saved_by_triton(p: SliceLoss) -> int:
    """The logits of target and positives, and of a slice of ids; or what the flash-like loss saves."""
    from alterrec_fast.kernels import flash_loss

    logits = 1 + (0 if p.positives is None else p.positives.shape[1])
    if flash_loss.is_flash(p.query, p.catalog, p.members, p.positives, p.precision):
        needs_query = dispatch.needs_gradient(p.query, p.temperature_tensor)
        return int(flash_loss.saved_bytes(p.query, p.catalog, p.members, logits, needs_query))
    return p.query.shape[0] * ((0 if p.ids is None else p.ids.shape[1]) + logits) * 4


def _reference(p: SliceLoss, neg: RankSlice | None, check: bool) -> Tensor:
    return slice_cross_entropy_ref(
        p.query,
        p.catalog,
        p.target,
        neg,
        p.positives,
        p.positive_weight,
        p.temperature if p.temperature_tensor is None else p.temperature_tensor,
        p.bias,
        p.first_item,
        p.ignore_index,
        p.precision,
        check,
    )


def _forward_fake(x: _Forward) -> tuple[Tensor, Tensor, Tensor]:
    query = x.problem.query
    losses = query.new_empty(query.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses), query.new_empty(x.saved_size, dtype=torch.uint8)


def _backward_fake(x: _Backward) -> tuple[Tensor, Tensor, Tensor]:
    p = x.problem
    query_dtype, bias_dtype = gradient_dtypes(p, x.needs)
    return (
        p.query.new_empty(p.query.shape if x.needs[0] else 0, dtype=query_dtype),
        p.catalog.new_empty(p.catalog.shape if x.needs[1] else 0),
        p.catalog.new_empty(p.catalog.shape[0] if x.needs[2] else 0, dtype=bias_dtype),
    )


def _triton(x: _Forward) -> tuple[Tensor, Tensor, Tensor]:
    from alterrec_fast.kernels import flash_loss
    from alterrec_fast.kernels import sampled_softmax as gathered
    from alterrec_fast.kernels import slice_cross_entropy as dense
    from alterrec_fast.kernels.losses import Saved

    p = x.problem
    if x.check:
        if p.temperature_tensor is not None:
            check_temperature_value(p.temperature_tensor)
        check_loss_ids(p.target, p.positives, p.bias, p.first_item, p.catalog.shape[0], p.ignore_index)
    problem = _triton_problem(p, x.check)
    if flash_loss.is_flash(p.query, p.catalog, p.members, p.positives, p.precision):
        memory = torch.empty(x.saved_size, dtype=torch.uint8, device=p.query.device)
        losses, lse = flash_loss.flash_loss_fwd(problem, p.first_item, p.members, memory)
        checks.raise_not_finite(problem.bad)
        return losses, lse, memory
    saved = Saved.empty(problem, x.saved_size, p.ids)
    if p.ids is not None:
        losses, lse, logits = gathered.sampled_softmax_fwd(problem, p.ids, saved.neg)
    else:
        losses, lse, logits = dense.slice_cross_entropy_fwd(problem, dense.Columns.of(problem, p.first_item, p.members))
    saved.store(logits)
    checks.raise_not_finite(problem.bad)
    return losses, lse, saved.memory


def _triton_backward(x: _Backward) -> tuple[Tensor, Tensor, Tensor]:
    from alterrec_fast.kernels import flash_loss
    from alterrec_fast.kernels import sampled_softmax as gathered
    from alterrec_fast.kernels import slice_cross_entropy as dense
    from alterrec_fast.kernels.losses import Dlogits, Saved

    p = x.problem
    bias_dtype = gradient_dtypes(p, x.needs)[1]
    problem = _triton_problem(p, False)
    if flash_loss.is_flash(p.query, p.catalog, p.members, p.positives, p.precision):
        query, catalog, bias = flash_loss.flash_loss_bwd(
            problem, p.first_item, p.members, x.grad_losses, x.lse, x.saved, x.needs
        )
        return query, catalog, bias.to(bias_dtype)
    saved = Saved.of(problem, x.saved, p.ids)
    dlogits = Dlogits.of(problem, x.grad_losses, x.lse, saved.pos)
    if p.ids is not None:
        grads = gathered.sampled_softmax_bwd(problem, p.ids, saved.neg, dlogits, False, x.needs)
        query, catalog, bias = grads.query, grads.catalog, grads.bias
    else:
        columns = dense.Columns.of(problem, p.first_item, p.members)
        query, catalog, bias = dense.slice_cross_entropy_bwd(problem, columns, dlogits, x.needs)
    return query, catalog, bias.to(bias_dtype)


def _triton_problem(p: SliceLoss, check: bool) -> Any:
    from alterrec_fast.kernels.losses import Problem

    return Problem.of(
        plain_strides(p.query),
        plain_strides(p.catalog),
        p.target,
        p.positives,
        p.positive_weight,
        p.temperature,
        p.temperature_tensor,
        p.bias,
        None,
        p.ignore_index,
        p.precision,
        check,
    )


_op = Op("slice_cross_entropy", _Forward, 3, _triton, _forward_fake)
_backward_op = Op("slice_cross_entropy_backward", _Backward, 3, _triton_backward, _backward_fake)


def _backward(
    p: SliceLoss, engine: str, grad_losses: Tensor, lse: Tensor, saved: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    asked = [True, needs[1], p.bias is not None, True] if needs[3] else needs
    query, catalog, bias = _backward_op(_Backward(grad_losses, p, lse, saved, asked), engine)
    return with_temperature(p, query, catalog, bias) if needs[3] else (query, catalog, bias, query)


def _losses(p: SliceLoss) -> Tensor:
    """The losses in plain PyTorch, whose gradients have gradients."""
    neg = None
    if p.members is not None:
        neg = RankSlice.of_members(p.members, p.catalog.shape[0], p.first_item)
    return _reference(p, neg, False)


_op.differentiate(("query", "catalog", "bias", "temperature_tensor"), _backward, _losses)
