"""The prepared form of ../shared/data/online_retail, against the figures of its README."""

from pathlib import Path

import numpy as np
import pytest

from alterrec_fast.data.prepare import prepare
from alterrec_fast.data.sessions import SPLITS, Dataset

SHARED = Path(__file__).parents[3] / "shared"


@pytest.mark.shared
def test_online_retail(tmp_path):
    summary = prepare("generic", SHARED / "data" / "online_retail", tmp_path / "out")
    assert summary.read == {"interaction rows": 515_754}
    assert not any(summary.left_out.values())
    assert summary.sessions == {"train": 12_791, "validation": 1_827, "test": 3_655}
    assert sum(summary.interactions.values()) == 515_754
    assert summary.num_items == 3_786 and summary.text_columns == ["title"]

    data = Dataset.load(tmp_path / "out")
    lengths = np.concatenate([data.split(name).lengths for name in SPLITS])
    assert len(lengths) == 18_273 and lengths.max() == 1_106 and np.median(lengths) == 17
    assert np.percentile(lengths, 95, method="higher") == 79 and round(lengths.mean(), 1) == 28.2
    assert data.items["title"].null_count() == summary.notes["items with no text"] == 0
    assert round(data.items["title"].str.split(" ").list.len().mean(), 1) == 4.4
    first = data.items["item_id"].gather(data.train[0].astype(np.int64)).to_list()
    assert first[:3] == ["85123A", "71053", "84406B"]
