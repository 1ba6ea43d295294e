"""top_k against float64: every arithmetic and option, a few items and a large part of the catalog."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alterrec_fast.ops import top_k

from .checks import SIZES, watched
from .device import Device
from .rank_cases import TOP_K_CASES, Ranking, assert_bad_value_is_named, top_case, top_is_right
from .truth import ARITHMETICS, Source


@pytest.mark.parametrize(("k", "arithmetic", "extras"), TOP_K_CASES)
def test_right(
    k: int | str,
    arithmetic: str,
    extras: str,
    device: Device,
    seed: int,
    record_property: Callable[[str, str], None],
) -> None:
    sizes = SIZES[device.kind]
    count = k if isinstance(k, int) else sizes.v // 8
    shape = (sizes.b, sizes.v, sizes.d)
    record_property("errors", top_case(device, seed, count, arithmetic, extras, shape, sizes.inputs))


def test_many_sessions(device: Device, seed: int) -> None:
    top_case(device, seed, 5, "bf16", "lists", SIZES[device.kind].many, 1)


def test_everything_excluded(device: Device) -> None:
    source = Source(2, device.device)
    query, catalog = source.integers(2, 5), source.integers(40, 5)
    exclude = torch.stack([torch.arange(40), torch.arange(40) - 3]).to(device.device)
    r = Ranking(query, catalog, ARITHMETICS["fp32"], {"exclude": exclude})
    top_is_right(watched(device, lambda: top_k(query, catalog, k=6, **r.keywords)), r, 6, True)


def test_a_bad_value_is_named(device: Device) -> None:
    assert_bad_value_is_named(device, top_k, k=2)
