"""Targets a second of AlterRec's ID phase, ours and the published step.

python -m alterrec_fast.benchmarks.training_throughput

Random data of Amazon-French's shape: 96,245 sessions of mean length 4.5, 40,258 items, d = 300, two layers, ranks
20:20000. Ours is `Trainer.step`. The published step is rewritten on the same modules, so that both start from the same
weights, and does what the original does for every batch: it expands each prefix into a row padded to 50, runs the text
network forward only to throw the result away, runs the frozen teacher's padded encoder, ranks with a sorted topk, and
steps an Adam that is not fused. What it is spared: the teacher's text MLP and all data loading. LayerNorm over the
catalog and the optimiser are counted in both. Loss and gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from alterrec_fast.benchmarks.race import race
from alterrec_fast.benchmarks.whole_step import published
from torch import Tensor

from alterrec_fast.data.batches import Batch, pack, plan
from alterrec_fast.data.sessions import Dataset, Sessions
from alterrec_fast.model.encoders import Block, TransformerSession
from alterrec_fast.model.networks import Recommender
from alterrec_fast.training.alternate import Trainer
from alterrec_fast.training.config import Config
from alterrec_fast.training.variants import Epoch

SESSIONS, MEAN_LENGTH, ITEMS, TEXT_WIDTH = 96_245, 4.5, 40_258, 384
ID_PHASE = Epoch(5, "id", "text", 2)


def random_data(rng: np.random.Generator) -> Dataset:
    """Sessions of at least 2 items, lengths geometric, items by Zipf's law."""
    lengths = 1 + rng.geometric(1.0 / (MEAN_LENGTH - 1.0), SESSIONS)
    weights = 1.0 / np.arange(1, ITEMS + 1)
    items = rng.choice(ITEMS, lengths.sum(), p=weights / weights.sum()).astype(np.int32)
    sessions = Sessions(items, np.concatenate([[0], np.cumsum(lengths)]))
    few = Sessions(items[: lengths[0]], sessions.offsets[:2])
    return Dataset(Path(), sessions, few, few, {"num_items": ITEMS, "text_columns": []})


