"""What all ops share: checks of their arguments, the choice of engine and precision, and the last step of a loss."""

from __future__ import annotations

import importlib
import importlib.util
import os
import struct

import torch
from torch import Tensor

# Schemas, fakes and autograd are registered from Python, in each op's file, so that every op exists without the
# extension too; the extension brings the kernels for CPU tensors, and some for CUDA.
LIBRARY = torch.library.Library("alterrec_fast", "DEF")

# Importing triton takes a second, so its kernels are imported by the first op that launches one.
TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton runs kernels in Python, on CPU tensors
TRITON_OPS: set[str] = set()  # the ops that have Triton kernels; each op's file adds its own

BACKENDS = ("auto", "reference", "native", "triton")
PRECISIONS = (None, "fp32", "bf16")
REDUCTIONS = ("mean", "sum", "none")
FLOATS = (torch.float32, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


EXTENSION = "alterrec_fast._C"
NO_EXTENSION = ""  # why the extension is missing; empty where it is there
try:
    importlib.import_module(EXTENSION)
except ImportError as error:
    NO_EXTENSION = str(error)
# The ops that the extension serves on CUDA tensors: none where it was built without nvcc.
CUDA_OPS: set[str] = set()
if not NO_EXTENSION and torch._C._dispatch_has_kernel_for_dispatch_key("alterrec_fast::sampled_softmax", "CUDA"):
    CUDA_OPS.add("sampled_softmax")


class BackendError(RuntimeError):
    """The engine asked for cannot serve these tensors; the message says why."""


def choose_backend(backend: str, tensor: Tensor, op: str) -> str:
    """The engine that serves `op` on `tensor`: the one named, or for "auto" the best one that is there.

    Raises ValueError for an unknown name and BackendError for an engine that cannot serve this tensor.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return backend
    wanted = backend
    if backend == "auto":
        wanted = "native" if tensor.device.type == "cpu" or not why_not_native(tensor, op) else "triton"
    why = why_not_native(tensor, op) if wanted == "native" else why_not_triton(tensor, op)
    if not why:
        return wanted
    if backend == "auto":
        return "reference"
    raise BackendError(f"backend={backend!r}: {why}; backend='auto' and backend='reference' always work")


def why_not_native(tensor: Tensor, op: str) -> str:
    """Why the extension cannot serve `op` on this tensor; empty where it can."""
    if NO_EXTENSION:
        return (
            f"the extension {EXTENSION} is not there ({NO_EXTENSION}); install again with a C++ compiler and without "
            "ALTERREC_FAST_NO_EXT=1"
        )
    # float64 is for gradcheck, which only the specification computes in.
    if tensor.device.type not in ("cpu", "cuda") or tensor.dtype == torch.float64:
        return f"it takes float32 and bfloat16 tensors on CPU or CUDA, got {tensor.dtype} on {tensor.device}"
    if tensor.device.type == "cuda" and op not in CUDA_OPS:
        return f"it has no CUDA kernel for {op}" + ("" if CUDA_OPS else ", it was built without nvcc")
    return ""


def why_not_triton(tensor: Tensor, op: str) -> str:
    """Why the Triton kernels cannot serve this tensor; empty where they can."""
    if op not in TRITON_OPS:
        return f"it has no kernel for {op}"
    if not TRITON:
        return "triton is not installed"
    if tensor.device.type != "cuda" and not (INTERPRETED and tensor.device.type == "cpu"):
        return f"it takes CUDA tensors, and CPU tensors only under TRITON_INTERPRET=1, got {tensor.device}"
    if tensor.dtype == torch.float64:
        return f"it takes float32 and bfloat16 tensors, got {tensor.dtype}"
    return ""


def choose_precision(precision: str | None, query: Tensor, catalog: Tensor) -> str:
    """What is asked for, else "bf16" under bf16 autocast, else the narrower input's; "fp64" for float64 inputs."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be None, 'fp32' or 'bf16', got {precision!r}")
    if torch.float64 in (query.dtype, catalog.dtype):
        return "fp64"
    if precision is not None:
        return precision
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
        return "bf16"
    return "bf16" if torch.bfloat16 in (query.dtype, catalog.dtype) else "fp32"


def choose_check(check: bool | None, tensor: Tensor) -> bool:
    """Whether values are checked: as asked for, else on the CPU only, since elsewhere it synchronises."""
    return tensor.device.type == "cpu" if check is None else check


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


def detached(query: Tensor, catalog: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What ops without a gradient score with, so that what they return asks for none either."""
    return query.detach(), catalog.detach(), None if bias is None else bias.detach()


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


def reduce_loss(rows: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """rows (B,), zero where the target is ignored -> (B,) or a scalar; the mean is over the rows not ignored."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / (target != ignore_index).sum().clamp(min=1)


def raise_not_finite(bad: Tensor | None) -> None:
    """Raises ValueError for what a Triton kernel found: (1,) int64, row << 32 | the bits of a float32 score; the
    largest int64 where all scores were finite."""
    found = torch.iinfo(torch.int64).max if bad is None else int(bad)
    if found != torch.iinfo(torch.int64).max:
        score = struct.unpack("<f", struct.pack("<I", found & 0xFFFFFFFF))[0]
        raise ValueError(f"scores: row {found >> 32} has a score of {score}, expected a finite one")
