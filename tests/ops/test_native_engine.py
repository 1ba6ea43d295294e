"""The native engine as a whole: extreme sizes, memory, interrupts, one compiled step of all ops, installation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alterrec_fast as af
from alterrec_fast.ops import library
from tests.conftest import integers, pytest_configure
from tests.ops.loss_helpers import assert_no_worse, call, needs_native
from tests.ops.test_rank_slice import same as same_slice
from tests.ops.test_top_k import same as same_top_k

if not library.NO_EXTENSION:
    from alterrec_fast import _C

ROOT = Path(__file__).resolve().parents[2]


def test_ci_skips_nothing_for_want_of_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "export CI_NO_SKIP=1\n" in (ROOT / ".ci" / "run").read_text()
    monkeypatch.setattr(library, "NO_EXTENSION", "no compiler")
    monkeypatch.delenv("CI_NO_SKIP", raising=False)
    pytest_configure()
    monkeypatch.setenv("CI_NO_SKIP", "1")
    with pytest.raises(pytest.UsageError, match=r"the extension is not built \(no compiler\)"):
        pytest_configure()


@needs_native
@pytest.mark.parametrize(("b", "v", "d"), [(2, 1_000_000, 2), (5_000, 400, 3), (3, 700, 1_024), (1, 9_000, 1)])
def test_sizes_at_their_extremes(b: int, v: int, d: int) -> None:
    query, catalog = integers(b, d, 1), integers(v, d, 2)
    same_slice(query, catalog, v // 50, v // 2, 5)
    same_top_k(query, catalog, 20)
    target = torch.arange(b) % v
    neg = af.rank_slice(query, catalog, start=v // 50, stop=v // 2)
    ids = torch.randint(v, (b, 30), generator=torch.Generator().manual_seed(3))
    query, catalog = query / d**0.5, catalog / d**0.5
    for op, options in ((af.slice_cross_entropy, {"neg": neg}), (af.sampled_softmax, {"neg": ids})):
        ours, theirs = (
            call(op, query, catalog, target=target, backend=backend, **options) for backend in ("native", "reference")
        )
        exact = call(op, query.double(), catalog.double(), target=target, backend="reference", **options)
        assert_no_worse(ours, theirs, exact, 2.0, 2e-6)


@needs_native
def test_a_buffer_overflows_where_all_scores_are_equal() -> None:
    """Without any forcing: every item lies between the limits, more than the buffer holds."""
    before = _C.counters()
    same_slice(torch.ones(6, 3), torch.ones(40_000, 3), 20, 20_000, 5)
    after = _C.counters()
    assert after["overflow"] - before["overflow"] == 6 and after["missed"] == before["missed"]


def step(
    teacher_query: Tensor, teacher_catalog: Tensor, query: Tensor, catalog: Tensor, target: Tensor, ids: Tensor
) -> Tensor:
    """All four ops in one function."""
    neg = af.rank_slice(teacher_query, teacher_catalog, start=20, stop=200, top=5, exclude=target)
    scores, _ = af.top_k(query, catalog, k=5)
    loss = af.slice_cross_entropy(2 * query, catalog, target, neg, positives=neg.top)
    return loss + af.sampled_softmax(query, catalog, target, ids) + (query.sum(1) - scores.mean(1)).square().mean()


def draw_step(b: int, v: int, d: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    floats = [torch.randn(n, d, generator=g) for n in (b, v, b, v)]
    return [*floats, torch.randint(v, (b,), generator=g), torch.randint(v, (b, 40), generator=g)]


@needs_native
def test_one_step_of_all_ops_compiles_with_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path)
    )  # a run that was killed leaves broken files in the user's
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no pool of processes for a few small kernels
    inputs = draw_step(12, 300, 16)
    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        query, catalog = (x.clone().requires_grad_() for x in inputs[2:4])
        loss = function(*inputs[:2], query, catalog, *inputs[4:])
        results.append([loss.detach(), *torch.autograd.grad(loss, (query, catalog))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_native
def test_what_ranks_asks_for_no_gradient() -> None:
    query, catalog = (x.requires_grad_() for x in (integers(3, 4, 1), integers(90, 4, 2)))
    neg = af.rank_slice(query, catalog, start=5, stop=50)
    assert not neg.thresholds.requires_grad and not af.top_k(query, catalog, k=5)[0].requires_grad


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_native
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_repeated_calls_do_not_grow() -> None:
    inputs = draw_step(64, 9_000, 16)
    query, catalog = (x.requires_grad_() for x in inputs[2:4])

    def repeat(times: int) -> None:
        for _ in range(times):
            torch.autograd.grad(step(*inputs), (query, catalog))

    repeat(10)
    before = resident()
    repeat(40)
    assert resident() - before < 4 << 20  # one (V, d) kept by each call would be 23 MB


@needs_native
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_an_interrupt_leaves_nothing_broken() -> None:
    """SIGINT comes while the kernels run, and once they are done Python raises it."""
    inputs = draw_step(128, 12_000, 32)
    query, catalog = (x.requires_grad_() for x in inputs[2:4])

    def whole() -> list[Tensor]:
        loss = step(*inputs)
        return [loss.detach(), *torch.autograd.grad(loss, (query, catalog))]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    expected = whole()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay in (0.001, 0.004, 0.013):
            signal.setitimer(signal.ITIMER_REAL, delay)
            with pytest.raises(KeyboardInterrupt):
                while True:
                    whole()
            assert all(torch.equal(a, b) for a, b in zip(whole(), expected, strict=True))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_install_without_a_compiler_says_what_to_do(tmp_path: Path) -> None:
    build = ("build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path))
    done = setup(*build, CXX="/nowhere/c++", ALTERREC_FAST_NO_EXT="0")
    assert done.returncode != 0
    assert (
        "alterrec-fast needs a C++20 compiler and found no '/nowhere/c++': install one, name yours in CXX, or set "
        "ALTERREC_FAST_NO_EXT=1 to install without compiled code." in done.stderr
    )
    assert not list(tmp_path.rglob("*.so"))


def test_an_install_from_a_source_distribution_has_all_that_nvcc_compiles(tmp_path: Path) -> None:
    done = setup(
        "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path), ALTERREC_FAST_NO_EXT="1"
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.[ch]*")}
    assert sources | {"kernels/rank_slice/scan.py", "benchmarks/baseline.json"} <= held


def test_an_install_without_compiled_code_has_every_op(tmp_path: Path) -> None:
    done = setup("build", "--build-base", str(tmp_path), ALTERREC_FAST_NO_EXT="1", CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    program = """
import sys
sys.meta_path = [x for x in sys.meta_path if "editable" not in repr(x)]  # such a finder leads back to the repository
import torch, alterrec_fast as af
q, e = torch.randn(3, 4), torch.randn(30, 4)
neg = af.rank_slice(q, e, start=2, stop=9)
af.slice_cross_entropy(q, e, torch.arange(3), neg) + af.sampled_softmax(q, e, torch.arange(3), torch.arange(9))
assert af.top_k(q, e, k=5)[1].shape == (3, 5)
print(af.__file__, *(hasattr(torch.ops.alterrec_fast, op) for op in ("rank_slice", "top_k", "slice_cross_entropy")))
try:
    af.rank_slice(q, e, start=2, stop=9, backend="native")
except af.BackendError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "lib"), "PYTHONSAFEPATH": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert printed.startswith(f"{tmp_path / 'lib'}{os.sep}") and "True True True" in printed
    assert "install again with a C++ compiler and without ALTERREC_FAST_NO_EXT=1" in printed
