"""A SASRec in plain PyTorch on Online Retail under different negatives: does it pay to choose them by rank?

`make integrations` puts its table into docs/integrations.md. Each way of training starts from the same seeds, in a
process of its own, and is measured on every prefix of the test sessions, at the epoch of its best validation NDCG@20.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import alterrec_fast as af
from alterrec_fast.data.batches import pack, plan
from alterrec_fast.data.prepare import prepare
from alterrec_fast.data.sessions import Dataset, Sessions

from ..harness.report import mean_and_deviation
from ..harness.worker import Memory

START, STOP = 20, 2_000
NEGATIVES = {
    "uniform": f"{STOP - START:,} uniform negatives",
    "hard": f"ranks {START}:{STOP}",
    "mixed": f"ranks {START}:{STOP}, hard_fraction=0.5",
    "full": "full softmax",
}
WIDTH, MAX_LENGTH, TARGETS = 64, 50, 2_048  # a batch holds about so many targets
K = 20
EPOCHS, SEEDS, JOBS = 15, 3, 2  # JOBS processes at once


class SASRec(nn.Module):
    """Kang and McAuley, 2018, as people write it: a causal transformer over padded sessions.

    Item 0 is padding. items (B, L), padded on the right -> a query (B, L, d) at every place.
    """

    def __init__(self, num_items: int, width: int, max_length: int):
        super().__init__()
        self.item = nn.Embedding(num_items, width, padding_idx=0)
        self.position = nn.Embedding(max_length, width)
        block = nn.TransformerEncoderLayer(width, 2, 4 * width, 0.2, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        for table in (self.item, self.position):
            nn.init.normal_(table.weight, std=0.02)
        with torch.no_grad():
            self.item.weight[0] = 0.0

    def forward(self, items: Tensor) -> Tensor:
        past = nn.Transformer.generate_square_subsequent_mask(items.shape[1])
        query: Tensor = self.blocks(self.item(items) + self.position.weight[: items.shape[1]], past, is_causal=True)
        return query


def batches(sessions: Sessions, rng: np.random.Generator | None = None) -> list[tuple[Tensor, Tensor]]:
    """(items, target), each (B, L) int64 padded on the right by 0; catalog row i is item i + 1 here."""
    made = []
    for which in plan(sessions, MAX_LENGTH, TARGETS, rng):
        batch = pack(sessions, which, MAX_LENGTH)
        items, target = (
            torch.nn.utils.rnn.pad_sequence(list(torch.from_numpy(ids + 1).split(batch.lengths.tolist())), True)
            for ids in (batch.items, batch.targets)
        )
        made.append((items, target))
    return made


def ndcg(model: SASRec, sessions: Sessions) -> float:
    """NDCG@20 over every prefix of every session, against the whole catalog."""
    model.eval()
    gains = []
    with torch.no_grad():
        for items, target in batches(sessions):
            real = target != 0
            _, best = af.top_k(model(items)[real], model.item.weight, k=K, first_item=1)
            hit = best == target[real].unsqueeze(1)
            gains.append((hit / torch.arange(2, K + 2).log2()).sum(1))
    return float(torch.cat(gains).mean())


def measure(name: str, data: str, seed: int, epochs: int) -> dict[str, float]:
    """One of NEGATIVES: test NDCG in %, the mean number of negatives, seconds an epoch, and peak MiB."""
    torch.set_num_threads(1)
    dataset = Dataset.load(Path(data))
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    memory = Memory()
    model = SASRec(dataset.num_items + 1, WIDTH, MAX_LENGTH)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    shared: dict[str, Any] = {"first_item": 1, "ignore_index": 0}
    fraction = {"uniform": 0.0, "hard": 1.0, "mixed": 0.5, "full": None}[name]
    sampler = (
        None if fraction is None else af.RankSliceSampler(START, STOP, hard_fraction=fraction, seed=seed, **shared)
    )
    loss_of = af.SliceCrossEntropy(**shared)
    best, best_state, seconds = -math.inf, model.state_dict(), 0.0
    numbers = []  # of negatives, of each epoch's last batch
    for _ in range(epochs):
        model.train()
        begin = time.perf_counter()
        for items, target in batches(dataset.train, rng):
            query, catalog = model(items), model.item.weight
            neg = None if sampler is None else sampler(query, catalog, target)
            optimizer.zero_grad()
            loss_of(query, catalog, target, neg).backward()
            optimizer.step()
        seconds += time.perf_counter() - begin
        numbers.append(dataset.num_items if neg is None else float(neg.counts().double().mean()))
        validation = ndcg(model, dataset.validation)
        if validation > best:
            best, best_state = validation, copy.deepcopy(model.state_dict())
    peak = memory.peak_mib()
    model.load_state_dict(best_state)
    metric = 100 * ndcg(model, dataset.test)
    return {"ndcg": metric, "negatives": statistics.fmean(numbers), "seconds": seconds / epochs, "mib": peak}


def sections(raw: Path, folder: Path, run: Callable[..., dict[str, float]]) -> list[dict[str, Any]]:
    data = folder.parent / "data"
    if not data.exists():
        prepare("generic", raw, data)
    dataset = Dataset.load(data)
    every = [(name, seed) for seed in range(SEEDS) for name in NEGATIVES]

    def answer(job: tuple[str, int]) -> dict[str, float]:
        return run(name=job[0], data=str(data), seed=job[1], epochs=EPOCHS)

    with ThreadPoolExecutor(JOBS) as pool:  # of threads that wait for their processes
        trained = dict(zip(every, pool.map(answer, every), strict=True))
    rows = []
    for name, title in NEGATIVES.items():
        answers = {key: [trained[name, seed][key] for seed in range(SEEDS)] for key in trained[name, 0]}
        number = f"{statistics.fmean(answers['negatives']):,.0f}"
        times = [f"{statistics.median(answers['seconds']):.1f}", f"{max(answers['mib']):,.0f}"]
        rows.append([title, number, mean_and_deviation(answers["ndcg"]), *times])
    text = (
        f"A SASRec of width {WIDTH} in plain PyTorch ([sasrec.py](../benchmarks/experiments/sasrec.py)), "
        f"{len(dataset.train):,} sessions of {dataset.num_items:,} items, {EPOCHS} epochs, {SEEDS} seeds, one thread, "
        f"{JOBS} at once. The model ranks by its own scores of the step; uniform sets have as many items in the mean. "
        f"With hard_fraction=0.5 half of the slice stays, and every other item enters with half of n / V: in a catalog "
        f"that is hardly larger than the slice fewer come in than go. Every prefix of a test session is a target."
    )
    header = ["negatives", "number, mean", f"NDCG@{K} in %", "seconds an epoch", "peak MiB"]
    return [{"heading": "Plain PyTorch: SASRec on Online Retail", "text": text, "header": header, "rows": rows}]
