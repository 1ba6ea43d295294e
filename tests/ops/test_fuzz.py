"""The fuzzer itself: cases follow from their seed, agree, and a wrong result is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import fuzz
from tests.ops.loss_helpers import needs_native


def test_a_seed_draws_the_same_case() -> None:
    for seed in range(40):
        one, other = fuzz.draw_case(seed, False), fuzz.draw_case(seed, False)
        assert one.op is other.op and one.options.keys() == other.options.keys()
        for name, x in one.inputs.items():
            assert x.stride() == other.inputs[name].stride()
            assert torch.equal(x.nan_to_num(), other.inputs[name].nan_to_num())


@needs_native
def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fuzz.results

    def wrong(case: fuzz.Case, engine: str, seed: int, copied: bool) -> dict[str, Tensor]:
        """The last element of every result is off by more than rounding."""
        every: dict[str, Any] = dict(right(case, engine, seed, copied))
        for name, x in every.items():
            if engine == "native" and x.numel():
                last = x.reshape(-1)[-1]
                more = 1 if case.exact else 10 * fuzz.bound(case, True, name) + 1 + 0.1 * last.abs()
                every[name] = x.clone()
                every[name].view(-1)[-1] = last + more if last.isfinite() else 0
        return every

    seeds = range(40)
    assert not any(fuzz.run_case(seed, "native") for seed in seeds)
    monkeypatch.setattr(fuzz, "results", wrong)
    noticed = [bool(fuzz.run_case(seed, "native")) for seed in seeds]
    empty = [not any(x.numel() for x in right(fuzz.draw_case(s, False), "reference", s, True).values()) for s in seeds]
    assert noticed == [not e for e in empty] and sum(noticed) > 30
