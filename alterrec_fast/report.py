"""The report of a run: one HTML file with its figures, tables and settings, which needs nothing but itself."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.resources import files
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alterrec_fast.files import printable, write_text
from alterrec_fast.report_data import Results, Seed, Series, as_json, read_results
from alterrec_fast.systems import SYSTEMS
from alterrec_fast.training.config import METRICS, Config
from alterrec_fast.training.evaluate import VIEWS

FIGURE_METRICS = ("hits@20", "ndcg@20")
VIEW_NAMES = {"fused": "Fused", "id": "ID", "text": "Text"}
METRIC_NAMES = {"hits": "Hits", "ndcg": "NDCG", "mrr": "MRR"}
DASH = "\N{EN DASH}"
MARKERS = {"fused": "o", "id": "s", "text": "^"}  # shape as well as colour tells the views apart

# Colours by their role. Figures are drawn in the light ones, which then give way to CSS variables of the same names.
LIGHT = {
    "fused": "#1d4f9c",
    "id": "#d55e00",
    "text": "#0f9a80",
    "ink": "#1c2127",
    "muted": "#5a6472",
    "grid": "#dbe0e6",
    "bar": "#9aa5b3",
    "paper": "#ffffff",
    "panel": "#f5f7f9",
}
DARK = {
    "fused": "#8db8ff",
    "id": "#ff9a57",
    "text": "#3fcfb0",
    "ink": "#e8ebef",
    "muted": "#a3adba",
    "grid": "#343b45",
    "bar": "#6b7684",
    "paper": "#12151a",
    "panel": "#1b2027",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # comes with matplotlib; the page shows its own, narrower font
    "font.size": 11,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LIGHT["grid"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
}
WIDTH = 330 / 72  # inches; as many points as a phone has pixels, so that text keeps its size there


def write_report(run: Path) -> Path:
    """Writes `run/report.html` from the run's config.toml, history.jsonl and metrics.json, and returns its path.

    Where metrics.json names several seeds, the first two are read from `run/seed-N` for each, and the report shows
    means with standard deviations. The same files always make the same report.
    """
    results = read_results(run)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "duration": _duration, "size": _size}
    template = files("alterrec_fast").joinpath("report.html.j2").read_text(encoding="utf-8")
    changed, rest = _settings(results, run)
    page = environment.from_string(template).render(
        results=results,
        metrics=results.metrics,
        headline=results.metrics["test"][results.views[0]],
        deviation=results.metrics.get("test_std"),
        about=SYSTEMS[results.variant].about,
        view_names=VIEW_NAMES,
        metric_names={metric: _metric_name(metric) for metric in METRICS},
        facts=_facts(results),
        checks=_checks(results),
        phases=_phases(results.seeds[0]),
        charts=_charts(results),
        changed=changed,
        rest=rest,
        light=LIGHT,
        dark=DARK,
    )
    path = run / "report.html"
    write_text(path, page)
    return path


# Words and numbers


def _facts(results: Results) -> list[tuple[str, str]]:
    """What the run was, as pairs of a name and a value."""
    config, seeds = results.seeds[0].config, results.seeds
    trained = [line for seed in seeds for line in seed.epochs]
    timed = [line for line in trained if line["seconds"] is not None]
    busy = sum(line["seconds"] for line in timed)
    targets = sum(line["seconds"] * line["targets_per_second"] for line in timed)
    memory = max((line["peak_memory"] or 0 for seed in seeds for line in seed.history), default=0)
    data = "generated shop" if config["demo"] else "/".join(Path(config["data"]).parts[-2:])
    hard = {line["negatives"].split(" of ")[0] for line in trained if _is_hard(line)}
    facts = [
        ("Data", printable(data)),
        ("Catalog", f"{results.items:,} items"),
        ("Preset", printable(config["preset"] or "")),
        ("Seeds" if len(seeds) > 1 else "Seed", _listed(seed.metrics["seed"] for seed in seeds)),
        ("Hard negatives", _listed(sorted(hard))),
        ("Best epoch", ", ".join(f"{seed.metrics['best_epoch']} of {len(seed.epochs)}" for seed in seeds)),
        ("Time", _duration(sum(seed.seconds for seed in seeds))),
        ("Speed", f"{targets / busy:,.0f} targets a second" if busy else ""),
        ("Peak memory", _size(memory) if memory else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _checks(results: Results) -> list[str]:
    """Sentences on networks that are under-trained, and on those that beat the fused score."""
    lines = [
        f"{VIEW_NAMES[view]} network, seed {seed.metrics['seed']}: under-trained. Its loss fell by "
        f"{_percent(fall, 1)} % in epoch {line['epoch']}, its last before the learning rate was gone."
        for seed in results.seeds
        for view, (line, fall) in seed.under_trained().items()
    ]
    for view, metrics in results.above_fused().items():
        test = results.metrics["test"]
        pairs = [f"{_metric_name(m)} {_percent(test[view][m])} against {_percent(test['fused'][m])} %" for m in metrics]
        lines.append(f"{VIEW_NAMES[view]} alone is above the fused score on the test set: {_listed(pairs)}.")
    return lines


def _settings(results: Results, run: Path) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Settings that differ from the default, as (name, value, default), and the others, as (name, value)."""
    default, values = as_json(Config(variant=results.variant)), dict(results.seeds[0].config)
    if len(results.seeds) > 1:
        values |= {"seed": [seed.config["seed"] for seed in results.seeds], "out": str(run)}
    changed = [(name, _shown(value), _shown(default[name])) for name, value in values.items() if value != default[name]]
    return changed, [(name, _shown(value)) for name, value in values.items() if value == default[name]]


