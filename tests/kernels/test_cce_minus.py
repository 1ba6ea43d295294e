"""CCE-, a baseline of the benchmarks on a GPU, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
from alterrec_fast.benchmarks.bench_loss import cce_minus
from alterrec_fast.benchmarks.harness.inputs import loss_error, loss_truth, make_loss
from alterrec_fast.benchmarks.harness.worker import Case

CASE = Case(300, 12, sessions=5, negatives=70)


@pytest.mark.parametrize("case", [CASE, replace(CASE, shared=True)], ids=["of each session", "shared"])
def test_cce_minus_is_right(case: Case) -> None:
    inputs = make_loss(case)
    inputs["neg"].view(-1)[::9] = inputs["target"][0, 0]  # a negative that is a target is none there
    call = cce_minus(case, inputs)
    assert loss_error(call.read(call.run(0)), loss_truth(case, inputs)) < 1e-5
