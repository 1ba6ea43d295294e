"""Finds the files of a source and opens them: regular files only, and gzip only as far as its size is plausible."""

from __future__ import annotations

import codecs
import gzip
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..sessions import DataError

TABLE_SUFFIXES = (".csv", ".csv.gz", ".parquet")
MAX_RATIO = 100  # of the size unpacked to the size packed; tables of interactions reach 5 to 30
ALWAYS_ALLOWED = 256 << 20  # bytes unpacked, whatever the ratio
STEP = 1 << 22  # bytes read at a time
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a folder",
}


def find_table(folder: Path, stem: str, suffixes: Sequence[str] = TABLE_SUFFIXES) -> Path | None:
    """The one file of folder named stem plus one of the suffixes, or None; raises DataError where there are several."""
    paths = [path for suffix in suffixes if (path := folder / f"{stem}{suffix}").exists()]
    if len(paths) > 1:
        raise DataError(f"{folder}: both {' and '.join(path.name for path in paths)} are here; keep one")
    return need_regular(paths[0]) if paths else None


def need_table(folder: Path, stem: str, suffixes: Sequence[str] = TABLE_SUFFIXES) -> Path:
    """As find_table, but raises DataError where there is none, naming what the folder holds."""
    need_folder(folder)
    path = find_table(folder, stem, suffixes)
    if path is None:
        names = " or ".join(f"{stem}{suffix}" for suffix in suffixes)
        raise DataError(f"{folder}: expected {names}, found {listing(folder)}")
    return path


def need_folder(folder: Path) -> None:
    if not folder.exists():
        raise DataError(f"{folder}: no such file or folder")
    if not folder.is_dir():
        need_regular(folder)
        raise DataError(f"{folder}: expected a folder, found a file")


def need_regular(path: Path) -> Path:
    """path itself; raises DataError for what is no regular file: opening a FIFO or a device may never end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: expected a regular file, found {_KINDS.get(stat.S_IFMT(mode), 'something else')}")
    return path


def listing(folder: Path) -> str:
    """The first names in folder, for an error message."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def is_pattern(path: Path) -> bool:
    """Whether the path is no file or folder but a pattern of file names."""
    return any(mark in path.name for mark in "*?[") and not path.exists()


def is_gzip(path: Path) -> bool:
    with need_regular(path).open("rb") as file:
        return file.read(2) == b"\x1f\x8b" or path.suffix == ".gz"


def check_unpacked(path: Path, packed: int, unpacked: int) -> None:
    """Raises DataError where a file of packed bytes unpacks to more than any table of that size would."""
    if unpacked > max(ALWAYS_ALLOWED, MAX_RATIO * packed):
        raise DataError(
            f"{path}: {packed:,} bytes unpack to more than {unpacked - 1:,}; expected at most {MAX_RATIO} times the "
            "packed size. If the file is meant to be so, unpack it first"
        )


def blocks(path: Path, encoding: str = "utf-8", size: int = STEP) -> Iterator[bytes]:
    """The content in UTF-8, unpacked if it is gzip, about size bytes at a time.

    Raises DataError for a gzip that is damaged, naming the line where it ends, or that unpacks to more than is allowed,
    and for bytes that are not of the encoding. (UTF-8 is not checked here: its parser does.)
    """
    packed, unpacked, num_lines = need_regular(path).stat().st_size, 0, 1
    decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)()
    pieces: list[bytes] = []
    held = 0
    try:
        compressed = is_gzip(path)
        with gzip.open(path) if compressed else path.open("rb") as file:
            while piece := file.read1(size):  # and not read, which would lose what comes before the damage
                unpacked += len(piece)
                if compressed:
                    check_unpacked(path, packed, unpacked)
                if compressed or decoder is not None:
                    num_lines += piece.count(b"\n")
                pieces.append(piece if decoder is None else decoder.decode(piece).encode())
                held += len(piece)
                if held >= size:
                    yield b"".join(pieces)
                    pieces, held = [], 0
            pieces.append(b"" if decoder is None else decoder.decode(b"", final=True).encode())
        yield b"".join(pieces)
    except UnicodeDecodeError as error:
        line, byte = num_lines - error.object.count(b"\n", error.start), f"byte 0x{error.object[error.start]:02x}"
        raise DataError(f"{path}, line {line}: {byte} is not {encoding} ({error.reason})") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        place = f"{path}, line {num_lines}"
        raise DataError(f"{place}: the gzip data ends early or is damaged ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
