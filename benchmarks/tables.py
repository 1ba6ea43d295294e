"""The Markdown table of a run: what it was made on, then for each op and shape who came in how."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from alterrec_fast.benchmarks.contestants import OPS
from alterrec_fast.benchmarks.records import FLOOR, Record, Results

COLUMNS = (
    "",
    "ms",
    "to mm",
    "expected again in",
    "of the ceiling",
    "to bandwidth",
    "peak MiB",
    "beyond inputs",
    "error",
)
TARGETS = "targets/s"


def markdown(results: Results) -> str:
    """The whole page."""
    parts = [_heading(results), "## In short\n\n" + in_short(results)]
    for op in OPS:
        records = [record for record in results.records if record.op == op.name]
        tables = [
            f"**{shape.label}**\n\n{table(list(group))}"
            for shape, group in groupby(records, key=lambda record: record.shape)
        ]
        if tables:
            parts.append(f"## {op.name}\n\n{op.title}.\n\n" + "\n\n".join(tables))
    return "\n\n".join(parts) + "\n"


def in_short(results: Results) -> str:
    """Ours beside the fastest of the others that are right, at the shapes of the tables; MiB beyond inputs."""
    lines = [
        "| op | shape | ours, ms | to mm | fastest of the others | its ms | times as long | MiB, ours | MiB, its |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    timed = [r for r in results.records if r.seconds is not None and not r.shape.figure]
    for (op, shape), group in groupby(timed, key=lambda record: (record.op, record.shape)):
        records = list(group)
        ours = next((r for r in records if r.contestant == "alterrec-fast"), None)
        others = [r for r in records if not r.ours and r.contestant != FLOOR]
        if ours is None or not others:
            continue
        best = min(others, key=lambda record: record.seconds or 0.0)
        cells = [f"`{op}`", shape.label, _milliseconds(ours), _number(ours.ratio), best.contestant, _milliseconds(best)]
        cells += [_number((best.seconds or 0.0) / (ours.seconds or 1.0)), _mebibytes(ours.extra_bytes)]
        lines.append("| " + " | ".join([*cells, _mebibytes(best.extra_bytes)]) + " |")
    return "\n".join(lines)


def table(records: Sequence[Record]) -> str:
    """One contest, ours first and then by time; those without a result come last, with the reason."""
    columns = (*COLUMNS, TARGETS) if any("targets" in record.detail for record in records) else COLUMNS
    ranked = sorted(records, key=lambda r: (r.seconds is None, r.contestant != FLOOR, not r.ours, r.seconds or 0.0))
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    return "\n".join(lines + [_line(record, columns) for record in ranked])


def _line(record: Record, columns: Sequence[str]) -> str:
    if record.seconds is None:
        reason = (record.failed or "not timed").replace("|", "\\|")
        return f"| {record.contestant} | {reason} |" + " |" * (len(columns) - 2)
    name = f"**{record.contestant}**" if record.ours else record.contestant
    if record.stopped is not None:
        name += f" ({record.stopped})".replace("|", "\\|")
    cells = [
        name if record.gflops is None else f"{name} ({record.gflops:,.0f} GFLOP/s)",
        _milliseconds(record),
        _number(record.ratio),
        _interval(record),
        "" if record.share is None else f"{100 * record.share:.0f}%",
        _number(record.bandwidth_ratio),
        _mebibytes(record.peak_bytes),
        _mebibytes(record.extra_bytes),
        "" if record.error is None else f"{record.error:.0e}",
    ]
    if TARGETS in columns:
        cells.append(f"{record.detail['targets'] / record.seconds:,.0f}" if "targets" in record.detail else "")
    return "| " + " | ".join(cells) + " |"


def _heading(results: Results) -> str:
    machine = results.machine
    there = {package.split(" ")[0] for package in machine.packages if " " in package} | {"torch", "alterrec-fast"}
    elsewhere = sorted(
        {r.version for r in results.records if " " in r.version and r.version.split(" ")[0] not in there}
    )
    packages = [package for package in machine.packages if " " in package] + elsewhere
    lines = [
        "# Benchmarks",
        f"`{results.command}`, {results.date}.",
        f"{machine.processor}, {machine.cores} cores, {machine.threads} threads, "
        f"{machine.memory / 2**30:.0f} GiB, {' '.join(machine.flags)}; native engine: {machine.instruction_set}; "
        f"governor: {machine.governor or 'not told'}; {machine.system}; Python {machine.python}, "
        f"torch {machine.torch}, {', '.join(packages)}.",
        f"Memory bandwidth {results.bandwidth / 1e9:.1f} GB/s. Load average {results.load_before:.1f} before and "
        f"{results.load_after:.1f} after; during the contests other work took {results.others:.2f} cores.",
    ]
    if results.busy:
        lines.append("**The machine was busy with other work: take the figures of this run as provisional.**")
    return "\n\n".join(lines)


def _interval(record: Record) -> str:
    """The floor's own ratio says how far it is from the best of the same product in the run, and has none."""
    if record.contestant == FLOOR:
        return ""
    interval = record.interval
    return f"{_number(interval[0])} to {_number(interval[1])}" if interval else "not known"


def _milliseconds(record: Record) -> str:
    seconds = record.seconds or 0.0
    return f"{1e3 * seconds:.1f}" if seconds < 1.0 else f"{1e3 * seconds:.0f}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10.0 else f"{value:.0f}"


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"
