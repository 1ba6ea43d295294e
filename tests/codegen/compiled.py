"""What can be said of the GPU kernels without a GPU: `python -m tests.codegen.compiled`.

Runs the launchers themselves on tensors without memory, compiles every kernel that they launch for four GPUs, and reads
the machine code: no spills, memory and registers within limits, matrix-unit instructions and asynchronous copies where
there is a product. Says nothing of speed. A new kernel joins by a `Case` in CASES.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from alterrec_fast.kernels import tiles
from torch import Tensor
from triton.backends.compiler import GPUTarget

from alterrec_fast.ops.slices import bits_width, exclude_lists, uses_bits


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
class Case:
    """A launcher and the shapes that it ships for. `run` is called on the meta device."""

    name: str
    run: Callable[[], object]
    product: str  # "bf16", "tf32" or "ieee": how the launcher's kernels multiply


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
        if self.product in ("bf16", "tf32") and not self.matrix:
            found.append("no matrix-unit instructions")
        if self.product in ("bf16", "tf32") and self.steps > 1 and gpu.target.backend == "cuda" and not self.copies:
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


B, V = 512, 40_258  # the paper's shape; sizes do not enter the code, forms do


def _inputs(product: str, d: int, dtype: torch.dtype | None, b: int = B) -> tuple[Tensor, Tensor]:
    """Query and catalog without memory; `dtype` None for the one that this product is for."""
    chosen = dtype or (torch.bfloat16 if product == "bf16" else torch.float32)
    return torch.empty(b, d, dtype=chosen, device="meta"), torch.empty(V, d, dtype=chosen, device="meta")


def _extras(extras: bool, b: int = B) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Lists of excluded items and a bias, empty and None without `extras`."""
    exclude = torch.empty(b, 3, dtype=torch.int64, device="meta") if extras else None
    return exclude_lists(exclude, b, torch.device("meta")), torch.empty(V, device="meta") if extras else None


def rank_slice_case(
    product: str,
    d: int,
    start: int,
    stop: int,
    top: int,
    extras: bool = False,
    dtype: torch.dtype | None = None,
    b: int = B,
) -> Case:
    def run() -> None:
        from alterrec_fast.kernels.rank_slice import rank_slice_fwd

        lists, bias = _extras(extras, b)
        form = (uses_bits(V, stop - start), bits_width(V))
        precision = "bf16" if product == "bf16" else "fp32"
        rank_slice_fwd(*_inputs(product, d, dtype, b), start, stop, top, *lists, bias, 1, precision, extras, *form)

    source = "" if dtype is None else f" of {dtype}".replace("torch.", "")
    few = "" if b == B else f" B={b}"
    return Case(f"rank_slice {start}:{stop} d={d} {product}{source}{few}{' extras' if extras else ''}", run, product)


def top_k_case(product: str, d: int, k: int, extras: bool = False) -> Case:
    def run() -> None:
        from alterrec_fast.kernels.top_k import top_k_fwd

        lists, bias = _extras(extras)
        top_k_fwd(*_inputs(product, d, None), k, *lists, bias, 1, "bf16" if product == "bf16" else "fp32", extras)

    return Case(f"top_k {k} d={d} {product}{' extras' if extras else ''}", run, product)


def loss_case(
    form: str,
    product: str,
    d: int,
    extras: bool = False,
    dtype: torch.dtype | None = None,
    needs: str = "query catalog",
) -> Case:
    """Forward and backward of a loss over "bits", over "all" items, over each session's "own" negatives, or over
    "shared" ones; `needs` names the gradients. The first two are slice_cross_entropy's, the others sampled_softmax's,
    which slice_cross_entropy takes for ids."""

    def run() -> None:
        from alterrec_fast.kernels import sampled_softmax, slice_cross_entropy
        from alterrec_fast.kernels.losses import Dlogits, Problem

        def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        target, positives = meta(B, dtype=torch.int64), meta(B, 3, dtype=torch.int64) if extras else None
        bias, log_q = (meta(V), meta(V) if form in ("own", "shared") else None) if extras else (None, None)
        inputs = (*_inputs(product, d, dtype), target, positives, 0.5, 0.07, bias, log_q, -100, product == "bf16")
        forward, backward = Problem.of(*inputs, extras), Problem.of(*inputs, False)
        wanted = ["query" in needs, "catalog" in needs, extras or "bias" in needs]
        if form in ("own", "shared"):
            own = form == "own"
            negatives = meta(*((B, 2048) if own else (2048,)), dtype=torch.int64)
            kept = meta(B, 2048) if own else None
            _, lse, logits = sampled_softmax.sampled_softmax_fwd(forward, negatives, kept)
            x = Dlogits.of(backward, meta(B), lse, logits)
            sampled_softmax.sampled_softmax_bwd(backward, negatives, kept, x, False, wanted)
        else:
            bits = meta(B, bits_width(V), dtype=torch.uint8) if form == "bits" else None
            columns = slice_cross_entropy.Columns.of(forward, 1, bits)
            _, lse, logits = slice_cross_entropy.slice_cross_entropy_fwd(forward, columns)
            x = Dlogits.of(backward, meta(B), lse, logits)
            slice_cross_entropy.slice_cross_entropy_bwd(backward, columns, x, wanted)

    op = "sampled_softmax" if form in ("own", "shared") else "slice_cross_entropy"
    source = "" if dtype is None else f" of {dtype}".replace("torch.", "")
    tail = f"{' extras' if extras else ''}{'' if 'query' in needs else ', ' + needs}"
    return Case(f"{op} {form} d={d} {product}{source}{tail}", run, product)


