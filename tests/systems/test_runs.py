"""What every system has of a run: resume to the byte, recommend, evaluate. Those of AlterRec: tests/training."""

from __future__ import annotations

from pathlib import Path

import pytest

import alterrec_fast as af
from alterrec_fast.data.sessions import Dataset
from alterrec_fast.systems import SYSTEMS, alterrec
from tests.training.test_training import ends_as_if_never_broken_off, small


@pytest.mark.parametrize("variant", ["ensemble", *sorted(SYSTEMS.keys() - alterrec.ENTRIES.keys())])
def test_a_run_goes_on_to_the_byte_and_opens(
    variant: str, shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(shop, tmp_path / "run", variant=variant, inner=16, m_max=2, batch_targets=256)
    ends_as_if_never_broken_off(config, 3, monkeypatch)
    model = af.load(tmp_path / "run")
    best = model.recommend([str(shop.items["item_id"][3])], n=5)
    assert len({one.item for one in best}) == 5
    assert model.evaluate("validation").metrics()["fused"]["hits@20"] > 0
