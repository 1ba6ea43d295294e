"""compute-sanitizer over a small run of every kernel, without torch's cache, so that it sees each tensor's ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .device import Device
from .small import run_small

FOUND = 99  # the exit code where a sanitizer found something


@pytest.fixture(scope="module", autouse=True)
def compiled(device: Device, seed: int) -> None:
    """The same run without a sanitizer leaves compiled kernels behind."""
    run_small(device, seed)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_finds_nothing(tool: str, seed: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sanitizer(), "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    # Looking for what does not exist (a kernel's attribute, a pool) is how the runtime works, and no error.
    command += ["--report-api-errors", "no", "--log-file", str(log)]
    command += [sys.executable, "-m", "tests.gpu.small", str(seed)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    said = log.read_text() if log.exists() else ""
    assert done.returncode == 0, said[-3000:] + done.stderr[-3000:]
    assert "0 errors" in said or "0 hazards" in said, said[-1000:]


def sanitizer() -> str:
    """The path of compute-sanitizer, on PATH or in the CUDA toolkit; skips where there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for folder in (None, f"{home}/bin", f"{home}/compute-sanitizer"):
        if path := shutil.which("compute-sanitizer", path=folder):
            return path
    pytest.skip(f"compute-sanitizer is neither on PATH nor under {home}")
