"""sampled_softmax: softmax cross-entropy of targets against sampled negatives, gathered row by row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from alterrec_fast.ops import checks, dispatch
from alterrec_fast.ops.checks import check_ids_in, check_loss_ids, check_temperature_value, plain_strides
from alterrec_fast.ops.library import Op
from alterrec_fast.ops.losses import finish_loss, flat_rows, gradient_dtypes, split_temperature, with_temperature
from alterrec_fast.ops.reference import sampled_softmax_ref
from alterrec_fast.ops.slices import RankSlice


def sampled_softmax(
    query: Tensor,
    catalog: Tensor,
    target: Tensor,
    neg: Tensor,
    *,
    log_q: Tensor | None = None,
    positives: Tensor | None = None,
    positive_weight: float = 1.0,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    sparse_grad: bool = False,
    precision: str | None = None,
    check: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of each target against its sampled negatives, with logQ correction.

    The loss of `slice_cross_entropy` with logits ``(q . e_i + bias_i) / temperature - log_q_i`` (Bengio and Senecal,
    2008; TensorFlow's sampled_softmax_loss). A repeated negative counts each time; one equal to the target is dropped.

    Gradients have gradients (``create_graph=True``), and torch.func transforms and forward mode work: the reference
    engine computes those.

    Args:
        query: (B, d), or (B, L, d) for sequences, float32, bfloat16 or float16, any strides; gets a gradient.
        catalog: (V, d) float32, bfloat16 or float16, any strides; gets a gradient.
        target: (B,), or (B, L), int32 or int64.
        neg: (B, n), or (B, L, n), or (n,) shared by all rows; int32 or int64, -1 is none.
        log_q: (V,), the log of each item's expected count among the negatives; no gradient.
        positives, positive_weight, temperature, bias, weight, reduction, ignore_index: as in `slice_cross_entropy`.
        sparse_grad: the catalog's gradient as a coalesced sparse tensor of the touched rows. torch drops the mark, not
            the order, when it stores the gradient as ``catalog.grad``; `torch.autograd.grad` returns it marked. With
            ``create_graph=True`` it is dense.
        precision, check, backend: as in `rank_slice`.

    Raises:
        TypeError, ValueError, BackendError: as `slice_cross_entropy` does.
    """
    checks.check_tensor("query", query)
    shape = query.shape[:-1]
    if query.ndim == 3:
        query, target, positives = flat_rows(query, target, positives)
        if isinstance(neg, Tensor) and neg.ndim > 1:
            if neg.ndim != 3 or neg.shape[:2] != shape:
                raise ValueError(
                    f"neg must be ({shape[0]}, {shape[1]}, n), as the query is, or (n,), got {tuple(neg.shape)}"
                )
            neg = neg.flatten(0, 1)
    engine = dispatch.choose_backend(backend, query, "sampled_softmax")
    checks.check_matrices(query, catalog, bias, 0, engine)
    checks.check_loss(temperature, positive_weight, reduction)
    b, v = query.shape[0], catalog.shape[0]
    checks.check_ids("target", target, b, (1,), query.device)
    checks.check_integer("ignore_index", ignore_index)
    checks.check_flag("sparse_grad", sparse_grad)
    ids: object = neg
    if isinstance(ids, RankSlice):
        raise TypeError("neg must be a tensor of ids, got a RankSlice; slice_cross_entropy takes one")
    checks.check_tensor("neg", neg)
    checks.check_ids("neg", neg, neg.shape[0] if neg.ndim == 1 else b, (1, 2), query.device)
    if positives is not None:
        checks.check_ids("positives", positives, b, (2,), query.device)
    if log_q is not None:
        checks.check_vector("log_q", log_q, v, query.device)
    if weight is not None:
        checks.check_vector("weight", weight, v, query.device)
    arithmetic, checked = dispatch.choose_precision(precision, query, catalog), dispatch.choose_check(check, query)
    problem = SampledLoss(
        query,
        catalog,
        target,
        neg,
        None if log_q is None else log_q.detach(),
        positives,
        positive_weight,
        *split_temperature(temperature, query),
        bias,
        ignore_index,
        bool(sparse_grad),
        arithmetic,
    )
    if engine == "reference":
        losses = _reference(problem, checked)
    else:
        saved_size = 0
        if dispatch.needs_gradient(query, catalog, bias, problem.temperature_tensor):
            on_cpu = engine == "native" and query.device.type == "cpu"
            saved_size = _saved_on_cpu(problem) if on_cpu else _saved_logits(problem)
        losses = _op(_Forward(problem, saved_size, checked), engine)[0]
    return finish_loss(problem, losses, reduction, shape, weight)


class SampledLoss(NamedTuple):
    """What forward and backward pass are given."""

    query: Tensor
    catalog: Tensor
    target: Tensor
    neg: Tensor
    log_q: Tensor | None
    positives: Tensor | None
    positive_weight: float
    temperature: float
    temperature_tensor: Tensor | None  # () float32, in temperature's place
    bias: Tensor | None
    ignore_index: int
    sparse_grad: bool
    precision: str


class _Forward(NamedTuple):
    problem: SampledLoss
    saved_size: int  # bytes of logits that may be saved for the backward pass
    check: bool


