"""Acceptance on a machine with a GPU: `python benchmarks/gpu_acceptance.py --out DIR`, from a checkout, offline.

Installs the checkout into a temporary folder, runs each stage in a process of its own with a time limit, and writes
acceptance.json and acceptance.md: correctness against float64, determinism, CUDA graphs, sanitizers, times against
torch, and shares of measured ceilings. Under 8 minutes. Exit code 1 where a check failed or a stage crashed.
`--device cpu` tries the logic at tiny shapes under TRITON_INTERPRET=1. Imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "alterrec_fast", "kernels", "benchmarks", "csrc")
LIMIT = 475.0  # seconds for everything
BUILD_SECONDS = 120.0
GRACE = 0.75  # of its time, after which a stage begins nothing new
KILLED = "killed after"
GRAPHED = "ours, CUDA graph"
STAGE_MODULE = ("-m", "alterrec_fast.benchmarks.gpu_stages")


@dataclass(frozen=True)
class Stage:
    """A process; those of one turn run side by side."""

    name: str
    turn: int
    seconds: float
    command: tuple[str, ...]  # of Python


def _stages() -> tuple[Stage, ...]:
    """Checks share the GPU, since most of their time goes into compiling; what takes much memory has it alone, and so
    has whatever is timed. The sanitizers find kernels compiled."""
    ranks = ("rank_slice bits", "rank_slice ids", "rank_slice edges", "top_k")
    checks = (*ranks, "slice_cross_entropy", "sampled_softmax", "determinism", "graphs", "small")
    plan = [
        ("environment", 0, 15.0),
        *((name, 1, 95.0) for name in checks),
        ("huge", 2, 30.0),
        *((name, 3, 45.0) for name in ("memcheck", "racecheck")),
        ("ceilings", 4, 15.0),
        ("kernels", 5, 15.0),
        ("times, paper", 6, 50.0),
        ("times, 1M", 7, 35.0),
        ("times, 10M", 8, 60.0),
    ]
    return tuple(Stage(name, turn, seconds, (*STAGE_MODULE, name)) for name, turn, seconds in plan)


@dataclass
class Ended:
    """What became of a stage, and the lines that it wrote."""

    name: str
    outcome: str  # "" where it ended by itself with code 0
    seconds: float
    records: list[dict[str, Any]]


@dataclass
class Installed:
    """What the checkout was installed as."""

    folder: str
    how: str
    notes: list[str] = field(default_factory=list)  # what was left out, and why
    seconds: float = 0.0


@dataclass
class Acceptance:
    """A run, as acceptance.json has it."""

    device: str
    seed: int
    commit: str
    installed: Installed
    planned: list[str] = field(default_factory=list)  # names of all stages
    stages: list[Ended] = field(default_factory=list)

    def records(self, kind: str) -> Iterator[dict[str, Any]]:
        for stage in self.stages:
            for record in stage.records:
                if record["kind"] == kind:
                    yield record | {"stage": stage.name}

    def checks(self) -> list[dict[str, Any]]:
        """Every check, and one for what the stages' times and ends say: a stage that its clock ended is not a fault."""
        found = list(self.records("check"))
        for time_ in self.records("time"):
            if time_.get("ours_failed"):
                name = f"{time_['op']}, {time_['name']} at {time_['shape']}"
                found.append({"stage": time_["stage"], "name": name, "result": "fail", "detail": time_["error"]})
            if time_["op"] == "rank_slice" and time_["name"].startswith("ours") and time_.get("peak_bytes") is not None:
                extra, allowed = extra_memory(time_)
                result, detail = "pass" if extra <= allowed else "fail", f"{extra:,.0f} of {allowed:,.0f} bytes"
                name = f"extra memory of rank_slice, {time_['name']} at {time_['shape']}"
                found.append({"stage": time_["stage"], "name": name, "result": result, "detail": detail})
        for stage in self.stages:
            if stage.outcome:
                result = "not run" if stage.outcome.startswith(KILLED) else "fail"
                detail = f"out of time: {stage.outcome}" if result == "not run" else stage.outcome
                found.append({"stage": stage.name, "name": "the stage", "result": result, "detail": detail})
        ended = {stage.name for stage in self.stages}
        for name in self.planned:
            if name not in ended:
                found.append({"stage": name, "name": "the stage", "result": "not run", "detail": "it did not end"})
        return found

    def late(self) -> list[str]:
        """Stages that their clock ended."""
        return [stage.name for stage in self.stages if stage.outcome.startswith(KILLED)]

    def failed(self) -> bool:
        return any(check["result"] == "fail" for check in self.checks())


