"""Sessions as one flat item array with offsets, and the data set that `prepare` writes; both are memory-mapped."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alterrec_fast import files
from alterrec_fast.errors import DataError as DataError
from alterrec_fast.errors import FileError

if TYPE_CHECKING:
    import polars as pl

FORMAT = 2
SPLITS = ("train", "validation", "test")
LAST_ONLY = "last_target_only"  # in dataset.json where validation and test sessions have their last item as target
INFO, ITEMS = "dataset.json", "items.parquet"
FILES = (ITEMS, *(f"{split}/{array}.npy" for split in SPLITS for array in ("items", "offsets")))  # all but INFO
AGAIN = "run prepare again"
HASH_AT_LOAD = 64 << 20  # bytes of a data set up to which opening it reads it all
CHUNK = 1 << 22  # numbers checked at a time


@dataclass(frozen=True)
class Sessions:
    """S sessions in compressed-row form: session i is ``items[offsets[i]:offsets[i + 1]]``, oldest item first.

    items: (T,) int32 or int64, rows of the catalog. offsets: (S + 1,) int64, from 0 to T. last_only: evaluation takes
    a session's last item as its only target, and not every item after the first.
    """

    items: np.ndarray
    offsets: np.ndarray
    last_only: bool = False

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(f"session {index} of {len(self)}")
        index %= len(self)
        return self.items[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(S,) int64, items in each session."""
        return np.diff(self.offsets)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "items.npy", self.items)
        np.save(folder / "offsets.npy", self.offsets)

    @classmethod
    def load(cls, folder: Path, last_only: bool = False) -> Sessions:
        """Maps the two files into memory; raises FileError where they are missing, damaged or do not fit together.

        The numbers in between are not read: `check` does that.
        """
        items = _map(folder / "items.npy", (np.int32, np.int64))
        offsets = _map(folder / "offsets.npy", (np.int64,))
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(items):
            raise FileError(f"{folder / 'offsets.npy'}: must run from 0 to the {len(items)} items; {AGAIN}")
        return cls(items, offsets, last_only)

    def check(self, folder: Path, num_items: int) -> None:
        """Reads every number; raises FileError for sessions of less than two items and items outside the catalog."""
        for start in range(0, len(self), CHUNK):
            lengths = np.diff(self.offsets[start : start + CHUNK + 1])
            if lengths.min() < 2:
                index = start + int(lengths.argmin())
                raise FileError(
                    f"{folder / 'offsets.npy'}: session {index} has {lengths.min()} items, expected 2 or more"
                )
        for start in range(0, len(self.items), CHUNK):
            chunk = self.items[start : start + CHUNK]
            if chunk.min() < 0 or chunk.max() >= num_items:
                raise FileError(
                    f"{folder / 'items.npy'}: items {chunk.min()} to {chunk.max()}, expected 0 to {num_items - 1}"
                )


def _map(file: Path, dtypes: tuple[type, ...]) -> np.ndarray:
    """A one-dimensional array file as a memory map."""
    files.regular_size(file)
    with files.naming(file, "an array file that can be read"):
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    if array.ndim != 1 or array.dtype not in dtypes:
        names = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise FileError(f"{file}: shape {array.shape} of {array.dtype}, expected one dimension of {names}; {AGAIN}")
    return array