class _Backward(NamedTuple):
    grad_losses: Tensor  # (B,)
    problem: SampledLoss
    lse: Tensor  # (B,) log-sum-exp of the negatives' logits
    saved: Tensor  # uint8
    needs: list[bool]  # the gradients of query, catalog, bias; and whether query's and bias's are in float32


SAVED_SHARED_BYTES = 256 << 20  # what the logits of shared negatives may take from forward to backward


def _saved_on_cpu(p: SampledLoss) -> int:
    """For each row a softmax over its negatives and a mean embedding; of shared negatives the logits, in whole tiles of
    512 distinct items."""
    rows, width = p.query.shape
    if p.neg.ndim == 2:
        return rows * (p.neg.shape[1] + width) * 4
    items = p.neg.shape[0] + rows * (1 if p.positives is None else 1 + p.positives.shape[1])
    size: int = torch.sym_min(SAVED_SHARED_BYTES, rows * -(-items // 512) * (512 + 1) * 4)
    return size


def _saved_logits(p: SampledLoss) -> int:
    """What engines for CUDA tensors save: the logits of negatives, target and positives."""
    return p.query.shape[0] * (p.neg.shape[-1] + 1 + (0 if p.positives is None else p.positives.shape[1])) * 4


def _reference(p: SampledLoss, check: bool) -> Tensor:
    return sampled_softmax_ref(
        p.query,
        p.catalog,
        p.target,
        p.neg,
        p.log_q,
        p.positives,
        p.positive_weight,
        p.temperature if p.temperature_tensor is None else p.temperature_tensor,
        p.bias,
        p.ignore_index,
        p.sparse_grad,
        p.precision,
        check,
    )


def _forward_fake(x: _Forward) -> tuple[Tensor, Tensor, Tensor]:
    query = x.problem.query
    losses = query.new_empty(query.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses), query.new_empty(x.saved_size, dtype=torch.uint8)


def _backward_fake(x: _Backward) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = x.problem
    items = torch.library.get_ctx().new_dynamic_size() if p.sparse_grad else 0
    rows = items if p.sparse_grad else p.catalog.shape[0]
    query_dtype, bias_dtype = gradient_dtypes(p, x.needs)
    return (
        p.query.new_empty(p.query.shape if x.needs[0] else 0, dtype=query_dtype),
        p.catalog.new_empty((rows, p.catalog.shape[1]) if x.needs[1] else 0),
        p.catalog.new_empty(p.catalog.shape[0] if x.needs[2] else 0, dtype=bias_dtype),
        p.catalog.new_empty(items, dtype=torch.int64),
    )


def _triton(x: _Forward) -> tuple[Tensor, Tensor, Tensor]:
    from alterrec_fast.kernels.losses import Saved
    from alterrec_fast.kernels.sampled_softmax import sampled_softmax_fwd

    p = x.problem
    if x.check:
        if p.temperature_tensor is not None:
            check_temperature_value(p.temperature_tensor)
        v = p.catalog.shape[0]
        check_loss_ids(p.target, p.positives, p.bias, 0, v, p.ignore_index)
        check_ids_in("neg", p.neg if p.neg.ndim == 2 else p.neg.unsqueeze(1), 0, v, -1)
    problem = _triton_problem(p, x.check)
    saved = Saved.empty(problem, x.saved_size, p.neg)
    losses, lse, logits = sampled_softmax_fwd(problem, p.neg.contiguous(), saved.neg)
    saved.store(logits)
    checks.raise_not_finite(problem.bad)
    return losses, lse, saved.memory


def _triton_backward(x: _Backward) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from alterrec_fast.kernels.losses import Dlogits, Saved
    from alterrec_fast.kernels.sampled_softmax import sampled_softmax_bwd

    p = x.problem
    bias_dtype = gradient_dtypes(p, x.needs)[1]
    problem = _triton_problem(p, False)
    saved = Saved.of(problem, x.saved, p.neg)
    dlogits = Dlogits.of(problem, x.grad_losses, x.lse, saved.pos)
    grads = sampled_softmax_bwd(problem, p.neg.contiguous(), saved.neg, dlogits, p.sparse_grad, x.needs)
    return grads.query, grads.catalog, grads.bias.to(bias_dtype), grads.items


def _triton_problem(p: SampledLoss, check: bool) -> Any:
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
        p.log_q,
        p.ignore_index,
        p.precision,
        check,
    )


_op = Op("sampled_softmax", _Forward, 3, _triton, _forward_fake)
_backward_op = Op("sampled_softmax_backward", _Backward, 4, _triton_backward, _backward_fake)


def _backward(
    p: SampledLoss, engine: str, grad_losses: Tensor, lse: Tensor, saved: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    asked = [True, needs[1], p.bias is not None, True] if needs[3] else needs
    query, catalog, bias, items = _backward_op(_Backward(grad_losses, p, lse, saved, asked), engine)
    if p.sparse_grad and needs[1]:
        catalog = torch.sparse_coo_tensor(
            items.unsqueeze(0), catalog, p.catalog.shape, check_invariants=False, is_coalesced=True
        )
    return with_temperature(p, query, catalog, bias) if needs[3] else (query, catalog, bias, query)


def _losses(p: SampledLoss) -> Tensor:
    """The losses in plain PyTorch, whose gradients have gradients."""
    return _reference(p._replace(sparse_grad=False), False)


_op.differentiate(("query", "catalog", "bias", "temperature_tensor"), _backward, _losses)
