"""A training step: slice, loss and gradients alone, and AlterRec's step with its encoders and its optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alterrec_fast.ops import rank_slice, slice_cross_entropy

from .bench_loss import forward_backward, gather_loss, indexing_loss
from .bench_rank import BASE, LARGE, SHOP_SLICED, SLICED, on_gpu, slice_curve
from .harness import inputs as data
from .harness.op import ANY_DTYPE, BOTH, GPU, LOSS, OURS, Implementation, Op, ours
from .harness.worker import BATCHES, Call, Case, Tensors

# --- slice, loss and gradients: the teacher (query, catalog) ranks, and the student learns from the slice ---

Teacher = tuple[Tensor, Tensor]


def published_loss(teacher: Teacher, q: Tensor, e: Tensor, target: Tensor, start: int, stop: int) -> Tensor:
    """As the published code has it: a sorted topk and advanced indexing. The mean over B sessions."""
    ranked = (teacher[0] @ teacher[1].T).topk(stop).indices
    return indexing_loss(q, e, target, ranked[:, start:])


def unsorted_loss(teacher: Teacher, q: Tensor, e: Tensor, target: Tensor, start: int, stop: int) -> Tensor:
    """The best of plain torch: an unsorted topk, whose first `start` ranks are masked, and gather."""
    best = (teacher[0] @ teacher[1].T).topk(stop, sorted=False)
    first = best.values.topk(start, sorted=False).indices
    drop = torch.zeros_like(best.indices, dtype=torch.bool).scatter_(1, first, True)
    return gather_loss(q, e, target, best.indices, drop)


def our_loss(
    teacher: Teacher, q: Tensor, e: Tensor, target: Tensor, start: int, stop: int, precision: str | None = None
) -> Tensor:
    neg = rank_slice(*teacher, start=start, stop=stop, precision=precision)
    return slice_cross_entropy(q, e, target, neg, precision=precision)


def step(loss: Callable[..., Tensor], case: Case, inputs: Tensors, **options: Any) -> Call:
    return forward_backward(inputs, partial(loss, start=case.start, stop=case.stop, **options), teacher=True)


# --- AlterRec: a call is one step of one network, against ranks of the other, frozen one ---

MEAN_LENGTH, MAX_LENGTH = 4.5, 50
TEXT_WIDTH, RATE = 384, 1e-3


def make_sessions(case: Case) -> Tensors:
    """items (N,) int64 and offsets: sessions of geometric length, in which every item of the catalog occurs.

    A fifth more items than the catalog has, the others by Zipf's law. query and catalog are for the baseline alone.
    """
    rng = np.random.default_rng(1)
    weights = 1.0 / np.arange(1, case.items + 1)
    more = rng.choice(case.items, case.items // 5, p=weights / weights.sum())
    items = rng.permutation(np.concatenate([np.arange(case.items), more]))
    lengths = np.minimum(1 + rng.geometric(1.0 / (MEAN_LENGTH - 1.0), len(items)), MAX_LENGTH)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    offsets = np.append(offsets[offsets < len(items) - 1], len(items))
    return data.make_ranking(case) | {"items": torch.from_numpy(items), "offsets": torch.from_numpy(offsets)}


def alterrec_truth(case: Case, inputs: Tensors, student: str = "id") -> Tensors:
    """The loss of the first batch, and the gradients of all parameters of the student, in float64."""
    trainer, batches = _trainer(case, inputs)
    published = PublishedStep(trainer.recommender.double(), trainer.bounds, student, unsorted_loss)
    loss = published.run(*prefixes(batches[0], MAX_LENGTH, case.device))
    product = inputs["query"][0][inputs["rows"]].double() @ inputs["catalog"][: data.PRODUCT_ITEMS].double().T
    return {"loss": loss, "product": product} | _gradients(published.student)


def step_error(result: Tensors, truth: Tensors) -> float:
    """The larger of the loss's relative error and that of the gradients of all parameters together, in the 2-norm."""
    names = sorted(truth.keys() - {"product", "loss"})
    if result.keys() != {"loss", *names}:
        raise ValueError(f"wrong: {sorted(result.keys() ^ {'loss', *names})} on one side only")
    found, exact = (torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (result, truth))
    error_of_loss = abs(float(result["loss"] / truth["loss"]) - 1.0)
    return max(error_of_loss, float((found - exact).norm() / exact.norm()))


