"""The figures of a run, as PNG and SVG, all in one style."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .op import BASELINE
from .report import Record, Results

# Ours in blue; others in colours that the colour-blind can tell apart, each with a marker of its own.
INK, MUTED, GRID = "#1c2127", "#5a6472", "#dbe0e6"
OUR_COLOURS = ("#1d4f9c", "#5b8fd9", "#8db8ff", "#123263")
COLOURS = ("#d55e00", "#0f9a80", "#b8860b", "#a6408f", "#7a4b2a", "#c0392b", "#4d7c0f", "#6b7684")
MARKERS = "os^Dvp<>"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "alterrec-fast",  # the same figure is the same file
    "font.family": "DejaVu Sans", "font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.titlesize": 12,
    "axes.titlelocation": "left", "axes.grid": True, "grid.color": GRID, "xtick.color": MUTED, "ytick.color": MUTED,
    "lines.linewidth": 1.8, "lines.markersize": 6, "legend.frameon": False, "legend.fontsize": 10, "figure.dpi": 100,
    "savefig.dpi": 160,
}  # fmt: skip
SIZE = (7.2, 4.4)  # inches: legible at the width of a README

Point = Callable[[Record], tuple[float, float]]
Curve = list[tuple[float, float]]


def draw(results: Results, out: Path) -> list[Path]:
    """Writes every figure that there are records for; returns the paths."""
    timed = [record for record in results.records if record.seconds]
    written = []
    with rc_context(STYLE):
        for op in dict.fromkeys(record.op for record in timed):
            over_v = [r for r in timed if r.op == op and r.case.figure == "V"]
            written += _save(out, f"time_{op}", over_v, _time)
            written += _save(out, f"memory_{op}", [r for r in over_v if r.extra_bytes], _memory)
    return written


def _save(out: Path, name: str, records: list[Record], plot: Callable[[Axes, list[Record]], None]) -> list[Path]:
    if all(record.implementation == BASELINE for record in records):
        return []
    figure = Figure(SIZE, layout="constrained")
    plot(figure.add_subplot(), records)
    paths = [out / f"{name}.{ending}" for ending in ("png", "svg")]
    for path in paths:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _over_items(ax: Axes, records: list[Record], what: str, unit: str, value: Callable[[Record], float]) -> None:
    case = records[0].case
    _plot(ax, _curves(records, lambda r: (r.case.items, value(r))))
    setting = f"B = {case.sessions}, d = {case.width}, {case.threads} threads"
    ax.set(title=f"{records[0].op}: {what}, {setting}", xlabel="catalog items", ylabel=unit)
    _logarithmic(ax)


_time = partial(_over_items, what="time", unit="milliseconds", value=lambda r: 1e3 * (r.seconds or 0.0))
_memory = partial(
    _over_items, what="peak memory beyond the inputs", unit="MiB", value=lambda r: (r.extra_bytes or 0) / 2**20
)


def _curves(records: Sequence[Record], point: Point) -> dict[str, tuple[bool, Curve]]:
    curves: dict[str, tuple[bool, Curve]] = {}
    for record in records:
        curves.setdefault(record.implementation, (record.ours, []))[1].append(point(record))
    return {name: (ours, sorted(curve)) for name, (ours, curve) in curves.items()}


def _plot(ax: Axes, curves: dict[str, tuple[bool, Curve]]) -> None:
    """Ours in blues and in front, the baseline dashed, and each of the others in its own colour and marker."""
    blues = iter(OUR_COLOURS * 2)
    others = iter(zip(COLOURS * 2, MARKERS * 2, strict=True))
    for name, (ours, curve) in curves.items():
        if name == BASELINE:
            style: dict[str, Any] = {"color": MUTED, "linestyle": "--"}
        elif ours:
            style = {"color": next(blues), "marker": "o", "zorder": 3, "linewidth": 2.4}
        else:
            colour, marker = next(others)
            style = {"color": colour, "marker": marker}
        ax.plot(*zip(*curve, strict=True), label=name, **style)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _logarithmic(ax: Axes) -> None:
    ax.set(xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