def extra_memory(time_: dict[str, Any]) -> tuple[float, float]:
    """Bytes that a timed rank_slice took beside its result, and the bar: 2 B (k2 - k1) x 8 bytes + 64 MiB."""
    sessions, size = time_["ranks"]
    return time_["peak_bytes"] - time_["result_bytes"], 16.0 * sessions * size + (64 << 20)


# --- installing ---


def install_command(source: Path, target: Path) -> list[str]:
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--no-input"]
    return [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]


def compiler_missing() -> str:
    """Why no extension can be built; empty where a C++ compiler is there."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    return "" if shutil.which(compiler) else f"there is no C++ compiler {compiler!r}"


def install(root: Path, work: Path, build_seconds: float) -> Installed:
    """Installs `root` into a folder in `work`: with compiled code, or without where that fails, or as plain files where
    pip fails. The checkout itself is left alone, whatever its build folder holds."""
    source, begun, notes = work / "source", time.monotonic(), []
    source.mkdir()
    for name in SOURCES:
        if (root / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
            shutil.copytree(root / name, source / name, ignore=ignore)
        else:
            shutil.copy(root / name, source / name)
    why = "ALTERREC_FAST_NO_EXT=1 was set" if os.environ.get("ALTERREC_FAST_NO_EXT") == "1" else compiler_missing()
    if not why:
        target = work / "compiled"
        failed = _run(install_command(source, target), {}, build_seconds)
        if not failed:
            home = os.environ.get("CUDA_HOME")
            nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
            notes += [] if nvcc else ["no CUDA C++: nvcc is not present"]
            return Installed(str(target), "pip, with the extension", notes, time.monotonic() - begun)
        why = f"building it failed: {failed}"
    notes.append(f"no extension, ALTERREC_FAST_NO_EXT=1: {why}")
    target = work / "plain"
    failed = _run(install_command(source, target), {"ALTERREC_FAST_NO_EXT": "1"}, 60.0)
    if not failed:
        return Installed(str(target), "pip, without the extension", notes, time.monotonic() - begun)
    notes.append(f"pip failed, the files were copied instead: {failed}")
    target = work / "copied"
    shutil.copytree(source / "alterrec_fast", target / "alterrec_fast")
    with (source / "pyproject.toml").open("rb") as file:
        places = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    for package, place in places.items():
        shutil.copytree(source / place, target / package.replace(".", "/"))
    return Installed(str(target), "copied, without the extension", notes, time.monotonic() - begun)


def _run(command: Sequence[str], environment: dict[str, str], seconds: float) -> str:
    """Runs a command; returns "" or how it failed."""
    outcome, said = run_limited(command, os.environ | environment, Path(tempfile.gettempdir()), seconds)
    return f"{outcome}: {said}" if outcome else ""


def run_limited(command: Sequence[str], environment: dict[str, str], folder: Path, seconds: float) -> tuple[str, str]:
    """Runs a command in a process group that is killed after `seconds`; -> how it failed, and its last words."""
    process = subprocess.Popen(
        command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    outcome = ""
    try:
        said, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        outcome = f"{KILLED} {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it may have left behind
    if outcome:
        said, _ = process.communicate()
    if process.returncode and not outcome:
        code = process.returncode
        outcome = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return outcome, " / ".join(line.strip() for line in said.strip().splitlines()[-6:])[-1500:]


# --- running ---


def run_stage(stage: Stage, device: str, seed: int, folder: Path, work: Path, seconds: float) -> Ended:
    """One stage, in a process that finds the package in `folder`."""
    out = work / f"{stage.name}.jsonl"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
        "TRITON_CACHE_DIR": str(work / "triton-cache"),  # what one stage has compiled the next need not
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # for torch's own deterministic products
        "TRITON_INTERPRET": str(int(device == "cpu")),
    }
    options = ["--device", device, "--seed", str(seed), "--seconds", str(GRACE * seconds), "--out", str(out)]
    begun = time.monotonic()
    outcome, said = run_limited([sys.executable, *stage.command, *options], environment, work, seconds)
    lines = out.read_text().splitlines() if out.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]  # a crash may cut the last one
    if outcome and said:
        outcome = f"{outcome}: {said}"
    return Ended(stage.name, outcome, time.monotonic() - begun, records)


def run(
    device: str, seed: int, out: Path, stages: Sequence[Stage], root: Path = ROOT, limit: float = LIMIT
) -> Acceptance:
    """Installs, runs the stages turn by turn, and writes both files after each stage."""
    deadline = time.monotonic() + limit
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="alterrec-acceptance-") as temporary:
        work = Path(temporary)
        print(f"installing {root}; the seed is {seed}", flush=True)
        installed, planned = install(root, work, min(BUILD_SECONDS, limit)), [stage.name for stage in stages]
        done = Acceptance(device, seed, _commit(root), installed, planned)
        write(done, out)
        for turn in sorted({stage.turn for stage in stages}):
            together = [stage for stage in stages if stage.turn == turn]
            left = deadline - time.monotonic()
            with ThreadPoolExecutor(len(together)) as pool:
                folder = Path(done.installed.folder)
                waiting = [
                    pool.submit(run_stage, stage, device, seed, folder, work, max(1.0, min(stage.seconds, left)))
                    for stage in together
                ]
                for ended in as_completed(waiting):
                    stage = ended.result()
                    print(f"{stage.name}: {stage.outcome or 'done'}, {stage.seconds:.0f} s", flush=True)
                    done.stages.append(stage)
                    write(done, out)
    return done


def _commit(root: Path) -> str:
    """The checkout's commit, with a + where files were changed."""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"


