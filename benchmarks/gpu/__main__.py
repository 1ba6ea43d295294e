"""Acceptance on a machine with a GPU, offline: `python benchmarks/gpu --out DIR` in a checkout.

Installs the checkout into a temporary folder, runs each file of tests/gpu in a process with a time limit, then the
times of gpu/times.py, all from outside the checkout, and writes acceptance.md and acceptance.json. Exit code 1 where a
test failed, a process crashed or one of ours was wrong. Imports nothing but the standard library.

`python -m alterrec_fast.benchmarks.gpu` does the same; of an installation without a checkout it runs the times alone,
and with --checkout DIR the tests of DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "alterrec_fast", "kernels", "benchmarks", "csrc")
PIP = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--no-input")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
LIMIT, BUILD_SECONDS, TEST_SECONDS = 475.0, 120.0, 150.0  # for everything, for building, for a file of tests
TIME_SHARES = {"paper": 0.45, "1M": 0.6, "10M": 1.0}  # of the time that is left when a group of times begins
GRACE = 0.75  # of its time, after which a group of times begins nothing new
ALONE = ("huge", "sanitizer", "memory")  # test files whose names have these words have the GPU to themselves
RESULTS = ("passed", "failed", "skipped")
KILLED = "killed after"
HARMLESS = ("not begun", "OutOfMemoryError")  # why an implementation of ours may have no time
ASKED = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem,mig.mode.current"


@dataclass
class Process:
    """What became of a process: `failed` says how it ended unless by itself with code 0."""

    name: str
    seconds: float
    failed: str
    records: list[dict[str, Any]] = field(default_factory=list)  # tests, or times
    page: str = ""  # tables of times

    @property
    def late(self) -> bool:
        return self.failed.startswith(KILLED)


@dataclass
class Acceptance:
    """A run, as acceptance.json has it."""

    commit: str
    installed: str
    notes: list[str]
    environment: dict[str, str]
    tests: list[Process] = field(default_factory=list)
    times: list[Process] = field(default_factory=list)

    def faults(self) -> list[tuple[str, str]]:
        """(what, why): failed tests, processes that crashed, and times of ours that are wrong."""
        tests = [(f"{p.name}: {r['name']}", r["why"]) for p in self.tests for r in p.records if r["result"] == "failed"]
        told = {p.name for p in self.tests if any(r["result"] == "failed" for r in p.records)}
        ended = [p for p in (*self.tests, *self.times) if p.failed and not p.late and p.name not in told]
        ours = [r for p in self.times for r in p.records if r["ours"] and r["failed"]]
        wrong = [r for r in ours if not r["failed"].startswith(HARMLESS)]
        names = "{op}, {implementation}, {case}"
        return [*tests, *((p.name, p.failed) for p in ended), *((names.format_map(r), r["failed"]) for r in wrong)]

    def add(self, processes: list[Process], process: Process, out: Path) -> None:
        """Writes both files with one more process in them."""
        processes.append(process)
        (out / "acceptance.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        (out / "acceptance.md").write_text(page(self) + "\n")
        print(f"{process.name}: {process.failed or 'done'}, {process.seconds:.0f} s", flush=True)


# --- installing ---


def install(root: Path, work: Path, seconds: float) -> tuple[Path, str, list[str]]:
    """Installs `root` into a folder in `work`: with compiled code, or without where that fails.

    -> (the folder, how, what was left out and why). The checkout itself is left alone, whatever its build folder holds.
    """
    source, home = work / "source", os.environ.get("CUDA_HOME")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    source.mkdir()
    for name in SOURCES:
        if (root / name).is_dir():
            shutil.copytree(root / name, source / name, ignore=ignore)
        else:
            shutil.copy(root / name, source / name)
    failed = "" if shutil.which(os.environ.get("CXX", "c++").split()[0]) else "there is no C++ compiler"
    failed = "ALTERREC_FAST_NO_EXT=1 is set" if os.environ.get("ALTERREC_FAST_NO_EXT") == "1" else failed
    if not failed:
        failed = run_limited([*PIP, "--target", str(work / "compiled"), str(source)], dict(os.environ), work, seconds)
    if not failed:
        nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
        return work / "compiled", "pip, with the extension", [] if nvcc else ["no CUDA C++: there is no nvcc"]
    plain = os.environ | {"ALTERREC_FAST_NO_EXT": "1"}
    again = run_limited([*PIP, "--target", str(work / "plain"), str(source)], plain, work, 60.0)
    if again:
        raise SystemExit(f"pip failed: {again}")
    return work / "plain", "pip, without the extension", [f"no extension: {failed}"]


def run_limited(command: Sequence[str], environment: dict[str, str], folder: Path, seconds: float) -> str:
    """Runs a command in a process group that is killed after `seconds`; -> "" or how it failed and its last lines."""
    process = subprocess.Popen(
        command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    failed = ""
    try:
        said, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        failed = f"{KILLED} {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it may have left behind
    if failed:
        said, _ = process.communicate()
    elif code := process.returncode:
        failed = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = [line.strip() for line in said.strip().splitlines()[-6:]]
    return f"{failed}: {' / '.join(lines)}"[:1500] if failed else ""


# --- running ---


class Runner:
    """Runs processes that find the installed package, from outside the checkout, until the time is over."""

    def __init__(self, package: Path | None, work: Path, deadline: float):
        self.work, self.deadline = work, deadline
        paths = [str(package) if package else "", os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TRITON_CACHE_DIR": str(work / "triton-cache"),  # what one process has compiled the next need not
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # for torch's own deterministic products
        }

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def test(self, file: Path) -> Process:
        """One file of tests."""
        begun, report = time.monotonic(), self.work / f"{file.stem}.xml"
        command = [*PYTEST, "--confcutdir", str(file.parent), f"--junitxml={report}", str(file)]
        failed = run_limited(command, self.environment, self.work, min(TEST_SECONDS, self.left()))
        return Process(file.name, time.monotonic() - begun, failed, read_report(report) if report.exists() else [])

    def time(self, group: str, seconds: float) -> Process:
        """One group of times."""
        begun, out = time.monotonic(), self.work / group
        command = [sys.executable, "-m", "alterrec_fast.benchmarks.gpu.times", group, "--out", str(out)]
        failed = run_limited([*command, "--seconds", str(GRACE * seconds)], self.environment, self.work, seconds)
        done = Process(group, time.monotonic() - begun, failed)
        if (out / "results.json").exists():
            done.records = json.loads((out / "results.json").read_text())["records"]
            _, _, done.page = (out / "table.md").read_text().partition("## In short")
        return done


def read_report(path: Path) -> list[dict[str, str]]:
    """pytest's JUnit XML -> {"name", "result": one of RESULTS, "why"} of each test."""
    records = []
    for case in ElementTree.parse(path).iter("testcase"):
        result, why = "passed", ", ".join(p.get("value", "") for p in case.iter("property"))
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                result, why = "skipped" if child.tag == "skipped" else "failed", child.get("message", "")
        records.append({"name": case.get("name", ""), "result": result, "why": why})
    return records