def _shown(value: Any) -> str:
    if value is None or value == "":
        return DASH
    if isinstance(value, list):
        return _listed(value)
    return str(value).lower() if isinstance(value, bool) else printable(str(value))


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values)


def _percent(fraction: float, digits: int = 2) -> str:
    return f"{100 * fraction:.{digits}f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _size(count: int | None) -> str:
    if count is None:
        return DASH
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _metric_name(metric: str) -> str:
    name, at, depth = metric.partition("@")
    return METRIC_NAMES.get(name, name) + at + depth


def _is_hard(line: dict[str, Any]) -> bool:
    return bool(line["negatives"].startswith("ranks"))


# Figures


def _charts(results: Results) -> dict[str, Any]:
    return {
        "headline": {metric: _headline_chart(results, metric) for metric in FIGURE_METRICS},
        "validation": {metric: _validation_chart(results, metric) for metric in FIGURE_METRICS},
        "loss": _loss_chart(results),
        "share": _share_chart(results),
        "groups": {metric: _group_chart(results, metric) for metric in FIGURE_METRICS},
        "sweep": {metric: _sweep_chart(results, metric) for metric in FIGURE_METRICS} if results.sweep else {},
    }


def _headline_chart(results: Results, metric: str) -> Markup:
    """A bar for each view, with its value."""
    test, deviation, views = results.metrics["test"], results.metrics.get("test_std"), results.views
    values = [100 * test[view][metric] for view in views]
    spreads = [f" ± {100 * deviation[view][metric]:.2f}" if deviation else "" for view in views]
    labels = [f"{value:.2f}{spread}" for value, spread in zip(values, spreads, strict=True)]

    def draw(axes: Axes) -> None:
        axes.barh(range(len(views)), values, height=0.66, color=[LIGHT[view] for view in views])
        for row, (value, label) in enumerate(zip(values, labels, strict=True)):
            axes.annotate(
                label, (value, row), (5, 0), textcoords="offset points", va="center", fontsize=12, weight="bold"
            )
        axes.set_yticks(range(len(views)), [VIEW_NAMES[view] for view in views], fontsize=11, color=LIGHT["ink"])
        axes.set_ylim(len(views) - 0.5, -0.5)
        axes.set_xlim(0, (1.5 if deviation else 1.25) * max(*values, 1e-3))
        axes.spines["bottom"].set_visible(False)
        axes.xaxis.set_visible(False)

    said = _listed(f"{VIEW_NAMES[view]} {label}" for view, label in zip(views, labels, strict=True))
    return _svg(f"headline-{metric}", f"Test {_metric_name(metric)} in percent: {said}", 32 * len(views) / 72, draw)


def _validation_chart(results: Results, metric: str) -> Markup:
    """The metric by epoch for each view, over the phases of the training, with each seed's best epoch."""
    views = results.views

    def draw(axes: Axes) -> None:
        _shade_phases(axes, results)
        for view in reversed(views):  # the fused score on top
            _draw_lines(axes, results.lines(partial(_validation, view, metric)), view)
        for seed, series in zip(results.seeds, results.lines(partial(_validation, views[0], metric)), strict=True):
            best = seed.metrics["best_epoch"]
            axes.plot(best, series[best], "o", color=LIGHT["ink"], markersize=10, markerfacecolor="none", clip_on=False)
        _finish_epochs(axes, results)
        axes.set_ylim(bottom=0)

    shown = " and ".join(VIEW_NAMES[view] for view in views)
    return _svg(f"validation-{metric}", f"Validation {_metric_name(metric)} in percent by epoch: {shown}", 3.0, draw)


