"""The figures of a run, as PNG and SVG, all in one style."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from alterrec_fast.benchmarks.contestants import OPS, OURS, Op
from alterrec_fast.benchmarks.records import FLOOR, Record, Results
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# Ours in blue; others in colours that the colour-blind can tell apart, each with a marker of its own.
INK, MUTED, GRID = "#1c2127", "#5a6472", "#dbe0e6"
OUR_COLOURS = ("#1d4f9c", "#5b8fd9", "#8db8ff", "#123263")
COLOURS = ("#d55e00", "#0f9a80", "#b8860b", "#a6408f", "#7a4b2a", "#c0392b", "#4d7c0f", "#6b7684")
MARKERS = "os^Dvp<>"
PHASES = {"bracket": "#b8860b", "stream": "#1d4f9c", "settle": "#0f9a80"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "alterrec-fast",  # the same figure is the same file
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.dpi": 100,
    "savefig.dpi": 160,
}
SIZE = (7.2, 4.4)  # inches: legible at the width of a README

Curve = list[tuple[float, float]]


def draw(results: Results, out: Path) -> list[Path]:
    """Writes every figure that the records suffice for; returns the paths."""
    timed = [record for record in results.records if record.seconds is not None]
    written = []
    with rc_context(STYLE):
        for op in OPS:
            over_v = [r for r in timed if r.op == op.name and r.shape.figure == "V"]
            written += _save(out, f"time_{op.name}", over_v, partial(_time, op=op))
            written += _save(out, f"memory_{op.name}", over_v, partial(_memory, op=op))
        written += _save(out, "ceiling", [r for r in timed if _is_main(r)], _ceiling)
        written += _save(out, "crossover", [r for r in timed if r.shape.figure == "form"], _crossover)
        written += _save(out, "threads", [r for r in timed if r.shape.figure == "threads"], _threads)
        written += _save(out, "phases", [r for r in timed if PHASES.keys() <= r.detail.keys()], _phases)
    return written


def _save(
    out: Path, name: str, records: Sequence[Record], plot: Callable[[Axes, Sequence[Record]], None]
) -> list[Path]:
    if not any(record.contestant != FLOOR for record in records):
        return []
    figure = Figure(SIZE, layout="constrained")
    plot(figure.add_subplot(), records)
    paths = [out / f"{name}.{ending}" for ending in ("png", "svg")]
    for path in paths:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


# --- the figures ---


def _time(ax: Axes, records: Sequence[Record], op: Op) -> None:
    curves = _curves(records, lambda r: (r.shape.items, 1e3 * (r.seconds or 0.0)))
    _plot(ax, curves)
    ax.set(title=f"{op.name}: time, {_setting(records)}", xlabel="catalog items", ylabel="milliseconds")
    _logarithmic(ax)


def _memory(ax: Axes, records: Sequence[Record], op: Op) -> None:
    measured = [record for record in records if record.extra_bytes]
    _plot(ax, _curves(measured, lambda r: (r.shape.items, (r.extra_bytes or 0) / 2**20)))
    ax.set(title=f"{op.name}: peak memory beyond the inputs, {_setting(records)}", xlabel="catalog items", ylabel="MiB")
    _logarithmic(ax)


def _ceiling(ax: Axes, records: Sequence[Record]) -> None:
    """A group of bars for each op: the time of its products alone over the time taken."""
    names = [op.name for op in OPS if any(r.op == op.name for r in records)]
    place, ticks = 0.0, []
    for name in names:
        rivals = sorted(
            (r for r in records if r.op == name and r.contestant != FLOOR and r.share is not None),
            key=lambda r: -(r.share or 0.0),
        )
        ours = next((r for r in rivals if r.ours and r.contestant == OURS), None)
        best = next((r for r in rivals if not r.ours), None)
        begin = place
        for record in (ours, best):
            if record is None or record.share is None:
                continue
            ax.barh(place, 100 * record.share, color=OUR_COLOURS[0] if record.ours else COLOURS[-1], height=0.8)
            ax.annotate(
                f"{100 * record.share:.0f}%  {record.contestant}",
                (100 * record.share, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
            place += 1
        ticks.append((begin + place - 1) / 2)
        place += 0.6
    ax.set_yticks(ticks, names)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlim(0, 1.45 * ax.get_xlim()[1])
    ax.set(title="Share of the matrix product's ceiling", xlabel="%: ours, and the best of the others")


def _crossover(ax: Axes, records: Sequence[Record]) -> None:
    curves = _curves(
        [r for r in records if r.contestant != FLOOR],
        lambda r: (100 * (r.shape.stop - r.shape.start) / r.shape.items, 1e3 * (r.seconds or 0.0)),
    )
    _plot(ax, curves)
    shape = records[0].shape
    ax.set(
        title=f"slice_cross_entropy: mask and gathered form, V = {shape.items:,}, d = {shape.width}",
        xlabel="items in the slice, % of the catalog",
        ylabel="milliseconds",
    )
    _logarithmic(ax)


def _threads(ax: Axes, records: Sequence[Record]) -> None:
    """How many times faster than on one thread."""
    curves: dict[str, tuple[bool, Curve]] = {}
    for (op, contestant), own in _grouped(records, lambda r: (r.op, r.contestant)).items():
        one = next((r.seconds for r in own if r.shape.threads == 1), None)
        if one is not None:
            name = FLOOR if contestant == FLOOR else f"{op}: {contestant}"
            curve = sorted((float(r.shape.threads), one / (r.seconds or one)) for r in own)
            curves.setdefault(name, (own[0].ours, curve))
    _plot(ax, curves)
    most = max(record.shape.threads for record in records)
    ax.plot([1, most], [1, most], color=MUTED, linestyle=":", linewidth=1, zorder=0)
    ax.set_xticks(sorted({record.shape.threads for record in records}))
    ax.set(title="Threads: times faster than one", xlabel="threads", ylabel="speed-up")


def _phases(ax: Axes, records: Sequence[Record]) -> None:
    """Stacked bars: where rank_slice's time goes, in % of the three phases together."""
    shapes = sorted({record.shape for record in records}, key=lambda s: (s.items, s.width, s.precision, s.threads))
    split = [record for record in records if sum(record.detail[name] for name in PHASES) > 0]
    drawn = [record for shape in shapes for record in _first(r for r in split if r.shape == shape)]
    begins = [0.0] * len(drawn)
    for name, colour in PHASES.items():
        shares = [100 * r.detail[name] / sum(r.detail[phase] for phase in PHASES) for r in drawn]
        ax.barh(range(len(drawn)), shares, left=begins, color=colour, label=name, height=0.7)
        begins = [begin + share for begin, share in zip(begins, shares, strict=True)]
    labels = [r.shape.label + ("" if r.contestant == OURS else f": {r.contestant}") for r in drawn]
    ax.set_yticks(range(len(drawn)), labels, fontsize=9)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(title="rank_slice: time split over its phases", xlabel="%", xlim=(0, 100))
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))


