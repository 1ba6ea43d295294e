"""The losses, forward and backward: full softmax, cross-entropy over a slice, and over sampled negatives.

Inputs are those of harness.inputs.make_loss. An implementation gives the mean loss and both gradients, the gradients in
memory of their own at every call, as training has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from alterrec_fast.ops import RankSlice, sampled_softmax, slice_cross_entropy
from alterrec_fast.ops.slices import uses_bits

from .bench_rank import BASE, FRENCH, LARGE, SCALED, SHOP, SHOP_SLICED, SLICED, TABLE, curve, on_gpu, slice_curve
from .harness import inputs as data
from .harness.op import ANY_DTYPE, BOTH, CPU, GPU, LOSS, OURS, Implementation, Op, ours
from .harness.worker import BATCHES, Call, Case, Tensors

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # query (B, d), catalog (V, d), target (B,) -> ()


def forward_backward(inputs: Tensors, loss: Callable[..., Tensor], teacher: bool = False) -> Call:
    """A call of a loss and its backward; with a teacher, its (query, catalog) is the first argument."""
    catalog = inputs["catalog"].detach().requires_grad_()
    rows, columns = inputs["rows"], inputs["columns"]

    def run(i: int) -> Tensors:
        query = inputs["query"][i % BATCHES].detach().requires_grad_()
        ranked = [(inputs["teacher_query"][i % BATCHES], inputs["teacher_catalog"])] if teacher else []
        value = loss(*ranked, query, catalog, inputs["target"][i % BATCHES])
        grad_query, grad_catalog = torch.autograd.grad(value, (query, catalog))
        return {"loss": value.detach(), "grad_query": grad_query, "grad_catalog": grad_catalog}

    def read(result: Tensors) -> Tensors:
        of_columns = result["grad_catalog"].index_select(0, columns)
        dense = of_columns.to_dense() if of_columns.is_sparse else of_columns
        return result | {"grad_query": result["grad_query"][rows], "grad_catalog": dense}

    return Call(run, read)


# --- plain torch: each written once, for the losses and for a whole step ---


def torch_cross_entropy(q: Tensor, e: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(q @ e.T, target)


def indexing_loss(q: Tensor, e: Tensor, target: Tensor, neg: Tensor) -> Tensor:
    """Advanced indexing into the scores, as the published code has it; neg (B, n)."""
    ids = torch.cat([target[:, None], neg], 1)
    hit = F.pad(neg == target[:, None], (1, 0))
    rows = torch.arange(len(q), device=q.device)[:, None].expand_as(ids)
    return F.cross_entropy((q @ e.T)[rows, ids].masked_fill(hit, -1e5), torch.zeros_like(target))


def gather_loss(q: Tensor, e: Tensor, target: Tensor, neg: Tensor, drop: Tensor | None = None) -> Tensor:
    """gather from the scores, and one concatenation; drop (B, n) bool names negatives that are none."""
    y, label = q @ e.T, target[:, None]
    hit = neg == label if drop is None else (neg == label) | drop
    logits = torch.cat([y.gather(1, label), y.gather(1, neg).masked_fill(hit, -1e5)], 1)
    return F.cross_entropy(logits, torch.zeros_like(target))


def masked_loss(case: Case, inputs: Tensors) -> Call:
    """All scores, those outside of the slice masked by a mask (B, V) that exists already."""
    outside = inputs["neg"].new_ones(case.sessions, case.items, dtype=torch.bool).scatter_(1, inputs["neg"], False)

    def loss(q: Tensor, e: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy((q @ e.T).masked_fill(outside.scatter(1, target[:, None], False), -torch.inf), target)

    return forward_backward(inputs, loss)


def gather_einsum(case: Case, inputs: Tensors, embedding: bool = False) -> Call:
    """The vectors of the target and its negatives gathered, B x (n + 1) x d, and einsum; a product if shared.

    By indexing or by F.embedding, whose backwards differ.
    """
    neg = inputs["neg"]

    def gather(e: Tensor, ids: Tensor) -> Tensor:
        return F.embedding(ids, e) if embedding else e[ids]

    def loss(q: Tensor, e: Tensor, target: Tensor) -> Tensor:
        y = q @ gather(e, neg).T if case.shared else torch.einsum("bd,bnd->bn", q, gather(e, neg))
        y = y.masked_fill(neg == target[:, None], -torch.inf)
        label = (q * gather(e, target)).sum(1, keepdim=True)
        return F.cross_entropy(torch.cat([label, y], 1), torch.zeros_like(target))

    return forward_backward(inputs, loss)


def of_loss(loss: Loss) -> Callable[[Case, Tensors], Call]:
    """The implementation that is a loss over the whole catalog."""
    return partial(_of_loss, loss)


def _of_loss(loss: Loss, case: Case, inputs: Tensors) -> Call:
    return forward_backward(inputs, loss)


def over_slice(loss: Callable[..., Tensor], case: Case, inputs: Tensors) -> Call:
    """The implementation that is a loss over negatives given as ids."""
    return forward_backward(inputs, partial(loss, neg=inputs["neg"]))


def torch_chunked(case: Case, inputs: Tensors, chunks: int = 0) -> Call:
    """F.linear_cross_entropy with so many chunks of sessions, or with those that torch chooses."""
    options = torch.nn.LinearCrossEntropyOptions()
    if chunks:
        size = max(1, case.sessions // chunks)
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=size, chunking_method=None)
    return forward_backward(inputs, partial(F.linear_cross_entropy, options=options))


# --- other libraries ---


def cut_cross_entropy(case: Case, inputs: Tensors) -> Call:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if case.device == "cuda" else "torch_compile"
    return forward_backward(inputs, lambda q, e, target: linear_cross_entropy(q, e, target, impl=impl))


def compile_cut_cross_entropy() -> None:
    """Compile once, for any shape, so that the compiler's memory is not taken for the loss's."""
    case = Case(64, 8, 16)
    cut_cross_entropy(case, data.make_loss(case)).run(0)


def liger(case: Case, inputs: Tensors) -> Call:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return forward_backward(inputs, lambda q, e, target: loss(e, q, target))


def cce_minus(case: Case, inputs: Tensors) -> Call:
    from .gpu.cce_minus import cce_minus as loss

    neg = inputs["neg"].expand(case.sessions, -1)
    return forward_backward(inputs, lambda q, e, target: loss(q, e, target, neg))


# --- ours ---


def our_full(case: Case, inputs: Tensors, precision: str | None = None, max_saved_bytes: int = 256 << 20) -> Call:
    return forward_backward(inputs, partial(slice_cross_entropy, precision=precision, max_saved_bytes=max_saved_bytes))


def our_slice_loss(case: Case, inputs: Tensors, precision: str | None = None, max_saved_bytes: int = 256 << 20) -> Call:
    neg = RankSlice.from_indices(inputs["neg"], case.items)
    if uses_bits(case.items, neg.size):  # the form in which rank_slice returns it
        neg = RankSlice.from_mask(neg.mask())
    loss = partial(slice_cross_entropy, neg=neg, precision=precision, max_saved_bytes=max_saved_bytes)
    return forward_backward(inputs, loss)


def our_sampled(
    case: Case, inputs: Tensors, precision: str | None = None, sparse_grad: bool = False, backend: str = "auto"
) -> Call:
    def loss(q: Tensor, e: Tensor, target: Tensor) -> Tensor:
        return sampled_softmax(
            q, e, target, inputs["neg"], sparse_grad=sparse_grad, precision=precision, backend=backend
        )

    return forward_backward(inputs, loss)


# --- the tables ---


CHUNKED = "F.linear_cross_entropy"
FULL_SOFTMAX = (
    BASE,
    *ours(our_full, LOSS, devices=BOTH),
    Implementation(f"{OURS}, max_saved_bytes=0", partial(our_full, max_saved_bytes=0), OURS, ours=True),
    Implementation(
        "F.cross_entropy", of_loss(torch_cross_entropy), dtypes=ANY_DTYPE, figures=("", "V", "threads"), devices=BOTH
    ),
    Implementation(f"{CHUNKED}, auto", torch_chunked, figures=TABLE),
    *(Implementation(f"{CHUNKED}, {n} chunks", partial(torch_chunked, chunks=n)) for n in (1, 4, 16)),
    Implementation(
        "Cut Cross-Entropy", cut_cross_entropy, "cut-cross-entropy", modules=("cut_cross_entropy",),
        warm=compile_cut_cross_entropy,
    ),
    Implementation("Cut Cross-Entropy", cut_cross_entropy, "cut-cross-entropy", dtypes=ANY_DTYPE, devices=GPU),
    Implementation("Liger", liger, "liger-kernel", dtypes=ANY_DTYPE, devices=GPU),
)  # fmt: skip
SLICE_LOSS = (
    BASE,
    *ours(our_slice_loss, LOSS, devices=BOTH),
    Implementation(f"{OURS}, max_saved_bytes=0", partial(our_slice_loss, max_saved_bytes=0), OURS, ours=True),
    Implementation("advanced indexing", partial(over_slice, indexing_loss)),
    Implementation("gather", partial(over_slice, gather_loss), dtypes=ANY_DTYPE, devices=BOTH),
    Implementation("masked_fill", masked_loss),
)
SAMPLED_SOFTMAX = (
    BASE,
    *ours(our_sampled, LOSS, devices=BOTH),
    Implementation(f"{OURS}, sparse_grad", partial(our_sampled, sparse_grad=True), OURS, ours=True),
    Implementation(
        f"{OURS}, Triton", partial(our_sampled, backend="triton"), OURS, ours=True, dtypes=ANY_DTYPE, devices=GPU
    ),
    Implementation("gather, einsum", gather_einsum, dtypes=ANY_DTYPE, devices=BOTH),
    Implementation("F.embedding, einsum", partial(gather_einsum, embedding=True), devices=CPU),
    Implementation("CCE-", cce_minus, dtypes=ANY_DTYPE, devices=GPU),
)


SAMPLED = Case(100_000, 128, negatives=2_000)
SHORT_CURVE = (10_000, 40_000)  # in the quick run, where calls are long
CHECKED = (data.make_loss, data.loss_truth, data.loss_error, LOSS)

OPS = (
    Op(
        "full_softmax", "Cross-entropy over the whole catalog, forward and backward", 3,
        *CHECKED, FULL_SOFTMAX,
        quick=(FRENCH, *curve(SHORT_CURVE)),
        full=(SHOP, *curve((160_000, 400_000))),
        gpu=tuple(case for case in on_gpu() if case.items < LARGE[-1]),
        threads=SCALED,
    ),
    Op(
        "slice_cross_entropy", "Cross-entropy over a slice, forward and backward", 3,
        *CHECKED, SLICE_LOSS,
        quick=(SLICED,),
        full=(SHOP_SLICED, *slice_curve((10_000, 40_000, 160_000, 400_000))),
        gpu=tuple(case for case in on_gpu(start=20, stop=20_000) if case.items < LARGE[-1]),
    ),
    Op(
        "sampled_softmax", "Cross-entropy over sampled negatives, forward and backward", 3,
        *CHECKED, SAMPLED_SOFTMAX,
        quick=(SAMPLED, replace(SAMPLED, shared=True)),
        full=curve((10_000, 160_000, 1_000_000), negatives=2_000),
        gpu=(*on_gpu(negatives=1_000), *on_gpu(negatives=8_192, shared=True)),
    ),
)  # fmt: skip
