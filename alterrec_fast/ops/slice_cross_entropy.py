"""slice_cross_entropy: softmax cross-entropy of targets against a set of negatives, without a stored score matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alterrec_fast.ops import register
from alterrec_fast.ops.reference import slice_cross_entropy_ref
from alterrec_fast.ops.slices import RankSlice


def slice_cross_entropy(
    query: Tensor,
    catalog: Tensor,
    target: Tensor,
    neg: RankSlice | None = None,
    positives: Tensor | None = None,
    positive_weight: float = 1.0,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    first_item: int = 0,
    reduction: str = "mean",
    ignore_index: int = -100,
    keep_bytes: int = 256 << 20,
    precision: str | None = None,
    check: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of each target, and of extra positives, against the same negatives.

    With y_i = (q . e_i + bias_i) / temperature and Z = logsumexp of y over the negatives N, the row's loss is
    ``softplus(Z - y_t) + positive_weight * sum_k softplus(Z - y_k)``: AlterRec, Eqs. (8) to (11), one log-partition for
    all positives. N is `neg` without the target; without `neg` every item from first_item on but the target, which is
    ``F.cross_entropy((query @ catalog.T + bias) / temperature, target)``. A row without negatives has zero loss.

    Args:
        query: (B, d) float32 or bfloat16, unit last stride; gets a gradient.
        catalog: (V, d) float32 or bfloat16, unit last stride; gets a gradient.
        target: (B,) int32 or int64.
        neg: the negatives, of B rows over V items, or None for all items.
        positives: (B, P) int32 or int64, -1 is none. A positive may equal the target, repeat, or be a negative as well.
        positive_weight: what a positive counts against the target (beta in the paper).
        temperature: above 0.
        bias: (V,); gets a gradient.
        first_item: rows before it are padding: no negatives without `neg`, and no targets.
        reduction: "mean" over the rows whose target is not ignore_index (0 over none), "sum", or "none" for (B,).
        ignore_index: a target that stands for no row.
        keep_bytes: an engine may keep logits of up to this size from forward to backward; it changes the speed only.
        precision, check, backend: as in `rank_slice`.

    Raises:
        TypeError, ValueError, BackendError: as `rank_slice` does; ValueError also for ids beyond the catalog.
    """
    engine = register.choose_backend(backend, query, "slice_cross_entropy")
    register.check_matrices(query, catalog, bias, first_item, engine)
    register.check_loss(temperature, positive_weight, reduction)
    b, v = query.shape[0], catalog.shape[0]
    register.check_ids("target", target, b, (1,), query.device)
    if positives is not None:
        register.check_ids("positives", positives, b, (2,), query.device)
    if keep_bytes < 0:
        raise ValueError(f"keep_bytes must be at least 0, got {keep_bytes}")
    if neg is not None:
        if (neg.batch_size, neg.num_items) != (b, v):
            raise ValueError(f"neg must be of {b} rows over {v} items, got {neg.batch_size} over {neg.num_items}")
        if neg.device != query.device:
            raise ValueError(f"neg must be on {query.device}, got {neg.device}")
    chosen, checked = register.choose_precision(precision, query, catalog), register.choose_check(check, query)
    if engine == "native":
        members = None if neg is None else neg.ids if neg.bits is None else neg.bits
        kept_size = 0
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, catalog, bias)):
            kept_size = torch.sym_min(keep_bytes, _kept_bytes(b, v, query.shape[1]))
        rows = torch.ops.alterrec_fast.slice_cross_entropy(
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
    return register.reduce_loss(rows, target, ignore_index, reduction)


def _kept_bytes(rows: int, items: int, width: int) -> int:
    """The most that the native engine can use: float32 logits of whole tiles of 512 items with a scale for each tile
    and row; for a slice of ids, a softmax over them and a mean embedding."""
    return rows * (-(-items // 512) * (512 + 1) + width) * 4


register.LIBRARY.define(
    "slice_cross_entropy(Tensor query, Tensor catalog, Tensor target, Tensor? members, Tensor? positives, "
    "float positive_weight, float temperature, Tensor? bias, SymInt first_item, SymInt ignore_index, SymInt kept_size, "
    "bool bf16, bool check) -> (Tensor losses, Tensor log_partition, Tensor kept)"
)
register.LIBRARY.define(
    "slice_cross_entropy_backward(Tensor grad_losses, Tensor query, Tensor catalog, Tensor target, Tensor? members, "
    "Tensor? positives, float positive_weight, float temperature, Tensor? bias, SymInt first_item, "
    "SymInt ignore_index, bool bf16, Tensor log_partition, Tensor kept, bool[3] needs) -> (Tensor, Tensor, Tensor)"
)


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


torch.library.register_fake("alterrec_fast::slice_cross_entropy", _forward_fake, lib=register.LIBRARY)
torch.library.register_fake("alterrec_fast::slice_cross_entropy_backward", _backward_fake, lib=register.LIBRARY)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, catalog, target, members, positives, ctx.positive_weight, ctx.temperature, bias, *static = inputs
    ctx.first_item, ctx.ignore_index, _, ctx.bf16, _ = static
    ctx.set_materialize_grads(False)  # there are none for what is kept, which may be large
    ctx.save_for_backward(query, catalog, target, members, positives, bias, output[1], output[2])


def _backward(ctx: Any, grad_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    query, catalog, target, members, positives, bias, log_partition, kept = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 7)]
    grads = torch.ops.alterrec_fast.slice_cross_entropy_backward(
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


torch.library.register_autograd(
    "alterrec_fast::slice_cross_entropy", _backward, setup_context=_setup_context, lib=register.LIBRARY
)
