"""Checkpoints: safetensors files with a state and a checksum in the header, the same bytes for the same content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alterrec_fast.errors import FileError
from alterrec_fast.files import naming, parse_json, regular_size, write_whole

FORMAT = 2
KEY = "alterrec_fast"  # the only one in the header: safetensors writes several in an order that changes from run to run


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes tensors, and `state` as JSON in the file's header, whole or not at all. Raises FileError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state, allow_nan=False)
    header = {"format": FORMAT, "checksum": _checksum(ready, text), "state": text}

    def write(draft: Path) -> None:
        try:
            save_file(ready, draft, metadata={KEY: json.dumps(header)})
        except SafetensorError as error:  # it holds the system's error, a full disk for example
            raise OSError(str(error)) from error

    write_whole(path, write)


def load(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote; raises FileError where the file is missing, of another format, or differs in a single bit."""
    from safetensors import safe_open

    regular_size(path)
    with naming(path, "a checkpoint that can be read"), safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(KEY)
        if text is None:
            raise FileError(f"{path}: not a checkpoint of this version of the package; train again")
        header = parse_json(text, f"{path}, header")
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise FileError(f"{path}: the checkpoint's format is not {FORMAT}; train again")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("checksum") != _checksum(tensors, header["state"]):
            raise FileError(f"{path}: damaged, its checksum is not that of its content")
        state = parse_json(header["state"], f"{path}, state")
        if not isinstance(state, dict):
            raise FileError(f"{path}: the state is {type(state).__name__}, expected an object")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, state


def check_tensors(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises FileError unless `tensors` are those of `expected` by name, shape and dtype, and all finite."""
    for name in sorted({*tensors, *expected}):
        if name not in tensors:
            raise FileError(f"{path}: tensor {name} is missing")
        if name not in expected:
            raise FileError(f"{path}: tensor {name} does not belong to a run with these settings and this data")
        tensor, like = tensors[name], expected[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise FileError(
                f"{path}: tensor {name} is {tuple(tensor.shape)} {tensor.dtype}, "
                f"expected {tuple(like.shape)} {like.dtype}"
            )
        if not bool(tensor.isfinite().all()):
            raise FileError(f"{path}: tensor {name} holds values that are not finite")


def _checksum(tensors: Mapping[str, Tensor], state: str) -> str:
    """32 hexadecimal digits of the state and of every tensor's name, shape, dtype and bytes."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
