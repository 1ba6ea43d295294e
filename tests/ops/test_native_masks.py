"""The native engine: masks by bias, ignored rows, a width of zero, what is too short, the memory of positives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alterrec_fast as af
from alterrec_fast.ops import library
from alterrec_fast.ops.layer_norm import NO_NORM
from tests.conftest import integers
from tests.ops.loss_helpers import call

pytestmark = pytest.mark.skipif(bool(library.NO_EXTENSION), reason="the extension is not built")


def ranked_by_hand(scores: Tensor, masked: Tensor) -> Tensor:
    """(B, candidates), the items that are not masked, by score and then by id."""
    candidates = (~masked).nonzero().flatten()
    return candidates[scores[:, candidates].sort(dim=1, descending=True, stable=True).indices]


@pytest.mark.parametrize(("v", "share"), [(70, 0.5), (600, 0.9), (9_000, 0.02), (9_000, 0.5), (20_000, 0.9)])
def test_items_masked_by_the_bias_are_never_ranked(v: int, share: float) -> None:
    query, catalog, bias = integers(5, 8, 1), integers(v, 8, 2), integers(1, v, 3)[0]
    masked = torch.rand(v, generator=torch.Generator().manual_seed(v)) < share
    expected = ranked_by_hand(query @ catalog.T + bias, masked)
    catalog[masked] = torch.nan  # nor looked at
    candidates = expected.shape[1]
    bias[masked] = -torch.inf
    for start, stop, top in ((3, v // 2, 5), (v // 4, v, v), (0, 3, 0), (candidates, v, 4)):
        ours = af.rank_slice(query, catalog, start=start, stop=stop, top=top, bias=bias, backend="native")
        mask = torch.zeros(5, v, dtype=torch.bool).scatter(1, expected[:, start:stop], True)
        assert torch.equal(ours.mask_rows(0, 5), mask)
        held = min(top, candidates)
        assert torch.equal(ours.top[:, :held], expected[:, :held]) and (ours.top[:, held:] == -1).all()
        assert ((ours.thresholds == -torch.inf) == torch.tensor([start >= candidates, stop > candidates])).all()
    scores, items = af.top_k(query, catalog, k=v, bias=bias, backend="native")
    assert torch.equal(items[:, :candidates], expected) and scores[:, :candidates].isfinite().all()
    assert (items[:, candidates:] == -1).all() and (scores[:, candidates:] == -torch.inf).all()


def test_items_masked_by_the_bias_are_no_negatives() -> None:
    g = torch.Generator().manual_seed(0)
    query, catalog, bias = (
        torch.randn(6, 5, generator=g),
        torch.randn(700, 5, generator=g),
        torch.randn(700, generator=g),
    )
    target = torch.arange(6)
    bias[100:650] = -torch.inf
    expected = [x.clone().requires_grad_() for x in (query, catalog, bias)]
    plain = torch.nn.functional.cross_entropy(expected[0] @ expected[1].T + expected[2], target, reduction="none")
    weights = torch.linspace(0.5, 1.5, 6)
    theirs = [plain.detach(), *torch.autograd.grad((plain * weights).sum(), expected)]
    everything = torch.arange(700).expand(6, -1)
    slices = (af.RankSlice.from_mask(torch.ones(6, 700, dtype=torch.bool)), af.RankSlice.from_indices(everything, 700))
    cases: list[tuple[Any, dict[str, Any]]] = [(af.slice_cross_entropy, {"neg": n}) for n in (None, *slices)]
    for neg in (everything, everything[0]):
        cases += [(af.sampled_softmax, {"neg": neg, "sparse_grad": sparse}) for sparse in (False, True)]
    for op, more in cases:
        ours = call(op, query, catalog, bias, target=target, backend="native", **more)
        for got, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        assert not ours[2][100:650].any() and not ours[3][100:650].any()


def test_a_masked_target_or_positive_is_named() -> None:
    query, catalog, bias = integers(3, 4, 1), integers(90, 4, 2), torch.zeros(90)
    bias[17] = -torch.inf
    target, positives = torch.tensor([1, 2, 17]), torch.tensor([[-1], [17], [3]])
    cases: list[tuple[Any, dict[str, Any]]] = [(af.slice_cross_entropy, {}), (af.sampled_softmax, {"neg": target % 3})]
    for op, more in cases:
        options = {"bias": bias, "backend": "native", **more}
        with pytest.raises(ValueError, match="target: row 2 holds 17, whose bias is -inf"):
            op(query, catalog, target, **options)
        with pytest.raises(ValueError, match="positives: row 1 holds 17, whose bias is -inf"):
            op(query, catalog, target % 7, positives=positives, **options)
        op(
            query, catalog, torch.tensor([1, -100, 3]), positives=positives, **options
        )  # those of an ignored row are not


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ignored_rows_are_not_looked_at(precision: str) -> None:
    b, v, g = 9, 600, torch.Generator().manual_seed(0)
    query, catalog, bias = torch.randn(b, 12, generator=g), torch.randn(v, 12, generator=g), torch.randn(v, generator=g)
    target, positives = torch.randint(v, (b,), generator=g), torch.randint(-1, v, (b, 2), generator=g)
    target[::3] = -100
    broken = query.clone()
    broken[0], broken[3], broken[6, 2] = torch.nan, torch.inf, -torch.inf
    neg = af.rank_slice(query, catalog, start=5, stop=400)
    ids = torch.randint(-1, v, (b, 30), generator=g)
    cases: list[tuple[Any, dict[str, Any]]] = [(af.slice_cross_entropy, {"neg": n}) for n in (neg, None)]
    cases.append((af.slice_cross_entropy, {"neg": af.RankSlice.from_indices(ids, v)}))
    cases.append((af.slice_cross_entropy, {"neg": neg, "max_saved_bytes": 0}))
    cases += [(af.sampled_softmax, {"neg": n, "sparse_grad": s}) for n in (ids, ids[0]) for s in (False, True)]
    for op, more in cases:
        options = {"target": target, "positives": positives, "backend": "native", "precision": precision, **more}
        ours, theirs = (call(op, q, catalog, bias, **options) for q in (broken, query))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert not ours[0][::3].any() and not ours[1][::3].any()


def test_a_width_of_zero() -> None:
    """Every score is zero, so that ranks are ids."""
    query, catalog = torch.zeros(3, 0), torch.zeros(9_000, 0)
    ours = af.rank_slice(query, catalog, start=20, stop=6_000, top=2, backend="native")
    assert torch.equal(ours.mask_rows(0, 3)[0].nonzero().flatten(), torch.arange(20, 6_000))
    assert torch.equal(af.top_k(query, catalog, k=4, backend="native").indices, torch.arange(4).expand(3, -1))
    loss = af.slice_cross_entropy(query, catalog, torch.arange(3), ours, backend="native")
    torch.testing.assert_close(loss, torch.tensor(5_981.0).log())


def test_what_is_too_short_is_refused() -> None:
    """Handed to the ops themselves, past all checks in Python."""
    query, catalog, target = integers(3, 4, 1), integers(700, 4, 2), torch.arange(3)
    bits = af.rank_slice(query, catalog, start=5, stop=400).bits
    assert bits is not None
    forward = torch.ops.alterrec_fast.native_slice_cross_entropy
    rest = (1.0, 1.0, None, None, 0, -100, "fp32", 0, True)
    for members, message in (
        (bits[:, :-8], r"neg.bits must be \[3, 88\], got \[3, 80\]"),
        (bits[:2], r"neg.bits must be \[3, 88\], got \[2, 88\]"),
        (torch.zeros(2, 50, dtype=torch.int32), r"neg.ids must be \(3, n\), got \[2, 50\]"),
        (torch.tensor([[5, 4]] * 3, dtype=torch.int32), "neg.ids: row 0 holds 4 at place 1, expected ids that ascend"),
        (torch.tensor([[5, 700]] * 3, dtype=torch.int32), "neg.ids: row 0 holds 700"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(query, catalog, target, members, None, *rest)
    with pytest.raises(ValueError, match=r"positives must be \(3, P\), got \[2, 4\]"):
        forward(query, catalog, target, None, torch.zeros(2, 4, dtype=torch.int64), *rest)
    with pytest.raises(ValueError, match=r"bias must be \[700\], got \[600\]"):
        forward(query, catalog, target, None, None, 1.0, 1.0, None, torch.zeros(600), *rest[4:])
    exclude = torch.empty(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"exclude offsets must be \[4\], got \[3\]"):
        torch.ops.alterrec_fast.native_top_k(query, catalog, 3, *exclude, None, 0, "fp32", True, *NO_NORM)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_positives_stay_within_the_memory_promised() -> None:
    """8 bytes for each target and positive, and 64 MiB for the thread, beyond what goes in and comes out."""
    program = """
import torch, alterrec_fast as af
def status(name):
    return int(next(x for x in open("/proc/self/status") if x.startswith(name)).split()[1]) << 10
torch.set_num_threads(1)
b, p, v = 5_000, 400, 1_000
query, catalog = (torch.randn(n, 8).requires_grad_() for n in (b, v))
target, positives, neg = torch.randint(v, (b,)), torch.randint(v, (b, p)), torch.randint(v, (20,))
for op in (lambda: af.slice_cross_entropy(query, catalog, target, positives=positives, max_saved_bytes=0),
           lambda: af.sampled_softmax(query, catalog, target, neg, positives=positives)):
    for _ in range(2):  # the first call loads libraries
        open("/proc/self/clear_refs", "w").write("5")
        before = status("VmRSS")
        op().backward()
    print(status("VmHWM") - before)
"""
    command = [sys.executable, "-c", program]
    peaks = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(peaks) == 2 and max(map(int, peaks)) < (64 << 20) + 8 * 5_000 * 401, peaks
