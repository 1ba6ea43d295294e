"""What several test files share: integer-valued embeddings, and the generated shop as a data set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from alterrec_fast.data.sessions import Dataset
from alterrec_fast.data.shop import ShopConfig, write_shop
from alterrec_fast.ops import library

settings.register_profile("fast", max_examples=40, deadline=None)
settings.load_profile("fast")


def pytest_configure() -> None:
    """Where the environment says CI_NO_SKIP, no test may be skipped for want of the extension."""
    if os.environ.get("CI_NO_SKIP") and library.NO_EXTENSION:
        raise pytest.UsageError(f"CI_NO_SKIP: the extension is not built ({library.NO_EXTENSION})")


def integers(rows: int, width: int, seed: int, spread: int = 2) -> torch.Tensor:
    """(rows, width) float32 of small integers: dot products are exact in float32 and bf16, and full of ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-spread, spread + 1, (rows, width), generator=generator).float()


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A shop small enough to train on in seconds."""
    folder: Path = tmp_path_factory.mktemp("shop") / "data"
    return write_shop(folder, ShopConfig(num_items=200, num_sessions=400))
