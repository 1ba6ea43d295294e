"""sampled_softmax: softmax cross-entropy of targets against sampled negatives, gathered row by row."""

from __future__ import annotations

from torch import Tensor

from alterrec_fast.ops import register
from alterrec_fast.ops.reference import sampled_softmax_ref


def sampled_softmax(
    query: Tensor,
    catalog: Tensor,
    target: Tensor,
    negatives: Tensor,
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
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of each target against its sampled negatives, with logQ correction.

    The loss of `slice_cross_entropy` with logits ``(q . e_i + bias_i) / temperature - log_q_i`` (Bengio and Senecal,
    2008; TensorFlow's sampled_softmax_loss). A repeated negative counts each time; one equal to the target is dropped.

    Args:
        query: (B, d) float32 or bfloat16, unit last stride; gets a gradient.
        catalog: (V, d) float32 or bfloat16, unit last stride; gets a gradient.
        target: (B,) int32 or int64.
        negatives: (B, n), or (n,) shared by all rows; int32 or int64, -1 is none.
        log_q: (V,), the log of each item's expected count among the negatives; no gradient.
        positives, positive_weight, temperature, bias, reduction, ignore_index: as in `slice_cross_entropy`.
        sparse_grad: the catalog's gradient as a coalesced sparse tensor of the touched rows.
        precision, check, backend: as in `rank_slice`.

    Raises:
        TypeError, ValueError, BackendError: as `slice_cross_entropy` does.
    """
    engine = register.choose_backend(backend, query)
    register.check_matrices(query, catalog, bias, 0, engine)
    register.check_loss(temperature, positive_weight, reduction)
    b, v = query.shape[0], catalog.shape[0]
    register.check_ids("target", target, b, (1,), query.device)
    rows = negatives.shape[0] if negatives.ndim == 1 else b
    register.check_ids("negatives", negatives, rows, (1, 2), query.device)
    if positives is not None:
        register.check_ids("positives", positives, b, (2,), query.device)
    if log_q is not None:
        register.check_vector("log_q", log_q, v, query.device)
    losses = sampled_softmax_ref(
        query,
        catalog,
        target,
        negatives,
        None if log_q is None else log_q.detach(),
        positives,
        positive_weight,
        temperature,
        bias,
        ignore_index,
        sparse_grad,
        register.choose_precision(precision, query, catalog),
        register.choose_check(check, query),
    )
    return register.reduce_loss(losses, target, ignore_index, reduction)
