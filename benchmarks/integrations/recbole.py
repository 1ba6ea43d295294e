"""RecBole with and without us: training over 200,000 items, and full-sort evaluation over a million.

Every row is a process, on the same generated sessions and from the same seeds, batch for batch. Peak memory is the
process's beyond what it held after imports and data loading, so model and optimiser count. Evaluations are of one
SASRec, which was trained beforehand, so that their NDCG says that they rank alike.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ..harness.worker import Memory

NAME = "generated"
LENGTH = 10  # the longest session; the mean is 5
FOLLOWERS = 4  # items that follow an item in nine of ten cases
WIDTH = 64
THREADS, ROUNDS = 2, 3


@dataclass(frozen=True)
class Setting:
    """One process. options: the config key alterrec_fast, or None for RecBole alone; epochs: 0 to evaluate the trained
    model; keep: whether to leave the model for others to evaluate."""

    title: str
    items: int
    sessions: int
    batch: int
    epochs: int = 0
    seed: int = 1
    options: dict[str, Any] | None = None
    keep: bool = False


SAMPLED = {"loss": "sampled", "negatives": 2048, "distribution": "popularity"}


def training(items: int = 200_000, sessions: int = 12_000, batch: int = 2048) -> list[Setting]:
    stock = Setting("RecBole", items, sessions, batch, epochs=2)
    return [
        stock,
        replace(stock, title="full softmax", options={"loss": "full"}),
        replace(stock, title="full softmax, bf16", options={"loss": "full", "precision": "bf16"}),
        replace(stock, title="2,048 sampled by popularity", options=SAMPLED),
    ]


def evaluation(items: int = 1_000_000, sessions: int = 2_200) -> list[Setting]:
    """RecBole's batch is the largest multiple of 64 for which 16 bytes an item and row are 0.8 of the memory available:
    what its peak was found to be (scores, positives and what torch makes on the way)."""
    available = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    fits = int(0.8 * available / (16 * items))
    stock = Setting("RecBole", items, sessions, batch=min(max(fits // 64, 1) * 64, sessions))
    ours = replace(stock, title="top_k", options={})
    smaller = [batch for batch in (512, 128) if batch < stock.batch]
    return [stock, *(replace(one, batch=batch) for one in (stock, ours) for batch in smaller), ours]


def write_sessions(folder: Path, items: int, sessions: int) -> None:
    """RecBole's atomic files: popularity falls as 1 / rank, and an item's followers are four popular ones."""
    rng = np.random.default_rng(0)
    cumulative = np.cumsum(1.0 / np.arange(1, items + 1))
    cumulative /= cumulative[-1]

    def popular(*shape: int) -> np.ndarray:
        return np.searchsorted(cumulative, rng.random(shape)).clip(max=items - 1)

    followers, lengths = popular(items, FOLLOWERS), 2 + rng.binomial(LENGTH - 2, 3 / (LENGTH - 2), sessions)
    item, lines = popular(sessions), ["session_id:token\titem_id:token\ttimestamp:float"]
    for place in range(LENGTH):
        lines += [f"{session}\t{item[session]}\t{place}" for session in np.flatnonzero(lengths > place)]
        follower = followers[item, rng.integers(FOLLOWERS, size=sessions)]
        item = np.where(rng.random(sessions) < 0.9, follower, popular(sessions))
    (folder / NAME).mkdir(parents=True)
    (folder / NAME / f"{NAME}.inter").write_text("\n".join(lines))
    (folder / NAME / f"{NAME}.item").write_text("\n".join(["item_id:token", *map(str, range(items))]))


def measure(folder: str, **job: Any) -> dict[str, float]:
    """The seconds of a training step (the median of all but the first) or of the evaluation, peak MiB, and NDCG@10."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec as StockSASRec
    from recbole.trainer import Trainer as StockTrainer
    from recbole.utils import init_seed

    from alterrec_fast.integrations.recbole import SASRec, Trainer

    setting, trained = Setting(**job), Path(folder) / "trained.pt"  # the model that the evaluations load
    sys.argv = sys.argv[:1]  # RecBole reads it
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.chdir(folder)  # where RecBole leaves its logs
    torch.set_num_threads(THREADS)
    model, trainer_class = (StockSASRec, StockTrainer) if setting.options is None else (SASRec, Trainer)
    options = {
        "data_path": folder, "USER_ID_FIELD": "session_id",
        "load_col": {"inter": ["session_id", "item_id", "timestamp"], "item": ["item_id"]},
        "train_neg_sample_args": None, "loss_type": "CE", "hidden_size": WIDTH, "MAX_ITEM_LIST_LENGTH": LENGTH,
        "train_batch_size": setting.batch, "eval_batch_size": 256 if setting.epochs else setting.batch,
        "learning_rate": 0.003, "metrics": ["NDCG"], "topk": [10], "valid_metric": "NDCG@10", "use_gpu": False,
        "show_progress": False, "state": "ERROR", "alterrec_fast": setting.options,
    }  # fmt: skip
    config = Config(model, NAME, config_dict=options)
    init_seed(setting.seed, reproducibility=True)
    train, _, test = data_preparation(config, create_dataset(config))
    memory = Memory()
    init_seed(setting.seed, reproducibility=True)
    network = model(config, train._dataset)
    if not setting.epochs:
        network.load_state_dict(torch.load(trained, mmap=True), assign=True)
    trainer = trainer_class(config, network)
    steps = []
    for epoch in range(setting.epochs):
        for batch in train:
            begin = time.perf_counter()
            trainer._train_epoch([batch], epoch)
            steps.append(time.perf_counter() - begin)
    if setting.keep:
        torch.save(network.state_dict(), trained)
    trained_mib, begin = memory.peak_mib(), time.perf_counter()
    result = trainer.evaluate(test, load_best_model=False)
    seconds = median(steps[1:]) if steps else time.perf_counter() - begin
    return {"seconds": seconds, "mib": trained_mib if steps else memory.peak_mib(), "ndcg": float(result["ndcg@10"])}


