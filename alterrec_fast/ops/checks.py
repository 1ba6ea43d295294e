"""Checks of arguments that ops share: messages name the argument, what was expected and what was found."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def check_tensor(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a torch.Tensor."""
    if not isinstance(value, Tensor):
        hint = "; torch.from_numpy makes one" if isinstance(value, np.ndarray) else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {kind_of(value)}{hint}")


def check_integer(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a whole number of an integer type: no float, no bool, no tensor."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {kind_of(value)}")


def check_number(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a number; a tensor is none, since it would get no gradient."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor, which would get no gradient; .item() gives its number")
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {kind_of(value)}")


def check_fraction(name: str, value: float) -> None:
    """Raises TypeError or ValueError unless `value` is a number in [0, 1]."""
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_flag(name: str, value: object) -> None:
    """Raises TypeError unless `value` is True, False or None."""
    if value is not None and not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True, False or None, got {kind_of(value)}")


def kind_of(value: object) -> str:
    """The type of an argument and, where that is short, its value; for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (str, int, float)):
        return f"{type(value).__name__} {value!r}"
    if value is None:
        return "None"
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


def check_matrices(query: Tensor, catalog: Tensor, bias: Tensor | None, first_item: int, backend: str) -> None:
    """Shapes, dtypes and devices of what every op takes: query (B, d), catalog (V, d), bias (V,)."""
    floats = (*FLOATS, torch.float64) if backend == "reference" else FLOATS
    for name, tensor in (("query", query), ("catalog", catalog)):
        check_tensor(name, tensor)
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be 2-D, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in floats:
            raise TypeError(
                f"{name} must be float32, bfloat16 or float16 (float64 with backend='reference'), got {tensor.dtype}"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if query.shape[1] != catalog.shape[1]:
        raise ValueError(f"query and catalog must have one width d, got {query.shape[1]} and {catalog.shape[1]}")
    if query.device != catalog.device:
        raise ValueError(f"query and catalog must be on one device, got {query.device} and {catalog.device}")
    if (query.dtype == torch.float64) != (catalog.dtype == torch.float64):
        raise TypeError(f"float64 goes with float64 only, got {query.dtype} and {catalog.dtype}")
    v = catalog.shape[0]
    if bias is not None:
        check_vector("bias", bias, v, catalog.device)
    check_integer("first_item", first_item)
    if not 0 <= first_item <= v:
        raise ValueError(f"first_item must lie in [0, {v}], got {first_item}")


def check_vector(name: str, vector: Tensor, length: int, device: torch.device) -> None:
    """One float for each item: bias, log_q, weight."""
    check_tensor(name, vector)
    if vector.shape != (length,):
        raise ValueError(f"{name} must be ({length},), got {tuple(vector.shape)}")
    if not vector.dtype.is_floating_point:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {vector.dtype}")
    if vector.device != device:
        raise ValueError(f"{name} must be on {device}, got {vector.device}")


def check_ids(name: str, ids: Tensor, rows: int, ndims: tuple[int, ...], device: torch.device) -> None:
    """Shape, dtype and device of an id tensor whose first dimension is the batch."""
    check_tensor(name, ids)
    if ids.ndim not in ndims or ids.shape[0] != rows:
        forms = " or ".join(f"({rows}{', n' if n == 2 else ''})" for n in ndims)
        raise ValueError(f"{name} must be {forms}, got {tuple(ids.shape)}")
    if ids.dtype not in INTEGERS:
        raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
    if ids.device != device:
        raise ValueError(f"{name} must be on {device}, got {ids.device}")


def check_range(name: str, start: int, stop: int, items: int) -> None:
    """0 <= start <= stop <= items, the number of items that are ranked; `name` are the names of both."""
    for argument, value in zip(("start", "stop") if "," in name else (name, name), (start, stop), strict=True):
        check_integer(argument, value)
    if not 0 <= start <= stop:
        raise ValueError(f"{name}: expected 0 <= start <= stop, got start={start}, stop={stop}")
    if stop > items:
        raise ValueError(f"{name}: rank {stop} is beyond the catalog, which holds {items} items")


def check_loss(temperature: float | Tensor, positive_weight: float, reduction: str) -> None:
    """Raises TypeError or ValueError for what both losses refuse; of a temperature in a tensor not its value."""
    check_number("positive_weight", positive_weight)
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or not temperature.dtype.is_floating_point:
            raise ValueError(
                "temperature, where a tensor, must hold one float, got "
                f"{kind_of(temperature)} and dtype {temperature.dtype}"
            )
    else:
        check_number("temperature", temperature)
        check_temperature_value(temperature)
    if not positive_weight >= 0.0:
        raise ValueError(f"positive_weight must be at least 0, got {positive_weight}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_smoothing(label_smoothing: float, sliced: bool, has_positives: bool) -> None:
    """Raises unless label_smoothing is 0, or up to 1 in a softmax over all items."""
    check_fraction("label_smoothing", label_smoothing)
    if label_smoothing > 0.0 and (sliced or has_positives):
        found = "neg" if sliced else "positives"
        raise ValueError(
            f"label_smoothing must be 0 with {found}, got {label_smoothing}: it gives every item of the catalog "
            "a share of the target, which only the softmax of one target over all items has"
        )


def check_temperature_value(temperature: float | Tensor) -> None:
    """Raises ValueError unless the one value is above 0."""
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {float(temperature)}")


def check_ids_in(name: str, ids: Tensor, first: int, stop: int, none: int) -> None:
    """Raises ValueError with row and value where an id is neither `none` nor in [first, stop)."""
    bad = (ids != none) & ((ids < first) | (ids >= stop))
    if bad.any():
        row, value = _first(bad, ids)
        raise ValueError(f"{name}: row {row} holds {value}, expected {none} or an id in [{first}, {stop})")


def check_loss_ids(
    target: Tensor, positives: Tensor | None, bias: Tensor | None, first: int, stop: int, ignore_index: int
) -> None:
    """Raises ValueError with row and value where a target or positive is no item of [first, stop) or has a bias of
    -inf; rows whose target is ignored may hold any positives in the catalog."""
    check_ids_in("target", target, first, stop, ignore_index)
    if positives is not None:
        check_ids_in("positives", positives, first, stop, -1)
    if bias is None:
        return
    ignored, masked = target == ignore_index, F.pad(bias == -torch.inf, (0, 1))  # the place of no item is not masked
    for name, ids in (("target", target.unsqueeze(1)), ("positives", positives)):
        if ids is not None:
            bad = masked[ids.long().masked_fill(ignored.unsqueeze(1) | (ids < 0), stop)]
            if bad.any():
                row, value = _first(bad, ids)
                raise ValueError(f"{name}: row {row} holds {value}, whose bias is -inf")


def _first(bad: Tensor, values: Tensor) -> tuple[int, Any]:
    """Row and value of the first element of `values` where `bad` holds."""
    place = bad.nonzero()[0]
    return int(place[0]), values[tuple(place)].item()


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
    fault = torch.iinfo(torch.int64).max if bad is None else int(bad)
    if fault != torch.iinfo(torch.int64).max:
        score = struct.unpack("<f", struct.pack("<I", fault & 0xFFFFFFFF))[0]
        raise ValueError(f"scores: row {fault >> 32} has a score of {score}, expected a finite one")


def plain_strides(matrix: Tensor) -> Tensor:
    """The matrix itself where kernels read it as it lies: unit last stride, rows that do not overlap; else a copy."""
    rows, columns = matrix.shape
    if (columns <= 1 or matrix.stride(1) == 1) and (rows <= 1 or matrix.stride(0) >= columns):
        return matrix
    return matrix.contiguous()
