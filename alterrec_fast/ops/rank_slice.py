"""rank_slice: ranks [start, stop) of the whole catalog for every session, as a set."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alterrec_fast.ops import checks, dispatch
from alterrec_fast.ops.checks import check_exclude_values
from alterrec_fast.ops.layer_norm import NO_NORM, RowNorm
from alterrec_fast.ops.library import Op
from alterrec_fast.ops.reference import rank_slice_ref
from alterrec_fast.ops.slices import RankSlice, bits_width, exclude_lists, unchecked_slice, uses_bits


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
    _norm: RowNorm = NO_NORM,  # of item tables, whose rows are ranked as they come out of it
) -> RankSlice:
    """The items of ranks [start, stop) by the score ``query @ catalog.T + bias``, for every row of the query.

    Equivalent to: ``(query @ catalog.T + bias).sort(dim=1, descending=True, stable=True).indices[:, start:stop]`` as a
    set. Ranks are 0-based and half-open; ties go to the lower id. No gradient flows.

    Args:
        query: (B, d) float32, bfloat16 or float16, any strides.
        catalog: (V, d) float32, bfloat16 or float16, any strides.
        start, stop: 0 <= start <= stop <= V - first_item.
        top: how many of the first ranks to return in order, in `RankSlice.top`.
        exclude: (B,) or (B, m) ids, or (values (E,), offsets (B + 1,)); int32 or int64; negative ids are none. Ranks
            are counted over the whole catalog, and excluded ids then leave the slice; `top` and `thresholds` ignore it.
        bias: (V,) added to the scores. An item with -inf is never a candidate: ranks count the others only, and ranks
            beyond them stay empty (no bit, -1 in ids and `top`, -inf in `thresholds`). +inf and NaN are errors.
        first_item: rows of the catalog before it are padding; ranks count from there.
        precision: "fp32"; "bf16" or "fp16", products of values rounded to bfloat16 or float16, accumulated in float32;
            or None: the format of autocast, else of the narrower input. Where those have both 16-bit formats it is
            "fp32"; one that is asked for by name beside a tensor of the other raises ValueError.
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
    exclude_ids = exclude_lists(exclude, query.shape[0], query.device)
    checked = dispatch.choose_check(check, query)
    arithmetic = dispatch.choose_precision(precision, query, catalog)
    query, catalog, bias = dispatch.detached(query, catalog, bias)
    if engine != "native":
        catalog, _norm = _norm.of(catalog), NO_NORM
    if engine == "reference":
        if checked:
            check_exclude_values(exclude_ids, catalog.shape[0])
        return rank_slice_ref(query, catalog, start, stop, top, exclude_ids, bias, first_item, arithmetic, checked)
    inputs = _Inputs(query, catalog, start, stop, top, *exclude_ids, bias, first_item, arithmetic, checked, _norm)
    members, best, thresholds = _op(inputs, engine)
    as_bits = uses_bits(catalog.shape[0], stop - start)
    return unchecked_slice(
        bits=members if as_bits else None,
        ids=None if as_bits else members,
        top=best,
        thresholds=thresholds,
        exclude_values=exclude_ids[0],
        exclude_offsets=exclude_ids[1],
        num_items=catalog.shape[0],
        first_item=first_item,
        size=stop - start,
    )


class _Inputs(NamedTuple):
    query: Tensor
    catalog: Tensor
    start: int
    stop: int
    top: int
    exclude_values: Tensor
    exclude_offsets: Tensor
    bias: Tensor | None
    first_item: int
    precision: str
    check: bool
    norm: RowNorm


def _fake(x: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    (b, _), v, size = x.query.shape, x.catalog.shape[0], x.stop - x.start
    if uses_bits(v, size):
        members = x.query.new_empty(b, bits_width(v), dtype=torch.uint8)
    else:
        members = x.query.new_empty(b, size, dtype=torch.int32)
    return members, x.query.new_empty(b, x.top, dtype=torch.int64), x.query.new_empty(b, 2, dtype=torch.float32)


def _triton(x: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    from alterrec_fast.kernels.rank_slice import rank_slice_fwd

    v = x.catalog.shape[0]
    if x.check:
        check_exclude_values((x.exclude_values, x.exclude_offsets), v)
    members, best, thresholds, bad = rank_slice_fwd(
        checks.plain_strides(x.query),
        checks.plain_strides(x.catalog),
        x.start,
        x.stop,
        x.top,
        x.exclude_values,
        x.exclude_offsets,
        x.bias,
        x.first_item,
        x.precision,
        x.check,
        uses_bits(v, x.stop - x.start),
        bits_width(v),
    )
    checks.raise_not_finite(bad)
    return members, best, thresholds


_op = Op("rank_slice", _Inputs, 3, _triton, _fake)