def our_alterrec(case: Case, inputs: Tensors, student: str = "id", precision: str = "fp32") -> Call:
    """`Trainer.step`; its graph is what `alterrec-fast train` does on CUDA, from the batch in host memory on."""
    from alterrec_fast.systems import Epoch

    trainer, batches = _trainer(case, inputs, precision)
    phase = Epoch(5, student, "text" if student == "id" else "id", 2)
    catalog, network = trainer.teacher(phase), trainer.recommender.network(student)

    def run(i: int) -> Tensors:
        losses, _ = trainer.step(phase, batches[i % BATCHES], catalog)
        return {"loss": losses["loss"]} | _gradients(network)

    def graphed(i: int) -> object:
        return stepper(batches[i % BATCHES])

    stepper = trainer.stepper(phase, catalog)
    detail = {"targets": sum(len(batch.targets) for batch in batches) / len(batches)}
    return Call(run, detail=detail, graph=graphed if case.device == "cuda" else None)


def published_alterrec(case: Case, inputs: Tensors, student: str = "id") -> Call:
    trainer, batches = _trainer(case, inputs)
    published = PublishedStep(trainer.recommender, trainer.bounds, student)
    rows = [prefixes(batch, MAX_LENGTH, case.device) for batch in batches]

    def run(i: int) -> Tensors:
        return {"loss": published.run(*rows[i % BATCHES])} | _gradients(published.student)

    return Call(run, detail={"targets": sum(len(batch.targets) for batch in batches) / len(batches)})


