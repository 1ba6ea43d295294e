"""A scratch folder beside a data set that is being made, and a budget of memory that polars spills from into it."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import polars as pl

from alterrec_fast import files

from .sessions import DataError

_BUDGET, _FOLDER = "POLARS_OOC_MEMORY_BUDGET_MB", "POLARS_OOC_SPILL_DIR"
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SHARE = 0.4  # of the limit that polars may hold before it spills; the rest is for batches, ids and what it can't spill
_IN_USE = "in-use"  # a file in the folder that its process holds locked
_LEAST = 512 << 20  # bytes, what a limit must leave


def parse_size(text: str) -> int:
    """Bytes of a size such as ``4GB``, ``500MB`` or ``1073741824``; raises DataError for another text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    if match is None:
        raise DataError(f"memory limit {text!r}, expected a size such as 4GB or 500MB")
    return int(float(match[1]) * (1 << _UNITS[match[2].upper()]))


def free_memory() -> int:
    """Bytes that this process may still take without swapping."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists() and (match := re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())):
        free = int(match[1]) << 10
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int(used.read_text()))
    return max(free, 0)


class Scratch:
    """A folder for what does not fit in memory; gone when its block ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def array(self, parts: Iterable[np.ndarray], dtype: type) -> np.ndarray:
        """The parts, one after another, as one array that is mapped into memory and has no name on the disk."""
        size = 0
        with tempfile.TemporaryFile(dir=self.folder) as file:
            for part in parts:
                part.astype(dtype, copy=False).tofile(file)
                size += len(part)
            file.flush()
            return np.memmap(file, dtype, "r+", shape=(size,)) if size else np.empty(0, dtype)


@contextmanager
def scratch(out: Path, memory_limit: int | None = None) -> Iterator[Scratch]:
    """A Scratch beside out, where those of killed processes are removed. memory_limit: bytes, by default half of what
    is free.

    Raises DataError for a limit that is too low to work with.
    """
    limit = free_memory() // 2 if memory_limit is None else memory_limit
    if memory_limit is not None and limit < _LEAST:
        raise DataError(f"memory limit of {limit:,} bytes, expected {_LEAST:,} or more")
    parent = next(parent for parent in out.absolute().parents if parent.is_dir())
    folder = files.new_draft(parent / out.name)
    _remove_abandoned(parent, out.name)
    folder.mkdir()
    lock = (folder / "new").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / "new").rename(folder / _IN_USE)  # in one step: nobody sees it without its lock
    before = {name: os.environ.get(name) for name in (_BUDGET, _FOLDER)}
    _set({_BUDGET: str(max(limit, _LEAST) * _SHARE / (1 << 20)).partition(".")[0], _FOLDER: str(folder)})
    try:
        yield Scratch(folder)
    finally:
        _set(before)
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _remove_abandoned(parent: Path, name: str) -> None:
    """Removes the scratch folders for a data set of this name whose processes are gone."""
    for file in parent.glob(f".{glob.escape(name)}-*{files.DRAFT}/{_IN_USE}"):
        with suppress(OSError), file.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(file.parent, ignore_errors=True)


def _set(environment: dict[str, str | None]) -> None:
    pl.Config.load(json.dumps({"environment": environment, "direct": {}}))  # tells the running engine, too
