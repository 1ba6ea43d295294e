"""One stage of the acceptance in a process of its own: `python -m alterrec_fast.benchmarks.gpu_stages NAME --out FILE`.

gpu_acceptance.py starts these and reads what they write (`gpu_journal.py`).
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import alterrec_fast
from alterrec_fast.ops.library import CUDA_OPS, EXTENSION, NO_EXTENSION

from . import gpu_behaviour, gpu_loss_checks, gpu_rank_checks, gpu_times
from .gpu_acceptance import KILLED, run_limited
from .gpu_device import Device, FaultError, NotHereError, open_device
from .gpu_journal import Journal

SANITIZERS = ("memcheck", "racecheck")
FOUND = 99  # what a sanitizer ends with where it found something


def look(device: Device, journal: Journal, _seed: int) -> None:
    """Environment: GPU, driver, versions, compilers, what was built."""
    facts: dict[str, str | list[str]] = {
        **device.facts(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": str(torch.version.cuda),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "nvcc": _output("nvcc", "--version").splitlines()[-1:],
        "CPU": f"{platform.machine()}, {os.cpu_count()} cores",
        "extension": NO_EXTENSION or f"instruction set {__import__(EXTENSION, fromlist=['isa']).isa()}",
        "ops in CUDA C++": ", ".join(sorted(CUDA_OPS)) or "none",
        "package": str(Path(alterrec_fast.__file__).parent),
    }
    if device.kind == "cuda":
        asked = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,mig.mode.current"
        facts[asked] = _output("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader")
    for name, value in facts.items():
        journal.write("fact", name, value=value if isinstance(value, str) else " ".join(value) or "not present")
    home = Path(alterrec_fast.__file__).parents[1]
    journal.check(device, "the package under test is the one that was installed", lambda: _is_on_path(home))


def _is_on_path(home: Path) -> str:
    if str(home) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        raise FaultError(f"alterrec_fast comes from {home}, which is not on PYTHONPATH")
    return str(home)


def sanitize(device: Device, journal: Journal, seed: int, tool: str) -> None:
    """compute-sanitizer over a small run of every kernel, without torch's cache, so that it sees each tensor's ends.

    The stage "small" is the same run without it, and has left compiled kernels behind.
    """

    def run() -> str:
        if device.kind != "cuda":
            raise NotHereError("no compute-sanitizer on this device")
        program = find_sanitizer()
        log = journal.path.with_suffix(".log")
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
        # Looking for what is not there (a kernel's attribute, a pool) is how the runtime works, and no error.
        command += ["--report-api-errors", "no", "--log-file", str(log)]
        command += [sys.executable, "-m", "alterrec_fast.benchmarks.gpu_stages", "small"]
        command += ["--device", device.kind, "--seed", str(seed), "--out", os.devnull]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        outcome, said = run_limited(command, environment, Path.cwd(), journal.deadline - time.monotonic())
        lines = [line.strip("= ") for line in log.read_text().splitlines()] if log.exists() else []
        if outcome.startswith(KILLED):
            raise NotHereError(f"{program}: {outcome}")
        if outcome:
            raise FaultError(f"{outcome}: {' / '.join(lines[:8] + lines[-1:])} / {said}")
        return lines[-1] if lines else "it said nothing"

    journal.check(device, f"compute-sanitizer {tool}", run)


def find_sanitizer() -> str:
    """The path of compute-sanitizer, on PATH or in the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for folder in (None, f"{home}/bin", f"{home}/compute-sanitizer"):
        if found := shutil.which("compute-sanitizer", path=folder):
            return found
    raise NotHereError(f"compute-sanitizer is not present on PATH or under {home}")


def check_huge(device: Device, journal: Journal, seed: int) -> None:
    """Every op where addresses need more than 32 bits; one process, since each takes tens of gigabytes."""
    gpu_rank_checks.check_huge_ranks(device, journal, seed)
    gpu_loss_checks.check_huge_losses(device, journal, seed)


STAGES: dict[str, Callable[[Device, Journal, int], None]] = {
    "environment": look,
    "rank_slice bits": functools.partial(gpu_rank_checks.check_rank_slice, form="bits"),
    "rank_slice ids": functools.partial(gpu_rank_checks.check_rank_slice, form="ids"),
    "rank_slice edges": gpu_rank_checks.check_rank_slice_edges,
    "top_k": gpu_rank_checks.check_top_k,
    "slice_cross_entropy": gpu_loss_checks.check_slice_cross_entropy,
    "sampled_softmax": gpu_loss_checks.check_sampled_softmax,
    "determinism": gpu_behaviour.check_determinism,
    "graphs": gpu_behaviour.check_graphs,
    "small": lambda device, _journal, seed: gpu_behaviour.run_small(device, seed),
    "huge": check_huge,
    **{tool: functools.partial(sanitize, tool=tool) for tool in SANITIZERS},
    "ceilings": gpu_times.measure_ceilings,
    "kernels": gpu_times.measure_kernels,
    **{f"times, {name}": functools.partial(gpu_times.measure, name=name) for name in ("paper", "1M", "10M")},
}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    """What a command prints, or why there is nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600.0, help="after which nothing new is begun")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    journal = Journal(chosen.out, time.monotonic() + chosen.seconds)
    STAGES[chosen.stage](open_device(chosen.device), journal, chosen.seed)


if __name__ == "__main__":
    main()
