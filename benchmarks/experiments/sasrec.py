"""A SASRec in plain PyTorch on Online Retail under different negatives: does it pay to choose them by rank?

`python -m alterrec_fast.benchmarks.experiments.sasrec`; `make integrations` puts its table into docs/integrations.md.
Each way of training starts from the same seeds, in a process of its own, and is measured on every prefix of the test
sessions, at the epoch of its best validation NDCG@20.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alterrec_fast as af
from alterrec_fast.data.batches import pack, plan
from alterrec_fast.data.prepare import prepare
from alterrec_fast.data.sessions import Dataset, Sessions

from ..harness.worker import Memory
from ..integrations.processes import call

MODULE = "alterrec_fast.benchmarks.experiments.sasrec"
START, STOP = 20, 2_000
NEGATIVES = {
    "uniform": f"{STOP - START:,} uniform negatives",
    "hard": f"ranks {START}:{STOP}",
    "mixed": f"ranks {START}:{STOP}, hard_fraction=0.5",
    "full": "full softmax",
}
WIDTH, MAX_LENGTH, TARGETS = 64, 50, 2_048  # a batch holds about so many targets
K = 20


class SASRec(nn.Module):
    """Kang and McAuley, 2018, as people write it: a causal transformer over padded sessions.

    Item 0 is padding. items (B, L), padded on the right -> a query (B, L, d) at every place.
    """

    def __init__(
        self, num_items: int, width: int, max_length: int, layers: int = 2, heads: int = 2, dropout: float = 0.2
    ):
        super().__init__()
        self.item = nn.Embedding(num_items, width, padding_idx=0)
        self.position = nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        for table in (self.item, self.position):
            nn.init.normal_(table.weight, std=0.02)
        with torch.no_grad():
            self.item.weight[0] = 0.0

    def forward(self, items: Tensor) -> Tensor:
        place = torch.arange(items.shape[1], device=items.device)
        x = self.dropout(self.item(items) + self.position(place))  # (B, L, d)
        for block in self.blocks:
            x = block(x)
        query: Tensor = self.norm(x)
        return query


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer. What padding on the right sees, nobody reads."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, length, d = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(b, length, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, L, d / h)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, length, d)
        x = x + self.dropout(self.out(attention))
        y: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.norm_forward(x)))))
        return y


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


def train(name: str, data: Path, seed: int, epochs: int) -> dict[str, float]:
    """One of NEGATIVES: test NDCG in %, the mean number of negatives, seconds an epoch, and peak MiB."""
    torch.set_num_threads(1)
    dataset = Dataset.load(data)
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


def sections(data: Path, seeds: int, epochs: int, jobs: int) -> list[dict[str, Any]]:
    dataset = Dataset.load(data)

    def run(job: tuple[str, int]) -> dict[str, float]:
        options = ("--train", job[0], "--seed", str(job[1]), "--data", str(data), "--epochs", str(epochs))
        answer: dict[str, float] = call(MODULE, *options)
        return answer

    every = [(name, seed) for seed in range(seeds) for name in NEGATIVES]
    with ThreadPoolExecutor(jobs) as pool:  # of threads that wait for their processes
        trained = dict(zip(every, pool.map(run, every), strict=True))
    rows = []
    for name, title in NEGATIVES.items():
        answers = [trained[name, seed] for seed in range(seeds)]
        metric = [answer["ndcg"] for answer in answers]
        spread = f" ± {statistics.stdev(metric):.2f}" if seeds > 1 else ""
        number = f"{statistics.fmean(answer['negatives'] for answer in answers):,.0f}"
        seconds = f"{statistics.median(answer['seconds'] for answer in answers):.1f}"
        mib = f"{max(answer['mib'] for answer in answers):,.0f}"
        rows.append([title, number, f"{statistics.fmean(metric):.2f}{spread}", seconds, mib])
    text = (
        f"A SASRec of width {WIDTH} in plain PyTorch ([sasrec.py](../benchmarks/experiments/sasrec.py)), "
        f"{len(dataset.train):,} sessions of {dataset.num_items:,} items, {epochs} epochs, {seeds} seeds, one thread, "
        f"{jobs} at once. The model ranks by its own scores of the step; uniform sets have as many items in the mean. "
        f"With hard_fraction=0.5 half of the slice stays, and every other item enters with half of n / V: in a catalog "
        f"that is hardly larger than the slice fewer come in than go. Every prefix of a test session is a target."
    )
    header = ["negatives", "number, mean", f"NDCG@{K} in %", "seconds an epoch", "peak MiB"]
    return [{"heading": "Plain PyTorch: SASRec on Online Retail", "text": text, "header": header, "rows": rows}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--raw", type=Path, help="Online Retail in the generic layout")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--data", type=Path, default=Path("runs/integrations/data"), help="prepared from --raw if new")
    parser.add_argument("--train", choices=list(NEGATIVES), help="train with these in this process")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.train:
        print(json.dumps(train(options.train, options.data, options.seed, options.epochs)))
        return
    if not options.data.exists():
        prepare("generic", options.raw, options.data)
    made = sections(options.data, options.seeds, options.epochs, options.jobs)
    if options.json:
        options.json.write_text(json.dumps(made), encoding="utf-8")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
