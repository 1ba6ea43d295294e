"""The command line: prepare, train, runs, recommend, export, evaluate, bench, doctor."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from alterrec_fast.doctor import diagnose
from alterrec_fast.errors import AlterRecError, ConfigError, RunError
from alterrec_fast.extras import needs_train
from alterrec_fast.files import check_folder, printable
from alterrec_fast.ops import BackendError
from alterrec_fast.training.config import METRICS, VARIANTS, demo_settings, from_mapping, read_toml
from alterrec_fast.training.evaluate import VIEWS

app = typer.Typer(
    help="Train AlterRec on catalogs of any size: exact hard negatives from the whole catalog.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# OSError: no room, no right, no such place; what the package's own code knows more about is one of its own errors.
KNOWN_ERRORS = (AlterRecError, BackendError, OSError)

Source = Literal["generic", "amazon-m2", "online-retail", "recbole"]
Catalog = Literal["sessions", "all"]
SessionPer = Literal["day", "user"]
SplitBy = Literal["latest", "leave-one-out"]
Split = Literal["train", "validation", "test"]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"alterrec-fast {version('alterrec-fast')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a title that the terminal's encoding lacks is no reason to fail
            stream.reconfigure(errors="backslashreplace")


PUBLISHED = (  # one line for each, tried by tests/data/test_published.py
    "yoochoose-clicks.dat OUT --no-header --columns session_id=1,timestamp=2,item_id=3",
    "train-item-views.csv OUT --separator ';' "
    "--columns session_id=sessionId,item_id=itemId,timestamp=eventdate,order=timeframe",
    "events.csv OUT --columns item_id=itemid --user-column visitorid --session-gap 30min",
    "otto-recsys-train.jsonl OUT --columns session_id=session,item_id=events.aid,timestamp=events.ts",
    "ratings.csv OUT --columns item_id=movieId --user-column userId --session-per user --items movies.csv",
    "All_Beauty.jsonl.gz OUT --columns item_id=parent_asin --user-column user_id --session-per user "
    "--items meta_All_Beauty.jsonl.gz --text-columns title",
)
_EPILOG = "\n\n".join(
    f"{name}: alterrec-fast prepare generic {line}"
    for name, line in zip(
        ("YooChoose", "Diginetica", "RetailRocket", "OTTO", "MovieLens", "Amazon Reviews 2023"), PUBLISHED, strict=True
    )
)


@app.command(epilog=_EPILOG)
def prepare(
    source: Annotated[Source, typer.Argument(help="layout of the raw files")],
    raw: Annotated[Path, typer.Argument(help="folder, file or quoted pattern: .csv, .csv.gz, .parquet, .jsonl")],
    out: Annotated[Path, typer.Argument(help="folder to make")],
    text_columns: Annotated[
        str | None,
        typer.Option(help="item text columns, separated by commas; default: the source's own, see docs/data.md"),
    ] = None,
    locale: Annotated[str | None, typer.Option(help="amazon-m2: UK, DE, JP, ES, FR or IT")] = None,
    test: Annotated[Path | None, typer.Option(help="amazon-m2: labelled test file")] = None,
    validation_fraction: Annotated[float, typer.Option(help="share of the sessions before the test ones")] = 0.1,
    test_fraction: Annotated[float, typer.Option(help="share of the latest sessions")] = 0.2,
    columns: Annotated[
        str | None,
        typer.Option(
            help="generic: session_id=A,item_id=B,timestamp=C,order=D,split=E, the files' names of these; "
            "items.item_id=F: that of the item table's ids"
        ),
    ] = None,
    items: Annotated[Path | None, typer.Option(help="generic: the item table, by default items.* beside RAW")] = None,
    separator: Annotated[str, typer.Option(help="generic: between the fields of text tables")] = ",",
    no_header: Annotated[bool, typer.Option("--no-header", help="generic: columns are named 1, 2, 3")] = False,
    encoding: Annotated[str, typer.Option(help="generic: of text tables")] = "utf-8",
    time_format: Annotated[str | None, typer.Option(help="generic: as in strftime, %d/%m/%Y %H:%M")] = None,
    user_column: Annotated[str | None, typer.Option(help="generic: make sessions of users")] = None,
    session_gap: Annotated[str | None, typer.Option(help="30min: a longer gap ends a user's session")] = None,
    session_per: Annotated[SessionPer | None, typer.Option(help="one session a day, or a user")] = None,
    split: Annotated[SplitBy, typer.Option(help="latest sessions, or each session's last items")] = "latest",
    test_days: Annotated[float | None, typer.Option(help="test sessions are those of the last days")] = None,
    validation_days: Annotated[float | None, typer.Option(help="with --test-days: the days before")] = None,
    last_sessions: Annotated[
        float | None, typer.Option(help="keep the latest so many sessions, or share if below 1")
    ] = None,
    min_item_count: Annotated[int, typer.Option(help="leave out items that occur less often")] = 1,
    min_session_length: Annotated[int, typer.Option(help="leave out shorter sessions")] = 2,
    k_core: Annotated[int | None, typer.Option(help="each item and session has so many interactions")] = None,
    filter_train_only: Annotated[
        bool, typer.Option("--filter-train-only", help="count and leave out in training sessions alone")
    ] = False,
    keep_repeats: Annotated[bool, typer.Option("--keep-repeats", help="keep rows equal in all columns")] = False,
    memory_limit: Annotated[str | None, typer.Option(help="such as 4GB; default: half of what is free")] = None,
    catalog: Annotated[Catalog, typer.Option(help="items of some session, or all of the item table")] = "sessions",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
) -> None:
    """Turn raw files into a data set on disk; prints what was read, kept and left out."""
    texts = None if text_columns is None else [name.strip() for name in text_columns.split(",")]
    with _errors():
        from alterrec_fast.data.filters import Filters
        from alterrec_fast.data.interactions import parse_duration
        from alterrec_fast.data.prepare import prepare as prepare_data
        from alterrec_fast.data.scratch import parse_size

        summary = prepare_data(
            source,
            raw,
            out,
            text_columns=texts,
            locale=locale,
            test=test,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            catalog=catalog,
            overwrite=overwrite,
            columns=_pairs(columns),
            items=items,
            separator=_unescaped(separator),
            has_header=not no_header,
            encoding=encoding,
            time_format=time_format,
            user_column=user_column,
            session_gap=None if session_gap is None else parse_duration(session_gap),
            session_per=session_per,
            keep_repeats=keep_repeats,
            filters=Filters(last_sessions, min_item_count, min_session_length, k_core, filter_train_only),
            leave_one_out=split == "leave-one-out",
            test_days=test_days,
            validation_days=validation_days,
            memory_limit=None if memory_limit is None else parse_size(memory_limit),
            progress=True,
        )
    for line in str(summary).splitlines():
        typer.echo(printable(line))


@app.command()
def train(
    data: Annotated[Path | None, typer.Option(help="folder made by prepare")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="train on a generated shop; needs no data")] = False,
    variant: Annotated[str | None, typer.Option(help=f"default: alterrec; any of {', '.join(VARIANTS)}")] = None,
    out: Annotated[Path | None, typer.Option(help="run directory; with --demo runs/demo")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="published or paper: trained as the paper's code or its text does; --set overrides"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="default: 0")] = None,
    seeds: Annotated[str | None, typer.Option(help="several seeds, separated by commas")] = None,
    text_model: Annotated[str | None, typer.Option(help="hub name, path, or 'packaged'")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: cuda where there is one")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE for any other setting")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in --out; its settings need not be repeated")
    ] = False,
) -> None:
    """Train one system; leaves a run directory with checkpoints, metrics.json and report.html."""
    with _errors("stopped; the same command with --resume goes on from the last checkpoint"):
        from alterrec_fast.run import DEMO_RUN, run_settings, seed_runs, train_seeds
        from alterrec_fast.run import train as train_one

        if seed is not None and seeds is not None:
            raise ConfigError("--seed and --seeds exclude each other")
        values: dict[str, Any] = {}
        place = out or (Path(DEMO_RUN) if demo else None)
        if resume and place is None:
            raise ConfigError("--resume needs --out, the run directory to go on with")
        if resume and place:
            if seeds is None and seed_runs(place) != [place]:
                raise ConfigError(f"{place} holds a run over several seeds: name all of them, as in --seeds 0,1,2")
            values = run_settings(place)
        if demo:
            values.pop("data", None)  # seeds of a demo train on the shop beside them
        values |= read_toml(config) if config else {}
        for setting in settings or []:
            name, equals, value = (part.strip() for part in setting.partition("="))
            if not equals:
                raise ConfigError(f"--set takes NAME=VALUE, got {setting!r}")
            values[name] = value.split(",") if name == "group_edges" else value
        given = {
            "data": None if data is None else str(data),
            "demo": demo or None,
            "variant": variant,
            "out": None if out is None else str(out),
            "seed": seed,
            "preset": preset,
            "text_model": text_model,
            "device": device,
        }
        values |= {name: value for name, value in given.items() if value is not None}
        if demo:
            values = demo_settings(values.get("variant", "alterrec"), values.get("preset")) | values
        made = from_mapping(values, "settings")
        progress = _Progress(made.m_max)
        if seeds is None:
            result = train_one(made, resume, progress)
        else:
            result = train_seeds(made, _seed_list(seeds), resume, progress)
    best = result.metrics["best_epoch"]
    epoch = f"epoch {best:g}" if seeds is None else f"epochs {best:.1f} on average"
    typer.echo(f"\ntest, after {epoch}, the best by validation")
    typer.echo(_table(result.metrics["test"], result.metrics.get("test_std")))
    typer.echo(f"\nreport: {result.path / 'report.html'}\nmetrics: {result.path / 'metrics.json'}")


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="folder that holds run directories, at any depth")]) -> None:
    """List the runs below a folder: how far each is, and its metrics in percent."""
    with _errors():
        from alterrec_fast.runs import table

        lines = table(folder).splitlines()
    for line in lines:
        typer.echo(printable(line))


@app.command()
def recommend(
    run: Annotated[Path, typer.Argument(help="run directory")],
    session: Annotated[
        str | None, typer.Option(help="item ids, oldest first, separated by spaces; quote ids that hold one")
    ] = None,
    sessions: Annotated[
        Path | None, typer.Option(help="many sessions, .parquet or .csv: rows of session_id, item_id, oldest first")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="with --sessions: file to write, .parquet or .csv")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="how many items")] = 10,
    repeats: Annotated[bool, typer.Option("--repeats", help="also items of the session itself")] = False,
    allow: Annotated[Path | None, typer.Option(help="file of item ids, one a line: recommend only these")] = None,
    exclude: Annotated[Path | None, typer.Option(help="file of item ids, one a line: recommend none of these")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="an unknown item is an error; else it is skipped")] = False,
) -> None:
    """Print the best next items after a session: ids, scores and titles; or write those after many to a file."""
    with _errors():
        from alterrec_fast.recommend import check_target, read_ids, write_table
        from alterrec_fast.trained import load

        if (session is None) == (sessions is None) or (sessions is None) != (out is None):
            raise RunError("expected --session IDS for one session, or --sessions FILE and --out FILE for many")
        try:
            ids = shlex.split(session or "")
        except ValueError as error:
            raise RunError(f"--session: a quote or backslash ends nothing in {session!r}") from error
        if out is not None:
            check_target(out)
        if sessions is not None and out is not None and sessions.resolve() == out.resolve():
            raise RunError(f"--out {out} is the file of --sessions, which writing would replace; name another")
        model, allowed, excluded = load(run), allow and read_ids(allow), exclude and read_ids(exclude)
        options: dict[str, Any] = {"repeats": repeats, "allow": allowed, "exclude": excluded, "strict": strict}
        try:
            if sessions is not None and out is not None:
                count = write_table(model.recommend_pieces(sessions, n, **options), out)
                typer.echo(f"{count} rows of session_id, rank, item_id, score: {out}")
                return
            best = model.recommend(ids, n, **options)
        except AlterRecError:
            raise
        except ValueError as error:
            raise RunError(str(error)) from error
    rows = [(printable(one.item), one.score, printable(one.title or "")) for one in best]
    width = max((len(item) for item, _, _ in rows), default=0)
    for item, score, title in rows:
        typer.echo(f"{item:<{width}}  {score:9.4f}  {title}".rstrip())
    if not rows:
        typer.echo("nothing to recommend: every item of the catalog is in the session; see --repeats", err=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="run directory")],
    to: Annotated[Path, typer.Option(help="folder to make")],
    onnx: Annotated[
        bool, typer.Option("--onnx", help="also the session encoder as ONNX; needs the extra onnx")
    ] = False,
) -> None:
    """Write item vectors with their ids, and the session encoder, for a search engine of your own."""
    with _errors():
        from alterrec_fast.export import export as export_run
        from alterrec_fast.trained import load

        export_run(load(run), to, onnx)
    typer.echo("\n".join(f"{file.stat().st_size:>14,} bytes  {file}" for file in sorted(to.iterdir())))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="run directory")],
    split: Annotated[Split, typer.Option(help="which sessions")] = "test",
    alpha: Annotated[
        float | None, typer.Option(help="weight of the ID scores in the fused score, 0 to 1; default: the run's")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON with the long-tail groups")] = False,
) -> None:
    """Measure the best epoch of a run on one split; of a run over several seeds mean and standard deviation."""
    with _errors():
        from alterrec_fast.run import seed_runs
        from alterrec_fast.runs import status
        from alterrec_fast.trained import evaluate_run

        results = evaluate_run(run, split, alpha=alpha)
        for part in seed_runs(run):
            if not (stands := status(part)).finished:
                typer.echo(f"{part} is {stands}: the figures are those of its best epoch so far", err=True)
    typer.echo(json.dumps(results, indent=2) if as_json else _table(results[split], results.get(f"{split}_std")))


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="folder for results.json, table.md and the figures")],
    quick: Annotated[bool, typer.Option("--quick", help="under 5 minutes instead of 40, on 2 cores")] = False,
    op: Annotated[list[str] | None, typer.Option(help="this op alone; may be given several times")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="say what got slower than the stored baseline")] = False,
    threads: Annotated[int, typer.Option(min=0, help="default: one for each core")] = 0,
) -> None:
    """Measure the ops against the alternatives on this machine; each result is checked before it is timed."""
    with _errors():
        from alterrec_fast.benchmarks.harness import bench as benchmarks

        command = shlex.join(["alterrec-fast", *sys.argv[1:]])
        check_folder(out)
        options = benchmarks.Options(out, quick, tuple(op or ()), threads, command)
        try:
            results = benchmarks.run(options, typer.echo)
        except benchmarks.BenchError as error:
            raise RunError(str(error)) from error
    if compare:
        typer.echo("\n" + benchmarks.compare(results))
    typer.echo(f"\ntable: {out / 'table.md'}\nresults: {out / 'results.json'}")


@app.command()
def doctor() -> None:
    """Say which engines this machine has, and why others are off."""
    typer.echo(diagnose())


@contextlib.contextmanager
def _errors(interrupted: str = "stopped") -> Iterator[None]:
    """Turns what a user can mend into one line on standard error and exit status 1; `interrupted` is the line after
    Ctrl-C, which has the shell's status for it.
    """
    try:
        with needs_train("this command"):
            yield
    except KeyboardInterrupt as error:
        typer.echo(f"\n{interrupted}", err=True)
        raise typer.Exit(130) from error
    except BrokenPipeError:
        raise
    except KNOWN_ERRORS as error:
        typer.secho(f"error: {printable(str(error))}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error


def _pairs(text: str | None) -> dict[str, str]:
    """NAME=VALUE,NAME=VALUE as a dict."""
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    wrong = [name for name, equals, value in pairs if not (name and equals and value)]
    if wrong:
        raise ConfigError(f"--columns takes NAME=COLUMN separated by commas, got {text!r}")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _unescaped(text: str) -> str:
    r"""With the characters that \t and \x01 stand for; as it is where a backslash starts none of Python's escapes."""
    try:
        return text.encode("ascii").decode("unicode_escape") if "\\" in text else text
    except UnicodeError:
        return text


