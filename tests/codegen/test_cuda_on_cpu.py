"""sampled_softmax for CUDA tensors, the binding and its kernels as C++ for the CPU, against the specification.

One build of half a minute puts them in place of the CPU engine for this file's tests, autograd and all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from alterrec_fast.ops import library, sampled_softmax
from tests.ops.loss_helpers import assert_no_worse, call, needs_native, widened
from tests.ops.test_sampled_softmax import BF16_LEAST, problem

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.proof, needs_native]


def include_folder() -> Path | None:
    """The headers of the CUDA toolkit."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_bf16.h").exists()), None)


@pytest.fixture(scope="module", autouse=True)
def cuda_engine(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Loads the binding and its kernels over the CPU engine's sampled_softmax, for the rest of this process."""
    headers = include_folder()
    if headers is None:
        pytest.skip("the headers of the CUDA toolkit are not here")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "cuda_on_cpu.so"
    csrc = ROOT / "csrc"
    folders = [f"-I{csrc}", f"-isystem{headers}", *(f"-isystem{path}" for path in cpp_extension.include_paths("cpu"))]
    sources = [csrc / "tests/cuda_binding_on_cpu.cpp", *sorted(csrc.glob("cuda/*.cu"))]
    command = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-std=c++20", "-O1", "-Wno-unknown-pragmas", *folders]
    command += ["-x", "c++", *map(str, sources), f"-L{cpp_extension.library_paths('cpu')[0]}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", str(library)], check=True)
    torch.ops.load_library(str(library))


