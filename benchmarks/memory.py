"""Peak memory, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from pathlib import Path


def peak_growth(build: Callable[[], Callable[[], object]]) -> int:
    """Bytes by which the peak of a new process grows while it runs, once, what `build` returns.

    `build` is pickled; it must not itself need much more memory than it leaves in use.
    """
    with multiprocessing.get_context("spawn").Pool(1) as process:
        grown: int = process.apply(_grow, (build,))
    return grown


def _grow(build: Callable[[], Callable[[], object]]) -> int:
    run = build()
    before = _peak()
    run()
    return _peak() - before


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, where ru_maxrss is at least what the parent held when it started this process
        return int(status.read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