def flash_case(form: str, d: int, extras: bool = False, needs: str = "query catalog") -> Case:
    """Forward and backward of slice_cross_entropy for a large catalog: over "bits", "ids" or "all" items."""

    def run() -> None:
        from alterrec_fast.kernels import flash_loss
        from alterrec_fast.kernels.losses import Problem

        def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        v = 1_000_000
        query, catalog = meta(B, d, dtype=torch.bfloat16), meta(v, d, dtype=torch.bfloat16)
        target, positives = meta(B, dtype=torch.int64), meta(B, 3, dtype=torch.int64) if extras else None
        bits, ids = meta(B, bits_width(v), dtype=torch.uint8), meta(B, 20_000, dtype=torch.int32)
        neg = {"all": None, "bits": bits, "ids": ids}[form]
        assert flash_loss.is_flash(query, catalog, neg, positives, True)
        inputs = (query, catalog, target, positives, 0.5, 0.07, meta(v) if extras else None, None, -100, True)
        size = flash_loss.saved_bytes(query, catalog, neg, 4 if extras else 1, "query" in needs)
        memory = meta(size, dtype=torch.uint8)
        _, lse = flash_loss.flash_loss_fwd(Problem.of(*inputs, extras), 1, neg, memory)
        wanted = ["query" in needs, "catalog" in needs, extras or "bias" in needs]
        flash_loss.flash_loss_bwd(Problem.of(*inputs, False), 1, neg, meta(B), lse, memory, wanted)

    tail = f"{' extras' if extras else ''}{'' if 'query' in needs else ', ' + needs}"
    return Case(f"flash_loss {form} d={d} bf16{tail}", run, "bf16")


def layer_norm_case(d: int) -> Case:
    """Forward, backward, and backward with a step of Adam."""

    def run() -> None:
        from alterrec_fast.kernels.layer_norm import Adam, layer_norm_adam, layer_norm_bwd, layer_norm_fwd

        x, weight, number = (torch.empty(shape, device="meta") for shape in ((V, d), (d,), ()))
        layer_norm_fwd(x, weight, weight, 1e-5)
        layer_norm_bwd(x, x, weight, 1e-5)
        layer_norm_adam(x, x, weight, 1e-5, Adam(x, x, number, number, (0.9, 0.999), 1e-8, 0.0))

    return Case(f"layer_norm d={d}", run, "")


# Every kernel in every form that a launcher chooses, on bf16; every kernel with a product in every arithmetic, and at
# widths on either side of what decides its block and whether rows are masked. "extras" are a bias, excluded items or
# positives and log_q, and `check`.
CASES = [
    rank_slice_case("bf16", 300, 20, 20_000, 5),
    rank_slice_case("bf16", 300, 10_000, 20_000, 5),
    rank_slice_case("bf16", 300, 20, 500, 5),
    rank_slice_case("bf16", 300, 10_000, 10_500, 5),
    rank_slice_case("bf16", 300, 20, 20_000, 5, extras=True),
    *(rank_slice_case("bf16", d, 20, 20_000, 5) for d in (16, 64, 128, 320, 1024)),
    *(rank_slice_case("bf16", d, 20, 500, 5) for d in (64, 100, 128, 320)),
    rank_slice_case("bf16", 128, 20, 500, 5, b=64),
    rank_slice_case("bf16", 128, 20, 500, 5, extras=True),
    rank_slice_case("bf16", 300, 20, 20_000, 5, dtype=torch.float32),
    *(rank_slice_case(product, d, 20, 20_000, 5) for product in ("tf32", "ieee") for d in (64, 300, 1024)),
    top_k_case("bf16", 300, 20, extras=True),
    *(top_k_case("bf16", d, 20) for d in (64, 1024)),
    top_k_case("tf32", 300, 20),
    top_k_case("ieee", 300, 20),
    top_k_case("bf16", 300, 5_000, extras=True),
    *(loss_case("bits", "bf16", d) for d in (16, 64, 128, 300, 320, 1024)),
    *(loss_case("bits", "tf32", d) for d in (16, 64, 300, 1024)),
    loss_case("bits", "ieee", 300),  # its scores are torch's, whatever the width
    loss_case("bits", "bf16", 300, extras=True),
    loss_case("bits", "bf16", 300, dtype=torch.float32),
    *(loss_case("all", product, 300) for product in ("bf16", "tf32", "ieee")),
    *(loss_case("shared", product, 300) for product in ("bf16", "tf32", "ieee")),
    loss_case("shared", "bf16", 300, extras=True),
    loss_case("bits", "bf16", 300, needs="bias"),
    *(loss_case("own", "bf16", d) for d in (64, 128, 300, 1024)),
    loss_case("own", "bf16", 300, extras=True),
    loss_case("own", "ieee", 300),
    loss_case("own", "bf16", 300, needs="bias"),
    *(flash_case("all", d) for d in (16, 64, 100, 128)),
    flash_case("ids", 128),
    flash_case("bits", 100, extras=True),
    flash_case("all", 128, extras=True),
    flash_case("all", 128, needs="bias"),
    *(layer_norm_case(d) for d in (16, 128, 300, 1024)),
]


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
