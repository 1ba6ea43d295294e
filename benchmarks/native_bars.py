"""Every measurement of the native CPU engine, one after the other, into docs/native.md.

python -m alterrec_fast.benchmarks.native_bars --run RUN --page docs/native.md

RUN is a finished run of two networks on Online Retail, for trained embeddings. Wants a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

from alterrec_fast.benchmarks.runs import between_marks

from alterrec_fast.training.checkpoint import write_text

MARK = "<!-- made by benchmarks/native_bars.py -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a finished run of two networks, for trained embeddings")
    parser.add_argument("--rounds", type=int, help="timed rounds, otherwise each benchmark's own number")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page", type=Path, help="Markdown file; the results replace what stands between its marks")
    options = parser.parse_args()
    common = ["--threads", str(options.threads)]
    if options.rounds:
        common += ["--rounds", str(options.rounds)]
    trained = ["--run", str(options.run)] if options.run else []
    blocks = [f"{date.today():%d %B %Y}, {_processor()}.", ""]
    for name, more in (
        ("native_ops", trained),
        ("native_losses", []),
        ("whole_step", trained),
        ("training_throughput", []),
    ):
        module = f"alterrec_fast.benchmarks.{name}"
        # Each in a process of its own: what one leaves in memory does not help or hinder the next.
        done = subprocess.run(
            [sys.executable, "-m", module, *common, *more], stdout=subprocess.PIPE, text=True, check=False
        )
        print(done.stdout, flush=True)
        if done.returncode != 0:
            raise SystemExit(f"{module} failed")
        shown = " ".join([*common, *(["--run", "RUN"] if more else [])])
        blocks += [f"`python -m {module} {shown}`:", "", "```text", done.stdout.strip(), "```", ""]
    if options.page:
        write_text(options.page, between_marks(options.page, MARK, "\n".join(blocks)))


def _processor() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor()


if __name__ == "__main__":
    main()
