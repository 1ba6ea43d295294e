"""What the tests of `prepare` and its readers share: raw files to write, and a data set in terms of item ids."""

from pathlib import Path

import pytest

from alterrec_fast.data.prepare import prepare
from alterrec_fast.data.sessions import DataError, Dataset

HEADER = "session_id,item_id,timestamp\n"
SIX = HEADER + "".join(f"s{s},i{i},{10 * s + i}\n" for s in range(6) for i in range(s % 3, s % 3 + 2))
NO_HOLDOUT = {"validation_fraction": 0, "test_fraction": 0}


def put(folder: Path, **files: str | bytes) -> Path:
    """Writes files, `interactions_csv=...` as interactions.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def ids(data: Dataset, split: str) -> list[list[str]]:
    """The sessions of a split as lists of item ids."""
    names = data.items["item_id"].to_list()
    sessions = data.split(split)
    return [[names[row] for row in sessions[i]] for i in range(len(sessions))]


def run(tmp_path: Path, source: str = "generic", raw: Path | None = None, **options):
    summary = prepare(source, raw or tmp_path / "raw", tmp_path / "out", **options)
    return summary, Dataset.load(tmp_path / "out")


def fails(tmp_path: Path, message: str, source: str = "generic", raw: Path | None = None, **options) -> None:
    with pytest.raises(DataError, match=message):
        prepare(source, raw or tmp_path / "raw", tmp_path / "failed", **options)
    assert not [path for path in tmp_path.iterdir() if "failed" in path.name]  # nothing, not even a draft
