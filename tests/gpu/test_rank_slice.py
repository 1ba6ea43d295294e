"""rank_slice against float64: every form, arithmetic and option; many sessions; scores that make limits miss."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from alterrec_fast.ops import rank_slice

from .checks import SIZES
from .device import Device
from .rank_cases import (
    ADVERSARIES,
    RANK_SLICE_CASES,
    Ranking,
    adversary,
    assert_bad_value_is_named,
    ranges,
    rank_case,
    slice_is_identical,
)
from .truth import ARITHMETICS


@pytest.mark.parametrize(("form", "arithmetic", "extras"), RANK_SLICE_CASES)
def test_right(
    form: str, arithmetic: str, extras: str, device: Device, seed: int, record_property: Callable[[str, str], None]
) -> None:
    sizes = SIZES[device.kind]
    shape = (sizes.b, sizes.v, sizes.d)
    record_property("errors", rank_case(device, seed, form, arithmetic, extras, shape, sizes.inputs))


@pytest.mark.parametrize("form", ["bits", "ids"])
def test_many_sessions(form: str, device: Device, seed: int) -> None:
    rank_case(device, seed, form, "bf16", "lists", SIZES[device.kind].many, 1)


@pytest.mark.parametrize("name", ADVERSARIES)
def test_hard_scores(name: str, device: Device) -> None:
    v = SIZES[device.kind].v
    query, catalog = adversary(name, device.device, v)
    r = Ranking(query, catalog, ARITHMETICS["fp32"], {})
    start, stop, top = ranges(v, 0)["bits"]
    found = rank_slice(query, catalog, start=start, stop=stop, top=top, **r.keywords)
    slice_is_identical(found, r, start, stop, top)


def test_a_bad_value_is_named(device: Device) -> None:
    assert_bad_value_is_named(device, rank_slice, start=3, stop=50)