def rows(every: list[Setting], folder: Path, run: Callable[..., dict[str, float]]) -> list[list[str]]:
    """Each setting in ROUNDS processes, a seed each, in turn; the first is what the others are compared with."""
    measured: list[list[dict[str, float]]] = [[] for _ in every]
    write_sessions(folder, every[0].items, every[0].sessions)
    if not every[0].epochs:  # the evaluations need a trained model
        run(folder=str(folder), **asdict(replace(every[0], batch=64, epochs=1, options=SAMPLED, keep=True)))
    for seed in range(1, ROUNDS + 1):
        for setting, answers in zip(every, measured, strict=True):
            answers.append(run(folder=str(folder), **asdict(replace(setting, seed=seed))))
    cells = []
    for setting, answers in zip(every, measured, strict=True):
        seconds, mib = (median(answer[name] for answer in answers) for name in ("seconds", "mib"))
        base_seconds, base_mib = (median(answer[name] for answer in measured[0]) for name in ("seconds", "mib"))
        times = [f"{seconds:.2f}", f"{base_seconds / seconds:.1f}", f"{mib:,.0f}", f"{base_mib / mib:.1f}"]
        cells.append([setting.title, f"{setting.batch:,}", *times, ", ".join(f"{one['ndcg']:.4f}" for one in answers)])
    return cells


def sections(_raw: Path, folder: Path, run: Callable[..., dict[str, float]]) -> list[dict[str, Any]]:
    trained, evaluated = training(), evaluation()
    header = ["", "batch", "seconds", "times faster", "peak MiB", "times less", "NDCG@10"]
    first, last = trained[0], evaluated[0]
    shape = f"sessions of 2 to {LENGTH} items (mean 5), hidden size {WIDTH}, {THREADS} threads"
    return [
        {
            "heading": "RecBole: training",
            "text": f"SASRec of RecBole 1.2.1, `loss_type: CE`, over {first.items:,} generated items; {shape}. Seconds "
            f"of a step of RecBole's trainer: the loss, backward, and Adam over all {first.items:,} x {WIDTH} "
            f"embeddings, which all of them share. NDCG@10 after {first.epochs} epochs over the same targets, for each "
            f"of {ROUNDS} seeds. Medians of {ROUNDS} processes in turn.",
            "header": header,
            "rows": rows(trained, folder / "training", run),
        },
        {
            "heading": "RecBole: full-sort evaluation",
            "text": f"RecBole's trainer and ours evaluate one trained SASRec over {last.items:,} items; {shape}. "
            f"RecBole at about the largest batch that fits into this machine's memory, and both at that and at smaller "
            f"ones. Medians of {ROUNDS} processes in turn.",
            "header": header,
            "rows": rows(evaluated, folder / "evaluation", run),
        },
    ]
