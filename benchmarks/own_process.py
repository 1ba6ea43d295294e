"""Contestants of a measurement in processes of their own, and what memory a process takes."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def call(module: str, *arguments: str, interpreter: str = sys.executable) -> dict[str, Any]:
    """Runs ``interpreter -m module arguments`` and returns what its last line says, in JSON."""
    done = subprocess.run([interpreter, "-m", module, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)} ended with code {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


class Memory:
    """What this process holds now, and at its peak beyond that: made once imports and data are there (Linux)."""

    def __init__(self) -> None:
        # What imports and data have freed goes back to the system: whoever used it again would seem to need less.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.held = _resident("VmRSS")
        CLEAR.write_text("5")  # the peak counts from here

    def peak_mib(self) -> float:
        return (_resident("VmHWM") - self.held) / 2**20


def _resident(field: str) -> int:
    """Bytes, as the kernel counts them."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