class PublishedStep:
    """The published hard-negative step of one network, rewritten on the networks of `recommender`.

    It does what the original does for every batch: expands each prefix into a row padded to 50, runs the other network
    forward only to throw the result away, runs the frozen teacher's padded encoder, ranks with a sorted topk, and steps
    an Adam that is not fused. What it is spared: the teacher's catalog and all data loading.
    """

    def __init__(
        self, recommender: Any, bounds: tuple[int, int], student: str, loss: Callable[..., Tensor] = published_loss
    ):
        self.student = recommender.network(student).train()
        self.other = recommender.network("text" if student == "id" else "id").train()
        self.loss = loss
        self.teacher = copy.deepcopy(self.other).eval()
        self.bounds = bounds
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=RATE)
        with torch.no_grad():
            self.teacher_catalog = self.teacher.vectors().catalog

    def run(self, rows: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """rows (T, L), lengths and target (T,) -> the loss; leaves gradients in the student's parameters."""
        catalog = self.student.vectors().catalog
        query = encode_padded(self.student.session, catalog[rows], lengths)
        encode_padded(self.other.session, self.other.vectors().catalog[rows], lengths)  # computed and thrown away
        with torch.no_grad():
            teacher_query = encode_padded(self.teacher.session, self.teacher_catalog[rows], lengths)
        query = query / self.student.temperature
        loss = self.loss((teacher_query, self.teacher_catalog), query, catalog, target, *self.bounds)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        value: Tensor = loss.detach()
        return value


def prefixes(batch: Any, max_length: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Every prefix as a row of its own: items (T, max_length), padded with item 0, lengths (T,), targets (T,)."""
    rows = np.zeros((len(batch.items), max_length), np.int64)
    ends = np.cumsum(batch.lengths)
    lengths = np.arange(len(batch.items)) - np.repeat(ends - batch.lengths, batch.lengths) + 1
    for row, length in enumerate(lengths):
        rows[row, :length] = batch.items[row + 1 - length : row + 1]
    on_host = (torch.from_numpy(array) for array in (rows, lengths, batch.targets))
    items, places, targets = (tensor.to(device) for tensor in on_host)
    return items, places, targets


def encode_padded(encoder: Any, x: Tensor, lengths: Tensor) -> Tensor:
    """x (T, L, d) -> (T, d): all L places of every row go through the encoder, and one is used."""
    b, length, d = x.shape
    # torch 2.13 misreads a mask of another dtype.
    mask = torch.full((length, length), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
    h = encoder.dropout(x + encoder.position[:length])
    for block in encoder.blocks:
        q, k, v = block.qkv(h).view(b, length, 3, block.heads, d // block.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, length, d)
        h = block.norm_attention(h + block.dropout(block.out(mixed)))
        h = block.norm_forward(h + block.dropout(block.down(F.relu(block.up(h)))))
    last: Tensor = h[torch.arange(b, device=x.device), lengths - 1]
    return last


def _trainer(case: Case, inputs: Tensors, precision: str = "fp32") -> tuple[Any, list[Any]]:
    """Without dropout, so that every implementation's first step has the same loss and gradients."""
    from alterrec_fast.data.batches import pack, plan
    from alterrec_fast.data.sessions import Dataset, Sessions
    from alterrec_fast.training.alternate import Trainer
    from alterrec_fast.training.config import Config

    sessions = Sessions(inputs["items"].numpy().astype(np.int32), inputs["offsets"].numpy())
    few = Sessions(sessions.items[: sessions.offsets[1]], sessions.offsets[:2])
    dataset = Dataset(Path(), sessions, few, few, {"num_items": case.items, "text_columns": []})
    settings: dict[str, Any] = {"width": case.width, "dropout": 0.0, "precision": precision, "device": case.device}
    config = Config(data="generated", k1=case.start, k2=case.stop, lr_id=RATE, **settings)
    generator = torch.Generator(case.device).manual_seed(1)
    features = torch.randn(case.items, TEXT_WIDTH, generator=generator, device=case.device)
    trainer = Trainer(config, dataset, features, Path())  # which steps write nothing to
    order = plan(sessions, MAX_LENGTH, case.sessions, np.random.default_rng(2))
    return trainer, [pack(sessions, which, MAX_LENGTH) for which in islice(order, BATCHES)]


def _gradients(network: torch.nn.Module) -> Tensors:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


# --- the tables ---


STEP = (
    BASE,
    *ours(partial(step, our_loss), LOSS, devices=BOTH),
    Implementation("published", partial(step, published_loss), dtypes=ANY_DTYPE, devices=BOTH),
    Implementation("topk unsorted, gather", partial(step, unsorted_loss), dtypes=ANY_DTYPE, devices=BOTH),
)
TRAINED = ((40_258, 300), (LARGE[0], 128))  # V, d


def alterrec(name: str, student: str) -> Op:
    """The steps of one network."""
    step_of = partial(our_alterrec, student=student)
    tf32: dict[str, Any] = {"package": OURS, "tolerance": (LOSS[1],) * 2, "ours": True, "devices": GPU}
    return Op(
        name, f"AlterRec's {student} phase end to end: one step against ranks of the other network, with its Adam", 4,
        make_sessions, partial(alterrec_truth, student=student), step_error, LOSS,
        (
            BASE,
            *ours(step_of, LOSS, dtypes=("fp32",), devices=BOTH),
            Implementation(f"{OURS}, tf32", partial(step_of, precision="tf32"), **tf32),
            Implementation("published", partial(published_alterrec, student=student), devices=BOTH),
        ),
        full=(replace(SLICED, training=True),),
        gpu=tuple(Case(*size, start=20, stop=20_000, training=True, device="cuda") for size in TRAINED),
    )  # fmt: skip


OPS = (
    Op(
        "step", "A training step's kernel part: slice, loss and gradients", 4,
        data.make_step, data.step_truth, data.loss_error, LOSS, STEP,
        quick=(SLICED,),
        full=(SHOP_SLICED, *slice_curve((10_000, 40_000, 160_000))),
        gpu=tuple(case for case in on_gpu(start=20, stop=20_000) if case.items < LARGE[-1]),
    ),
    alterrec("alterrec", "id"),
    alterrec("alterrec_text", "text"),
)  # fmt: skip
