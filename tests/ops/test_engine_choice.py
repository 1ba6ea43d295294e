"""Which engine serves a call: what "auto" takes for CUDA tensors (no GPU is needed to ask), and `backend` blocks."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import alterrec_fast as af
from alterrec_fast.ops import BackendError, dispatch, library

CUDA: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)


@pytest.mark.parametrize("op", ["rank_slice", "top_k", "slice_cross_entropy"])
def test_slices_and_the_dense_loss_are_tritons(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "TRITON", True)
    assert dispatch.choose_backend("auto", CUDA, op) == "triton"
    monkeypatch.setattr(library, "TRITON", False)
    assert dispatch.choose_backend("auto", CUDA, op) == "reference"
    with pytest.raises(BackendError, match="triton is not installed"):
        dispatch.choose_backend("triton", CUDA, op)


def test_sampled_softmax_is_the_extensions_where_it_was_built_with_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "NO_EXTENSION", "")
    monkeypatch.setattr(library, "TRITON", True)
    monkeypatch.setattr(library, "CUDA_OPS", {"sampled_softmax"})
    assert dispatch.choose_backend("auto", CUDA, "sampled_softmax") == "native"
    with pytest.raises(BackendError, match="it has no CUDA kernel for slice_cross_entropy; "):
        dispatch.choose_backend("native", CUDA, "slice_cross_entropy")
    monkeypatch.setattr(library, "CUDA_OPS", set())
    assert dispatch.choose_backend("auto", CUDA, "sampled_softmax") == "triton"
    with pytest.raises(BackendError, match="it has no CUDA kernel for sampled_softmax, it was built without nvcc"):
        dispatch.choose_backend("native", CUDA, "sampled_softmax")


@pytest.mark.parametrize("engine", ["native", "triton"])
def test_gpus_before_ampere_have_the_reference(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "NO_EXTENSION", "")
    monkeypatch.setattr(library, "TRITON", True)
    monkeypatch.setattr(library, "CUDA_OPS", {"sampled_softmax"})
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = SimpleNamespace(name="Tesla T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert dispatch.choose_backend("auto", CUDA, "sampled_softmax") == "reference"
    with pytest.raises(BackendError, match="takes GPUs of sm_80 or later, got Tesla T4, sm_75"):
        dispatch.choose_backend(engine, CUDA, "sampled_softmax")
    gpu.major = 8
    assert dispatch.choose_backend("auto", CUDA, "sampled_softmax") == "native"


@pytest.mark.parametrize(
    "op",
    [
        "rank_slice",
        "top_k",
        "slice_cross_entropy",
        "slice_cross_entropy_backward",
        "sampled_softmax",
        "sampled_softmax_backward",
    ],
)
def test_every_op_has_a_cuda_kernel(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"alterrec_fast::{op}", "CUDA")


def test_a_block_sets_the_engine_of_calls_that_name_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "NO_EXTENSION", "")
    tensor = torch.zeros(2, 3)

    def chosen(name: str | None = None) -> str:
        return dispatch.choose_backend(name, tensor, "top_k")

    assert chosen() == "native"
    with af.backend("reference"):
        assert chosen() == "reference" and chosen("native") == "native" and chosen("auto") == "native"
        with pytest.raises(KeyError), af.backend("native"):
            assert chosen() == "native"
            raise KeyError
        assert chosen() == "reference"  # the inner block is over
        others: list[str] = []
        thread = threading.Thread(target=lambda: others.append(chosen()))
        thread.start()
        thread.join()
        assert others == ["native"]
    assert chosen() == "native"
    with pytest.raises(ValueError, match="backend must be one of auto, reference, native, triton, got 'gpu'"):
        af.backend("gpu").__enter__()


@pytest.mark.skipif(bool(library.NO_EXTENSION), reason="the extension is not built")
def test_a_block_inside_and_around_compiled_code() -> None:
    codes: list[str] = []

    def keep_code(module: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        codes.append(module.code)
        return module.forward

    def loss(query: Tensor) -> Tensor:
        return af.slice_cross_entropy(query, torch.eye(4), torch.tensor([3]), check=False)

    def loss_by_reference(query: Tensor) -> Tensor:
        with af.backend("reference"):
            return loss(query)

    query = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    compiled, inside = (torch.compile(f, backend=keep_code, fullgraph=True) for f in (loss, loss_by_reference))
    torch.testing.assert_close(compiled(query), loss(query))
    with af.backend("reference"):
        torch.testing.assert_close(compiled(query), loss(query))
    torch.testing.assert_close(inside(query), loss(query))
    assert ["alterrec_fast.native_slice_cross_entropy" in code for code in codes] == [True, False, False]


@pytest.mark.skipif(bool(library.NO_EXTENSION), reason="the extension is not built")
def test_a_native_call_takes_no_way_through_python() -> None:
    called: list[str] = []

    class Listed(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "alterrec_fast":
                called.append(func._schema.name.removeprefix("alterrec_fast::"))
            return func(*args, **(kwargs or {}))

    query, catalog = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    with Listed():
        neg = af.rank_slice(query, catalog, start=1, stop=8)
        af.top_k(query, catalog, k=2)
        af.slice_cross_entropy(query, catalog, torch.arange(3), neg).backward()
        af.sampled_softmax(query, catalog, torch.arange(3), torch.arange(9)).backward()
    losses = [f"native_{op}{way}" for op in ("slice_cross_entropy", "sampled_softmax") for way in ("", "_backward")]
    assert called == ["native_rank_slice", "native_top_k", *losses]
