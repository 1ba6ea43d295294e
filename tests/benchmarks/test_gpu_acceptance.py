"""The acceptance command and the times on a GPU, without one: what they make of tests, times and crashes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alterrec_fast.benchmarks.gpu import __main__ as acceptance
from alterrec_fast.benchmarks.gpu import times
from alterrec_fast.benchmarks.gpu.__main__ import Acceptance, Process
from alterrec_fast.benchmarks.harness.op import Implementation
from alterrec_fast.benchmarks.harness.report import Record, Results

from tests.benchmarks import stubs


class StubGpu(times.Gpu):
    """Tells times and memory of its own instead of a device's."""

    def __init__(self) -> None:
        self.calls = 0

    def seconds(self, call: Callable[[], object]) -> float:
        call()
        self.calls += 1
        return 1e-3 * self.calls

    def peak_bytes(self, call: Callable[[], object]) -> int:
        return 1 << 20

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        return call

    def release(self) -> None:
        pass


def timed(*implementations: Implementation, seconds: float = 60.0) -> dict[str, Record]:
    records = times.measure(StubGpu(), stubs.op(*implementations), stubs.CASE, time.monotonic() + seconds)
    return {record.implementation: record for record in records}


def test_implementations_take_turns_after_their_results_were_checked() -> None:
    good, wrong = Implementation("good", stubs.doubles), Implementation("wrong", stubs.triples, ours=True)
    records = timed(good, replace(good, name="also good"), wrong, Implementation("raises", stubs.raises))
    assert [len(records[name].samples[0]) for name in ("good", "also good")] == [times.SAMPLES] * 2
    assert records["good"].seconds == 1e-3 and records["also good"].seconds == 3e-3
    assert records["good"].detail == {"answer": 42.0, "graph": 2e-3} and records["good"].error == 0.0
    assert str(records["wrong"].failed).startswith("ValueError: wrong: error 6.3e+01")
    assert records["raises"].failed == "RuntimeError: cannot do this" and not records["raises"].samples


def test_what_cannot_be_captured_is_timed_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: StubGpu, call: Callable[[], object]) -> Callable[[], object]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(StubGpu, "capture", refuse)
    record = timed(Implementation("good", stubs.doubles))["good"]
    assert record.detail == {"answer": 42.0} and record.failed is None and len(record.samples[0]) == times.SAMPLES


def test_out_of_time_each_that_was_prepared_is_timed_once() -> None:
    good = Implementation("good", stubs.doubles)
    records = timed(good, replace(good, name="late"), seconds=-1.0)
    assert len(records["good"].samples[0]) == 1 and records["late"].failed == "not begun: out of time"


def test_every_case_of_a_gpu_is_in_one_group() -> None:
    from alterrec_fast.benchmarks.ops import OPS

    for case in (case for op in OPS for case in op.gpu):
        assert sum(case.items in group for group in times.GROUPS.values()) == 1 and case.device == "cuda"


def a_time(implementation: str, failed: str | None, ours: bool = True) -> dict[str, Any]:
    return {"op": "top_k", "case": "V = 7", "implementation": implementation, "ours": ours, "failed": failed}


def test_a_page_says_what_failed() -> None:
    paper = Process("paper", 9.0, "", [a_time("ours", None), a_time("large", "OutOfMemoryError: x")], "\n\n## top_k\n")
    done = Acceptance("abc", "pip", ["a note"], {"python": "3.12"}, times=[paper])
    done.tests = [Process("test_top_k.py", 5.0, "", [{"name": "x", "result": "skipped", "why": "no sanitizer"}])]
    text = acceptance.page(done)
    assert text.startswith("# GPU acceptance: passed\n") and "0 tests passed, 0 tests failed, 1 tests skipped" in text
    assert "| test_top_k.py | no sanitizer |" in text and "- a note" in text and "#### top_k" in text
    done.times.append(Process("10M", 9.0, f"{acceptance.KILLED} 9 s: x"))
    assert acceptance.page(done).startswith("# GPU acceptance: passed as far as it ran, out of time")
    paper.records += [a_time("ours, too", "ValueError: wrong"), a_time("mm", "ValueError: wrong", ours=False)]
    done.tests[0].records.append({"name": "y", "result": "failed", "why": "assert 1 == 2"})
    done.tests[0].failed = "exit code 1: x"
    done.tests.append(Process("test_dies.py", 5.0, "signal SIGSEGV: x"))
    assert acceptance.page(done).startswith("# GPU acceptance: FAILED")
    assert [what for what, _ in done.faults()] == ["test_top_k.py: y", "test_dies.py", "top_k, ours, too, V = 7"]


def test_files_of_tests_run_apart_and_outside_the_checkout(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    for package in (tmp_path / "tests", folder):
        (package / "__init__.py").touch()
    (folder / "helper.py").write_text("ONE = 1\n")
    file = folder / "test_few.py"
    file.write_text(
        "import pytest\nfrom tests.gpu.helper import ONE\n\n"
        "def test_good(): assert ONE == 1\n\ndef test_bad(): assert ONE == 2\n\n"
        "@pytest.mark.skip('not here')\ndef test_skipped(): ...\n"
    )
    (folder / "test_hangs.py").write_text("import time\ntime.sleep(60)\n")
    runner = acceptance.Runner(None, tmp_path, time.monotonic() + 60)
    done = runner.test(file)
    assert [(r["name"], r["result"]) for r in done.records] == [
        ("test_good", "passed"), ("test_bad", "failed"), ("test_skipped", "skipped"),
    ]  # fmt: skip
    assert "assert 1 == 2" in done.records[1]["why"] and done.records[2]["why"] == "not here"
    assert done.failed.startswith("exit code 1") and not done.late
    runner.deadline = time.monotonic() + 1
    late = runner.test(folder / "test_hangs.py")
    assert late.late and not Acceptance("", "", [], {}, tests=[late]).faults()


def test_the_command_imports_the_standard_library_alone() -> None:
    folder = str(Path(acceptance.__file__).parent)
    done = subprocess.run([sys.executable, "-I", "-S", folder, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--limit" in done.stdout, done.stderr


def test_a_command_that_goes_on_for_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert acceptance.run_limited([sys.executable, "-c", code], {}, tmp_path, 1.0).startswith("killed after 1 s")
    assert acceptance.run_limited([sys.executable, "-c", "print('x'); exit(3)"], {}, tmp_path, 30.0) == "exit code 3: x"
    assert acceptance.run_limited([sys.executable, "-c", "print('x')"], {}, tmp_path, 30.0) == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_group_of_times_runs(tmp_path: Path) -> None:
    code = [sys.executable, "-m", "alterrec_fast.benchmarks.gpu.times", "paper", "--op", "top_k", "--seconds", "20"]
    subprocess.run([*code, "--out", str(tmp_path)], check=True)
    assert any(record.ours and record.seconds for record in Results.read(tmp_path / "results.json").records)
