"""Contestants end to end: SASRec for one pass over the same sessions, and AlterRec's step, published and ours.

What other libraries do is in `peers.py`, since they need interpreters of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from alterrec_fast.benchmarks import losses
from alterrec_fast.benchmarks.training_throughput import ID_PHASE, TEXT_WIDTH, Published, prefixes
from alterrec_fast.benchmarks.worker import BATCHES, Call, Shape, Tensors
from torch import Tensor

from alterrec_fast.data.batches import Batch, pack, plan
from alterrec_fast.data.sessions import Dataset, Sessions
from alterrec_fast.model.packing import Packing
from alterrec_fast.ops import slice_cross_entropy
from alterrec_fast.training.alternate import Trainer
from alterrec_fast.training.config import Config, from_mapping
from alterrec_fast.training.variants import build

MEAN_LENGTH, MAX_LENGTH = 4.5, 50
LAYERS, HEADS, DROPOUT, RATE = 2, 2, 0.1, 1e-3


# --- SASRec: a call is one pass over all sessions ---


def make_sessions(shape: Shape) -> Tensors:
    """items (N,) int64 and offsets: sessions of geometric length, in which every item of the catalog occurs.

    A fifth more items than the catalog has, the others by Zipf's law. query and catalog are for the floor alone.
    """
    rng = np.random.default_rng(1)
    weights = 1.0 / np.arange(1, shape.items + 1)
    more = rng.choice(shape.items, shape.items // 5, p=weights / weights.sum())
    items = rng.permutation(np.concatenate([np.arange(shape.items), more]))
    lengths = np.minimum(1 + rng.geometric(1.0 / (MEAN_LENGTH - 1.0), len(items)), MAX_LENGTH)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    offsets = np.append(offsets[offsets < len(items) - 1], len(items))
    generator = torch.Generator().manual_seed(1)
    return {
        "items": torch.from_numpy(items),
        "offsets": torch.from_numpy(offsets),
        "query": torch.randn(BATCHES, shape.sessions, shape.width, generator=generator),
        "catalog": torch.randn(shape.items, shape.width, generator=generator),
    }


def sessions_truth(shape: Shape, inputs: Tensors) -> Tensors:
    """How many targets a pass has: every item of a session but the first."""
    targets = len(inputs["items"]) - len(inputs["offsets"]) + 1
    product = inputs["query"][0][:8].double() @ inputs["catalog"].double().T
    return {"rows": torch.arange(8), "targets": torch.tensor(targets), "product": product[:, :1000]}


@lru_cache
def batches_of(shape: Shape) -> int:
    """Batches of a pass over the sessions."""
    return len(list(_batches(make_sessions(shape), shape, 0)))


def _batches(inputs: Tensors, shape: Shape, seed: int) -> Iterator[Batch]:
    sessions = Sessions(inputs["items"].numpy().astype(np.int32), inputs["offsets"].numpy())
    for which in plan(sessions, MAX_LENGTH, shape.sessions, np.random.default_rng(seed)):
        yield pack(sessions, which, MAX_LENGTH)


def products(shape: Shape, inputs: Tensors) -> Call:
    """The floor: a product of the shape for each batch of a pass."""
    once, batches = losses.products(shape, inputs), batches_of(shape)

    def run(i: int) -> Tensor:
        for number in range(batches):
            result: Tensor = once.run(i + batches - 1 - number)  # last the one that is compared: of batch i
        return result

    return Call(run, once.read)


def our_sasrec(shape: Shape, inputs: Tensors, precision: str | None = None) -> Call:
    """The ID network of this package and cross-entropy over the whole catalog."""
    torch.manual_seed(0)
    config = Config(
        data="made", variant="id_only", width=shape.width, layers=LAYERS, heads=HEADS, dropout=DROPOUT, init="xavier"
    )
    recommender = build(config, shape.items, None)
    network = recommender.network("id").train()
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, fused=True)

    def run(i: int) -> Tensors:
        targets, total = 0, torch.zeros(())
        for batch in _batches(inputs, shape, i):
            optimizer.zero_grad()
            catalog = network.catalog()
            query = network.queries(catalog, torch.from_numpy(batch.items), Packing.of(batch.lengths))
            loss = slice_cross_entropy(query, catalog, torch.from_numpy(batch.targets), precision=precision)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch.targets)
            targets += len(batch.targets)
        return {"targets": torch.tensor(targets), "loss": total / targets}

    return Call(run, detail=partial(_targets, inputs))


def _targets(inputs: Tensors) -> dict[str, float]:
    return {"targets": float(len(inputs["items"]) - len(inputs["offsets"]) + 1)}


# --- AlterRec: a call is one step of the ID phase, against ranks of the frozen text network ---


def make_alterrec(shape: Shape) -> Tensors:
    """The sessions of about BATCHES batches, and features (V, F) of the items' text."""
    rng = np.random.default_rng(1)
    lengths = np.minimum(1 + rng.geometric(1.0 / (MEAN_LENGTH - 1.0), BATCHES * shape.sessions), MAX_LENGTH)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    generator = torch.Generator().manual_seed(1)
    return {
        "items": torch.from_numpy(rng.integers(shape.items, size=offsets[-1])),
        "offsets": torch.from_numpy(offsets),
        "features": torch.randn(shape.items, TEXT_WIDTH, generator=generator),
        "query": torch.randn(BATCHES, shape.sessions, shape.width, generator=generator),
        "catalog": torch.randn(shape.items, shape.width, generator=generator),
    }


