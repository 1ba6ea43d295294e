"""slice_cross_entropy: softmax cross-entropy of targets against a set of negatives, in tiles of scores."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from alterrec_fast.ops import checks, dispatch, library
from alterrec_fast.ops.checks import check_ids_in
from alterrec_fast.ops.reference import reduce_loss, slice_cross_entropy_ref
from alterrec_fast.ops.slices import RankSlice


def slice_cross_entropy(
    query: Tensor,
    catalog: Tensor,
    target: Tensor,
    neg: RankSlice | None = None,
    *,
    positives: Tensor | None = None,
    positive_weight: float = 1.0,
    temperature: float = 1.0,
    bias: Tensor | None = None,
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
    ``softplus(Z - y_t) + positive_weight * sum_k softplus(Z - y_k)``: AlterRec, Eqs. (8) to (11), one log-partition for
    all positives. N is `neg` without the target; without `neg` every item from first_item on but the target, which is
    ``F.cross_entropy((query @ catalog.T + bias) / temperature, target)``. A row without negatives has zero loss.

    Args:
        query: (B, d) float32 or bfloat16, any strides; gets a gradient.
        catalog: (V, d) float32 or bfloat16, any strides; gets a gradient.
        target: (B,) int32 or int64.
        neg: the negatives, of B rows over V items, or None for all items.
        positives: (B, P) int32 or int64, -1 is none. A positive may equal the target, repeat, or be a negative as well.
        positive_weight: what a positive counts against the target (beta in the paper).
        temperature: above 0; a number, as positive_weight: a tensor raises TypeError, since it would get no gradient.
        bias: (V,); gets a gradient. An item with -inf is no negative and gets a gradient of zero; as a target or
            positive it is an error. +inf and NaN are errors.
        first_item: rows before it are padding: no negatives (`neg` must be made with this first_item or more), and no
            targets.
        reduction: "mean" over the rows whose target is not ignore_index (0 over none), "sum", or "none" for (B,).
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
    checks.check_tensor("query", query)
    engine = dispatch.choose_backend(backend, query, "slice_cross_entropy")
    checks.check_matrices(query, catalog, bias, first_item, engine)
    checks.check_loss(temperature, positive_weight, reduction)
    (b, d), v = query.shape, catalog.shape[0]
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
    chosen, checked = dispatch.choose_precision(precision, query, catalog), dispatch.choose_check(check, query)
    if engine != "reference":
        members = None if neg is None else neg.ids if neg.bits is None else neg.bits
        op, kept_size = (
            torch.ops.alterrec_fast.slice_cross_entropy,
            torch.sym_min(max_saved_bytes, _kept_bytes(b, v, d)),
        )
        if engine == "triton":
            op, kept_size = torch.ops.alterrec_fast.slice_cross_entropy_triton, _kept_logits(b, members, positives)
        if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in (query, catalog, bias)):
            kept_size = 0
        rows = op(
            query,
            catalog,
            target,
            members,
            positives,
            positive_weight,
            temperature,
            bias,
            first_item,
            ignore_index,
            kept_size,
            chosen == "bf16",
            checked,
        )[0]
    else:
        rows = slice_cross_entropy_ref(
            query,
            catalog,
            target,
            neg,
            positives,
            positive_weight,
            temperature,
            bias,
            first_item,
            ignore_index,
            chosen,
            checked,
        )
    return reduce_loss(rows, target, ignore_index, reduction)


def _kept_bytes(rows: int, items: int, width: int) -> int:
    """The most that the native engine can use: float32 logits of whole tiles of 512 items with a scale for each tile
    and row; for a slice of ids, a softmax over them and a mean embedding."""
    return rows * (-(-items // 512) * (512 + 1) + width) * 4


def _kept_logits(rows: int, members: Tensor | None, positives: Tensor | None) -> int:
    """What the Triton engine keeps: the logits of target and positives, and of a slice of ids."""
    negatives = members.shape[1] if _are_ids(members) and members is not None else 0
    return rows * (negatives + 1 + (0 if positives is None else positives.shape[1])) * 4


def _are_ids(members: Tensor | None) -> bool:
    return members is not None and members.dtype != torch.uint8


def _forward_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    losses = query.new_empty(query.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses), query.new_empty(rest[9], dtype=torch.uint8)


def _backward_fake(_grad: Tensor, query: Tensor, catalog: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    bias, needs = rest[5], rest[-1]
    return (
        query.new_empty(query.shape if needs[0] else 0),
        catalog.new_empty(catalog.shape if needs[1] else 0),
        catalog.new_empty(catalog.shape[0] if needs[2] else 0, dtype=torch.float32 if bias is None else bias.dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, catalog, target, members, positives, ctx.positive_weight, ctx.temperature, bias, *static = inputs
    ctx.first_item, ctx.ignore_index, _, ctx.bf16, _ = static
    ctx.set_materialize_grads(False)  # there are none for what is kept, which may be large
    ctx.save_for_backward(query, catalog, target, members, positives, bias, output[1], output[2])


def _backward(backward_op: str, ctx: Any, grad_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    query, catalog, target, members, positives, bias, log_partition, kept = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 7)]
    grads = getattr(torch.ops.alterrec_fast, backward_op)(
        grad_losses,
        query,
        catalog,
        target,
        members,
        positives,
        ctx.positive_weight,
        ctx.temperature,
        bias,
        ctx.first_item,
        ctx.ignore_index,
        ctx.bf16,
        log_partition,
        kept,
        needs,
    )
    by_input: list[Tensor | None] = [None] * 13
    for place, grad, needed in zip((0, 1, 7), grads, needs, strict=True):
        by_input[place] = grad if needed else None
    return tuple(by_input)


def _define(name: str) -> None:
    """Schemas, fakes and autograd of one engine's pair of ops."""
    library.LIBRARY.define(
        f"{name}(Tensor query, Tensor catalog, Tensor target, Tensor? members, Tensor? positives, "
        "float positive_weight, float temperature, Tensor? bias, SymInt first_item, SymInt ignore_index, "
        "SymInt kept_size, bool bf16, bool check) -> (Tensor losses, Tensor log_partition, Tensor kept)"
    )
    library.LIBRARY.define(
        f"{name}_backward(Tensor grad_losses, Tensor query, Tensor catalog, Tensor target, Tensor? members, "
        "Tensor? positives, float positive_weight, float temperature, Tensor? bias, SymInt first_item, "
        "SymInt ignore_index, bool bf16, Tensor log_partition, Tensor kept, bool[3] needs) -> (Tensor, Tensor, Tensor)"
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
    members: Tensor | None,
    positives: Tensor | None,
    positive_weight: float,
    temperature: float,
    bias: Tensor | None,
    first_item: int,
    ignore_index: int,
    kept_size: int,
    bf16: bool,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from alterrec_fast.kernels import sampled_softmax as gathered
    from alterrec_fast.kernels import slice_cross_entropy as dense
    from alterrec_fast.kernels.losses import Problem, Saved

    if check:
        check_ids_in("target", target, first_item, catalog.shape[0], ignore_index)
        if positives is not None:
            check_ids_in("positives", positives, first_item, catalog.shape[0], -1)
    p = Problem.of(
        query, catalog, target, positives, positive_weight, temperature, bias, None, ignore_index, bf16, check
    )
    kept = Saved.empty(p, kept_size, members if _are_ids(members) else None)
    if _are_ids(members):
        losses, log_partition, logits = gathered.sampled_softmax_fwd(p, members, kept.neg)
    else:
        losses, log_partition, logits = dense.slice_cross_entropy_fwd(p, dense.Columns.of(p, first_item, members))
    kept.store(logits)
    checks.raise_not_finite(p.bad)
    return losses, log_partition, kept.memory


def _triton_backward(
    grad_losses: Tensor,
    query: Tensor,
    catalog: Tensor,
    target: Tensor,
    members: Tensor | None,
    positives: Tensor | None,
    positive_weight: float,
    temperature: float,
    bias: Tensor | None,
    first_item: int,
    ignore_index: int,
    bf16: bool,
    log_partition: Tensor,
    kept: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    from alterrec_fast.kernels import sampled_softmax as gathered
    from alterrec_fast.kernels import slice_cross_entropy as dense
    from alterrec_fast.kernels.losses import Dlogits, Problem, Saved

    p = Problem.of(
        query, catalog, target, positives, positive_weight, temperature, bias, None, ignore_index, bf16, False
    )
    if _are_ids(members):
        logits = Saved.of(p, kept, members)
        x = Dlogits.of(p, grad_losses, log_partition, logits.pos)
        found = gathered.sampled_softmax_bwd(p, members, logits.neg, x, False, needs)
        grads = found.query, found.catalog, found.bias
    else:
        x = Dlogits.of(p, grad_losses, log_partition, Saved.of(p, kept, None).pos)
        grads = dense.slice_cross_entropy_bwd(p, dense.Columns.of(p, first_item, members), x, needs)
    return *grads[:2], grads[2] if bias is None else grads[2].to(bias.dtype)


# The first is the compiled CPU engine's and, on CUDA tensors, Triton's; the second always Triton's, which under the
# interpreter serves CPU tensors.
for name in ("slice_cross_entropy", "slice_cross_entropy_triton"):
    _define(name)
    for key in ("CUDA", "CPU") if name.endswith("triton") else ("CUDA",):
        torch.library.impl(f"alterrec_fast::{name}", key, _triton, lib=library.LIBRARY)
        torch.library.impl(f"alterrec_fast::{name}_backward", key, _triton_backward, lib=library.LIBRARY)
library.TRITON_OPS.add("slice_cross_entropy")
