"""Sessions on disk: what is written comes back mapped, and what is broken is an error that names the file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from alterrec_fast import files
from alterrec_fast.data.prepare import prepare
from alterrec_fast.data.sessions import FILES, SPLITS, DataError, Dataset, Sessions, _about, _fingerprint
from alterrec_fast.errors import FileError


def sessions(*rows: list[int]) -> Sessions:
    lengths = [len(row) for row in rows]
    return Sessions(
        np.array([item for row in rows for item in row], np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def write(path: Path, overwrite: bool = False) -> Dataset:
    splits = {"train": sessions([0, 1, 2], [2, 1]), "validation": sessions(), "test": sessions([1, 0])}
    items = pl.DataFrame({"item_id": ["a", "b", "00123"], "title": ["A", None, "C"], "other": [1, 2, 3]})
    return Dataset.write(path, splits, items, ["title"], {"source": "test"}, overwrite)


def test_indexing():
    three = sessions([5, 6, 7], [8], [9, 10])
    assert len(three) == 3
    assert three[0].tolist() == [5, 6, 7] and three[-1].tolist() == [9, 10]
    assert three.lengths.tolist() == [3, 1, 2]
    for index in (3, -4):
        with pytest.raises(IndexError):
            three[index]


def test_round_trip_is_memory_mapped(tmp_path):
    data = write(tmp_path / "out")
    assert isinstance(data.train.items, np.memmap) and data.train.items.dtype == np.int32
    assert [row.tolist() for row in (data.train[0], data.train[1], data.test[0])] == [[0, 1, 2], [2, 1], [1, 0]]
    assert len(data.validation) == 0  # an empty array can be mapped too
    assert data.num_items == 3 and data.text_columns == ["title"] and data.info["source"] == "test"
    assert data.items.to_dict(as_series=False) == {"item_id": ["a", "b", "00123"], "title": ["A", None, "C"]}
    assert data.split("test") is data.test
    with pytest.raises(ValueError, match="train, validation, test"):
        data.split("valid")


def test_write_replaces_only_prepared_data_and_only_when_asked(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(DataError, match="--overwrite"):
        write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    write(other, overwrite=True)  # an empty folder may be taken
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds thesis\.txt, which prepare did not make"):
        write(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["items.npy", "offsets.npy"])
@pytest.mark.parametrize("size", [0, 50, 130])
def test_arrays_cut_short_are_an_error(tmp_path, name, size):
    write(tmp_path / "out")
    file = tmp_path / "out" / "train" / name
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(FileError, match=name):
        Dataset.load(tmp_path / "out")


def test_a_damaged_item_table_is_an_error_when_it_is_read(tmp_path, monkeypatch):
    data = write(tmp_path / "out")
    monkeypatch.setattr("alterrec_fast.data.sessions.HASH_AT_LOAD", 0)  # large: the content is read when it is used
    file = data.path / "items.parquet"
    whole = file.read_bytes()
    about = file.stat()
    file.write_bytes(whole[:40] + b"X" + whole[41:])
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    opened = Dataset.load(data.path)
    with pytest.raises(FileError, match=r"items\.parquet: changed since prepare wrote it"):
        _ = opened.items


def test_the_fingerprint_is_of_the_content(tmp_path):
    one, same = write(tmp_path / "one"), write(tmp_path / "same")
    assert one.fingerprint == same.fingerprint == Dataset.load(tmp_path / "one").fingerprint != ""
    splits = {name: one.split(name) for name in SPLITS}
    items = one.items.with_columns(pl.col("title").replace("A", "B"))
    title = Dataset.write(tmp_path / "title", splits, items, ["title"], {"source": "test"})
    order = Dataset.write(
        tmp_path / "order", {**splits, "train": sessions([2, 1], [0, 1, 2])}, one.items, ["title"], {}
    )
    assert len({one.fingerprint, title.fingerprint, order.fingerprint}) == 3


def test_missing_or_foreign_json_is_an_error(tmp_path):
    with pytest.raises(FileError, match=r"dataset\.json is missing"):
        Dataset.load(tmp_path)
    data = write(tmp_path / "out")
    for text, message in (
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"format": 2}', "checksum"),
        ("[" * 10**5, "JSON"),
    ):
        (data.path / "dataset.json").write_text(text)
        with pytest.raises(FileError, match=message):
            Dataset.load(data.path)
    files.write_sealed(data.path / "dataset.json", {**data.info, "format": 1})
    with pytest.raises(FileError, match="data format 1, expected 2"):
        Dataset.load(data.path)
    assert SPLITS == ("train", "validation", "test")


def seal(data: Dataset) -> None:
    """Writes dataset.json anew for files that were changed, as a stranger may who wants them to be taken."""
    about = {name: _about(data.path / name) for name in FILES}
    files.write_sealed(data.path / "dataset.json", {**data.info, "files": about, "fingerprint": _fingerprint(about)})


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("test/items.npy", np.zeros(5, np.int32), "must run from 0 to the 5 items"),
        ("test/items.npy", np.array([0, 3], np.int32), "items 0 to 3, expected 0 to 2"),
        ("test/items.npy", np.array([-1, 2], np.int32), "items -1 to 2"),
        ("test/items.npy", np.array([0.0, 2.0]), "float64, expected one dimension of int32 or int64"),
        ("test/items.npy", np.zeros((2, 1), np.int32), r"shape \(2, 1\)"),
        ("test/items.npy", np.array([0, 1], ">i4"), ">i4"),
        ("train/offsets.npy", np.array([0, 7, 3, 5]), "session 1 has -4 items"),
        ("train/offsets.npy", np.array([0, 1, 5]), "session 0 has 1 items"),
        ("train/offsets.npy", np.array([0.0, 3.0, 5.0]), "float64"),
        ("train/offsets.npy", np.empty(0, np.int64), "must run from 0"),
        ("items.parquet", pl.DataFrame({"item_id": ["a"], "title": ["A"]}), "1 rows"),
        ("items.parquet", pl.DataFrame({"item_id": [1, 2, 3], "title": ["A"] * 3}), "Int64"),
        ("items.parquet", pl.DataFrame({"item_id": ["a", "a", "b"], "title": ["A"] * 3}), "repeat"),
        ("items.parquet", pl.DataFrame({"item_id": ["a", None, "b"], "title": ["A"] * 3}), "missing or repeat"),
    ],
)
def test_foreign_values_are_an_error_that_names_the_file(tmp_path, file, array, message):
    data = write(tmp_path / "out")
    if isinstance(array, pl.DataFrame):
        array.write_parquet(data.path / file)
    else:
        np.save(data.path / file, array)
    seal(data)
    with pytest.raises(FileError, match=message) as error:
        _ = Dataset.load(data.path).items
    assert Path(file).name in str(error.value) or "offsets.npy" in str(error.value)


def test_a_changed_array_is_found_at_once_or_when_asked_for(tmp_path, monkeypatch):
    data = write(tmp_path / "out")
    file = data.path / "train" / "items.npy"
    about = file.stat()
    np.save(file, data.train.items[::-1].copy())  # as many bytes
    with pytest.raises(FileError, match=r"items\.npy: changed since prepare wrote it"):
        Dataset.load(data.path)
    monkeypatch.setattr("alterrec_fast.data.sessions.HASH_AT_LOAD", 0)
    with pytest.raises(FileError, match=r"items\.npy: changed"):  # by its time
        Dataset.load(data.path)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    opened = Dataset.load(data.path)
    with pytest.raises(FileError, match=r"items\.npy: changed"):
        opened.verify()
    with pytest.raises(FileError, match=r"items\.npy: changed"):
        Dataset.load(data.path, verify=True)
    shutil.copytree(write(tmp_path / "other").path, tmp_path / "copy", copy_function=shutil.copyfile)
    Dataset.load(tmp_path / "copy")  # other times, the same content


def test_overwriting_removes_nothing_that_prepare_did_not_make(tmp_path):
    data = write(tmp_path / "out")
    for name in ("notes.txt", "train/notes.txt"):
        (data.path / name).write_text("mine")
        with pytest.raises(DataError, match=rf"holds {name}, which prepare did not make"):
            write(tmp_path / "out", overwrite=True)
        assert (data.path / name).read_text() == "mine"
        (data.path / name).unlink()
    (tmp_path / "link").symlink_to(data.path)
    write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_killed_while_overwriting_leaves_the_old_or_the_new_one(tmp_path):
    moments = ("before the exchange", "after it", "while the old one is removed")
    before = [write(tmp_path / moment) for moment in moments]
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), *moments], capture_output=True, text=True)
    assert done.stdout.split() == ["9", "9", "9"], done.stderr
    for moment, old in zip(moments, before, strict=True):
        after = Dataset.load(tmp_path / moment)
        assert (after.fingerprint == old.fingerprint) == (moment == "before the exchange")
        assert len(after.train) == (2 if moment == "before the exchange" else 1)
        write(tmp_path / moment, overwrite=True)


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np, polars as pl
from alterrec_fast import files
from alterrec_fast.data import sessions
from alterrec_fast.data.sessions import Dataset, Sessions

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

one = Sessions(np.array([0, 1], np.int32), np.array([0, 2]))
for moment, (owner, step) in zip(sys.argv[2:], [(files, "exchange"), (sessions, "_remove"), (Path, "rmdir")]):
    child = os.fork()
    if not child:
        setattr(owner, step, kill)
        items = pl.DataFrame({"item_id": ["a", "b"]})
        splits = dict.fromkeys(("train", "validation", "test"), one)
        Dataset.write(Path(sys.argv[1]) / moment, splits, items, [], {}, overwrite=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1, flush=True)
"""


def test_a_file_system_without_exchange_is_named_and_nothing_is_lost(tmp_path, monkeypatch):
    write(tmp_path / "out")
    monkeypatch.setattr(files, "_EXCHANGE", {})
    with pytest.raises(FileError, match="cannot be replaced in one step here"):
        write(tmp_path / "out", overwrite=True)
    assert len(Dataset.load(tmp_path / "out").train) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_written_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        data = write(tmp_path / "out")
        files.write_text(tmp_path / "text", "x")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in [tmp_path / "text", *data.path.rglob("*.*")]}
    assert modes == {0o640}
    assert data.path.stat().st_mode & 0o777 == (data.path / "train").stat().st_mode & 0o777 == 0o750


def test_prepare_looks_at_the_place_before_it_reads(tmp_path):
    data = write(tmp_path / "out")
    (data.path / "test.csv").write_text("mine")
    with pytest.raises(DataError, match=r"holds test\.csv, which prepare did not make"):
        prepare("generic", tmp_path / "nowhere", data.path, overwrite=True)
    assert (data.path / "test.csv").read_text() == "mine"
