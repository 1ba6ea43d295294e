"""What a run was made on: processor, memory, versions, and how busy it was with other work."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "neon", "sve")
PACKAGES = ("numpy", "faiss-cpu", "usearch", "sentence-transformers", "cut-cross-entropy", "liger-kernel")
EXTENSION = "alterrec_fast._C"


@dataclass(frozen=True)
class Machine:
    """The environment of a run; "" stands for what the system does not tell."""

    processor: str
    cores: int  # that this process may use
    flags: list[str]
    memory: int  # bytes
    system: str
    python: str
    torch: str
    instruction_set: str  # of the native engine, or why there is none
    packages: list[str]
    threads: int

    @classmethod
    def this(cls, threads: int) -> Machine:
        info = _read("/proc/cpuinfo")
        flags = _field(info, "flags").split()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(
            _field(info, "model name") or platform.processor(), cores(), [f for f in FLAGS if f in flags], memory,
            platform.platform(), platform.python_version(), torch.__version__, instruction_set(),
            [version_of(package) for package in PACKAGES], threads,
        )  # fmt: skip

    @property
    def kind(self) -> str:
        """What machines have in common whose ratios can be compared."""
        return f"{self.processor}, {self.instruction_set}, {self.threads} threads"


def instruction_set() -> str:
    """That of the native engine, or why there is no native engine."""
    try:
        return str(importlib.import_module(EXTENSION).isa())
    except ImportError as error:
        return str(error)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_available() -> int:
    """Bytes that are free or can be made free; where the system does not tell, half of all."""
    line = _field(_read("/proc/meminfo"), "MemAvailable")
    return int(line.split()[0]) * 1024 if line else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def version_of(package: str) -> str:
    """Name and version of an installed package, or the name alone."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


class BackgroundLoad:
    """How many cores work other than this run's has taken since this was made (Linux; else 0)."""

    def __init__(self) -> None:
        self._begun, self._busy, self._run = time.monotonic(), _busy_seconds(), _run_seconds()

    def cores(self) -> float:
        """Time that a hypervisor took counts."""
        other = _busy_seconds() - self._busy - (_run_seconds() - self._run)
        return max(0.0, other) / max(time.monotonic() - self._begun, 1e-9)


def _busy_seconds() -> float:
    """Seconds since the system started that cores spent on anything but waiting."""
    line = next((line for line in _read("/proc/stat").splitlines() if line.startswith("cpu ")), "cpu" + 8 * " 0")
    ticks = [int(x) for x in line.split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _run_seconds() -> float:
    """CPU seconds of this process and of all that it has started, those that have ended among them."""
    children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in _read(str(path)).split()]
    stats = [_read(f"/proc/{pid}/stat").rpartition(")")[2].split()[11:15] for pid in ("self", *children)]
    return sum(int(ticks) for stat in stats for ticks in stat) / os.sysconf("SC_CLK_TCK")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    line = next((line for line in text.splitlines() if line.startswith(name)), "")
    return line.partition(":")[2].strip()