def _loss_chart(results: Results) -> Markup:
    """Training loss by epoch: of each student, and of the parts of a naive fusion where they are known."""
    longest = results.longest
    students = sorted({line["student"] for line in longest.epochs}, key=VIEWS.index)
    fused_of = [view for view in ("id", "text") if any(f"loss_{view}" in line for line in longest.epochs)]

    def draw(axes: Axes) -> None:
        _shade_phases(axes, results)
        for view in fused_of:
            _draw_lines(axes, results.lines(partial(_part_loss, view)), view)
        for view in students:
            losses = results.lines(partial(_student_loss, view))
            soft = {line["epoch"] for line in longest.epochs if not _is_hard(line)}
            _draw_lines(axes, losses, view, hollow=soft)
        _finish_epochs(axes, results)

    shown = " and ".join(VIEW_NAMES[view] for view in students + fused_of)
    return _svg("loss", f"Training loss by epoch: {shown}", 3.0, draw)


def _share_chart(results: Results) -> Markup:
    """The share of the test targets in each long-tail group."""
    groups = results.metrics["groups"]
    shares = [100 * group["share"] for group in groups.values()]

    def draw(axes: Axes) -> None:
        axes.bar(range(len(groups)), shares, width=0.62, color=LIGHT["bar"])
        for place, share in enumerate(shares):
            axes.annotate(f"{share:.1f}", (place, share), (0, 3), textcoords="offset points", ha="center", va="bottom")
        _finish_groups(axes, list(groups))

    said = _listed(f"{name}: {share:.1f}" for name, share in zip(groups, shares, strict=True))
    return _svg("share", f"Share of test targets in percent by their count in training: {said}", 2.8, draw)


def _group_chart(results: Results, metric: str) -> Markup:
    """The metric of each view in each long-tail group."""
    groups, deviations, views = results.metrics["groups"], results.metrics.get("groups_std"), results.views
    width = 0.8 / len(views)

    def draw(axes: Axes) -> None:
        for nth, view in enumerate(views):
            shown = [(place, name) for place, name in enumerate(groups) if groups[name][view] is not None]
            places = [place + width * (nth - (len(views) - 1) / 2) for place, _ in shown]
            heights = [100 * groups[name][view][metric] for _, name in shown]
            axes.bar(places, heights, width=0.9 * width, color=LIGHT[view])
            if deviations:
                errors = [100 * deviations[name][view][metric] for _, name in shown]
                axes.errorbar(places, heights, yerr=errors, fmt="none", ecolor=LIGHT["ink"], elinewidth=1)
        _finish_groups(axes, list(groups))

    label = f"Test {_metric_name(metric)} in percent by the target's count in training"
    return _svg(f"groups-{metric}", label, 2.8, draw)


def _sweep_chart(results: Results, metric: str) -> Markup:
    """The fused score's metric over alpha on both splits, with the run's alpha."""
    own = results.seeds[0].config["alpha"]
    lines = {split: [100 * scores[metric] for scores in by.values()] for split, by in results.sweep.items()}
    alphas = [float(alpha) for alpha in results.sweep["test"]]

    def draw(axes: Axes) -> None:
        axes.axvline(own, color=LIGHT["ink"], linewidth=1.1, linestyle=(0, (1, 2)))
        axes.plot(alphas, lines["validation"], color=LIGHT["muted"], marker="s", markersize=4.5)
        axes.plot(alphas, lines["test"], color=LIGHT["fused"], marker=MARKERS["fused"], markersize=4.5)
        axes.grid(True, axis="y")
        axes.set_xlabel("alpha, the weight of the ID scores")
        axes.margins(y=0.12)

    return _svg(f"sweep-{metric}", f"{_metric_name(metric)} of the fused score in percent by alpha", 2.8, draw)


def _validation(view: str, metric: str, line: dict[str, Any]) -> float | None:
    scores = line["validation"][view]
    return 100 * scores[metric] if scores else None


