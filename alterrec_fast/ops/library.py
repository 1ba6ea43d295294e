"""The library of ops alterrec_fast:: that all engines register with, and which engines are there."""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch

# Schemas, fakes and autograd are registered from Python, in each op's file, so that every op exists without the
# extension too; the extension brings the kernels for CPU tensors, and some for CUDA.
LIBRARY = torch.library.Library("alterrec_fast", "DEF")

# Importing triton takes a second, so its kernels are imported by the first op that launches one.
TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton runs kernels in Python, on CPU tensors
TRITON_OPS: set[str] = set()  # the ops that have Triton kernels; each op's file adds its own

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
