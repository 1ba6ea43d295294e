"""top_k: the k best items of the whole catalog for every session, sorted and exact."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alterrec_fast.ops import checks, dispatch
from alterrec_fast.ops.checks import check_exclude_values
from alterrec_fast.ops.layer_norm import NO_NORM, RowNorm
from alterrec_fast.ops.library import Op
from alterrec_fast.ops.reference import top_k_ref
from alterrec_fast.ops.slices import exclude_lists


class TopK(NamedTuple):
    """What `top_k` returns: the items of ranks 0..k-1, best first; places that stay empty hold -inf and -1."""

    scores: Tensor  # (B, k) float32
    indices: Tensor  # (B, k) int64


def top_k(
    query: Tensor,
    catalog: Tensor,
    *,
    k: int,
    exclude: Tensor | tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    first_item: int = 0,
    precision: str | None = None,
    check: bool | None = None,
    backend: str | None = None,
    _norm: RowNorm = NO_NORM,  # of item tables, whose rows are ranked as they come out of it
) -> TopK:
    """The k best items by the score ``query @ catalog.T + bias``: scores (B, k) float32 and indices (B, k) int64.

    Equivalent to: ``torch.topk(query @ catalog.T + bias, k)`` with ties in order of the lower id. No gradient flows.

    Args:
        query: (B, d) float32, bfloat16 or float16, any strides.
        catalog: (V, d) float32, bfloat16 or float16, any strides.
        k: 0 <= k <= V - first_item.
        exclude: as in `rank_slice`, but excluded ids never enter the ranking; places that stay empty hold the score
            -inf and the index -1.
        bias, first_item, precision, check, backend: as in `rank_slice`.

    Raises:
        TypeError, ValueError, BackendError: as `rank_slice` does.
    """
    checks.check_tensor("query", query)
    engine = dispatch.choose_backend(backend, query, "top_k")
    checks.check_matrices(query, catalog, bias, first_item, engine)
    checks.check_range("k", 0, k, catalog.shape[0] - first_item)
    exclude_ids = exclude_lists(exclude, query.shape[0], query.device)
    checked = dispatch.choose_check(check, query)
    arithmetic = dispatch.choose_precision(precision, query, catalog)
    query, catalog, bias = dispatch.detached(query, catalog, bias)
    if engine != "native":
        catalog, _norm = _norm.of(catalog), NO_NORM
    if engine == "reference":
        if checked:
            check_exclude_values(exclude_ids, catalog.shape[0])
        return TopK(*top_k_ref(query, catalog, k, exclude_ids, bias, first_item, arithmetic, checked))
    inputs = _Inputs(query, catalog, k, *exclude_ids, bias, first_item, arithmetic, checked, _norm)
    return TopK(*_op(inputs, engine))


class _Inputs(NamedTuple):
    query: Tensor
    catalog: Tensor
    k: int
    exclude_values: Tensor
    exclude_offsets: Tensor
    bias: Tensor | None
    first_item: int
    precision: str
    check: bool
    norm: RowNorm


def _fake(x: _Inputs) -> tuple[Tensor, Tensor]:
    b = x.query.shape[0]
    return x.query.new_empty(b, x.k, dtype=torch.float32), x.query.new_empty(b, x.k, dtype=torch.int64)


def _triton(x: _Inputs) -> tuple[Tensor, Tensor]:
    from alterrec_fast.kernels.top_k import top_k_fwd

    if x.check:
        check_exclude_values((x.exclude_values, x.exclude_offsets), x.catalog.shape[0])
    scores, items, bad = top_k_fwd(
        checks.plain_strides(x.query),
        checks.plain_strides(x.catalog),
        x.k,
        x.exclude_values,
        x.exclude_offsets,
        x.bias,
        x.first_item,
        x.precision,
        x.check,
    )
    checks.raise_not_finite(bad)
    return scores, items.masked_fill(scores == -torch.inf, -1)


_op = Op("top_k", _Inputs, 2, _triton, _fake)