@dataclass(frozen=True)
class Dataset:
    """A prepared data set on disk: three splits of sessions, and an item table whose row i is catalog row i."""

    path: Path
    train: Sessions
    validation: Sessions
    test: Sessions
    info: dict[str, Any]

    @property
    def num_items(self) -> int:
        return int(self.info["num_items"])

    @property
    def text_columns(self) -> list[str]:
        return list(self.info["text_columns"])

    @property
    def fingerprint(self) -> str:
        """A hash of everything in the data set, by which a run knows the data that it was trained on."""
        return str(self.info.get("fingerprint", ""))

    @cached_property
    def items(self) -> pl.DataFrame:
        """The item table, row i for catalog row i: ``item_id`` and the text columns (String, null if missing).

        Raises FileError where the file is missing, or not the one that was written with the data set.
        """
        import polars as pl

        file = self.path / ITEMS
        self._check_file(ITEMS, content=True)
        with files.naming(file, "a Parquet file that can be read"):
            table = pl.read_parquet(file)
        schema = dict.fromkeys(["item_id", *self.text_columns], pl.String)
        if dict(table.schema) != schema or len(table) != self.num_items:
            raise FileError(
                f"{file}: {len(table)} rows of {dict(table.schema)}, expected {self.num_items} of {schema}; {AGAIN}"
            )
        if table["item_id"].null_count() or table["item_id"].n_unique() < len(table):
            raise FileError(f"{file}: item ids are missing or repeat; {AGAIN}")
        return table

    def split(self, name: str) -> Sessions:
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
        sessions: Sessions = getattr(self, name)
        return sessions

    @classmethod
    def load(cls, path: str | Path, verify: bool = False) -> Dataset:
        """Maps a prepared data set into memory; raises FileError where it is missing, damaged or of another format.

        Sizes and times of all files are compared with those that were written down, and a file with another time is
        read and compared as a whole. With `verify`, and for a data set of at most HASH_AT_LOAD bytes, all files are.
        """
        path = Path(path)
        if not (path / INFO).exists():
            raise FileError(
                f"{path}: no prepared data set here ({INFO} is missing); make one with alterrec-fast prepare"
            )
        info = files.read_sealed(path / INFO)
        _check_info(path / INFO, info)
        for name in FILES:
            _check_file(path, info, name, content=False)
        last = info.get(LAST_ONLY) is True
        train, validation, test = (Sessions.load(path / name, last and name != "train") for name in SPLITS)
        dataset = cls(path, train, validation, test, info)
        small = sum(size for size, _, _ in info["files"].values()) <= HASH_AT_LOAD
        return dataset.verify() if small or verify else dataset

    def verify(self) -> Dataset:
        """Reads every file and compares it with the checksum that was written down; returns the data set itself.

        Raises FileError for a file that was changed, and for sessions and items that cannot be.
        """
        for name in FILES:
            self._check_file(name, content=True)
        for name in SPLITS:
            self.split(name).check(self.path / name, self.num_items)
        return self

    def _check_file(self, name: str, content: bool) -> None:
        _check_file(self.path, self.info, name, content)

    @classmethod
    def write(
        cls,
        path: str | Path,
        splits: Mapping[str, Sessions],
        items: pl.DataFrame,
        text_columns: list[str],
        info: Mapping[str, Any],
        overwrite: bool = False,
    ) -> Dataset:
        """Writes a data set beside its place and moves it there in one step: whatever interrupts it, `path` holds what
        was there before, or all of the new one. (A kill leaves a folder ``.NAME-….draft`` beside it.)

        splits: one Sessions for each of train, validation, test, sessions of two or more items. items: row i for
        catalog row i, with ``item_id`` and the text columns. info: what `prepare` counted, kept in dataset.json.
        Raises DataError as `check_place` does, FileError where the file system cannot replace a folder in one step.
        """
        path = Path(path).resolve() if Path(path).is_symlink() else Path(path)
        check_place(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = files.new_draft(path)
        try:
            for name in SPLITS:
                splits[name].save(draft / name)
                splits[name].check(path / name, len(items))
            items.select("item_id", *text_columns).write_parquet(draft / ITEMS)
            for name in FILES:
                files.sync(draft / name)
            about = {name: _about(draft / name) for name in FILES}
            facts = {
                "format": FORMAT,
                "fingerprint": _fingerprint(about),
                "num_items": len(items),
                "text_columns": text_columns,
                **info,
                "files": about,
            }
            files.write_sealed(draft / INFO, facts)
            before = path.exists() and any(path.iterdir())
            if before:
                check_place(path, overwrite)  # minutes may have passed
                files.exchange(draft, path)
            else:
                draft.replace(path)  # an empty folder gives way, too
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        files.sync(path.parent)
        if before:
            _remove(draft)
        return cls.load(path)


def check_place(path: Path, overwrite: bool) -> None:
    """Raises DataError unless a data set may be written to `path`: nothing is there, or with `overwrite` an empty
    folder or a data set and nothing else; FileError where no file can be written beside it.
    """
    files.check_folder(path.parent)
    if not path.exists():
        return
    if not overwrite:
        raise DataError(f"{path} exists already; choose another folder or pass --overwrite")
    if not path.is_dir():
        raise DataError(f"{path} is not a prepared data set, so it is not replaced; choose another folder")
    names = {file.relative_to(path).as_posix() for file in path.rglob("*")}
    foreign = sorted(names - {INFO, *FILES, *SPLITS})
    if names and (INFO not in names or foreign):
        what = f"holds {', '.join(foreign[:5])}" if foreign else f"lacks {INFO}"
        raise DataError(f"{path} {what}, which prepare did not make, so it is not replaced; choose another folder")


def _remove(folder: Path) -> None:
    """Removes a data set, and nothing that came into its folder since it was looked at."""
    for name in (INFO, *FILES):
        (folder / name).unlink(missing_ok=True)
    for path in (*(folder / split for split in SPLITS), folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _about(file: Path) -> tuple[int, int, str]:
    """Size in bytes, time of the last change in nanoseconds, and a hash of the content."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns, files.digest(file)


def _fingerprint(about: Mapping[str, Any]) -> str:
    """A hash of the names and the content of all files."""
    text = "".join(f"{name} {about[name][2]}\n" for name in sorted(about))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _check_file(folder: Path, info: Mapping[str, Any], name: str, content: bool) -> None:
    """Raises FileError for a file of another size than was written down; its content is compared where `content` asks
    for it or its time is another.
    """
    file, (size, changed, digest) = folder / name, info["files"][name]
    actual = files.regular_size(file)
    if actual != size:
        raise FileError(f"{file}: {actual} bytes, expected {size}: changed since prepare wrote it; {AGAIN}")
    if (content or file.stat().st_mtime_ns != changed) and files.digest(file) != digest:
        raise FileError(f"{file}: changed since prepare wrote it (its checksum is another); {AGAIN}")


def _check_info(file: Path, info: Mapping[str, Any]) -> None:
    """Raises FileError unless dataset.json holds what this version of the package writes."""
    if info.get("format") != FORMAT:
        raise FileError(f"{file}: data format {info.get('format')!r}, expected {FORMAT}; {AGAIN}")
    columns, about, count = info.get("text_columns"), info.get("files"), info.get("num_items")
    if type(count) is not int or count < 1:
        raise FileError(f"{file}: num_items is {count!r}, expected a number above 0; {AGAIN}")
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise FileError(f"{file}: text_columns is {columns!r}, expected names; {AGAIN}")
    if not isinstance(about, dict) or set(about) != set(FILES) or not all(_is_about(one) for one in about.values()):
        raise FileError(f"{file}: files must name size, time and hash of {', '.join(FILES)}; {AGAIN}")
    if info.get("fingerprint") != _fingerprint(about):
        raise FileError(f"{file}: fingerprint is not that of the files; {AGAIN}")


def _is_about(value: Any) -> bool:
    return isinstance(value, list) and [type(part) for part in value] == [int, int, str]
