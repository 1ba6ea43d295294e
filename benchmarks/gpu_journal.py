"""What a stage of the acceptance finds: a JSON line at a time, so that a crash costs nothing that was found before."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .gpu_device import Device, NotHereError


class Journal:
    """Writes lines to a file: facts, checks and times. What is begun after `deadline` (monotonic) is not run."""

    def __init__(self, path: Path, deadline: float) -> None:
        self.path, self.deadline = path, deadline

    def write(self, kind: str, name: str, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "name": name, **{k: _plain(v) for k, v in values.items()}}) + "\n")

    def spent(self) -> bool:
        return time.monotonic() > self.deadline

    def check(self, device: Device, name: str, body: Callable[[], str]) -> None:
        """Runs one check; `body` returns what is worth telling, or raises. A device that is lost ends the stage."""
        if self.spent():
            self.write("check", name, result="not run", detail="the time of this stage was spent")
            return
        try:
            detail = body()
            device.synchronize()
            self.write("check", name, result="pass", detail=detail)
        except NotHereError as why:
            self.write("check", name, result="not run", detail=str(why))
        except torch.OutOfMemoryError as why:
            self.write("check", name, result="not run", detail=short(why))
            device.release()
        except Exception as why:
            self.write("check", name, result="fail", detail=short(why))
            device.synchronize()  # raises again where the error is one that the device does not recover from


def short(error: BaseException) -> str:
    """Type and text of an error, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:600]}"


def _plain(value: Any) -> Any:
    """What JSON can hold: no infinities, no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
