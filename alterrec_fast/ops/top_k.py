"""top_k: the k best items of the whole catalog for every session, sorted and exact."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alterrec_fast.ops import checks, dispatch, library
from alterrec_fast.ops.checks import check_exclude_values
from alterrec_fast.ops.reference import top_k_ref
from alterrec_fast.ops.slices import exclude_lists

library.LIBRARY.define(
    "top_k(Tensor query, Tensor catalog, int k, Tensor exclude_values, Tensor exclude_offsets, Tensor? bias, "
    "int first_item, str precision, bool check) -> (Tensor scores, Tensor indices)"
)


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
) -> TopK:
    """The k best items by the score ``query @ catalog.T + bias``: scores (B, k) float32 and indices (B, k) int64.

    Equivalent to: ``torch.topk(query @ catalog.T + bias, k)`` with ties in order of the lower id. No gradient flows.

    Args:
        query: (B, d) float32 or bfloat16, any strides.
        catalog: (V, d) float32 or bfloat16, any strides.
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
    left_out = exclude_lists(exclude, query.shape[0], query.device)
    checked = dispatch.choose_check(check, query)
    arithmetic = dispatch.choose_precision(precision, query, catalog)
    query, catalog, bias = dispatch.detached(query, catalog, bias)
    if engine == "reference":
        if checked:
            check_exclude_values(left_out, catalog.shape[0])
        return TopK(*top_k_ref(query, catalog, k, left_out, bias, first_item, arithmetic, checked))
    op = _triton if engine == "triton" and query.device.type == "cpu" else torch.ops.alterrec_fast.top_k
    return TopK(*op(query, catalog, k, *left_out, bias, first_item, arithmetic, checked))


def _fake(
    query: Tensor,
    catalog: Tensor,
    k: int,
    exclude_values: Tensor,
    exclude_offsets: Tensor,
    bias: Tensor | None,
    first_item: int,
    precision: str,
    check: bool,
) -> tuple[Tensor, Tensor]:
    b = query.shape[0]
    return query.new_empty(b, k, dtype=torch.float32), query.new_empty(b, k, dtype=torch.int64)


torch.library.register_fake("alterrec_fast::top_k", _fake, lib=library.LIBRARY)


def _triton(
    query: Tensor,
    catalog: Tensor,
    k: int,
    exclude_values: Tensor,
    exclude_offsets: Tensor,
    bias: Tensor | None,
    first_item: int,
    precision: str,
    check: bool,
) -> tuple[Tensor, Tensor]:
    """The Triton engine; CPU tensors come here directly, under the interpreter."""
    from alterrec_fast.kernels.top_k import top_k_fwd

    if check:
        check_exclude_values((exclude_values, exclude_offsets), catalog.shape[0])
    scores, items, bad = top_k_fwd(
        query, catalog, k, exclude_values, exclude_offsets, bias, first_item, precision, check
    )
    checks.raise_not_finite(bad)
    return scores, items.masked_fill(scores == -torch.inf, -1)


torch.library.impl("alterrec_fast::top_k", "CUDA", _triton, lib=library.LIBRARY)
library.TRITON_OPS.add("top_k")
