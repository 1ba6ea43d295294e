"""A run from data to results: `train` makes a run directory; `trained.py` opens one.

A run directory holds config.toml, history.jsonl, checkpoints/, metrics.json and report.html; with --demo also data/.
A run over several seeds holds a run directory for each, seed-0/ and so on, and their mean and standard deviation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic  # noqa: F401  training imports these three where it uses them; a missing one is told before a run
import safetensors  # noqa: F401
import torch
import tqdm  # noqa: F401
from filelock import FileLock, Timeout
from torch import Tensor

from alterrec_fast import files
from alterrec_fast.data.sessions import Dataset
from alterrec_fast.errors import FileError
from alterrec_fast.errors import RunError as RunError
from alterrec_fast.model.networks import Recommender
from alterrec_fast.report import write_report
from alterrec_fast.systems import SYSTEMS, build
from alterrec_fast.training import checkpoint
from alterrec_fast.training.alternate import LAST, Progress, Trainer
from alterrec_fast.training.config import (
    EXTENDABLE,
    MACHINE,
    Config,
    ConfigError,
    from_mapping,
    read_toml,
    same_or_more,
)
from alterrec_fast.training.evaluate import evaluate, sweep
from alterrec_fast.training.records import (
    HISTORY,
    METRICS_FILE,
    check_history,
    read_metrics,
    with_times,
    write_history,
    write_metrics,
)
from alterrec_fast.training.state import State

if TYPE_CHECKING:
    from alterrec_fast.data.text import TextEncoder

CONFIG, DEMO_DATA, LOCK = "config.toml", "data", ".lock"
DEMO_RUN = "runs/demo"
MEASURED = ("validation", "test", "groups", "sweep")  # what of metrics.json has a mean over seeds


@dataclass(frozen=True)
class Result:
    """What a finished run left behind."""

    path: Path
    metrics: dict[str, Any]  # the contents of metrics.json


def train(config: Config, resume: bool = False, progress: Progress | None = None) -> Result:
    """Trains one variant with one seed and writes its run directory; see the module.

    progress: called with each new line of the history. resume: go on with what is in config.out; a run that was killed
    at any moment ends in the result of the uninterrupted one (same machine, CPU). A larger m_max or patience than the
    run was begun with extends it, also one that is finished.

    Raises ConfigError, DataError for unusable settings or data; RunError where config.out is taken, where a resumed run
    was made with other settings, or where another process trains there; FileError for a file that is damaged, missing
    or cannot be written, which loses nothing; DivergedError where scores are no longer finite.
    """
    config = _with_places(config)
    run = Path(config.out)
    files.check_folder(run)
    config = _with_text_model(config, run)
    _check_place(run, config, resume)  # again below: this only keeps what cannot be from costing minutes
    if config.demo or (run / METRICS_FILE).exists():
        with _alone(run):
            _check_place(run, config, resume)
            _extend(run, config)
            if (run / METRICS_FILE).exists():
                return _finished(run, config)
            _write_demo(config)
    dataset = Dataset.load(data_folder(config), verify=True)
    if not (run / CONFIG).exists():
        config = _pinned(config)
    encoder = text_encoder(config)
    trainer = Trainer(config, dataset, sentence_features(dataset, encoder), run, encoder.key if encoder else "")
    with _alone(run):
        _check_place(run, config, resume)
        _extend(run, config)
        if (run / METRICS_FILE).exists():
            return _finished(run, config)
        files.sweep(run)
        if not (run / CONFIG).exists():
            files.write_text(run / CONFIG, config.to_toml())
        if resume:
            trainer.resume()
        recommender = trainer.fit(progress or (lambda line: None))
        tested = evaluate(recommender, dataset.test, trainer.counts, config)
        best = trainer.state.history[trainer.state.best_epoch]
        measured = {"validation": best["validation"], "test": tested.metrics()}
        metrics = {
            "variant": config.variant,
            "seed": config.seed,
            "items": dataset.num_items,
            "slice": list(trainer.bounds),
            "best_epoch": trainer.state.best_epoch,
            **measured,
            "groups": tested.groups(),
        }
        if trainer.system.alternates:
            metrics["sweep"] = {
                name: sweep(recommender, dataset.split(name), trainer.counts, config, known)
                for name, known in measured.items()
            }
        return _finish(run, metrics)


def train_seeds(config: Config, seeds: Sequence[int], resume: bool = False, progress: Progress | None = None) -> Result:
    """Trains one run a seed, in config.out/seed-N, and writes their mean and standard deviation beside them.

    Raises what `train` does; ConfigError also where seeds are none or repeat, RunError where config.out holds a run
    over one seed.
    """
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ConfigError(f"seeds must be one or more different numbers, got {list(seeds)}")
    config = _with_places(config)
    run = Path(config.out)
    files.check_folder(run)
    singles = [config.replace(seed=seed, out=str(run / f"seed-{seed}")) for seed in seeds]
    _check_place_of_seeds(run, resume)
    if not config.demo:
        Dataset.load(data_folder(config))  # a mistake in the name leaves no run directory
    with _alone(run):
        _check_place_of_seeds(run, resume)
        _write_demo(config)
        data = str(data_folder(config))
        each = [train(single.replace(data=data, demo=False), resume, progress).metrics for single in singles]
        metrics = {
            "variant": config.variant,
            "seeds": list(seeds),
            "items": each[0]["items"],
            "slice": each[0]["slice"],
            "best_epoch": _over(statistics.fmean, [one["best_epoch"] for one in each]),
            **mean_and_deviation(
                {key: [one[key] for one in each] for key in MEASURED if all(key in one for one in each)}
            ),
        }
        return _finish(run, metrics)


def seed_runs(run: str | Path) -> list[Path]:
    """The run directories in a run over several seeds, those of its metrics.json or, before there is one, all in order
    of their seeds; of any other run itself alone.
    """
    run = Path(run)
    if (run / CONFIG).exists():
        return [run]
    if (run / METRICS_FILE).exists() and (trained := read_metrics(run / METRICS_FILE).get("seeds")):
        return [run / f"seed-{seed}" for seed in trained]
    seeds = [path for path in run.glob("seed-*") if path.name.removeprefix("seed-").isdecimal()]
    seeds.sort(key=lambda path: int(path.name.removeprefix("seed-")))
    return seeds or [run]


def _with_places(config: Config) -> Config:
    """The config with an absolute run directory and data folder, so that the run works from anywhere."""
    if not config.data and not config.demo:
        raise ConfigError("data is missing: name a folder made by prepare (--data), or use --demo")
    if not config.out and not config.demo:
        raise ConfigError("out is missing: name the run directory (--out)")
    out = str(Path(config.out or DEMO_RUN).absolute())
    return config.replace(out=out, data=str(Path(config.data).absolute()) if config.data else "")


def _with_text_model(config: Config, run: Path) -> Config:
    """The config with the revision of the hub's text model that the run began with: the hub may change, a run's item
    vectors may not.
    """
    if not (run / CONFIG).exists():
        return config
    written = str(read_toml(run / CONFIG).get("text_model", ""))
    return config.replace(text_model=written) if written.partition("@")[0] == config.text_model else config


def _pinned(config: Config) -> Config:
    """The config with the newest revision in the name of a hub's text model."""
    if not SYSTEMS[config.variant].text:
        return config
    from alterrec_fast.data.text import pin_model

    return config.replace(text_model=pin_model(config.text_model))


