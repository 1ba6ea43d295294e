"""Our parts inside other people's libraries, side by side with theirs: `make integrations` writes docs/integrations.md.

Each measurement is a module of its own under an interpreter of its own, and each of its contestants a process of its
own. A measurement takes ``--json FILE`` and ``--raw FOLDER`` (Online Retail), and writes a list of sections
``{"heading": str, "text": str, "header": [str, ...], "rows": [[str, ...], ...]}``, to which "measured" is added: day,
processor and cores. Those that are there already are kept, so that the command can be broken off and started again;
``--again NAME`` measures one anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from alterrec_fast.benchmarks import machine
from alterrec_fast.benchmarks.runs import between_marks

MARK = "<!-- made by make integrations -->"


@dataclass(frozen=True)
class Measurement:
    """A module of alterrec_fast.benchmarks, and the Python that has the libraries it needs."""

    module: str
    interpreter: str = sys.executable


MEASUREMENTS = [
    Measurement("integrations_mining"),
    Measurement("integrations_sasrec"),
    Measurement("integrations_recbole", ".venv-recommenders/bin/python"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="Online Retail in the generic layout")
    parser.add_argument("--out", type=Path, required=True, help="where data and figures go")
    parser.add_argument("--page", type=Path, help=f"Markdown file; the tables replace what stands after {MARK}")
    parser.add_argument("--again", default=[], nargs="*", choices=[m.module for m in MEASUREMENTS], metavar="NAME")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sections: list[dict[str, Any]] = []
    for measurement in MEASUREMENTS:
        file = options.out / f"{measurement.module}.json"
        if measurement.module in options.again or not file.exists():
            command = [measurement.interpreter, "-m", f"alterrec_fast.benchmarks.{measurement.module}"]
            subprocess.run([*command, "--json", str(file), "--raw", str(options.raw)], check=True)
            made = [{**section, "measured": here_and_now()} for section in json.loads(file.read_text("utf-8"))]
            file.write_text(json.dumps(made), encoding="utf-8")
        sections += json.loads(file.read_text(encoding="utf-8"))
    text = "\n".join(markdown(section) for section in sections)
    print(text)
    if options.page:
        options.page.write_text(between_marks(options.page, MARK, text), encoding="utf-8")


def here_and_now() -> str:
    """Kept with what is measured, so that a page tells what is older or of another machine."""
    found = machine.look(torch.get_num_threads())
    today = datetime.date.today()
    return f"{today.day} {today:%B %Y}, {found.processor or 'unknown processor'}, {found.cores} cores"


def markdown(section: dict[str, Any]) -> str:
    """A section as a heading, where and when it was measured if that is known, its text and a table."""
    header, rows = section["header"], section["rows"]
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"{section['heading']}: every row must have {len(header)} cells, got {rows}")
    table = [" | ".join(cells) for cells in (header, ["---"] * len(header), *rows)]
    above = [f"## {section['heading']}", ""]
    if "measured" in section:
        above += [f"{section['measured']}.", ""]
    return "\n".join([*above, section["text"], "", *(f"| {line} |" for line in table), ""])


if __name__ == "__main__":
    main()
