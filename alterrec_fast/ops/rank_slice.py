"""rank_slice: ranks [start, stop) of the whole catalog for every session, as a set."""

from __future__ import annotations

import torch
from torch import Tensor

from alterrec_fast.ops import checks, dispatch, library
from alterrec_fast.ops.checks import check_exclude_values
from alterrec_fast.ops.reference import rank_slice_ref
from alterrec_fast.ops.slices import RankSlice, bits_width, exclude_lists, uses_bits

library.LIBRARY.define(
    "rank_slice(Tensor query, Tensor catalog, int start, int stop, int top, Tensor exclude_values, "
    "Tensor exclude_offsets, Tensor? bias, int first_item, Tensor? guess, str precision, bool check) "
    "-> (Tensor members, Tensor top, Tensor thresholds)"
)


def rank_slice(
    query: Tensor,
    catalog: Tensor,
    *,
    start: int,
    stop: int,
    top: int = 0,
    exclude: Tensor | tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    first_item: int = 0,
    precision: str | None = None,
    check: bool | None = None,
    backend: str | None = None,
) -> RankSlice:
    """The items of ranks [start, stop) by the score ``query @ catalog.T + bias``, for every row of the query.

    Equivalent to: ``(query @ catalog.T + bias).sort(dim=1, descending=True, stable=True).indices[:, start:stop]`` as a
    set. Ranks are 0-based and half-open; ties go to the lower id. No gradient flows.

    Args:
        query: (B, d) float32 or bfloat16, any strides.
        catalog: (V, d) float32 or bfloat16, any strides.
        start, stop: 0 <= start <= stop <= V - first_item.
        top: how many of the first ranks to return in order, in `RankSlice.top`.
        exclude: (B,) or (B, m) ids, or (values (E,), offsets (B + 1,)); int32 or int64; negative ids are none. Ranks
            are counted over the whole catalog, and excluded ids then leave the slice; `top` and `thresholds` ignore it.
        bias: (V,) added to the scores. An item with -inf is never a candidate: ranks count the others only, and ranks
            beyond them stay empty (no bit, -1 in ids and `top`, -inf in `thresholds`). +inf and NaN are errors.
        first_item: rows of the catalog before it are padding; ranks count from there.
        precision: "fp32", "bf16" (products of values rounded to bfloat16, accumulated in float32), or None: bf16 where
            an input is bfloat16 or under autocast to bfloat16.
        check: whether values are checked; None: on the CPU.
        backend: "auto", "reference", "native" or "triton"; None: that of the `backend` block around the call, else
            "auto".

    Raises:
        TypeError: for an argument of a wrong kind or dtype.
        ValueError: for a wrong shape or device, start > stop, a rank beyond the catalog; where `check` holds
            also for an excluded id beyond the catalog and for a score that is not finite.
        BackendError: where the backend named cannot serve these tensors.
    """
    checks.check_tensor("query", query)
    engine = dispatch.choose_backend(backend, query, "rank_slice")
    checks.check_matrices(query, catalog, bias, first_item, engine)
    checks.check_range("start, stop", start, stop, catalog.shape[0] - first_item)
    checks.check_integer("top", top)
    checks.check_range("top", 0, top, catalog.shape[0] - first_item)
    left_out = exclude_lists(exclude, query.shape[0], query.device)
    checked = dispatch.choose_check(check, query)
    arithmetic = dispatch.choose_precision(precision, query, catalog)
    query, catalog, bias = dispatch.detached(query, catalog, bias)
    if engine == "reference":
        if checked:
            check_exclude_values(left_out, catalog.shape[0])
        return rank_slice_ref(query, catalog, start, stop, top, left_out, bias, first_item, arithmetic, checked)
    op = _triton if engine == "triton" and query.device.type == "cpu" else torch.ops.alterrec_fast.rank_slice
    members, best, thresholds = op(
        query, catalog, start, stop, top, *left_out, bias, first_item, None, arithmetic, checked
    )
    as_bits = uses_bits(catalog.shape[0], stop - start)
    return RankSlice(
        bits=members if as_bits else None,
        ids=None if as_bits else members,
        top=best,
        thresholds=thresholds,
        exclude_values=left_out[0],
        exclude_offsets=left_out[1],
        num_items=catalog.shape[0],
        first_item=first_item,
        size=stop - start,
    )


def _fake(
    query: Tensor,
    catalog: Tensor,
    start: int,
    stop: int,
    top: int,
    exclude_values: Tensor,
    exclude_offsets: Tensor,
    bias: Tensor | None,
    first_item: int,
    guess: Tensor | None,
    precision: str,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    b, v = query.shape[0], catalog.shape[0]
    if uses_bits(v, stop - start):
        members = query.new_empty(b, bits_width(v), dtype=torch.uint8)
    else:
        members = query.new_empty(b, stop - start, dtype=torch.int32)
    return members, query.new_empty(b, top, dtype=torch.int64), query.new_empty(b, 2, dtype=torch.float32)


torch.library.register_fake("alterrec_fast::rank_slice", _fake, lib=library.LIBRARY)


def _triton(
    query: Tensor,
    catalog: Tensor,
    start: int,
    stop: int,
    top: int,
    exclude_values: Tensor,
    exclude_offsets: Tensor,
    bias: Tensor | None,
    first_item: int,
    guess: Tensor | None,
    precision: str,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton engine; CPU tensors come here directly, under the interpreter."""
    from alterrec_fast.kernels.rank_slice import rank_slice_fwd

    v = catalog.shape[0]
    if check:
        check_exclude_values((exclude_values, exclude_offsets), v)
    *found, bad = rank_slice_fwd(
        query,
        catalog,
        start,
        stop,
        top,
        exclude_values,
        exclude_offsets,
        bias,
        first_item,
        precision,
        check,
        uses_bits(v, stop - start),
        bits_width(v),
    )
    checks.raise_not_finite(bad)
    members, best, thresholds = found
    return members, best, thresholds


torch.library.impl("alterrec_fast::rank_slice", "CUDA", _triton, lib=library.LIBRARY)
library.TRITON_OPS.add("rank_slice")
