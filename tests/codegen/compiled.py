"""What can be said of the GPU kernels without a GPU: `python -m tests.codegen.compiled`.

Runs the launchers themselves on tensors without memory, compiles every kernel that they launch for four GPUs, and reads
the machine code: no spills, memory and registers within limits, matrix-unit instructions and asynchronous copies where
there is a product. Says nothing of speed. A new kernel joins by a `Case` in cases.py.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from alterrec_fast.kernels import tiles
from triton.backends.compiler import GPUTarget

from tests.codegen.cases import CASES, Case


@dataclass(frozen=True)
class Gpu:
    """A target and its limits, for one block and for one processor (NVIDIA: an SM, AMD: a compute unit)."""

    name: str
    target: GPUTarget
    matrix: str  # how the assembler names the matrix unit's instructions
    block_shared: int  # bytes
    shared: int
    warps: int
    blocks: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; CDNA3 ISA guide and whitepaper.
GPUS = (
    Gpu("sm_80", GPUTarget("cuda", 80, 32), "HMMA", 163 << 10, 164 << 10, 64, 32),
    Gpu("sm_90", GPUTarget("cuda", 90, 32), "HGMMA", 227 << 10, 228 << 10, 64, 32),
    Gpu("sm_100", GPUTarget("cuda", 100, 32), "UTC[A-Z]*MMA", 227 << 10, 228 << 10, 64, 32),
    Gpu("gfx942", GPUTarget("hip", "gfx942", 64), "v_mfma|v_smfmac", 64 << 10, 64 << 10, 32, 32),
)
REGISTERS = 65536  # 32-bit registers of an NVIDIA processor
VECTOR_REGISTERS = 512  # of a lane, on each of the four units of an AMD processor


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one kernel says."""

    case: str
    kernel: str
    gpu: str
    product: str  # "" for kernels without one
    steps: int  # in which the width is summed; one leaves nothing to copy while the matrix unit is busy
    warps: int
    registers: int
    shared: int  # bytes
    spills: int  # instructions on NVIDIA, bytes of scratch on AMD
    matrix: int  # instructions of the matrix unit
    copies: int  # asynchronous copies
    instructions: int  # 0 where nothing was disassembled
    occupancy: float  # resident warps over the most there can be

    def faults(self) -> list[str]:
        """What is wrong; empty if nothing is."""
        gpu = next(g for g in GPUS if g.name == self.gpu)
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > gpu.block_shared:
            found.append(f"{self.shared} bytes of shared memory, {gpu.block_shared} is the limit")
        if not self.occupancy:
            found.append("a block does not fit")
        on_matrix_unit = self.product in ("bf16", "fp16", "tf32")
        if on_matrix_unit and not self.matrix:
            found.append("no matrix-unit instructions")
        if on_matrix_unit and self.steps > 1 and gpu.target.backend == "cuda" and not self.copies:
            found.append("no asynchronous copies")
        return found


class StubDriver:
    """A Triton driver that names its target and owns no device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return [gpu.target for gpu in GPUS].index(self.target)  # Triton keeps compiled kernels by device

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def set_current_device(self, _device: int) -> None:
        pass


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel that was compiled instead."""

    kernel: Any
    grid: tuple[int, ...]
    options: dict[str, Any]  # constants, and arguments given by their names
    compiled: Any

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def steps(self) -> int:
        """In which the width is summed."""
        form = self.options.get("FORM")
        return 1 if form is None else int(triton.cdiv(form.D, form.BLOCK_D))


@contextmanager
def compiling_for(gpu: Gpu) -> Iterator[list[Launch]]:
    """Within, launches compile for `gpu` and nothing runs; yields the list that they fill."""
    found: list[Launch] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found.append(Launch(kernel, grid, options, kernel.warmup(*args, grid=grid, **options)))

    triton.runtime.driver.set_active(StubDriver(gpu.target))
    tiles.replace_launcher(compile_only)
    try:
        yield found
    finally:
        tiles.replace_launcher(None)


def compile_case(case: Case, gpu: Gpu, seen: set[str]) -> list[Compiled]:
    """Every kernel that the case's launcher launches, compiled; without those whose hashes are in `seen` already."""
    rows = []
    for launch in launches(case, gpu):
        if launch.compiled.hash not in seen:
            seen.add(launch.compiled.hash)
            rows.append(read(case, launch, gpu))
    return rows