@pytest.fixture(autouse=True)
def saved_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved for the backward pass is what engines for CUDA tensors save."""
    module = sys.modules["alterrec_fast.ops.sampled_softmax"]
    monkeypatch.setattr(module, "_saved_on_cpu", module._saved_logits)


@pytest.fixture(params=[False, True], ids=["fast", "deterministic"])
def deterministic(request: pytest.FixtureRequest) -> Any:
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def compare(query: Tensor, catalog: Tensor, options: dict[str, Any], **more: Any) -> None:
    formats = {query.dtype, catalog.dtype, more.get("precision")}
    least = BF16_LEAST if formats & {torch.bfloat16, "bf16"} else 4e-6
    least = BF16_LEAST / 8 if formats & {torch.float16, "fp16"} else least
    wide = widened(options | more | {"precision": None})
    exact = call(sampled_softmax, query.double(), catalog.double(), backend="reference", **wide)
    theirs = call(sampled_softmax, query, catalog, backend="reference", **options, **more)
    ours = call(sampled_softmax, query, catalog, backend="native", **options, **more)
    assert_no_worse(ours, theirs, exact, 2.0, least)


def test_the_extension_has_it() -> None:
    """Built where nvcc is, imported without a driver."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    assert "sampled_softmax" in library.CUDA_OPS
    for op in ("sampled_softmax", "sampled_softmax_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"alterrec_fast::native_{op}", "CUDA")


@pytest.mark.parametrize("shared", [False, True])
def test_matches_the_reference(shared: bool, deterministic: bool) -> None:
    query, catalog, options = problem(7, 60, 20, 75, shared)
    g = torch.Generator().manual_seed(3)
    options |= {"bias": torch.randn(60, generator=g), "log_q": torch.randn(60, generator=g)}
    for sparse_grad in (False, True):
        compare(query, catalog, options, sparse_grad=sparse_grad, temperature=0.7, positive_weight=0.3)
    for precision in ("bf16", "fp16"):
        compare(query, catalog, options, precision=precision)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs(shared: bool, dtype: torch.dtype) -> None:
    query, catalog, options = problem(6, 50, 24, 70, shared)
    options["bias"] = torch.randn(50).to(dtype)
    for sparse_grad in (False, True):
        compare(query.to(dtype), catalog.to(dtype), options, sparse_grad=sparse_grad)
    compare(query, catalog.to(dtype), options)
    compare(query.to(dtype), catalog, options, precision="fp32")
    compare(query.bfloat16(), catalog.to(dtype), options, precision="fp32")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_temperature_as_a_tensor(shared: bool, dtype: torch.dtype) -> None:
    """Under a scaled loss; its gradient, and those of all others, against float64."""
    query, catalog, options = problem(7, 60, 20, 75, shared)
    options["positive_weight"] = 0.3
    drawn = [(query / 4).to(dtype), catalog.to(dtype), torch.randn(60).to(dtype), torch.tensor(0.7)]
    found = []
    for engine in ("native", "reference"):
        leaves = [(x if engine == "native" else x.double()).clone().requires_grad_() for x in drawn]
        loss = sampled_softmax(*leaves[:2], **options, bias=leaves[2], temperature=leaves[3], backend=engine)
        (loss * 2.0**14).backward()
        assert all(x.grad.dtype == x.dtype for x in leaves)
        found.append([x.grad.double() for x in leaves])
    for ours, truth in zip(*found, strict=True):
        assert float((ours - truth).norm() / truth.norm()) < (1e-5 if dtype == torch.float32 else 1e-3)
    with pytest.raises(ValueError, match="temperature must be above 0, got -1"):
        sampled_softmax(*drawn[:2], **options, temperature=torch.tensor(-1.0), backend="native", check=True)


def test_an_infinite_gradient_passes() -> None:
    query, catalog, options = problem(6, 50, 8, 20, False)
    leaves = [x.half().requires_grad_() for x in (query, catalog)]
    (sampled_softmax(*leaves, **options, backend="native") * 1e38).backward()
    assert not any(x.grad.isfinite().all() for x in leaves)
    assert not leaves[0].grad[1].any()  # whose target is ignored


@pytest.mark.parametrize("shared", [False, True])
def test_int32_ids_no_positives_and_strided_rows(shared: bool) -> None:
    query, catalog, options = problem(5, 40, 9, 30, shared)
    del options["positives"]
    options = {name: ids.int() for name, ids in options.items()}
    wide_query, wide_catalog = torch.zeros(5, 20), torch.zeros(40, 11)
    wide_query[:, 3:12], wide_catalog[:, :9] = query, catalog
    compare(wide_query[:, 3:12], wide_catalog[:, :9], options)


@pytest.mark.parametrize("shared", [False, True])
def test_masks_ignored_rows_and_any_strides(shared: bool, deterministic: bool) -> None:
    query, catalog, options = problem(7, 60, 20, 75, shared)
    positive = torch.cat([options["target"], options["positives"].flatten()])
    bias = torch.randn(60, generator=torch.Generator().manual_seed(3))
    bias[~torch.isin(torch.arange(60), positive)] = -torch.inf
    bias[::2] = bias[::2].nan_to_num(neginf=0.5)
    query[1] = torch.nan  # its target is ignored
    for sparse_grad in (False, True):
        compare(query.T.contiguous().T, catalog.T.contiguous().T, options | {"bias": bias}, sparse_grad=sparse_grad)
    masked = int((bias == -torch.inf).nonzero()[0])
    options["target"][4] = masked
    with pytest.raises(ValueError, match=f"target: row 4 holds {masked}, whose bias is -inf"):
        sampled_softmax(query, catalog, **options, bias=bias, backend="native")


@pytest.mark.parametrize("shared", [False, True])
def test_the_deterministic_gradient_is_always_the_same(shared: bool, deterministic: bool) -> None:
    """And sums in the order of the entries, so that its bits do not depend on which thread came first."""
    query, catalog, options = problem(6, 4, 8, 200, shared)
    first = call(sampled_softmax, query, catalog, backend="native", **options)
    again = call(sampled_softmax, query, catalog, backend="native", **options)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    compare(query, catalog, options)


def test_no_rows_and_no_negatives() -> None:
    catalog = torch.randn(10, 4, requires_grad=True)
    for b, shape in ((0, (0, 5)), (0, (5,)), (3, (3, 0)), (3, (0,))):
        query = torch.randn(b, 4, requires_grad=True)
        target, negatives = torch.zeros(b, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        for sparse_grad in (False, True):
            loss = sampled_softmax(query, catalog, target, negatives, backend="native", sparse_grad=sparse_grad)
            grads = torch.autograd.grad(loss, (query, catalog))
            assert loss == 0 and not any(g.to_dense().any() for g in grads)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 50}, r"target: row 4 holds 50, expected -100 or an id in \[0, 50\)"),
        ({"neg": -2}, r"neg: row 4 holds -2, expected -1 or an id in \[0, 50\)"),
        ({"positives": 50}, r"positives: row 4 holds 50, expected -1 or an id in \[0, 50\)"),
        ({"query": float("inf")}, r"scores: row 4 has a score of (-?inf|-?nan), expected a finite one"),
    ],
)
def test_wrong_values(shared: bool, change: dict[str, float], message: str) -> None:
    query, catalog, options = problem(6, 50, 8, 20, shared)
    tensors = {"query": query, "catalog": catalog, **options}
    for name, value in change.items():
        tensors[name][4] = value
    with pytest.raises(ValueError, match=message):
        sampled_softmax(query, catalog, **options, backend="native")
    losses = sampled_softmax(query, catalog, **options, backend="native", check=False, reduction="none")
    assert losses[0].isfinite()


def test_wrong_shapes() -> None:
    forward, ids = torch.ops.alterrec_fast.native_sampled_softmax, torch.zeros(1, dtype=torch.int64)
    rest = (ids, ids[:, None], None, None, 1.0, 1.0, None, None, -100, False, "fp32", 0, False)
    with pytest.raises(ValueError, match=r"d must be at most 8192, got 9000"):
        forward(torch.zeros(1, 9000), torch.zeros(1, 9000), *rest)
    losses, partition, kept = forward(torch.zeros(1, 4), torch.zeros(1, 4), *rest)
    backward = torch.ops.alterrec_fast.native_sampled_softmax_backward
    with pytest.raises(ValueError, match=r"saved must hold 8 bytes from the forward pass, got 0"):
        backward(losses, torch.zeros(1, 4), torch.zeros(1, 4), *rest[:11], partition, kept, [True] * 3 + [False])