def run(root: Path | None, out: Path, limit: float, only: str = "") -> Acceptance:
    """Everything; both files are written after each process. `only`: test files and groups whose names contain it."""
    deadline = time.monotonic() + limit
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="alterrec-acceptance-") as folder:
        work, files = Path(folder), list[Path]()
        if root is None:
            package, how, notes = None, "what was installed before", ["no tests: there is no checkout"]
        else:
            package, how, notes = install(root, work, min(BUILD_SECONDS, limit))
            # Copied, since pytest would put the checkout on the path, where alterrec_fast has neither kernels nor this.
            shutil.copytree(root / "tests" / "gpu", work / "tests" / "gpu")
            (work / "tests" / "__init__.py").touch()
            files = [file for file in sorted((work / "tests" / "gpu").glob("test_*.py")) if only in file.name]
        done, runner = Acceptance(commit_of(root), how, notes, environment()), Runner(package, work, deadline)
        alone = [file for file in files if any(word in file.stem for word in ALONE)]
        with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:  # most of it is compiling
            for process in pool.map(runner.test, [file for file in files if file not in alone]):
                done.add(done.tests, process, out)
        for file in alone:
            done.add(done.tests, runner.test(file), out)
        for group, share in TIME_SHARES.items():
            if only in group:
                done.add(done.times, runner.time(group, share * runner.left()), out)
    return done


def commit_of(root: Path | None) -> str:
    """The checkout's commit, with a + where files were changed."""
    return output("git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+") if root else "no checkout"


def environment() -> dict[str, str]:
    """GPU, driver, versions, compilers."""
    facts = {ASKED: output("nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader")}
    facts |= {"python": platform.python_version(), "CPU": f"{platform.machine()}, {os.cpu_count()} cores"}
    for package in ("torch", "triton", "numpy", "pytest"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    return facts | {"nvcc": output("nvcc", "--version").splitlines()[-1]}


def output(*command: str) -> str:
    """What a command prints, or why there is nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or "-"
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"


# --- the page ---


def page(done: Acceptance) -> str:
    """Markdown: the result, tests, environment, times."""
    faults, late = done.faults(), [process.name for process in (*done.tests, *done.times) if process.late]
    result = "FAILED" if faults else "passed as far as it ran, out of time" if late else "passed"
    counts = {name: sum(r["result"] == name for p in done.tests for r in p.records) for name in RESULTS}
    lines = [f"# GPU acceptance: {result}", "", ", ".join(f"{n} tests {name}" for name, n in counts.items()) + "."]
    lines += [f"Out of time, and ended before they were done: {', '.join(late)}."] if late else []
    lines += ["", f"Commit {done.commit}; installed by {done.installed}.", *(f"- {note}" for note in done.notes)]
    lines += ["", *table(["what failed", "why"], faults)] if faults else []
    rows = []
    for p in done.tests:
        numbers = [str(sum(r["result"] == name for r in p.records)) for name in RESULTS]
        rows.append([p.name, *numbers, f"{p.seconds:.0f}", p.failed])
    lines += ["", "## Tests", "", *table(["file", *RESULTS, "seconds", "how it ended"], rows)]
    skipped = sorted({(p.name, r["why"]) for p in done.tests for r in p.records if r["result"] == "skipped"})
    lines += ["", *table(["skipped in", "why"], skipped)] if skipped else []
    lines += ["", "## Environment", "", *table(["", ""], list(done.environment.items())), "", "## Times", ""]
    lines += ["By CUDA events, the L2 cache flushed before each call; docs/benchmarks.md has the method."]
    for p in done.times:
        lines += ["", f"### {p.name}: {p.failed or 'complete'}", p.page.replace("\n## ", "\n#### ")]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


def main() -> int:
    checkout = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything")
    parser.add_argument("--only", default="", help="test files and groups of times whose names contain this")
    parser.add_argument("--checkout", type=Path, default=checkout if (checkout / "setup.py").exists() else None)
    options = parser.parse_args()
    done = run(options.checkout, options.out.resolve(), options.limit, options.only)
    print(page(done).split("\n## ")[0])
    return int(bool(done.faults()))


if __name__ == "__main__":
    sys.exit(main())
