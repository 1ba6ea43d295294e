"""Contestants of the losses and of the whole step, forward and backward: the loss and both gradients.

Inputs are those of `truth.make_loss` and `truth.make_step`. A contestant gives loss (), grad_query (B, d) and
grad_catalog (V, d), the gradients in memory of their own at every call, as training has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from alterrec_fast.benchmarks.rankers import room
from alterrec_fast.benchmarks.worker import BATCHES, Call, Shape, Tensors
from torch import Tensor

from alterrec_fast.ops import RankSlice, rank_slice, sampled_softmax, slice_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # query, catalog, target, number of the batch -> ()


def step_of(loss: Loss, inputs: Tensors) -> Call:
    """The forward and backward of a loss."""
    catalog = inputs["catalog"].detach().requires_grad_()

    def run(i: int) -> Tensors:
        query = inputs["query"][i % BATCHES].detach().requires_grad_()
        value = loss(query, catalog, inputs["target"][i % BATCHES], i)
        grad_query, grad_catalog = torch.autograd.grad(value, (query, catalog))
        return {"loss": value.detach(), "grad_query": grad_query, "grad_catalog": grad_catalog}

    return Call(run)


def products(shape: Shape, inputs: Tensors) -> Call:
    """The floor: one product of the shape, forward only, into memory that is there already.

    Of the whole catalog; where each session has negatives of its own, of as many items as it has negatives.
    """
    query, catalog = inputs["query"], inputs["catalog"]
    items = shape.negatives or shape.items
    out = room(shape.sessions, items, query.dtype)

    def run(i: int) -> Tensor:
        return torch.mm(query[i % BATCHES], catalog[:items].T, out=out)

    return Call(run, lambda y, rows: {"product": y[rows][:, :1000]})


# --- full softmax ---


def torch_cross_entropy(shape: Shape, inputs: Tensors) -> Call:
    return step_of(lambda q, e, target, i: F.cross_entropy(q @ e.T, target), inputs)


def torch_linear_cross_entropy(shape: Shape, inputs: Tensors) -> Call:
    """F.linear_cross_entropy with chunks chosen by torch."""
    options = torch.nn.LinearCrossEntropyOptions()
    return step_of(lambda q, e, target, i: F.linear_cross_entropy(q, e, target, options=options), inputs)


def torch_linear_cross_entropy_best(shape: Shape, inputs: Tensors) -> Call:
    """F.linear_cross_entropy with the fastest of five chunk sizes: each warm, and the best of three calls."""

    def made(chunk: int) -> Call:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
        return step_of(lambda q, e, target, i: F.linear_cross_entropy(q, e, target, options=options), inputs)

    chunks = [max(1, shape.sessions // parts) for parts in (1, 2, 4, 8, 16)]
    return fastest("chunk", {float(chunk): made(chunk) for chunk in chunks})


def fastest(name: str, calls: dict[float, Call]) -> Call:
    """The call that is fastest, each by the best of three after an untimed one; of fewer where all of them together
    take longer than 0.7 s each.

    They take turns, so that a machine that slows down slows all of them. `name` and its number are recorded.
    """
    for call in calls.values():
        call.run(0)
    best = dict.fromkeys(calls, float("inf"))
    started = time.perf_counter()
    for i in range(3):
        for number, call in calls.items():
            begun = time.perf_counter()
            call.run(i)
            best[number] = min(best[number], time.perf_counter() - begun)
        if time.perf_counter() - started > 0.7 * len(calls):
            break
    chosen = min(best, key=lambda number: best[number])
    return replace(calls[chosen], detail=lambda: {name: chosen})


def cut_cross_entropy(shape: Shape, inputs: Tensors) -> Call:
    from cut_cross_entropy import linear_cross_entropy

    return step_of(lambda q, e, target, i: linear_cross_entropy(q, e, target, impl="torch_compile"), inputs)


def compile_cut_cross_entropy() -> None:
    """Compiles once, for any shape, so that the compiler's memory is not taken for the loss's."""
    inputs = {
        "query": torch.randn(BATCHES, 16, 8),
        "catalog": torch.randn(64, 8),
        "target": torch.randint(64, (BATCHES, 16)),
    }
    cut_cross_entropy(Shape(64, 8, 16), inputs).run(0)


def liger(shape: Shape, inputs: Tensors) -> Call:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return step_of(lambda q, e, target, i: loss(e, q, target), inputs)


def our_full(shape: Shape, inputs: Tensors, max_saved_bytes: int = 256 << 20, precision: str | None = None) -> Call:
    return step_of(
        lambda q, e, target, i: slice_cross_entropy(q, e, target, max_saved_bytes=max_saved_bytes, precision=precision),
        inputs,
    )


# --- a slice as negatives: the same `negatives` (B, n) for every batch ---


def indexed(shape: Shape, inputs: Tensors) -> Call:
    """Advanced indexing into the scores, as the published code has it."""
    negatives = inputs["negatives"]

    def loss(q: Tensor, e: Tensor, target: Tensor, i: int) -> Tensor:
        ids = torch.cat([target[:, None], negatives], 1)
        hit = F.pad(negatives == target[:, None], (1, 0))
        rows = torch.arange(len(q))[:, None].expand_as(ids)
        return F.cross_entropy((q @ e.T)[rows, ids].masked_fill(hit, -1e5), torch.zeros_like(target))

    return step_of(loss, inputs)


def gathered(shape: Shape, inputs: Tensors) -> Call:
    """gather from the scores, and one concatenation."""
    negatives = inputs["negatives"]

    def loss(q: Tensor, e: Tensor, target: Tensor, i: int) -> Tensor:
        y = q @ e.T
        others = y.gather(1, negatives).masked_fill(negatives == target[:, None], -1e5)
        return F.cross_entropy(torch.cat([y.gather(1, target[:, None]), others], 1), torch.zeros_like(target))

    return step_of(loss, inputs)


def masked(shape: Shape, inputs: Tensors) -> Call:
    """All scores, those outside of the slice masked away by a mask (B, V) that is there already."""
    outside = torch.ones(shape.sessions, shape.items, dtype=torch.bool).scatter_(1, inputs["negatives"], False)

    def loss(q: Tensor, e: Tensor, target: Tensor, i: int) -> Tensor:
        left_out = outside.scatter(1, target[:, None], False)
        return F.cross_entropy((q @ e.T).masked_fill(left_out, -torch.inf), target)

    return step_of(loss, inputs)


def our_slice_loss(
    shape: Shape, inputs: Tensors, max_saved_bytes: int = 256 << 20, precision: str | None = None
) -> Call:
    neg = _slice(shape, inputs)
    return step_of(
        lambda q, e, target, i: slice_cross_entropy(
            q, e, target, neg, max_saved_bytes=max_saved_bytes, precision=precision
        ),
        inputs,
    )


def our_slice_gathered(shape: Shape, inputs: Tensors) -> Call:
    """The gathered form: the slice's ids as sampled negatives."""
    negatives = inputs["negatives"].int()
    return step_of(lambda q, e, target, i: sampled_softmax(q, e, target, negatives), inputs)


