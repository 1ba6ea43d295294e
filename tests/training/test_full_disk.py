"""A disk that is really full: a run on a tiny file system fails cleanly and, once there is room, ends the same."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import alterrec_fast as af
from alterrec_fast.data.sessions import Dataset
from alterrec_fast.errors import FileError
from alterrec_fast.training.alternate import LAST
from tests.training.test_training import same_run, small


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.root
def test_a_run_on_a_full_disk_goes_on_once_there_is_room(shop: Dataset, tmp_path: Path, tiny_disk: Path) -> None:
    config = small(shop, tmp_path / "whole", m_max=3)
    af.train(config)
    room = sum(path.stat().st_size for path in (tmp_path / "whole" / "checkpoints").iterdir())
    filler = tiny_disk / "filler"
    # Room for the first epochs' checkpoints, but not for the draft of a later one, which holds more moments.
    filler.write_bytes(b"x" * ((1 << 20) - int(1.5 * room)))
    cramped = config.replace(out=str(tiny_disk / "run"))
    with pytest.raises(FileError, match="No space left"):
        af.train(cramped)
    assert (tiny_disk / "run" / LAST).exists()
    filler.unlink()
    af.train(cramped, resume=True)
    same_run(tmp_path / "whole", tiny_disk / "run")
