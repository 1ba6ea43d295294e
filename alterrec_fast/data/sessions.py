"""Sessions as one flat item array with offsets, and the data set that `prepare` writes; both are memory-mapped."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import polars as pl

FORMAT = 1
DRAFT = ".draft"  # how the name of a file or folder ends that is still being written
SPLITS = ("train", "validation", "test")


class DataError(ValueError):
    """Raw or prepared data that cannot be read; the message names the file, the place and what was expected."""


@dataclass(frozen=True)
class Sessions:
    """S sessions in compressed-row form: session i is ``items[offsets[i]:offsets[i + 1]]``, oldest item first.

    items: (T,) int32 or int64, rows of the catalog. offsets: (S + 1,) int64, from 0 to T.
    """

    items: np.ndarray
    offsets: np.ndarray

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
    def load(cls, folder: Path) -> Sessions:
        """Maps the two files into memory; raises DataError where they are missing, cut short or do not fit together."""
        arrays = []
        for name in ("items.npy", "offsets.npy"):
            try:
                arrays.append(np.load(folder / name, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError, EOFError) as error:  # EOFError: a file of no bytes
                raise DataError(f"{folder / name}: not a readable array file ({error}); run prepare again") from error
        items, offsets = arrays
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(items):
            raise DataError(f"{folder}: offsets must run from 0 to the {len(items)} items; run prepare again")
        return cls(items, offsets)


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

        Raises DataError where the file is missing, cut short, or of another number of items.
        """
        import polars as pl

        file = self.path / "items.parquet"
        try:
            table = pl.read_parquet(file)
        except (pl.exceptions.PolarsError, OSError) as error:
            cause = str(error).splitlines()[0]
            raise DataError(f"{file}: not a readable Parquet file ({cause}); run prepare again") from error
        if len(table) != self.num_items:
            raise DataError(f"{file}: {len(table)} rows, expected {self.num_items} items; run prepare again")
        return table

    def split(self, name: str) -> Sessions:
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
        sessions: Sessions = getattr(self, name)
        return sessions

    @classmethod
    def load(cls, path: str | Path) -> Dataset:
        """Maps a prepared data set into memory; raises DataError where it is missing, damaged or of another format."""
        path = Path(path)
        try:
            info = json.loads((path / "dataset.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(
                f"{path}: no prepared data set here (dataset.json is missing); make one with alterrec-fast prepare"
            ) from error
        except ValueError as error:
            raise DataError(f"{path / 'dataset.json'}: not JSON ({error}); run prepare again") from error
        if info.get("format") != FORMAT:
            raise DataError(f"{path}: data format {info.get('format')!r}, expected {FORMAT}; run prepare again")
        train, validation, test = (Sessions.load(path / name) for name in SPLITS)
        return cls(path, train, validation, test, info)

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
        """Writes a data set beside its place and moves it there whole: an interrupted write leaves nothing at `path`.
        (A killed one leaves a folder ``.NAME-….draft`` beside it.)

        splits: one Sessions for each of train, validation, test. items: row i for catalog row i, with ``item_id`` and
        the text columns. info: what `prepare` counted, kept in dataset.json. Raises DataError where `path` exists and
        `overwrite` is off, or is anything but a prepared data set or an empty folder.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists already; choose another folder or pass --overwrite")
        if path.exists() and not (path / "dataset.json").is_file() and not (path.is_dir() and not any(path.iterdir())):
            raise DataError(f"{path} is not a prepared data set, so it is not replaced; choose another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=DRAFT, dir=path.parent))
        try:
            for name in SPLITS:
                splits[name].save(draft / name)
            items.select("item_id", *text_columns).write_parquet(draft / "items.parquet")
            facts = {
                "format": FORMAT,
                "fingerprint": _fingerprint(draft),
                "num_items": len(items),
                "text_columns": text_columns,
                **info,
            }
            (draft / "dataset.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            draft.chmod(0o755)  # mkdtemp makes it private
            if path.exists():
                shutil.rmtree(path)
            draft.rename(path)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return cls.load(path)


def _fingerprint(folder: Path) -> str:
    """A hash of the names and the content of all files in folder."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
