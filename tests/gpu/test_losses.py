"""slice_cross_entropy and sampled_softmax with all gradients against float64, in every form and arithmetic.

Extras are a bias that masks items, positives, a temperature, log_q, strided inputs, and NaN in ignored rows.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .checks import SIZES
from .device import Device
from .loss_cases import SAMPLED_CASES, SLICE_CASES, sampled_case, slice_loss_case


@pytest.mark.parametrize(("form", "arithmetic", "extras"), SLICE_CASES)
def test_slice_cross_entropy(
    form: str, arithmetic: str, extras: bool, device: Device, seed: int, record_property: Callable[[str, str], None]
) -> None:
    sizes = SIZES[device.kind]
    part = 0.02 if form == "ids" else 0.4  # of the catalog that are negatives
    shape = (sizes.b, sizes.v, sizes.d)
    record_property("errors", slice_loss_case(device, seed, form, arithmetic, extras, *shape, part))


@pytest.mark.parametrize("form", ["all", "bits", "ids"])
@pytest.mark.parametrize("extras", [False, True])
def test_flash_loss(
    form: str,
    extras: bool,
    device: Device,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, str], None],
) -> None:
    """The kernels for large catalogs, at a size that float64 has memory for."""
    from alterrec_fast.kernels import shapes

    monkeypatch.setattr(shapes, "FLASH_ITEMS", 1)
    sizes = SIZES[device.kind]
    shape = (sizes.b, sizes.v, min(sizes.d, shapes.FLASH_WIDTH))
    part = 0.02 if form == "ids" else 0.4
    record_property("errors", slice_loss_case(device, seed, form, "bf16", extras, *shape, part))


@pytest.mark.parametrize("engine", ["native", "triton"])
@pytest.mark.parametrize(("shared", "arithmetic", "extras", "deterministic"), SAMPLED_CASES)
def test_sampled_softmax(
    engine: str,
    shared: bool,
    arithmetic: str,
    extras: bool,
    deterministic: bool,
    device: Device,
    seed: int,
    record_property: Callable[[str, str], None],
) -> None:
    sizes = SIZES[device.kind]
    case = (engine, shared, arithmetic, extras, deterministic)
    record_property("errors", sampled_case(device, seed, *case, sizes.b, sizes.v, sizes.d))