def _part_loss(view: str, line: dict[str, Any]) -> float | None:
    return line.get(f"loss_{view}")


def _student_loss(student: str, line: dict[str, Any]) -> float | None:
    return line["loss"] if line.get("student") == student else None


def _draw_lines(axes: Axes, lines: Sequence[Series], view: str, hollow: Iterable[int] = ()) -> None:
    """Each seed as a thin line, and their mean over the epochs that all have; markers of epochs in `hollow` empty."""
    colour = LIGHT[view]
    if len(lines) > 1:
        for line in lines:
            axes.plot(list(line), list(line.values()), color=colour, linewidth=0.7, alpha=0.55)
    mean = {epoch: statistics.fmean(line[epoch] for line in lines) for epoch in _common(lines)}
    axes.plot(list(mean), list(mean.values()), color=colour)
    empty = set(hollow)
    for face, chosen in ((colour, mean.keys() - empty), (LIGHT["paper"], mean.keys() & empty)):
        epochs = sorted(chosen)
        axes.plot(
            epochs,
            [mean[epoch] for epoch in epochs],
            linestyle="none",
            marker=MARKERS[view],
            markersize=4.5,
            color=colour,
            markerfacecolor=face,
        )


def _common(lines: Sequence[Series]) -> list[int]:
    """The epochs that all lines have."""
    return sorted(set.intersection(*(set(line) for line in lines)))


def _phases(seed: Seed) -> list[dict[str, Any]]:
    """Runs of epochs with one student and one kind of negatives."""
    phases = []
    grouped_epochs = groupby(seed.epochs, lambda line: (line["student"], _is_hard(line)))
    for (student, hard), grouped in grouped_epochs:
        lines = list(grouped)
        kind = "Hard" if hard else "Uniform" if lines[0]["negatives"] == "uniform" else "All items as"
        places = {"first": lines[0]["epoch"], "last": lines[-1]["epoch"]}
        phases.append({"student": student, "hard": hard, "negatives": kind, **places})
    return phases


def _shade_phases(axes: Axes, results: Results) -> None:
    """Where students take turns, a tint in the student's colour; a dotted line where hard negatives begin."""
    phases = _phases(results.longest)
    if len({phase["student"] for phase in phases}) > 1:
        for phase in phases:
            begin, end, colour = phase["first"] - 1, phase["last"], LIGHT[phase["student"]]
            axes.axvspan(begin, end, facecolor=colour, edgecolor="none", alpha=0.08)
            axes.axvspan(begin, end, ymin=0.975, facecolor=colour, edgecolor="none", alpha=0.75)
    for before, after in pairwise(phases):
        if after["hard"] and not before["hard"]:
            axes.axvline(before["last"], color=LIGHT["ink"], linewidth=1.1, linestyle=(0, (1, 2)))


def _finish_epochs(axes: Axes, results: Results) -> None:
    """The epoch axis, with a tip above the figure at the best epoch of each seed."""
    best = [seed.metrics["best_epoch"] for seed in results.seeds]
    above: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    axes.plot(best, [1.035] * len(best), "v", color=LIGHT["ink"], markersize=5, **above)
    axes.grid(True, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel("epoch")
    last = len(results.longest.epochs)
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.margins(y=0.12)


def _finish_groups(axes: Axes, names: list[str]) -> None:
    axes.grid(True, axis="y")
    axes.set_xticks(range(len(names)), [name.replace("-", DASH) for name in names], color=LIGHT["ink"])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("times that the target occurs in training")
    axes.margins(y=0.12)


def _svg(name: str, label: str, height: float, draw: Callable[[Axes], None]) -> Markup:
    """What `draw` draws, as an SVG element for the middle of a page: colours are CSS variables, ids are its own."""
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), facecolor="none", layout="constrained")
        axes = figure.add_subplot(facecolor="none")
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    view_box = re.search(r'viewBox="([^"]*)"', text)
    body = re.search(r"<svg.*?>(.*)</svg>", text, re.DOTALL)
    assert view_box and body, "matplotlib wrote no SVG"
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body[1], flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # numbered alike in every figure, and nothing refers to them
    drawing = drawing.replace("xlink:href", "href")
    roles = {colour: role for role, colour in LIGHT.items()}
    drawing = re.sub(r": (#[0-9a-f]{6})", lambda colour: f": var(--{roles[colour[1]]})", drawing)
    opening = Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(view_box[1], label)
    return opening + Markup(drawing) + Markup("</svg>")
