"""Processes of measurements whose rows each need one of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def call(module: str, *arguments: str, interpreter: str = sys.executable) -> dict[str, Any]:
    """Runs ``interpreter -m module arguments`` and returns what its last line says, in JSON."""
    done = subprocess.run([interpreter, "-m", module, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)} ended with code {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
