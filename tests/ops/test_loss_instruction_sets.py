"""Both losses with their kernels limited to one instruction set, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.loss_helpers import needs_native


@needs_native
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16", "amx"])
def test_losses_match_the_reference(isa: str) -> None:
    here = Path(__file__).parent
    tests = [
        str(here / f"{name}::test_matches_the_reference")
        for name in ("test_slice_cross_entropy.py", "test_sampled_softmax.py")
    ]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-k", "255", *tests]  # one shape
    done = subprocess.run(
        command, env=os.environ | {"ALTERREC_FAST_ISA": isa}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
