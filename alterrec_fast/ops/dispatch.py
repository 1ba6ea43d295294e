"""The choices that all ops share: the engine, the precision of products, and whether values are checked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from alterrec_fast.ops import library
from alterrec_fast.ops.checks import check_flag

BACKENDS = ("auto", "reference", "native", "triton")
FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16"}  # of 16 bits
PRECISIONS = (None, "fp32", *FORMATS.values())
LOSSES = ("slice_cross_entropy", "sampled_softmax")  # the ops that gradients flow through


class BackendError(RuntimeError):
    """The engine asked for cannot serve these tensors; the message says why."""


class _Block(threading.local):
    """The engine of the innermost `backend` block of this thread.

    Not a context variable: torch.compile traces reads and writes of a thread's attribute, and guards on it, and refuses
    those of a context variable.
    """

    def __init__(self) -> None:
        self.backend = "auto"


_block = _Block()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Set the engine of all ops called in a ``with`` block by this thread that name no engine themselves.

    Blocks may be nested, and stand inside or around a function compiled by torch.compile.

    Args:
        name: "auto", "reference", "native" or "triton".

    Raises:
        ValueError: for another name.
    """
    check_backend(name)
    before, _block.backend = _block.backend, name
    try:
        yield
    finally:
        _block.backend = before


def check_backend(name: str) -> None:
    """Raises ValueError for a name that no engine has."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")


def choose_backend(name: str | None, tensor: Tensor, op: str) -> str:
    """The engine that serves `op` on `tensor`: the one named, else that of the `backend` block around the call, or for
    "auto" the best that is installed.

    Raises ValueError for an unknown name and BackendError for an engine that cannot serve this tensor.
    """
    asked = _block.backend if name is None else name
    check_backend(asked)
    if asked == "reference":
        return asked
    chosen = asked
    if asked == "auto":
        chosen = "native" if tensor.device.type == "cpu" or not why_not_native(tensor, op) else "triton"
    why = why_not_native(tensor, op) if chosen == "native" else why_not_triton(tensor)
    if not why and op in LOSSES and transformed():
        why = "it has no rules for torch.func transforms and forward-mode derivatives"
    if not why:
        return chosen
    if asked == "auto":
        return "reference"
    raise BackendError(f"backend={asked!r}: {why}; backend='auto' and backend='reference' always work")


def transformed() -> bool:
    """Whether the call is inside a torch.func transform (grad, vmap, jvp, ...) or a dual level of forward mode."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def why_not_native(tensor: Tensor, op: str) -> str:
    """Why the extension cannot serve `op` on this tensor; empty where it can."""
    if library.NO_EXTENSION:
        return (
            f"the extension {library.EXTENSION} is missing ({library.NO_EXTENSION}); install again with a C++ "
            "compiler and without ALTERREC_FAST_NO_EXT=1"
        )
    # float64 is for gradcheck, which only the specification computes in.
    if tensor.device.type not in ("cpu", "cuda") or tensor.dtype == torch.float64:
        return f"it takes float32, bfloat16 and float16 tensors on CPU or CUDA, got {tensor.dtype} on {tensor.device}"
    if tensor.device.type == "cuda" and op not in library.CUDA_OPS:
        return f"it has no CUDA kernel for {op}" + ("" if library.CUDA_OPS else ", it was built without nvcc")
    return why_not_gpu(tensor)


def why_not_triton(tensor: Tensor) -> str:
    """Why the Triton kernels cannot serve this tensor; empty where they can."""
    if not library.TRITON:
        return "triton is not installed"
    if tensor.device.type != "cuda" and not (library.INTERPRETED and tensor.device.type == "cpu"):
        return f"it takes CUDA tensors, and CPU tensors only under TRITON_INTERPRET=1, got {tensor.device}"
    if tensor.dtype == torch.float64:
        return f"it takes float32, bfloat16 and float16 tensors, got {tensor.dtype}"
    return why_not_gpu(tensor)


def why_not_gpu(tensor: Tensor) -> str:
    """Why no kernel runs on this tensor's GPU: they need instructions that came with Ampere; empty where they do."""
    if tensor.device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return ""
    gpu = torch.cuda.get_device_properties(tensor.device.index)  # torch.compile folds it; get_device_capability breaks
    return "" if gpu.major >= 8 else f"it takes GPUs of sm_80 or later, got {gpu.name}, sm_{gpu.major}{gpu.minor}"


def choose_precision(precision: str | None, query: Tensor, catalog: Tensor) -> str:
    """What is asked for, else autocast's 16-bit format, else that of the narrower input; "fp64" for float64 inputs.

    Two 16-bit formats do not mix: asked for by name beside a tensor of the other, it raises ValueError; else, where
    inputs or autocast have both, products are of the inputs' own values, "fp32".
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be None, 'fp32', 'bf16' or 'fp16', got {precision!r}")
    if torch.float64 in (query.dtype, catalog.dtype):
        return "fp64"
    if precision == "fp32":
        return precision
    formats = {FORMATS[x.dtype] for x in (query, catalog) if x.dtype in FORMATS}
    if precision is not None:
        if formats - {precision}:
            raise ValueError(
                f"precision={precision!r} takes float32 tensors and its own format, got query {query.dtype} and "
                f"catalog {catalog.dtype}; precision='fp32' takes all"
            )
        return precision
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) in FORMATS:
        formats.add(FORMATS[torch.get_autocast_dtype(kind)])
    return formats.pop() if len(formats) == 1 else "fp32"


def choose_check(check: bool | None, tensor: Tensor) -> bool:
    """Whether values are checked: as asked for, else on the CPU only, since elsewhere it synchronises, and not under
    vmap, which can't branch on values."""
    check_flag("check", check)
    return tensor.device.type == "cpu" and not transformed() if check is None else bool(check)


def detached(query: Tensor, catalog: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What ops without a gradient score with, so that what they return asks for none either."""
    return query.detach(), catalog.detach(), None if bias is None else bias.detach()
