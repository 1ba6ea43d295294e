"""Our parts inside other people's libraries, side by side with theirs: `make integrations` writes docs/integrations.md.

Each measurement is a module with `measure(**job)`, which is called in a process of its own under an interpreter that
has the libraries, and `sections(raw, folder, run)`, which has jobs run by `run(**job)` and returns ``{"heading": str,
"text": str, "header": [str, ...], "rows": [[str, ...], ...]}``. Sections that exist already are kept, so that the
command can be broken off and started again; ``--again NAME`` repeats one.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..harness.machine import Machine
from ..harness.report import between_marks, markdown

MARK = "<!-- made by make integrations -->"
PACKAGE = "alterrec_fast.benchmarks"
MEASUREMENTS = {  # modules, and the Python that has the libraries they need
    "integrations.mining": sys.executable,
    "experiments.sasrec": sys.executable,
    "integrations.recbole": ".venv-recommenders/bin/python",
}


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measured = importlib.import_module(f"{PACKAGE}.{sys.argv[2]}")
        print(json.dumps(measured.measure(**json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="Online Retail in the generic layout")
    parser.add_argument("--out", type=Path, required=True, help="where data and figures go")
    parser.add_argument("--page", type=Path, help=f"Markdown file; the tables replace what stands after {MARK}")
    parser.add_argument("--again", default=[], nargs="*", choices=list(MEASUREMENTS), metavar="NAME")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sections: list[dict[str, Any]] = []
    for name, interpreter in MEASUREMENTS.items():
        file = options.out / f"{name}.json"
        if name in options.again or not file.exists():
            module, run = importlib.import_module(f"{PACKAGE}.{name}"), partial(call, interpreter, name)
            with tempfile.TemporaryDirectory(dir=options.out) as folder:
                made = module.sections(options.raw, Path(folder), run)
                made = [section | {"measured": when_and_where()} for section in made]
            file.write_text(json.dumps(made), encoding="utf-8")
        sections += json.loads(file.read_text(encoding="utf-8"))
    text = "\n".join(as_markdown(section) for section in sections)
    print(text)
    if options.page:
        options.page.write_text(between_marks(options.page, MARK, text), encoding="utf-8")


def call(interpreter: str, module: str, **job: Any) -> dict[str, Any]:
    """What the module's measure(**job) returns, in JSON, from a process of its own."""
    command = [interpreter, "-m", f"{PACKAGE}.integrations", "--measure", module, json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{module} {job} ended with code {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def when_and_where() -> str:
    """Stored with what is measured, so that a page tells what is older or of another machine."""
    machine, today = Machine.this(torch.get_num_threads()), datetime.date.today()
    return f"{today.day} {today:%B %Y}, {machine.processor or 'unknown processor'}, {machine.cores} cores"


def as_markdown(section: dict[str, Any]) -> str:
    """A section as a heading, when and where it was measured if that is known, its text and a table."""
    measured = [f"{section['measured']}.", ""] if "measured" in section else []
    table = markdown(section["header"], section["rows"])
    return "\n".join([f"## {section['heading']}", "", *measured, section["text"], "", table, ""])


if __name__ == "__main__":
    main()
