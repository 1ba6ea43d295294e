"""The GPU kernels' machine code, read without a GPU; `python -m tests.codegen.compiled` prints it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from alterrec_fast.kernels import tiles

from alterrec_fast.ops import library
from tests.codegen import compiled

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(library.INTERPRETED, reason="the interpreter has taken the compiler's place"),
]


def launched_kernels() -> set[str]:
    """The first argument of every call of `launch` in kernels/."""
    calls = [
        node
        for page in Path(tiles.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(page.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "launch"
    ]
    return {call.args[0].id for call in calls if isinstance(call.args[0], ast.Name)}


def test_kernels_are_found_by_their_launches() -> None:
    found = launched_kernels()
    assert {"_scan_kernel", "_lse_kernel", "_segment_kernel", "_loss_kernel"} <= found
    assert len(found) == 27


@pytest.mark.parametrize("gpu", compiled.GPUS, ids=lambda gpu: gpu.name)
def test_every_kernel_compiles_as_it_should(gpu: compiled.Gpu) -> None:
    rows = compiled.prove(gpus=(gpu,))
    print(compiled.table(rows))
    assert not [row for row in rows if row.faults()], compiled.table([row for row in rows if row.faults()])
    assert launched_kernels() <= {row.kernel for row in rows}
    assert {row.product for row in rows} == {"bf16", "fp16", "tf32", "ieee", ""}


def test_faults_are_found() -> None:
    """The readers are not blind: a kernel with a product, and what each check makes of code that is worse."""
    gpu = compiled.GPUS[0]
    (good,) = [row for row in compiled.prove("rank_slice 20:500 d=300", (gpu,)) if row.kernel == "_sample_kernel"]
    assert not good.faults()
    for worse, word in (
        (replace(good, spills=1), "spills"),
        (replace(good, shared=gpu.block_shared + 1), "shared memory"),
        (replace(good, occupancy=0.0), "does not fit"),
        (replace(good, matrix=0), "matrix-unit"),
        (replace(good, copies=0), "asynchronous"),
    ):
        assert any(word in fault for fault in worse.faults())
    assert not replace(good, copies=0, steps=1).faults()  # nothing to copy while another step is multiplied
    assert compiled.occupancy(gpu, 8, 128, 48 << 10) == 2 * 8 / 64  # two blocks by registers, three by shared memory
    assert compiled.occupancy(gpu, 8, 32, 100 << 10) == 8 / 64
    assert compiled.occupancy(gpu, 8, 255, 164 << 10) == 0.0


# On Hopper, what the older Triton compiles: every kernel, arithmetic, and shape of the scan and the losses.
SHIPPED = "|".join(
    (
        r"rank_slice 20:500 d=(128|320) bf16( extras)?$",
        r"rank_slice 20:20000 d=128 bf16$",
        r"rank_slice 20:20000 d=300 (bf16 extras|tf32|ieee)$",
        r"rank_slice 10000:20000 d=300 bf16$",
        r"top_k \d+ d=300 bf16 extras$",
        r"slice_cross_entropy bits d=128 bf16$",
        r"slice_cross_entropy bits d=300 (bf16 extras|tf32|ieee)$",
        r"sampled_softmax (own|shared) d=300 bf16$",
        r"flash_loss (all|ids) d=128 bf16$",
        r"flash_loss bits d=100 fp16 extras$",
        r"layer_norm d=300$",  # at 128 it keeps two numbers of Adam's kernel on the stack
    )
)


@pytest.mark.skipif(not os.environ.get("TRITON_3_6"), reason="TRITON_3_6 names no folder with Triton 3.6.0")
def test_triton_3_6_compiles_the_kernels_too() -> None:
    folder = Path(os.environ["TRITON_3_6"])
    command = [sys.executable, "-m", "tests.codegen.compiled", "--cases", SHIPPED, "--gpus", "sm_90"]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(folder)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Triton 3.6.0" in done.stdout, done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [kernel for kernel in launched_kernels() if f"| {kernel} |" not in done.stdout]
    for case in ("20:500 d=128 bf16 |", "d=128 bf16 extras |", "d=320 bf16 |", "d=300 tf32 |", "d=300 ieee |"):
        assert case in done.stdout
