"""A run from data to results: `train` makes a run directory, `load` opens one to recommend and to evaluate.

A run directory holds config.toml, history.jsonl, checkpoints/, metrics.json and report.html; with --demo also data/.
A run over several seeds holds a run directory for each, seed-0/ and so on, and their mean and standard deviation.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alterrec_fast.data.sessions import Dataset
from alterrec_fast.model.packing import Packing
from alterrec_fast.ops import top_k
from alterrec_fast.report import write_report
from alterrec_fast.training import checkpoint
from alterrec_fast.training.alternate import BEST, Progress, Trainer, pick_device
from alterrec_fast.training.config import Config, ConfigError, from_mapping, read_toml
from alterrec_fast.training.evaluate import Evaluation, evaluate, training_counts
from alterrec_fast.training.variants import build, needs_text

CONFIG, METRICS, DEMO_DATA = "config.toml", "metrics.json", "data"
WHERE_FREE = ("backend", "device", "checkpoint_minutes", "out")  # settings that a resumed run may change


class RunError(RuntimeError):
    """A run directory that cannot be used as asked; the message says what to do."""


@dataclass(frozen=True)
class Result:
    """What a finished run left behind."""

    path: Path
    metrics: dict[str, Any]  # the contents of metrics.json


def train(config: Config, resume: bool = False, progress: Progress | None = None) -> Result:
    """Trains one variant with one seed and writes its run directory; see the module.

    progress: called with each new line of the history. resume: go on with what is in config.out; a run that was killed
    at any moment ends in the result of the uninterrupted one (same machine, CPU).

    Raises ConfigError, DataError for unusable settings or data; RunError where config.out is taken, or where a resumed
    run was made with other settings; CheckpointError where a file cannot be written, which loses nothing.
    """
    config = _with_places(config)
    run = Path(config.out)
    _check_place(run, config, resume)
    if (run / METRICS).exists():  # finished; only the report may be missing
        return _finish(run, json.loads((run / METRICS).read_text(encoding="utf-8")))
    dataset = _dataset(config)
    trainer = Trainer(config, dataset, _features(config, dataset), run)
    if not (run / CONFIG).exists():
        checkpoint.write_text(run / CONFIG, config.to_toml())
    if resume:
        trainer.resume()
    recommender = trainer.fit(progress or (lambda line: None))
    found = evaluate(recommender, dataset.test, trainer.counts, config)
    best = trainer.state.history[trainer.state.best_epoch]
    metrics = {
        "variant": config.variant,
        "seed": config.seed,
        "items": dataset.num_items,
        "slice": list(trainer.bounds),
        "best_epoch": trainer.state.best_epoch,
        "validation": best["validation"],
        "test": found.metrics(),
        "groups": found.groups(),
    }
    return _finish(run, metrics)


def train_seeds(config: Config, seeds: Sequence[int], resume: bool = False, progress: Progress | None = None) -> Result:
    """Trains one run a seed, in config.out/seed-N, and writes their mean and standard deviation beside them."""
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ConfigError(f"seeds must be one or more different numbers, got {list(seeds)}")
    config = _with_places(config)
    run = Path(config.out)
    if run.exists() and not resume:
        raise RunError(f"{run} exists already; choose another --out, or go on with --resume")
    found = []
    for seed in seeds:
        one = config.replace(seed=seed, out=str(run / f"seed-{seed}"), data=str(_demo_data(config)), demo=False)
        found.append(train(one, resume, progress).metrics)
    metrics = {
        "variant": config.variant,
        "seeds": list(seeds),
        "items": found[0]["items"],
        "slice": found[0]["slice"],
        "best_epoch": _over(statistics.fmean, [one["best_epoch"] for one in found]),
        **{
            key + suffix: _over(how, [one[key] for one in found])
            for suffix, how in (("", statistics.fmean), ("_std", _deviation))
            for key in ("validation", "test", "groups")
        },
    }
    return _finish(run, metrics)


class TrainedModel:
    """The best epoch of a finished or running run, for recommendations and evaluation."""

    def __init__(self, run: str | Path):
        self.path = Path(run)
        first_seed = sorted(self.path.glob("seed-*"))
        if not (self.path / CONFIG).exists() and first_seed:
            self.path = first_seed[0]
        if not (self.path / BEST).exists():
            raise RunError(f"{self.path} holds no trained model ({BEST} is missing); train one with --out {self.path}")
        self.config = from_mapping(read_toml(self.path / CONFIG), str(self.path / CONFIG))
        self.dataset = _dataset(self.config)
        device = torch.device(pick_device(self.config.device))
        self.recommender = build(self.config, self.dataset.num_items, _features(self.config, self.dataset)).to(device)
        self.recommender.load_state_dict(checkpoint.load(self.path / BEST, str(device))[0])
        self.recommender.eval()

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {item: row for row, item in enumerate(self.dataset.items["item_id"])}

    @cached_property
    def _catalogs(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return self.recommender.catalogs()

    def recommend(self, session: Sequence[str], n: int = 10, repeats: bool = False) -> list[Recommendation]:
        """The n best next items after a session of item ids, oldest first, by the fused score.

        repeats: also items that the session holds already. Raises ValueError for an empty session or an unknown item.
        """
        unknown = [item for item in session if item not in self._rows]
        if unknown or not session:
            what = f"unknown items {', '.join(map(repr, unknown))}" if unknown else "an empty session"
            raise ValueError(f"{what}; expected one or more of the {self.dataset.num_items} ids in {self.dataset.path}")
        rows = torch.tensor([self._rows[item] for item in session][1 - self.config.max_length :])  # as in training
        with torch.no_grad():
            view = self.recommender.views(self._catalogs)["fused"]
            packing = Packing.of(torch.tensor([len(rows)]).numpy(), view.catalog.device)
            queries = self.recommender.queries(self._catalogs, rows.to(view.catalog.device), packing)
            query = view.query(queries)[-1:]
            seen = None if repeats else torch.tensor([[self._rows[item] for item in session]], device=query.device)
            k = min(n, self.dataset.num_items)
            scores, items = top_k(query, view.catalog, k, exclude=seen, backend=self.config.backend)
        table = self.dataset.items[items[0][items[0] >= 0].cpu().numpy()]
        titles = table[self.dataset.text_columns[0]] if self.dataset.text_columns else [None] * len(table)
        return [
            Recommendation(item, score, title)
            for item, score, title in zip(table["item_id"], scores[0].tolist(), titles, strict=False)
        ]

    def evaluate(self, split: str = "test") -> Evaluation:
        """Metrics over every prefix of the split's sessions; see `Evaluation`."""
        counts = training_counts(self.dataset.train, self.dataset.num_items)
        return evaluate(self.recommender, self.dataset.split(split), counts, self.config)


