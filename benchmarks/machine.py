"""What the measurements were made on: processor, memory, versions, and how busy it was."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from alterrec_fast.ops.library import EXTENSION, NO_EXTENSION

FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "neon", "sve")
PACKAGES = ("numpy", "faiss-cpu", "usearch", "sentence-transformers", "cut-cross-entropy", "liger-kernel", "replay-rec")
STREAMED = 256 << 20  # bytes of the buffers that bandwidth is measured with: beyond any cache


@dataclass(frozen=True)
class Machine:
    """The environment of a run; "" and 0 stand for what the system does not tell."""

    processor: str
    cores: int  # that this process may use
    flags: list[str]
    governor: str
    memory: int  # bytes
    system: str
    python: str
    torch: str
    instruction_set: str  # of the native engine, or why there is none
    packages: list[str]
    threads: int


def look(threads: int) -> Machine:
    info = _read("/proc/cpuinfo")
    there = set(_field(info, "flags").split())
    return Machine(
        processor=_field(info, "model name") or platform.processor(),
        cores=cores(),
        flags=[flag for flag in FLAGS if flag in there],
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip(),
        memory=memory_total(),
        system=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        instruction_set=NO_EXTENSION or __import__(EXTENSION, fromlist=["isa"]).isa(),
        packages=[version_of(package) for package in PACKAGES],
        threads=threads,
    )


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_total() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_available() -> int:
    line = _field(_read("/proc/meminfo"), "MemAvailable")
    return int(line.split()[0]) * 1024 if line else memory_total() // 2


def load() -> float:
    """Processes that ran or waited for a core, over the last minute."""
    return os.getloadavg()[0]


def cpu_of(pid: int) -> float:
    """CPU seconds of a process and of those that it has started and waited for; 0.0 where it is not told."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return sum(int(x) for x in fields[11:15]) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def own_seconds() -> float:
    """CPU seconds of this process and of all that it has started, those that have ended among them."""
    children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in _read(str(path)).split()]
    return cpu_of(os.getpid()) + sum(cpu_of(int(pid)) for pid in children)


def busy_seconds() -> float:
    """Seconds since the system started that cores spent on anything but waiting; 0.0 where it is not told."""
    line = next((line for line in _read("/proc/stat").splitlines() if line.startswith("cpu ")), "cpu 0 0 0 0 0 0 0 0")
    user, nice, system, _, _, interrupts, soft, steal = (int(x) for x in line.split()[1:9])
    return (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")


def version_of(package: str) -> str:
    """Name and version of an installed package, or the name alone."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def measure_bandwidth(connection: Connection, threads: int) -> None:
    """A process that answers with bytes a second: the best of reading (a sum) and of copying (read and written)."""
    connection.recv()
    torch.set_num_threads(threads)
    source = torch.ones(STREAMED // 4)
    target = torch.zeros_like(source)
    best = 0.0
    for _ in range(5):
        begun = time.perf_counter()
        source.sum()
        read = time.perf_counter()
        target.copy_(source)
        best = max(best, STREAMED / (read - begun), 2 * STREAMED / (time.perf_counter() - read))
    connection.send(("done", best))
    connection.recv()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    line = next((line for line in text.splitlines() if line.startswith(name)), "")
    return line.partition(":")[2].strip()