def prefixes(batch: Batch, max_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every prefix as a row of its own: items (T, max_length), padded with item 0, lengths (T,), targets (T,)."""
    rows = np.zeros((len(batch.items), max_length), np.int64)
    ends = np.cumsum(batch.lengths)
    place = np.arange(len(batch.items)) - np.repeat(ends - batch.lengths, batch.lengths)
    for row, (end, length) in enumerate(zip(range(1, len(rows) + 1), place + 1, strict=True)):
        rows[row, :length] = batch.items[end - length : end]
    return torch.from_numpy(rows), torch.from_numpy(place + 1), torch.from_numpy(batch.targets)


def encode_padded(encoder: TransformerSession, x: Tensor, lengths: Tensor) -> Tensor:
    """x (T, L, d) -> (T, d): all L places of every row go through the encoder, and one is used."""
    b, length, d = x.shape
    mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)  # torch 2.13 misreads another dtype
    h = encoder.dropout(x + encoder.position[:length])
    for block in encoder.blocks:
        assert isinstance(block, Block)
        q, k, v = block.qkv(h).view(b, length, 3, block.heads, d // block.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, length, d)
        h = block.norm_attention(h + block.dropout(block.out(mixed)))
        h = block.norm_forward(h + block.dropout(block.down(F.relu(block.up(h)))))
    last: Tensor = h[torch.arange(b), lengths - 1]
    return last


class Published:
    """The published hard-negative step of the ID phase, on the networks of `recommender`."""

    def __init__(self, recommender: Recommender, bounds: tuple[int, int], lr: float):
        self.student, self.other = recommender.network("id"), recommender.network("text")
        self.teacher = copy.deepcopy(self.other).eval()
        self.bounds = bounds
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=lr)
        with torch.no_grad():
            self.teacher_catalog = self.teacher.catalog()

    def step(self, rows: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """rows (T, L), lengths and target (T,) -> the loss; leaves gradients in the student's parameters."""
        encoders = [network.session for network in (self.student, self.other, self.teacher)]
        student, other, teacher = (encoder for encoder in encoders if isinstance(encoder, TransformerSession))
        catalog = self.student.catalog()
        query = encode_padded(student, catalog[rows], lengths)
        encode_padded(other, self.other.catalog()[rows], lengths)  # computed and thrown away
        with torch.no_grad():
            teacher_query = encode_padded(teacher, self.teacher_catalog[rows], lengths)
        loss = published(teacher_query, self.teacher_catalog, query, catalog, target, *self.bounds)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        value: Tensor = loss.detach()
        return value


def check(ours: Trainer, theirs: Published, batch: Batch, teacher_catalog: Tensor | None) -> str:
    """Takes a step of each without dropout; raises SystemExit where loss or gradients differ, else returns how far."""
    ours.recommender.eval()
    theirs.student.eval()
    theirs.other.eval()
    losses, _ = ours.step(ID_PHASE, batch, teacher_catalog)
    pairs = {"loss": (losses["loss"], theirs.step(*prefixes(batch, ours.config.max_length)))}
    for (name, mine), other in zip(
        ours.recommender.network("id").named_parameters(), theirs.student.parameters(), strict=True
    ):
        assert mine.grad is not None and other.grad is not None
        pairs[name] = mine.grad, other.grad
    errors = {name: float((a - b).norm() / b.norm()) for name, (a, b) in pairs.items()}
    worst = max(errors, key=lambda name: errors[name])
    tolerance = 0.1 if ours.config.precision == "bf16" else 1e-3
    if not errors[worst] < tolerance:
        raise SystemExit(f"the gradient of {worst} differs by {errors[worst]:.1e} from the published step's")
    ours.recommender.train()
    theirs.student.train()
    theirs.other.train()
    return f"loss {errors['loss']:.1e}, gradients up to {errors[worst]:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = random_data(np.random.default_rng(0))
    features = torch.randn(ITEMS, TEXT_WIDTH, generator=torch.Generator().manual_seed(0))
    config = Config(data="random")
    contestants: dict[str, Any] = {}
    batches = plan(data.train, config.max_length, config.batch_targets, np.random.default_rng(1))
    first = pack(data.train, next(batches), config.max_length)
    with tempfile.TemporaryDirectory() as run:
        for name in ("fp32", "bf16"):
            trainer = Trainer(config.replace(precision=name), data, features, Path(run))
            theirs = Published(copy.deepcopy(trainer.recommender), trainer.bounds, config.lr_id)
            teacher_catalog = trainer.teacher_catalog(ID_PHASE)
            found = check(trainer, theirs, first, teacher_catalog)
            print(f"{name}, relative differences from the published step: {found}")

            def step(
                inputs: tuple[np.ndarray, Any], trainer: Trainer = trainer, catalog: Tensor | None = teacher_catalog
            ) -> None:
                trainer.step(ID_PHASE, pack(data.train, inputs[0], config.max_length), catalog)

            contestants[name] = step
    contestants = {"published": lambda inputs: theirs.step(*inputs[1]), **contestants}
    targets: list[int] = []

    def fresh() -> tuple[np.ndarray, Any]:
        which = next(batches)
        batch = pack(data.train, which, config.max_length)
        targets.append(len(batch.targets))
        return which, prefixes(batch, config.max_length)

    times = race(contestants, fresh, options.rounds)
    rate = {name: sum(targets[-options.rounds :]) / sum(found.wall) for name, found in times.items()}
    print(f"\n{'':12s} {'ms a step':>10s} {'CPU ms':>8s} {'targets/s':>10s} {'ratio':>7s} {'of CPU':>7s}")
    for name, found in times.items():
        wall, cpu = times["published"].over(found)
        print(f"{name:12s} {found.ms:10.1f} {found.cpu_ms:8.1f} {rate[name]:10.0f} {wall:7.2f} {cpu:7.2f}")


if __name__ == "__main__":
    main()
