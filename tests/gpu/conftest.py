"""Tests that need a GPU, skipped without one; `python benchmarks/gpu --out DIR` runs them on a bare machine.

They import nothing but torch, pytest and the package.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from .device import Cuda, Device, Interpreted

SEED = int(os.environ.get("ALTERREC_FAST_TEST_SEED", random.randrange(1 << 31)))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU")


def pytest_report_header() -> str:
    return f"inputs of ALTERREC_FAST_TEST_SEED={SEED}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "torch sees no CUDA device"
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> Device:
    return Cuda() if torch.cuda.is_available() else Interpreted()


@pytest.fixture(scope="session")
def seed() -> int:
    return SEED
