"""Whether the native engine trains as well as the reference.

`python -m alterrec_fast.benchmarks.experiments.engine_quality` trains `alterrec` and `alterrec_aug` on Online Retail,
each with the native engine in fp32 and bf16 and with the reference in fp32. Under --out of the results command, its
finished runs serve as those of the native engine in fp32; see `runs`. --short changes the student after every epoch, so
that 4 epochs hold every stage of the schedule.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace

from alterrec_fast.files import write_text
from alterrec_fast.training.config import METRICS

from ..harness.report import markdown
from .runs import ALTERREC, ALTERREC_AUG, Metrics, Row, between_marks, cell, parser, run_all

MARK = "<!-- made by benchmarks/experiments/engine_quality.py -->"
ENGINES = {
    "": {"backend": "native"},  # of this name the results command's rows are as well
    ", bf16": {"backend": "native", "precision": "bf16"},
    ", reference": {"backend": "reference"},
}
ROWS = [
    Row(row.name + name, row.variant, row.settings | settings)
    for row in (ALTERREC, ALTERREC_AUG)
    for name, settings in ENGINES.items()
]


SHORT = {"m_random": 1, "m_gap": 1}


def main() -> None:
    taken = parser(__doc__)
    taken.add_argument("--short", action="store_true", help="m_random = m_gap = 1")
    options = taken.parse_args()
    rows = [replace(row, settings=row.settings | SHORT) for row in ROWS] if options.short else ROWS
    table = _page(run_all(rows, options), options)
    write_text(options.out / "engine_quality.md", table)
    print(table)
    if options.table:
        write_text(options.table, between_marks(options.table, MARK, table))


def _page(runs: dict[str, list[Metrics]], options: argparse.Namespace) -> str:
    """Every row's metrics, and how far apart the engines are."""
    schedule = ", m_random = m_gap = 1" if options.short else ""
    lines = [
        f"Online Retail, width {options.width}, {options.epochs} epochs{schedule}, {options.seeds} seeds; rows "
        "without a word on the engine are native, fp32.",
        "",
        markdown(
            ["test, in %", *METRICS],
            [[name, *(cell(seeds, "fused", metric) for metric in METRICS)] for name, seeds in runs.items()],
        ),
        "",
    ]
    for variant in (ALTERREC.name, ALTERREC_AUG.name):
        for engine, title in (("", "fp32"), (", bf16", "bf16")):
            apart = {metric: _deviations(runs, variant, engine, metric) for metric in METRICS}
            most = max(apart, key=lambda metric: apart[metric])
            where = "within" if apart[most] <= 1.0 else "BEYOND"
            lines.append(
                f"- {variant}, native {title}: {where} one standard deviation of the reference; at most "
                f"{apart[most]:.2f}, in {most}."
            )
    return "\n".join([*lines, ""])


def _deviations(runs: dict[str, list[Metrics]], variant: str, engine: str, metric: str) -> float:
    """Between the means of an engine and of the reference, in standard deviations over seeds, pooled over all engines.

    Pooled, since that of three seeds is itself uncertain by half.
    """
    values = {name: [one["test"]["fused"][metric] for one in runs[variant + name]] for name in ENGINES}
    spread = statistics.fmean(statistics.variance(v) for v in values.values()) ** 0.5
    difference = abs(statistics.fmean(values[engine]) - statistics.fmean(values[", reference"]))
    if difference == 0.0:
        return 0.0
    return difference / spread if spread > 0.0 else math.inf


if __name__ == "__main__":
    main()
