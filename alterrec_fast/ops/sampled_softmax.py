"""sampled_softmax: softmax cross-entropy of targets against sampled negatives, gathered row by row."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from alterrec_fast.ops import checks, dispatch, library
from alterrec_fast.ops.checks import check_ids_in
from alterrec_fast.ops.reference import reduce_loss, sampled_softmax_ref
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
    temperature: float = 1.0,
    bias: Tensor | None = None,
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

    Args:
        query: (B, d) float32 or bfloat16, any strides; gets a gradient.
        catalog: (V, d) float32 or bfloat16, any strides; gets a gradient.
        target: (B,) int32 or int64.
        neg: (B, n), or (n,) shared by all rows; int32 or int64, -1 is none.
        log_q: (V,), the log of each item's expected count among the negatives; no gradient.
        positives, positive_weight, temperature, bias, reduction, ignore_index: as in `slice_cross_entropy`.
        sparse_grad: the catalog's gradient as a coalesced sparse tensor of the touched rows. torch drops the mark, not
            the order, when it stores the gradient as ``catalog.grad``; `torch.autograd.grad` returns it marked.
        precision, check, backend: as in `rank_slice`.

    Raises:
        TypeError, ValueError, BackendError: as `slice_cross_entropy` does.
    """
    checks.check_tensor("query", query)
    engine = dispatch.choose_backend(backend, query, "sampled_softmax")
    checks.check_matrices(query, catalog, bias, 0, engine)
    checks.check_loss(temperature, positive_weight, reduction)
    b, v = query.shape[0], catalog.shape[0]
    checks.check_ids("target", target, b, (1,), query.device)
    checks.check_integer("ignore_index", ignore_index)
    checks.check_flag("sparse_grad", sparse_grad)
    if isinstance(neg, RankSlice):
        raise TypeError("neg must be a tensor of ids, got a RankSlice; slice_cross_entropy takes one")
    checks.check_tensor("neg", neg)
    checks.check_ids("neg", neg, neg.shape[0] if neg.ndim == 1 else b, (1, 2), query.device)
    if positives is not None:
        checks.check_ids("positives", positives, b, (2,), query.device)
    if log_q is not None:
        checks.check_vector("log_q", log_q, v, query.device)
    fixed_log_q = None if log_q is None else log_q.detach()
    chosen, checked = dispatch.choose_precision(precision, query, catalog), dispatch.choose_check(check, query)
    if engine != "reference":
        op = torch.ops.alterrec_fast.sampled_softmax
        kept = _kept_on_cpu if query.device.type == "cpu" else _kept_logits
        if engine == "triton":
            op, kept = torch.ops.alterrec_fast.sampled_softmax_triton, _kept_logits
        needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, catalog, bias))
        losses = op(
            query,
            catalog,
            target,
            neg,
            fixed_log_q,
            positives,
            positive_weight,
            temperature,
            bias,
            ignore_index,
            sparse_grad,
            kept(query, neg, positives) if needed else 0,
            chosen == "bf16",
            checked,
        )[0]
    else:
        losses = sampled_softmax_ref(
            query,
            catalog,
            target,
            neg,
            fixed_log_q,
            positives,
            positive_weight,
            temperature,
            bias,
            ignore_index,
            sparse_grad,
            chosen,
            checked,
        )
    return reduce_loss(losses, target, ignore_index, reduction)


KEEP_SHARED_BYTES = 256 << 20  # what the logits of shared negatives may take from forward to backward


