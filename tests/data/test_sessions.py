"""Sessions on disk: what is written comes back mapped, and what is broken is an error that names the file."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from alterrec_fast.data.sessions import SPLITS, DataError, Dataset, Sessions


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
    some = sessions([5, 6, 7], [8], [9, 10])
    assert len(some) == 3
    assert some[0].tolist() == [5, 6, 7] and some[-1].tolist() == [9, 10]
    assert some.lengths.tolist() == [3, 1, 2]
    for index in (3, -4):
        with pytest.raises(IndexError):
            some[index]


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
    with pytest.raises(DataError, match="not a prepared data set"):
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
    with pytest.raises(DataError, match=name):
        Dataset.load(tmp_path / "out")


def test_a_damaged_item_table_is_an_error_when_it_is_read(tmp_path):
    data = write(tmp_path / "out")
    file = data.path / "items.parquet"
    whole = file.read_bytes()
    for content in (b"", whole[:100]):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"items\.parquet: not a readable Parquet file"):
            _ = Dataset.load(data.path).items
    pl.DataFrame({"item_id": ["a"]}).write_parquet(file)
    with pytest.raises(DataError, match="1 rows, expected 3 items"):
        _ = Dataset.load(data.path).items


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


def test_unfit_arrays_and_missing_or_foreign_json_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"dataset\.json is missing"):
        Dataset.load(tmp_path)
    data = write(tmp_path / "out")
    np.save(data.path / "test" / "items.npy", np.zeros(5, np.int32))
    with pytest.raises(DataError, match="offsets must run from 0 to the 5 items"):
        Dataset.load(data.path)
    for text, message in (("{", "not JSON"), ('{"format": 99}', "data format 99")):
        (data.path / "dataset.json").write_text(text)
        with pytest.raises(DataError, match=message):
            Dataset.load(data.path)
    assert SPLITS == ("train", "validation", "test")
