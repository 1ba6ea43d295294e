"""Our parts inside other people's libraries, side by side with theirs: `make integrations` writes docs/integrations.md.

Each measurement is a module under an interpreter that has its libraries, and each of its rows a process. A measurement
takes ``--json FILE`` and ``--raw FOLDER`` (Online Retail), and writes a list of sections ``{"heading": str, "text":
str, "header": [str, ...], "rows": [[str, ...], ...]}``, to which "measured" is added: day, processor and cores. Those
that exist already are kept, so that the command can be broken off and started again; ``--again NAME`` repeats one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..harness.machine import Machine
from ..harness.report import between_marks, markdown

MARK = "<!-- made by make integrations -->"
MEASUREMENTS = {  # modules of alterrec_fast.benchmarks, and the Python that has the libraries they need
    "integrations.mining": sys.executable,
    "experiments.sasrec": sys.executable,
    "integrations.recbole": ".venv-recommenders/bin/python",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="Online Retail in the generic layout")
    parser.add_argument("--out", type=Path, required=True, help="where data and figures go")
    parser.add_argument("--page", type=Path, help=f"Markdown file; the tables replace what stands after {MARK}")
    parser.add_argument("--again", default=[], nargs="*", choices=list(MEASUREMENTS), metavar="NAME")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sections: list[dict[str, Any]] = []
    for module, interpreter in MEASUREMENTS.items():
        file = options.out / f"{module}.json"
        if module in options.again or not file.exists():
            command = [interpreter, "-m", f"alterrec_fast.benchmarks.{module}"]
            subprocess.run([*command, "--json", str(file), "--raw", str(options.raw)], check=True)
            made = [{**section, "measured": when_and_where()} for section in json.loads(file.read_text("utf-8"))]
            file.write_text(json.dumps(made), encoding="utf-8")
        sections += json.loads(file.read_text(encoding="utf-8"))
    text = "\n".join(as_markdown(section) for section in sections)
    print(text)
    if options.page:
        options.page.write_text(between_marks(options.page, MARK, text), encoding="utf-8")


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