def _check_place(run: Path, config: Config, resume: bool) -> None:
    """Raises RunError where the run directory is taken, or holds a run of other settings than the one to be resumed."""
    held = _held(run)
    if CONFIG not in held:
        if held:
            raise RunError(f"{run} holds {_first(held)} and no run ({CONFIG} is missing); choose another --out")
        return
    if not resume:
        raise RunError(f"{run} holds a run already; choose another --out, or go on with --resume")
    before = dataclasses.asdict(read_config(run))
    now = dataclasses.asdict(config)
    changed = [name for name in now if name not in MACHINE and not same_or_more(name, before[name], now[name])]
    if changed:
        listed = ", ".join(f"{name} = {before[name]!r} (now {now[name]!r})" for name in changed)
        raise RunError(
            f"{run / CONFIG}: the run was begun with {listed}; resume with the same settings or choose another --out"
        )


def _extend(run: Path, config: Config) -> None:
    """Writes down that a run goes on for longer than it was begun for; one that was finished no longer is."""
    if not (run / CONFIG).exists():
        return
    before = read_config(run)
    longer = before.replace(**{name: getattr(config, name) for name in EXTENDABLE})
    if longer != before:
        (run / METRICS_FILE).unlink(missing_ok=True)  # first: a kill leaves an unfinished run, which goes on
        files.write_text(run / CONFIG, longer.to_toml())