# --- the report ---


def write(done: Acceptance, out: Path) -> None:
    for name, text in (("acceptance.json", json.dumps(asdict(done), indent=1)), ("acceptance.md", report(done))):
        draft = out / f"{name}.draft"
        draft.write_text(text + "\n")
        draft.replace(out / name)


def report(done: Acceptance) -> str:
    """Markdown: the verdict, checks, environment, times, shares."""
    checks = done.checks()
    count = {result: sum(check["result"] == result for check in checks) for result in ("pass", "fail", "not run")}
    partly = "passed as far as it ran" + (", out of time" if done.late() else "")
    verdict = "FAILED" if count["fail"] else partly if count["not run"] else "passed"
    lines = [f"# GPU acceptance: {verdict}", ""]
    lines.append(f"{count['pass']} checks passed, {count['fail']} failed, {count['not run']} were not run.")
    if late := done.late():
        lines += ["", f"Out of time, and ended before they were done: {', '.join(late)}."]
    lines += ["", f"Commit {done.commit}, device {done.device}, seed {done.seed}."]
    lines.append(f"Installed by {done.installed.how} in {done.installed.seconds:.0f} s.")
    lines += ["", *(f"- {note}" for note in done.installed.notes)]
    order = {"fail": 0, "not run": 1, "pass": 2}
    rows = [[c["result"], c["stage"], c["name"], c["detail"]] for c in sorted(checks, key=lambda c: order[c["result"]])]
    lines += ["", "## Checks", "", *_table(["result", "stage", "check", "detail"], rows)]
    lines += [
        "",
        "Errors are parts of the largest value, against float64; torch's are those of plain torch in the same",
    ]
    lines += ["arithmetic.", "", "## Environment", ""]
    lines += _table(["", ""], [[fact["name"], fact["value"]] for fact in done.records("fact")])
    lines += [
        "",
        "## Times",
        "",
        "By CUDA events, the L2 cache flushed before each; medians of turns. Memory is the peak",
    ]
    lines += ["of one call beyond its inputs.", ""]
    lines += _table(["shape", "op", "contestant", "ms", "range", "turns", "MiB"], _time_rows(done))
    stages = [[s.name, f"{s.seconds:.0f}", s.outcome or "ended"] for s in done.stages]
    kernels = ["## Kernels", "", "Device time of one call, by torch's profiler; the shortest are left out.", ""]
    rows = [
        [k["shape"], k["op"], k["name"], f"{k['calls']:.0f}", f"{k['microseconds']:,.0f}"]
        for k in done.records("kernel")
    ]
    kernels += _table(["shape", "op", "kernel", "launches", "us"], rows)
    return "\n".join(
        [*lines, "", *_shares(done), "", *kernels, "", "## Stages", "", *_table(["stage", "s", "outcome"], stages)]
    )


