"""Checks of arguments that ops share: messages name the argument, what was expected and what was found."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
FLOATS = (torch.float32, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


def check_matrices(query: Tensor, catalog: Tensor, bias: Tensor | None, first_item: int, backend: str) -> None:
    """Shapes, dtypes, devices and strides of what every op takes: query (B, d), catalog (V, d), bias (V,)."""
    floats = (*FLOATS, torch.float64) if backend == "reference" else FLOATS
    for name, tensor in (("query", query), ("catalog", catalog)):
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be 2-D, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in floats:
            raise TypeError(
                f"{name} must be float32 or bfloat16 (float64 with backend='reference'), got {tensor.dtype}"
            )
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"{name} must have unit last stride, got strides {tensor.stride()}")
    if query.shape[1] != catalog.shape[1]:
        raise ValueError(f"query and catalog must have one width d, got {query.shape[1]} and {catalog.shape[1]}")
    if query.device != catalog.device:
        raise ValueError(f"query and catalog must be on one device, got {query.device} and {catalog.device}")
    if (query.dtype == torch.float64) != (catalog.dtype == torch.float64):
        raise TypeError(f"float64 goes with float64 only, got {query.dtype} and {catalog.dtype}")
    v = catalog.shape[0]
    if bias is not None:
        check_vector("bias", bias, v, catalog.device)
    if not 0 <= first_item <= v:
        raise ValueError(f"first_item must lie in [0, {v}], got {first_item}")


def check_vector(name: str, vector: Tensor, length: int, device: torch.device) -> None:
    """One float for each item: bias and log_q."""
    if vector.shape != (length,):
        raise ValueError(f"{name} must be ({length},), got {tuple(vector.shape)}")
    if not vector.dtype.is_floating_point or vector.dtype == torch.float16:
        raise TypeError(f"{name} must be float32 or bfloat16, got {vector.dtype}")
    if vector.device != device:
        raise ValueError(f"{name} must be on {device}, got {vector.device}")


def check_ids(name: str, ids: Tensor, rows: int, ndims: tuple[int, ...], device: torch.device) -> None:
    """Shape, dtype and device of an id tensor whose first dimension is the batch."""
    if ids.ndim not in ndims or ids.shape[0] != rows:
        forms = " or ".join(f"({rows}{', n' if n == 2 else ''})" for n in ndims)
        raise ValueError(f"{name} must be {forms}, got {tuple(ids.shape)}")
    if ids.dtype not in INTEGERS:
        raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
    if ids.device != device:
        raise ValueError(f"{name} must be on {device}, got {ids.device}")


def check_range(name: str, start: int, stop: int, items: int) -> None:
    """0 <= start <= stop <= items, the number of items that are ranked."""
    if not 0 <= start <= stop:
        raise ValueError(f"{name}: expected 0 <= start <= stop, got start={start}, stop={stop}")
    if stop > items:
        raise ValueError(f"{name}: rank {stop} is beyond the catalog, which holds {items} items")


def check_loss(temperature: float, positive_weight: float, reduction: str) -> None:
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not positive_weight >= 0.0:
        raise ValueError(f"positive_weight must be at least 0, got {positive_weight}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_ids_in(name: str, ids: Tensor, first: int, stop: int, none: int) -> None:
    """Raises ValueError with row and value where an id is neither `none` nor in [first, stop)."""
    bad = (ids != none) & ((ids < first) | (ids >= stop))
    if bad.any():
        where = bad.nonzero()[0]
        raise ValueError(
            f"{name}: row {int(where[0])} holds {int(ids[tuple(where)])}, expected {none} or an id in [{first}, {stop})"
        )


def check_exclude_values(exclude: tuple[Tensor, Tensor], num_items: int) -> None:
    """Raises ValueError with row and value where an excluded id lies beyond the catalog, or offsets do not rise."""
    values, offsets = exclude
    if int(offsets[0]) != 0 or int(offsets[-1]) != values.numel() or bool((offsets.diff() < 0).any()):
        raise ValueError(f"exclude: offsets must rise from 0 to the {values.numel()} values, got {offsets.tolist()}")
    beyond = values >= num_items
    if beyond.any():
        place = int(beyond.nonzero()[0])
        row = int(torch.searchsorted(offsets, place, right=True)) - 1
        raise ValueError(f"exclude: row {row} holds {int(values[place])}, expected an id below {num_items}")


def raise_not_finite(bad: Tensor | None) -> None:
    """Raises ValueError for what a Triton kernel found: (1,) int64, row << 32 | the bits of a float32 score; the
    largest int64 where all scores were finite."""
    found = torch.iinfo(torch.int64).max if bad is None else int(bad)
    if found != torch.iinfo(torch.int64).max:
        score = struct.unpack("<f", struct.pack("<I", found & 0xFFFFFFFF))[0]
        raise ValueError(f"scores: row {found >> 32} has a score of {score}, expected a finite one")