# --- parts ---


def _first(records: Iterable[Record]) -> list[Record]:
    """Ours as it is; where that failed, what else there is."""
    return sorted(records, key=lambda record: record.contestant != OURS)[:1]


def _is_main(record: Record) -> bool:
    """Of each op's first shape, the paper's."""
    return record.shape.figure == "" and any(
        op.name == record.op and _alike((op.quick or op.full)[0], record.shape) for op in OPS
    )


def _alike(wanted: Any, shape: Any) -> bool:
    return all(getattr(wanted, name) == getattr(shape, name) for name in ("items", "width", "precision", "shared"))


def _grouped(records: Sequence[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _curves(records: Sequence[Record], point: Callable[[Record], tuple[float, float]]) -> dict[str, tuple[bool, Curve]]:
    groups = _grouped(records, lambda r: r.contestant)
    return {name: (own[0].ours, sorted(point(r) for r in own)) for name, own in groups.items()}


def _plot(ax: Axes, curves: dict[str, tuple[bool, Curve]]) -> None:
    """Ours in blues and in front, the floor dashed, and each of the others in its own colour and marker."""
    ours = iter(OUR_COLOURS * 2)
    others = iter(zip(COLOURS * 2, MARKERS * 2, strict=True))
    for name, (own, curve) in curves.items():
        if name == FLOOR:
            style: dict[str, Any] = {"color": MUTED, "linestyle": "--"}
        elif own:
            style = {"color": next(ours), "marker": "o", "zorder": 3, "linewidth": 2.4}
        else:
            colour, marker = next(others)
            style = {"color": colour, "marker": marker}
        ax.plot(*zip(*curve, strict=True), label=name, **style)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _logarithmic(ax: Axes) -> None:
    ax.set(xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))


def _setting(records: Sequence[Record]) -> str:
    shape = records[0].shape
    return f"B = {shape.sessions}, d = {shape.width}, {shape.threads} threads"
