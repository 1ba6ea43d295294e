"""What a run leaves: a record for each op, case and implementation; the table; the comparison with a stored baseline.

`python -m alterrec_fast.benchmarks.harness.report RESULTS.json` makes a run the stored baseline of its kind of machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from .machine import Machine, version_of
from .op import BASELINE, Implementation, Op
from .worker import Case

STORED = Path(__file__).parents[1] / "baseline.json"
SLOWER = 1.3  # times the stored ratio from which on an op is reported as slower
END = "<!-- end -->"  # what a table that a command writes into a page ends with
NOT_BEGUN = "not begun"  # what the reason starts with where the time was over
BUSY = 0.1  # cores of background load from which on a run's figures are provisional


@dataclass
class Record:
    """What is known of one implementation at one case of one op. Times in seconds, sizes in bytes."""

    op: str
    case: Case
    implementation: str
    ours: bool
    version: str
    allowed: float  # the largest error that counts as right
    product: str  # what the baseline multiplies
    products: int  # of those that no implementation can do without
    operations: float  # additions and multiplications of the baseline
    samples: list[list[float]] = field(default_factory=list)  # of each repetition
    error: float | None = None  # against float64
    failed: str | None = None  # why there are no samples, or no more
    peak_bytes: int | None = None  # the most that the process held
    extra_bytes: int | None = None  # beyond inputs and libraries
    detail: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, op: Op, case: Case, one: Implementation) -> Record:
        allowed, sizes = op.allowed(one, case), (op.product(case), op.products, op.operations(case))
        return cls(op.name, case, one.name, one.ours, version_of(one.package), allowed, *sizes)

    @property
    def key(self) -> str:
        return f"{self.op} | {self.case.label} | {self.implementation}"

    @property
    def seconds(self) -> float | None:
        """The minimum over all processes, since whatever else a machine does makes a call longer."""
        return min((sample for samples in self.samples for sample in samples), default=None)

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The quarter, the half and three quarters of all samples, one at least, are shorter."""
        samples = [sample for samples in self.samples for sample in samples]
        first, median, third = statistics.quantiles(samples * 2 if len(samples) == 1 else samples, method="inclusive")
        return first, median, third

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Record:
        return cls(**values | {"case": Case(**values["case"])})


@dataclass
class Results:
    """A run."""

    command: str
    date: str
    machine: Machine
    background: float  # cores that other work took meanwhile
    records: list[Record] = field(default_factory=list)

    def ratio(self, record: Record) -> float | None:
        """To the baseline: the least that the same product took in the whole run."""
        same = [one.seconds for one in self.records if one.implementation == BASELINE and one.product == record.product]
        least = min((seconds for seconds in same if seconds), default=None)
        return record.seconds / least if record.seconds and least else None

    @classmethod
    def read(cls, path: Path) -> Results:
        values = json.loads(path.read_text())
        made = {"machine": Machine(**values["machine"]), "records": [Record.from_json(x) for x in values["records"]]}
        return cls(**values | made)

    def write(self, out: Path) -> None:
        """results.json and table.md."""
        for name, text in (("results.json", json.dumps(asdict(self), indent=1)), ("table.md", page(self))):
            draft = out / f"{name}.draft"
            draft.write_text(text + "\n")
            draft.replace(out / name)


# --- the table ---

COLUMNS = ("", "ms", "median", "IQR", "of mm", "of the ceiling", "peak MiB", "beyond inputs", "error")
DETAILS: dict[str, tuple[str, Callable[[float, Record], str]]] = {  # of Record.detail, those that are columns
    "targets": ("targets/s", lambda targets, record: f"{targets / (record.seconds or 1.0):,.0f}"),
    "graph": ("as a CUDA graph, ms", lambda seconds, record: milliseconds(seconds)),
}


def page(results: Results) -> str:
    """The whole table.md."""
    machine, parts = results.machine, []
    packages = sorted({r.version for r in results.records if " " in r.version} | set(machine.packages))
    parts += [
        "# Benchmarks",
        f"`{results.command}`, {results.date}.",
        f"{machine.processor}, {machine.cores} cores, {machine.threads} threads, {machine.memory / 2**30:.0f} GiB, "
        f"{' '.join(machine.flags)}; native engine: {machine.instruction_set}; {machine.system}; "
        f"Python {machine.python}, torch {machine.torch}, {', '.join(name for name in packages if ' ' in name)}.",
        f"Background load: {results.background:.2f} cores.",
    ]
    if results.background > BUSY:
        parts.append("**The machine was busy with other work: take the figures of this run as provisional.**")
    parts.append("## In short\n\n" + in_short(results))
    for op, of_op in groupby(results.records, key=lambda record: record.op):
        parts.append(f"## {op}")
        for case, records in groupby(of_op, key=lambda record: record.case):
            parts.append(f"**{case.label}**\n\n{table(list(records), results)}")
    return "\n\n".join(parts)