def _seed_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds takes numbers separated by commas, got {text!r}") from None


class _Progress:
    """Prints a line for each epoch; called with each new line of the history."""

    def __init__(self, epochs: int):
        """epochs: as planned, fewer where training stops early."""
        self.epochs, self.seconds = epochs, list[float]()

    def __call__(self, line: dict[str, Any]) -> None:
        scores = "  ".join(
            f"{view} {100 * metrics['hits@20']:5.2f} / {100 * metrics['ndcg@20']:5.2f}"
            for view in VIEWS
            if (metrics := line["validation"][view]) is not None
        )
        digits = len(str(self.epochs))
        number = f"epoch {line['epoch']:{digits}d} of {self.epochs}"
        if line["epoch"] == 0:
            self.seconds.clear()
            typer.echo(f"validation Hits@20 / NDCG@20 in %\n{number}  {'untrained':58s}{scores}")
            return
        self.seconds.append(line["seconds"] + line["validation_seconds"])
        left = sum(self.seconds) / len(self.seconds) * (self.epochs - line["epoch"])
        typer.echo(
            f"{number}  {line['student']:5s} lr {line['learning_rate']:7.1e}  loss {line['loss']:8.4f}  "
            f"{line['seconds']:6.1f} s {line['targets_per_second']:8.0f} targets/s  {scores}"
            + (f"  {_duration(left)} left" if left else "")
        )


def _duration(seconds: float) -> str:
    """Rounded up, in the unit that a person would use."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{math.ceil(seconds / size)} {unit}"
    return f"{math.ceil(seconds)} s"


def _table(test: dict[str, Any], deviation: dict[str, Any] | None = None) -> str:
    """Metrics in percent, a row for each part that the model has; mean and standard deviation over several seeds."""
    rows = [f"{'in %':8s}" + "".join(f"{name:>15s}" for name in METRICS)]
    for view in VIEWS:
        if test[view] is None:
            continue
        cells = []
        for name in METRICS:
            spread = f" ± {100 * deviation[view][name]:.2f}" if deviation else ""
            cells.append(f"{100 * test[view][name]:.2f}{spread}")
        rows.append(f"{view:8s}" + "".join(f"{cell:>15s}" for cell in cells))
    return "\n".join(rows)
