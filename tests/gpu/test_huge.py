"""Every op where addresses need more than 32 bits: V d > 2^31. One process, since each takes tens of gigabytes."""

from __future__ import annotations

import pytest

from .checks import HUGE
from .device import Device
from .loss_cases import sampled_case, slice_loss_case
from .rank_cases import rank_case, top_case


@pytest.mark.parametrize("form", ["bits", "ids"])
def test_rank_slice(form: str, device: Device, seed: int) -> None:
    rank_case(device, seed, form, "bf16", "none", HUGE, 1)


def test_top_k(device: Device, seed: int) -> None:
    top_case(device, seed, 20, "bf16", "none", HUGE, 1)


@pytest.mark.parametrize("form", ["bits", "ids"])
def test_slice_cross_entropy(form: str, device: Device, seed: int) -> None:
    slice_loss_case(device, seed, form, "bf16", False, *HUGE, 0.001)


@pytest.mark.parametrize("engine", ["native", "triton"])
def test_sampled_softmax(engine: str, device: Device, seed: int) -> None:
    sampled_case(device, seed, engine, False, "bf16", False, False, *HUGE)
