"""Both losses with their kernels limited to one instruction set, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ops.loss_helpers import INSTRUCTION_SETS, needs_native, run_with_isa

HERE = Path(__file__).parent


@needs_native
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_losses_match_the_reference(isa: str) -> None:
    names = ("test_slice_cross_entropy.py", "test_sampled_softmax.py")
    run_with_isa(isa, "-k", "255", *(f"{HERE / name}::test_matches_the_reference" for name in names))  # one shape
