"""Which engine "auto" takes for CUDA tensors, and that there is a kernel for them; no GPU is needed to ask."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alterrec_fast.ops import BackendError, register

CUDA: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)


@pytest.mark.parametrize("op", ["rank_slice", "top_k", "slice_cross_entropy"])
def test_slices_and_the_dense_loss_are_tritons(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register, "TRITON", True)
    assert register.choose_backend("auto", CUDA, op) == "triton"
    monkeypatch.setattr(register, "TRITON", False)
    assert register.choose_backend("auto", CUDA, op) == "reference"
    with pytest.raises(BackendError, match="triton is not installed"):
        register.choose_backend("triton", CUDA, op)


def test_sampled_softmax_is_the_extensions_where_it_was_built_with_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register, "NO_EXTENSION", "")
    monkeypatch.setattr(register, "TRITON", True)
    monkeypatch.setattr(register, "CUDA_OPS", {"sampled_softmax"})
    assert register.choose_backend("auto", CUDA, "sampled_softmax") == "native"
    with pytest.raises(BackendError, match="it has no CUDA kernel for slice_cross_entropy; "):
        register.choose_backend("native", CUDA, "slice_cross_entropy")
    monkeypatch.setattr(register, "CUDA_OPS", set())
    assert register.choose_backend("auto", CUDA, "sampled_softmax") == "triton"
    with pytest.raises(BackendError, match="it has no CUDA kernel for sampled_softmax, it was built without nvcc"):
        register.choose_backend("native", CUDA, "sampled_softmax")


@pytest.mark.parametrize(
    "op",
    [
        "rank_slice",
        "top_k",
        "slice_cross_entropy",
        "slice_cross_entropy_backward",
        "sampled_softmax_triton",
        "sampled_softmax_triton_backward",
    ],
)
def test_every_op_has_a_cuda_kernel(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"alterrec_fast::{op}", "CUDA")