def _time_rows(done: Acceptance) -> list[list[str]]:
    rows = []
    for t in done.records("time"):
        about = [t["shape"], t["op"], t["name"]]
        if "error" in t:
            rows.append([*about, t["error"], "", "", ""])
            continue
        low, high = 1e3 * t["fastest"], 1e3 * t["slowest"]
        memory = "not measured" if t["peak_bytes"] is None else f"{t['peak_bytes'] / 2**20:,.0f}"
        rows.append([*about, f"{1e3 * t['seconds']:.3f}", f"{low:.3f} to {high:.3f}", str(t["turns"]), memory])
    return rows


def _shares(done: Acceptance) -> list[str]:
    """What each time is of the ceilings that this run measured, and the issue's bars for rank_slice."""
    ceilings = {c["name"]: c["value"] for c in done.records("ceiling")}
    lines = ["## Shares of measured ceilings", ""]
    if not {"copy", "bf16", "fp32"} <= ceilings.keys():
        return [*lines, "The ceilings were not measured."]
    lines.append(
        f"Copy {ceilings['copy'] / 1e9:,.1f} GB/s; square products: bf16 {ceilings['bf16'] / 1e12:,.2f} TFLOP/s,"
    )
    lines += [
        f"fp32 {ceilings['fp32'] / 1e12:,.2f} TFLOP/s. The bytes and operations are those that the op can't do without;"
    ]
    lines += ["*over the floor* is the time over the larger of what they take at the ceilings.", ""]
    rows: list[list[str]] = []
    bars: dict[str, dict[str, str]] = {}
    for t in done.records("time"):
        if "error" in t:
            continue
        speed, rate = t["bytes"] / t["seconds"], t["operations"] / t["seconds"]
        floor = max(t["bytes"] / ceilings["copy"], t["operations"] / ceilings[t["dtype"]])
        row = [t["shape"], t["op"], t["name"], f"{speed / 1e9:,.1f}", f"{speed / ceilings['copy']:.1%}"]
        row += [f"{rate / 1e12:,.2f}", f"{rate / ceilings[t['dtype']]:.1%}", f"{t['seconds'] / floor:.2f}"]
        rows.append(row)
        if t["op"] == "rank_slice" and t["name"] in ("ours", GRAPHED):
            ours = bars.setdefault(t["shape"], {})
            ours["name"], ours["over"] = t["name"], f"{t['seconds'] / floor:.2f}"  # the graph's line comes last
            if t["peak_bytes"] is not None:
                extra, room = extra_memory(t)
                ours["memory"] = f"{extra / 2**20:,.0f} of {room / 2**20:,.0f}"
    head = ["shape", "op", "contestant", "GB/s", "of copy", "TFLOP/s", "of product", "over the floor"]
    lines += _table(head, rows)
    lines += [
        "",
        "The bars of rank_slice: within 1.3 of the floor at 10M items in bf16, by the captured graph's time where",
    ]
    lines += ["there is one, and memory beside its result under 2 B (k2 - k1) x 8 bytes + 64 MiB.", ""]
    held = [[shape, b["name"], b["over"], b.get("memory", "not measured")] for shape, b in bars.items()]
    return lines + _table(["shape", "contestant", "over the floor", "MiB of those allowed"], held)


def _table(head: list[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return ["None."]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--seed", type=int, default=secrets.randbelow(2**31), help="of the inputs; drawn where not given"
    )
    parser.add_argument("--stages", default="", help="only stages whose name contains this")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything")
    chosen = parser.parse_args(arguments)
    stages = [stage for stage in _stages() if chosen.stages in stage.name]
    done = run(chosen.device, chosen.seed, chosen.out, stages, limit=chosen.limit)
    print(report(done).split("\n## ")[0])
    return int(done.failed())


if __name__ == "__main__":
    sys.exit(main())