@dataclass(frozen=True)
class Recommendation:
    item: str
    score: float
    title: str | None


def load(run: str | Path) -> TrainedModel:
    """Opens a run directory; of a run over several seeds the first seed's."""
    return TrainedModel(run)


def _with_places(config: Config) -> Config:
    """The config with an absolute run directory and data folder, so that the run works from anywhere."""
    if not config.data and not config.demo:
        raise ConfigError("data is missing: name a folder made by prepare (--data), or use --demo")
    if not config.out and not config.demo:
        raise ConfigError("out is missing: name the run directory (--out)")
    out = str(Path(config.out or "runs/demo").absolute())
    return config.replace(out=out, data=str(Path(config.data).absolute()) if config.data else "")


def _check_place(run: Path, config: Config, resume: bool) -> None:
    """Raises RunError where the run directory is taken, or holds a run of other settings than the one to be resumed."""
    written = run / CONFIG
    if not written.exists():
        if run.exists() and any(path.name != DEMO_DATA for path in run.iterdir()):
            raise RunError(f"{run} holds other files and no run; choose another --out")
        return
    if not resume:
        raise RunError(f"{run} holds a run already; choose another --out, or go on with --resume")
    before = dataclasses.asdict(from_mapping(read_toml(written), str(written)))
    now = dataclasses.asdict(config)
    changed = [name for name in now if now[name] != before[name] and name not in WHERE_FREE]
    if changed:
        listed = ", ".join(f"{name} = {before[name]!r} (now {now[name]!r})" for name in changed)
        raise RunError(f"{run} was begun with {listed}; resume with the same settings or choose another --out")


def _demo_data(config: Config) -> Path:
    """The data folder; with demo that of the generated shop, which is made where it is missing."""
    if not config.demo:
        return Path(config.data)
    from alterrec_fast.data.shop import ShopConfig, write_shop

    folder = Path(config.out) / DEMO_DATA
    if not folder.exists():
        write_shop(folder, ShopConfig())
    return folder


def _dataset(config: Config) -> Dataset:
    return Dataset.load(_demo_data(config))


def _features(config: Config, dataset: Dataset) -> Tensor | None:
    """(V, F) float32 sentence embeddings, or None where the variant reads no text."""
    if not needs_text(config):
        return None
    from alterrec_fast.data.text import item_features

    return torch.from_numpy(item_features(dataset, config.text_model))


def _finish(run: Path, metrics: dict[str, Any]) -> Result:
    checkpoint.write_text(run / METRICS, json.dumps(metrics, indent=2) + "\n")
    write_report(run)
    return Result(run, metrics)


def _over(how: Any, values: list[Any]) -> Any:
    """`how` applied to numbers that stand at the same place in several nested dictionaries; None stays."""
    if isinstance(values[0], dict):
        return {key: _over(how, [value[key] for value in values]) for key in values[0]}
    return None if values[0] is None else how(values)


def _deviation(values: list[float]) -> float:
    """Sample standard deviation, 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