def _kept_on_cpu(query: Tensor, neg: Tensor, positives: Tensor | None) -> int:
    """What the CPU engine keeps for the backward pass: for each row a softmax over its negatives and a mean embedding;
    of shared negatives the logits, in whole tiles of 512 distinct items."""
    rows, width = query.shape
    if neg.ndim == 2:
        return rows * (neg.shape[1] + width) * 4
    items = neg.shape[0] + rows * (1 if positives is None else 1 + positives.shape[1])
    kept: int = torch.sym_min(KEEP_SHARED_BYTES, rows * -(-items // 512) * (512 + 1) * 4)
    return kept


def _kept_logits(query: Tensor, neg: Tensor, positives: Tensor | None) -> int:
    """What engines for CUDA tensors keep: the logits of negatives, target and positives."""
    return query.shape[0] * (neg.shape[-1] + 1 + (0 if positives is None else positives.shape[1])) * 4


def _forward_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    losses = query.new_empty(query.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses), query.new_empty(rest[10], dtype=torch.uint8)


def _backward_fake(_grad: Tensor, query: Tensor, catalog: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias, sparse, needs = rest[6], rest[8], rest[-1]
    items = torch.library.get_ctx().new_dynamic_size() if sparse else 0
    rows = items if sparse else catalog.shape[0]
    return (
        query.new_empty(query.shape if needs[0] else 0),
        catalog.new_empty((rows, catalog.shape[1]) if needs[1] else 0),
        catalog.new_empty(catalog.shape[0] if needs[2] else 0, dtype=torch.float32 if bias is None else bias.dtype),
        catalog.new_empty(items, dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, catalog, target, neg, log_q, positives, ctx.positive_weight, ctx.temperature, bias, *static = inputs
    ctx.ignore_index, ctx.sparse_grad, _, ctx.bf16, _ = static
    ctx.set_materialize_grads(False)  # there are none for what is kept, which may be large
    ctx.save_for_backward(query, catalog, target, neg, log_q, positives, bias, output[1], output[2])


def _backward(backward_op: str, ctx: Any, grad_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    query, catalog, target, neg, log_q, positives, bias, log_partition, kept = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 8)]
    grad_query, grad_catalog, grad_bias, items = getattr(torch.ops.alterrec_fast, backward_op)(
        grad_losses,
        query,
        catalog,
        target,
        neg,
        log_q,
        positives,
        ctx.positive_weight,
        ctx.temperature,
        bias,
        ctx.ignore_index,
        ctx.sparse_grad,
        ctx.bf16,
        log_partition,
        kept,
        needs,
    )
    if ctx.sparse_grad and needs[1]:
        grad_catalog = torch.sparse_coo_tensor(
            items.unsqueeze(0), grad_catalog, catalog.shape, check_invariants=False, is_coalesced=True
        )
    by_input: list[Tensor | None] = [None] * 14
    for place, grad, needed in zip((0, 1, 8), (grad_query, grad_catalog, grad_bias), needs, strict=True):
        by_input[place] = grad if needed else None
    return tuple(by_input)


def _define(name: str) -> None:
    """Schemas, fakes and autograd of one engine's pair of ops."""
    library.LIBRARY.define(
        f"{name}(Tensor query, Tensor catalog, Tensor target, Tensor neg, Tensor? log_q, Tensor? positives, "
        "float positive_weight, float temperature, Tensor? bias, SymInt ignore_index, bool sparse_grad, "
        "SymInt kept_size, bool bf16, bool check) -> (Tensor losses, Tensor log_partition, Tensor kept)"
    )
    library.LIBRARY.define(
        f"{name}_backward(Tensor grad_losses, Tensor query, Tensor catalog, Tensor target, Tensor neg, "
        "Tensor? log_q, Tensor? positives, float positive_weight, float temperature, Tensor? bias, "
        "SymInt ignore_index, bool sparse_grad, bool bf16, Tensor log_partition, Tensor kept, bool[3] needs) "
        "-> (Tensor query, Tensor catalog, Tensor bias, Tensor items)"
    )
    full = f"alterrec_fast::{name}"
    torch.library.register_fake(full, _forward_fake, lib=library.LIBRARY)
    torch.library.register_fake(f"{full}_backward", _backward_fake, lib=library.LIBRARY)
    backward = functools.partial(_backward, f"{name}_backward")
    torch.library.register_autograd(full, backward, setup_context=_setup_context, lib=library.LIBRARY)


def _triton(
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
    _sparse_grad: bool,
    kept_size: int,
    bf16: bool,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from alterrec_fast.kernels.losses import Problem, Saved
    from alterrec_fast.kernels.sampled_softmax import sampled_softmax_fwd

    if check:
        v = catalog.shape[0]
        check_ids_in("target", target, 0, v, ignore_index)
        check_ids_in("neg", neg if neg.ndim == 2 else neg.unsqueeze(1), 0, v, -1)
        if positives is not None:
            check_ids_in("positives", positives, 0, v, -1)
    p = Problem.of(
        query, catalog, target, positives, positive_weight, temperature, bias, log_q, ignore_index, bf16, check
    )
    kept = Saved.empty(p, kept_size, neg)
    losses, log_partition, logits = sampled_softmax_fwd(p, neg, kept.neg)
    kept.store(logits)
    checks.raise_not_finite(p.bad)
    return losses, log_partition, kept.memory


def _triton_backward(
    grad_losses: Tensor,
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
    bf16: bool,
    log_partition: Tensor,
    kept: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from alterrec_fast.kernels.losses import Dlogits, Problem, Saved
    from alterrec_fast.kernels.sampled_softmax import sampled_softmax_bwd

    p = Problem.of(
        query, catalog, target, positives, positive_weight, temperature, bias, log_q, ignore_index, bf16, False
    )
    logits = Saved.of(p, kept, neg)
    x = Dlogits.of(p, grad_losses, log_partition, logits.pos)
    grads = sampled_softmax_bwd(p, neg, logits.neg, x, sparse_grad, needs)
    return grads.query, grads.catalog, grads.bias if bias is None else grads.bias.to(bias.dtype), grads.items


# The first is compiled code's, for CPU tensors and where nvcc was there for CUDA tensors; the second Triton's, which
# under the interpreter serves CPU tensors.
for name in ("sampled_softmax", "sampled_softmax_triton"):
    _define(name)
for key in ("CUDA", "CPU"):
    torch.library.impl("alterrec_fast::sampled_softmax_triton", key, _triton, lib=library.LIBRARY)
    torch.library.impl("alterrec_fast::sampled_softmax_triton_backward", key, _triton_backward, lib=library.LIBRARY)
library.TRITON_OPS.add("sampled_softmax")
