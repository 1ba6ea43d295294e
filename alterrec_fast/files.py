"""Files that are whole or not there, and checked when they are read.

What is being written has a name of its own, a draft, until it moves to its place in one step. Knows nothing of what
the files hold; needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alterrec_fast.errors import FileError

DRAFT = ".draft"  # how the name of a file or folder ends that is still being written
MAX_TEXT = 256 << 20  # bytes of a text file that is read as a whole; those of a run are far smaller
CHECKSUM = "checksum"  # the key of a sealed JSON file

_AT_FDCWD = -2 if sys.platform == "darwin" else -100
_EXCHANGE = {"linux": ("renameat2", 2), "darwin": ("renameatx_np", 2)}  # function of libc, flag that swaps both names


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a draft beside `path` and moves it there in one step, durably; its mode follows the umask.

    An error leaves what was at `path` before, and no draft; a kill may leave the draft, which `sweep` removes. Raises
    FileError with the cause where the file cannot be written.
    """
    draft = new_draft(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE(draft.stat().st_mode)
        write(draft)
        draft.chmod(mode)  # a writer may have put a file of its own there, as safetensors does
        sync(draft)
        draft.replace(path)
        sync(path.parent)  # the new name, too, is to outlive a power cut
    except OSError as error:
        raise FileError(f"{path} could not be written ({error}); what was there before is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def check_folder(folder: Path) -> None:
    """Raises FileError unless files can be made in `folder`, which need not exist yet; leaves nothing behind."""
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise FileError(f"{folder}: nothing can be written there ({error.strerror}); choose another place") from error


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def new_draft(path: Path) -> Path:
    """A name beside `path` for what is to move there."""
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}{DRAFT}")


def is_draft(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(DRAFT)


def sweep(folder: Path) -> None:
    """Removes the drafts that killed writes left in `folder` and below; no other process may be writing there."""
    for path in list(folder.rglob(f".*{DRAFT}")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Has a file, or the names in a folder, written to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(one: Path, other: Path) -> None:
    """Swaps what two names stand for, in one step; raises FileError where the file system has no such step."""
    name, flag = _EXCHANGE.get(sys.platform, ("", 0))
    swap = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if swap is None or swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(flag)):
        cause = os.strerror(ctypes.get_errno()) if swap is not None else "no such system call"
        raise FileError(
            f"{other} cannot be replaced in one step here ({cause}); remove it yourself or choose another folder"
        )


def regular_size(path: Path) -> int:
    """Bytes of a regular file; raises FileError for one that is missing, and for pipes, devices and folders."""
    try:
        about = path.stat()
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(about.st_mode):
        raise FileError(f"{path}: not a regular file")
    return about.st_size


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; raises FileError, also for one of more than MAX_TEXT bytes."""
    size = regular_size(path)
    if size > MAX_TEXT:
        raise FileError(f"{path}: {size:,} bytes, expected {MAX_TEXT:,} at most")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} cannot be read ({error})") from error


def digest(path: Path) -> str:
    """32 hexadecimal digits that stand for the content of a file; raises FileError where it cannot be read."""
    regular_size(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error})") from error


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; raises FileError, also for NaN and infinity, which JSON lacks."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where}: not JSON ({error})") from error


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object with a checksum of all its values, the last of its keys."""
    write_text(path, json.dumps({**values, CHECKSUM: _checksum(values)}, indent=2, allow_nan=False) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote, without the checksum; raises FileError where it is not what was written."""
    values = parse_json(read_text(path), str(path))
    if not isinstance(values, dict) or CHECKSUM not in values:
        raise FileError(f"{path}: expected a JSON object with a {CHECKSUM}, as this version of the package writes it")
    checksum = values.pop(CHECKSUM)
    if checksum != _checksum(values):
        raise FileError(f"{path}: changed since it was written, {CHECKSUM} {checksum!r} is not that of its values")
    return values


def printable(text: str) -> str:
    r"""The text on one line without what a terminal obeys: control characters, line ends and marks of direction are
    written as \x1b or \u202e.
    """
    return "".join(_escape(character) if ord(character) in _OBEYED else character for character in text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


# C0 and C1 controls, soft hyphen, marks and overrides of direction, line separators, surrogates, byte order mark.
_OBEYED = {
    *range(0x20), *range(0x7F, 0xA0), 0xAD, 0x61C, 0x200B, 0x200E, 0x200F, *range(0x2028, 0x202F),
    *range(0x2060, 0x2070), *range(0xD800, 0xE000), 0xFEFF, *range(0xFFF9, 0xFFFC),
}  # fmt: skip


def _checksum(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


@contextlib.contextmanager
def naming(path: Path, what: str) -> Iterator[None]:
    """Turns what a parser raises about a file into a FileError that names it: FileErrors pass as they are.

    Parsers meet damaged and foreign files with errors of many kinds; polars even with one that is no Exception.
    """
    try:
        yield
    except (FileError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileError(f"{path}: not {what} ({cause})") from error