def our_slice_streamed(shape: Shape, inputs: Tensors) -> Call:
    """The streamed form: the slice as bits, whatever its size."""
    mask = torch.zeros(shape.sessions, shape.items, dtype=torch.bool).scatter_(1, inputs["negatives"], True)
    neg = RankSlice.from_mask(mask)
    return step_of(lambda q, e, target, i: slice_cross_entropy(q, e, target, neg), inputs)


def _slice(shape: Shape, inputs: Tensors) -> RankSlice:
    return RankSlice.from_indices(inputs["negatives"], shape.items)


# --- sampled softmax ---


def gather_einsum(shape: Shape, inputs: Tensors) -> Call:
    """The vectors of the target and its negatives gathered, B x (n + 1) x d, and einsum; shared ones by a product.

    Gathered by indexing or by F.embedding, whose backwards differ, whichever is faster.
    """
    negatives = inputs["negatives"]

    def gather(e: Tensor, ids: Tensor, embedding: bool) -> Tensor:
        return F.embedding(ids, e) if embedding else e[ids]

    def own(q: Tensor, e: Tensor, target: Tensor, i: int, embedding: bool) -> Tensor:
        ids = torch.cat([target[:, None], negatives], 1)
        hit = F.pad(negatives == target[:, None], (1, 0))
        logits = torch.einsum("bd,bnd->bn", q, gather(e, ids, embedding)).masked_fill(hit, -torch.inf)
        return F.cross_entropy(logits, torch.zeros_like(target))

    def shared(q: Tensor, e: Tensor, target: Tensor, i: int, embedding: bool) -> Tensor:
        hit = negatives[None] == target[:, None]
        logits = (q @ gather(e, negatives, embedding).T).masked_fill(hit, -torch.inf)
        own = (q * gather(e, target, embedding)).sum(1, keepdim=True)
        return F.cross_entropy(torch.cat([own, logits], 1), torch.zeros_like(target))

    loss = shared if shape.shared else own
    ways = {float(embedding): step_of(partial(loss, embedding=embedding), inputs) for embedding in (False, True)}
    return fastest("embedding", ways)


def our_sampled(shape: Shape, inputs: Tensors, sparse_grad: bool = False, precision: str | None = None) -> Call:
    negatives = inputs["negatives"]
    return step_of(
        lambda q, e, target, i: sampled_softmax(q, e, target, negatives, sparse_grad=sparse_grad, precision=precision),
        inputs,
    )


# --- the kernel part of a training step: the teacher ranks, the student learns from the slice ---


def ranked_step(shape: Shape, inputs: Tensors, way: Callable[..., Tensor]) -> Call:
    """One of whole_step.py's ways: the teacher's queries rank its catalog, and the student learns from the slice."""

    def loss(q: Tensor, e: Tensor, target: Tensor, i: int) -> Tensor:
        teacher = inputs["teacher_query"][i % BATCHES], inputs["teacher_catalog"]
        return way(*teacher, q, e, target, shape.start, shape.stop)

    return step_of(loss, inputs)


def our_step(shape: Shape, inputs: Tensors, precision: str | None = None) -> Call:
    def way(qt: Tensor, ht: Tensor, q: Tensor, e: Tensor, target: Tensor, start: int, stop: int) -> Tensor:
        neg = rank_slice(qt, ht, start=start, stop=stop, precision=precision)
        return slice_cross_entropy(q, e, target, neg, precision=precision)

    return ranked_step(shape, inputs, way)
