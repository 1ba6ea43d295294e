"""Our parts inside other people's libraries, side by side with theirs: `make integrations` writes docs/integrations.md.

Each measurement is a module of its own under an interpreter of its own, and each of its contestants a process of its
own. A measurement takes ``--json FILE`` and ``--raw FOLDER`` (Online Retail), and writes a list of sections
``{"heading": str, "text": str, "header": [str, ...], "rows": [[str, ...], ...]}``. Those that are there already are
kept, so that the command can be broken off and started again; ``--again NAME`` measures one anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        sections += json.loads(file.read_text(encoding="utf-8"))
    text = "\n".join(markdown(section) for section in sections)
    print(text)
    if options.page:
        options.page.write_text(between_marks(options.page, MARK, text), encoding="utf-8")


def markdown(section: dict[str, Any]) -> str:
    """A section as a heading, its text and a table."""
    header, rows = section["header"], section["rows"]
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"{section['heading']}: every row must have {len(header)} cells, got {rows}")
    table = [" | ".join(cells) for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join([f"## {section['heading']}", "", section["text"], "", *(f"| {line} |" for line in table), ""])


if __name__ == "__main__":
    main()