def in_short(results: Results) -> str:
    """Ours beside the fastest of the others that are right, at the cases of the tables; MiB beyond inputs."""
    rows = []
    timed = [r for r in results.records if r.seconds and not r.case.figure]
    for (op, case), group in groupby(timed, key=lambda record: (record.op, record.case)):
        records = list(group)
        ours = [r for r in records if r.ours][:1]
        others = sorted(
            (r for r in records if not r.ours and r.implementation != BASELINE), key=lambda r: r.seconds or 0
        )
        for mine, best in zip(ours, others, strict=False):
            times = _number((best.seconds or 0.0) / (mine.seconds or 1.0))
            row = [f"`{op}`", case.label, milliseconds(mine.seconds), _number(results.ratio(mine)), best.implementation]
            rows.append([*row, milliseconds(best.seconds), times, _mib(mine.extra_bytes), _mib(best.extra_bytes)])
    head = ["op", "case", "ours, ms", "of mm", "fastest of the others", "its ms", "times as long", "MiB, ours", "its"]
    return markdown(head, rows)


def table(records: Sequence[Record], results: Results) -> str:
    """One case: the baseline, ours, the others by time; those without a result come last, with the reason."""
    ranked = sorted(records, key=lambda r: (not r.samples, r.implementation != BASELINE, not r.ours, r.seconds or 0.0))
    details = [name for name in DETAILS if any(name in record.detail for record in records)]
    head = [*COLUMNS, *(DETAILS[name][0] for name in details)]
    return markdown(head, [_row(record, results, details) for record in ranked])


def _row(record: Record, results: Results, details: Sequence[str]) -> list[str]:
    if not record.seconds:
        return [record.implementation, record.failed or "not timed", *[""] * (len(COLUMNS) + len(details) - 2)]
    name = f"**{record.implementation}**" if record.ours else record.implementation
    if record.implementation == BASELINE:
        name += f" ({record.operations / record.seconds / 1e9:,.0f} GFLOP/s)"
    first, median, third = record.quartiles
    ratio = results.ratio(record)
    ceiling = None if record.implementation == BASELINE else ratio
    return [
        f"{name} ({record.failed})" if record.failed else name, milliseconds(record.seconds), milliseconds(median),
        milliseconds(third - first), _number(ratio), f"{100 * record.products / ceiling:.0f}%" if ceiling else "",
        _mib(record.peak_bytes), _mib(record.extra_bytes), "" if record.error is None else f"{record.error:.0e}",
        *(DETAILS[name][1](record.detail[name], record) if name in record.detail else "" for name in details),
    ]  # fmt: skip


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; ValueError where a row has not as many cells as the head."""
    if any(len(row) != len(head) for row in rows):
        raise ValueError(f"every row must have {len(head)} cells, got {[len(row) for row in rows]}")
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells))


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean and standard deviation of runs over seeds; empty for none."""
    if not values:
        return ""
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def between_marks(page: Path, mark: str, table: str) -> str:
    """The text of the page with the table between `mark` and the next END."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(mark)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page}: the marks {mark} and {END} are missing")
    return f"{before}{begin}\n\n{table}\n{end}{after}"


def milliseconds(seconds: float | None) -> str:
    ms = 1e3 * (seconds or 0.0)
    return f"{ms:.1f}" if ms >= 1.0 else f"{ms:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10.0 else f"{value:.0f}"


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"


# --- the stored baseline: ratios to torch.mm for each kind of machine, never seconds ---


def read_stored(path: Path = STORED) -> dict[str, dict[str, float]]:
    """{kind of machine: {record's key: ratio}}."""
    ratios: dict[str, dict[str, float]] = json.loads(path.read_text())["ratios"]
    return ratios


def comparison(results: Results, stored: dict[str, dict[str, float]]) -> str:
    """For a person: what takes more than SLOWER times its stored ratio, out of how many that could be compared."""
    kind = results.machine.kind
    if kind not in stored:
        return f"no baseline of this kind of machine ({kind}), so nothing to compare; stored: {'; '.join(stored)}"
    ratios = {r.key: results.ratio(r) for r in results.records if r.ours and not (r.failed or "").startswith(NOT_BEGUN)}
    compared, lines = 0, []
    for key in ratios.keys() & stored[kind].keys():
        ratio, before = ratios[key], stored[kind][key]
        compared += 1
        if ratio is None:
            lines.append(f"  {key}: no ratio any more")
        elif ratio > SLOWER * before:
            lines.append(f"  {key}: {ratio:.2f} times mm, was {before:.2f}")
    title = f"more than {SLOWER} times as slow as the baseline: {len(lines)} of {compared} ratios to torch.mm"
    return "\n".join([title, *sorted(lines)])


def main() -> None:
    """Stores a run's ratios as the baseline of its kind of machine."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("results", type=Path, help="results.json")
    results = Results.read(parser.parse_args().results)
    ratios = {r.key: round(ratio, 4) for r in results.records if r.ours and (ratio := results.ratio(r))}
    values = json.loads(STORED.read_text())
    values["ratios"][results.machine.kind] = ratios
    values["made"][results.machine.kind] = f"{results.command}, {results.date}"
    STORED.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