def run_settings(run: Path) -> dict[str, Any]:
    """The settings that a run was begun with, of one over several seeds those of its first; empty where there is none.

    Raises FileError, ConfigError where they cannot be read.
    """
    first = seed_runs(run)[0]
    if not (first / CONFIG).exists():
        return {}
    names = ("out",) if first == run else ("out", "seed")
    return {name: value for name, value in read_toml(first / CONFIG).items() if name not in names}


def _check_place_of_seeds(run: Path, resume: bool) -> None:
    held = _held(run)
    if held and not resume:
        raise RunError(f"{run} holds {_first(held)} already; choose another --out, or go on with --resume")
    if CONFIG in held:
        raise RunError(f"{run} holds a run over one seed; choose another --out for several")


def read_config(run: Path) -> Config:
    return from_mapping(read_toml(run / CONFIG), str(run / CONFIG))


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Keeps other processes out of the run directory; a process that is killed lets go."""
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{run}: another process is training here") from None
    try:
        yield
    finally:
        lock.release()


def _held(run: Path) -> list[str]:
    """What the run directory holds but the demo's data, the lock, and drafts of a killed process."""
    paths = sorted(run.iterdir()) if run.exists() else []
    return [path.name for path in paths if path.name not in (DEMO_DATA, LOCK) and not files.is_draft(path)]


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def data_folder(config: Config) -> Path:
    return Path(config.out) / DEMO_DATA if config.demo else Path(config.data)


def _write_demo(config: Config) -> None:
    """Generates the demo's shop where it is missing."""
    if config.demo and not data_folder(config).exists():
        from alterrec_fast.data.shop import ShopConfig, write_shop

        write_shop(data_folder(config), ShopConfig())


def text_encoder(config: Config) -> TextEncoder | None:
    """The text model of the config; its key tells the folder's content, or the hub's revision. None without text."""
    if not SYSTEMS[config.variant].text:
        return None
    from alterrec_fast.data.text import find_model

    return find_model(config.text_model)


def sentence_features(dataset: Dataset, encoder: TextEncoder | None) -> Tensor | None:
    """(V, F) float32 sentence embeddings, or None without a text model."""
    if encoder is None:
        return None
    from alterrec_fast.data.text import item_features

    return torch.from_numpy(item_features(dataset, encoder))


def build_networks(config: Config, dataset: Dataset, features: Tensor | None) -> Recommender:
    """The networks of a config.toml, which may be a stranger's; raises ConfigError where they cannot be built."""
    try:
        return build(config, dataset.num_items, features)
    except (RuntimeError, MemoryError, ValueError) as error:
        cause = str(error).splitlines()[0] if str(error) else "out of memory"
        raise ConfigError(f"{Path(config.out) / CONFIG}: the networks cannot be built ({cause})") from error


def _finished(run: Path, config: Config) -> Result:
    """The result of a run that is done: only its report may be missing, or its history.jsonl behind."""
    metrics = read_metrics(run / METRICS_FILE)
    if (run / LAST).exists():
        state = State.of(checkpoint.load(run / LAST)[1], run / LAST)
        config.check_settings(state.settings, run / LAST, run)
        lines = with_times(state.history, run / HISTORY)
        check_history(lines, str(run / LAST))
        write_history(run / HISTORY, lines)
        best = lines[metrics["best_epoch"]] if metrics["best_epoch"] < len(lines) else None
        if best is None or best["validation"] != metrics["validation"]:
            raise FileError(f"{run / METRICS_FILE}: not the metrics of this run; remove it and go on with --resume")
    return _finish(run, metrics)


def _finish(run: Path, metrics: dict[str, Any]) -> Result:
    write_metrics(run / METRICS_FILE, metrics)
    write_report(run)
    return Result(run, metrics)


def mean_and_deviation(values_of: dict[str, list[Any]]) -> dict[str, Any]:
    """For each name of values over seeds their mean, and under NAME_std their standard deviation."""
    return {
        name + suffix: _over(how, values)
        for suffix, how in (("", statistics.fmean), ("_std", _deviation))
        for name, values in values_of.items()
    }


def _over(how: Any, values: list[Any]) -> Any:
    """`how` applied to numbers that stand at the same place in several nested dictionaries; None stays."""
    if isinstance(values[0], dict):
        return {key: _over(how, [value[key] for value in values]) for key in values[0]}
    return None if values[0] is None else how(values)


def _deviation(values: list[float]) -> float:
    """Sample standard deviation, 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