def alterrec_truth(shape: Shape, inputs: Tensors) -> Tensors:
    """The loss of the first batch, and the gradients of all parameters of the ID network, in float64."""
    trainer, batches = _trainer(shape, inputs)
    theirs = Published(trainer.recommender.double(), trainer.bounds, RATE)
    loss = theirs.step(*prefixes(batches[0], MAX_LENGTH))
    product = inputs["query"][0][:8].double() @ inputs["catalog"].double().T
    found = {"rows": torch.arange(8), "loss": loss, "product": product[:, :1000]}
    return found | _gradients(theirs.student)


def our_alterrec(shape: Shape, inputs: Tensors, precision: str | None = None) -> Call:
    """`Trainer.step`, what `alterrec-fast train` does for each batch."""
    trainer, batches = _trainer(shape, inputs, precision)
    catalog = trainer.teacher_catalog(ID_PHASE)
    student = trainer.recommender.network("id")

    def run(i: int) -> Tensors:
        losses, _ = trainer.step(ID_PHASE, batches[i % BATCHES], catalog)
        return {"loss": losses["loss"]} | _gradients(student)

    return Call(run, detail=partial(_mean_targets, batches))


def published_alterrec(shape: Shape, inputs: Tensors) -> Call:
    """The published code's step, rewritten from its description: see training_throughput.py."""
    trainer, batches = _trainer(shape, inputs)
    theirs = Published(copy.deepcopy(trainer.recommender), trainer.bounds, RATE)
    rows = [prefixes(batch, MAX_LENGTH) for batch in batches]

    def run(i: int) -> Tensors:
        return {"loss": theirs.step(*rows[i % BATCHES])} | _gradients(theirs.student)

    return Call(run, detail=partial(_mean_targets, batches))


def _trainer(shape: Shape, inputs: Tensors, precision: str | None = None) -> tuple[Trainer, list[Batch]]:
    """Without dropout, so that every contestant's first step has the same loss and gradients."""
    sessions = Sessions(inputs["items"].numpy().astype(np.int32), inputs["offsets"].numpy())
    few = Sessions(sessions.items[: sessions.offsets[1]], sessions.offsets[:2])
    dataset = Dataset(Path(), sessions, few, few, {"num_items": shape.items, "text_columns": []})
    config = from_mapping(
        {
            "data": "made",
            "width": shape.width,
            "dropout": 0.0,
            "precision": precision,
            "k1": shape.start,
            "k2": shape.stop,
            "lr_id": RATE,
        },
        "settings",
    )
    trainer = Trainer(config, dataset, inputs["features"], Path(mkdtemp(dir=Path.cwd())))
    whole = list(plan(sessions, MAX_LENGTH, shape.sessions, np.random.default_rng(2)))[:BATCHES]
    return trainer, [pack(sessions, which, MAX_LENGTH) for which in whole]


def _gradients(network: torch.nn.Module) -> Tensors:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def _mean_targets(batches: list[Batch]) -> dict[str, float]:
    return {"targets": sum(len(batch.targets) for batch in batches) / len(batches)}