def launches(case: Case, gpu: Gpu) -> list[Launch]:
    """What the case's launcher launches, compiled for `gpu`, in order."""
    with compiling_for(gpu) as found, _tf32(case.product == "tf32"):
        case.run()
    return found


def read(case: Case, launch: Launch, gpu: Gpu) -> Compiled:
    """Reads the machine code."""
    compiled = launch.compiled
    multiplies = "tt.dot" in compiled.asm["ttir"]
    nvidia = gpu.target.backend == "cuda"
    facts = _read_cubin(compiled, multiplies) if nvidia else _read_hsaco(compiled)
    code = facts.pop("code")
    warps = compiled.metadata.num_warps
    shared = compiled.metadata.shared
    return Compiled(
        case=case.name,
        kernel=launch.name,
        gpu=gpu.name,
        product=case.product if multiplies else "",
        steps=launch.steps,
        warps=warps,
        shared=shared,
        matrix=len(re.findall(gpu.matrix, code)),
        occupancy=occupancy(gpu, warps, facts["registers"], shared),
        **facts,
    )


def occupancy(gpu: Gpu, warps: int, registers: int, shared: int) -> float:
    """Resident warps over the most there can be, by registers, shared memory and slots."""
    blocks = min(gpu.blocks, gpu.warps // warps)
    if gpu.target.backend == "cuda":
        by_warp = -(-registers * 32 // 256) * 256  # registers are handed out to warps in units of 256
        blocks = min(blocks, REGISTERS // by_warp // 4 * 4 // warps)
        blocks = min(blocks, gpu.shared // (-(-(shared + 1024) // 128) * 128))  # the system takes 1 KiB a block
    else:
        a_unit = min(8, VECTOR_REGISTERS // max(8, -(-registers // 8) * 8))  # waves on each of four units
        blocks = min(blocks, 4 * a_unit // warps)
        if shared:
            blocks = min(blocks, gpu.shared // shared)
    return blocks * warps / gpu.warps


def _read_cubin(compiled: Any, multiplies: bool) -> dict[str, Any]:
    """Disassembling takes as long as compiling a small kernel: one without a product and without a stack is not."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin)
        code = _output(tools / "nvdisasm", "-c", cubin) if multiplies or "STACK:0 " not in usage else ""
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return {
        "registers": int(registers[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "copies": len(re.findall(r"LDGSTS|UTMALDG", code)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
        "code": code,
    }


def _read_hsaco(compiled: Any) -> dict[str, Any]:
    """The code object's own metadata, which the assembler prints along with the code."""
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found is not None, name
        return int(found[1])

    assert number("group_segment_fixed_size") <= compiled.metadata.shared
    return {
        "registers": number("vgpr_count"),
        "spills": number("private_segment_fixed_size") + number("vgpr_spill_count"),
        "copies": len(re.findall(r"global_load_lds|buffer_load.* lds", code)),
        "instructions": len(re.findall(r"^\t[vs]_|^\t(?:ds|global|buffer|flat)_", code, re.MULTILINE)),
        "code": code,
    }


def _output(*command: object) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def prove(names: str = "", gpus: tuple[Gpu, ...] = GPUS) -> list[Compiled]:
    """Compiles the cases in whose name the regular expression `names` is found, for `gpus`."""
    seen: set[str] = set()
    cases = [case for case in CASES if re.search(names, case.name)]
    return [row for case in cases for gpu in gpus for row in compile_case(case, gpu, seen)]


def table(rows: list[Compiled]) -> str:
    """Markdown."""
    lines = [
        "| case | kernel | gpu | warps | registers | shared | spills | matrix | copies | instructions | occupancy | |",
        "| --- | --- | --- " + "| ---: " * 8 + "| --- |",
    ]
    for row in rows:
        cells = [
            row.case,
            row.kernel,
            row.gpu,
            row.warps,
            row.registers,
            row.shared,
            row.spills,
            row.matrix,
            row.copies,
        ]
        cells += [row.instructions, f"{row.occupancy:.0%}", "; ".join(row.faults()) or "ok"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases in whose name this regular expression is found")
    parser.add_argument("--gpus", default="", help="only GPUs whose name contains this")
    chosen = parser.parse_args()
    rows = prove(chosen.cases, tuple(gpu for gpu in GPUS if chosen.gpus in gpu.name))
    print(f"Triton {triton.__version__}\n")
    print(table(rows))
    if any(row.faults() for row in rows):
        sys.exit("some kernels are not as they should be")


if __name__ == "__main__":
    main()
