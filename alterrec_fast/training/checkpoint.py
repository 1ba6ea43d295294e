"""Files that are whole or not there: checkpoints as safetensors with JSON in the header, and small text files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alterrec_fast.data.sessions import DRAFT

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file and the cause."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a draft beside `path` and moves it there in one step, durably.

    An error leaves what was at `path` before, and no draft; a kill may leave the draft, which `sweep` removes. Raises
    CheckpointError with the cause.
    """
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=DRAFT, dir=path.parent)
        os.close(handle)
        draft = Path(name)
        write(draft)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.chmod(0o644)  # mkstemp makes it private
        draft.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, is to outlive a power cut
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be written ({error}); what was there before is untouched") from error
    finally:
        if draft is not None:
            with contextlib.suppress(FileNotFoundError):
                draft.unlink()


def is_draft(path: Path) -> bool:
    """Whether `path` is named as what `write_whole` and `Dataset.write` fill before it moves to its place."""
    return path.name.startswith(".") and path.name.endswith(DRAFT)


def sweep(folder: Path) -> None:
    """Removes the drafts that killed writes left in `folder` and below; no other process may be writing there."""
    for path in list(folder.rglob(f".*{DRAFT}")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes tensors, and `state` as JSON in the file's header, whole or not at all."""
    header = {"format": str(FORMAT), "state": json.dumps(state)}
    ready = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda draft: save_file(ready, draft, metadata=header))


def load(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote; raises CheckpointError where the file is missing, damaged or of another format."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            header = file.metadata() or {}
            if header.get("format") != str(FORMAT):
                raise CheckpointError(f"{path}: checkpoint format {header.get('format')!r}, expected {FORMAT!r}")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(header["state"])  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
