"""The table of what is measured: ops, the shapes they are measured at, and who takes part.

Both front ends read it: `pytest benchmarks --benchmark-only` and `alterrec-fast bench`. To add a contestant, write its
`prepare` beside those of its op (`rankers.py`, `losses.py`) and name it here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from alterrec_fast.benchmarks import losses, rankers, training, truth, verdicts
from alterrec_fast.benchmarks.records import FLOOR
from alterrec_fast.benchmarks.whole_step import published, strong
from alterrec_fast.benchmarks.worker import Call, Shape, Task, Tensors

OURS = "alterrec-fast"
# Errors up to which a result counts as right; bfloat16 has 8 significant bits, and two scores of about the largest's
# size, each rounded by half a unit, can change places where they are 2 ** -8 of it apart.
RANKS, RANKS_BF16, LOSS, LOSS_BF16 = 1e-5, 4e-3, 1e-4, 2e-2

ANY = ("fp32", "bf16")
TABLE, CURVES = ("",), ("", "V")  # figures, see Shape.figure

Compare = Callable[[Tensors, Tensors], float]


@dataclass(frozen=True)
class Contestant:
    """One way to do an op."""

    name: str
    package: str  # whose version the record holds
    task: Task | None  # None where `python` is set: peers.py has it then
    tolerance: float = RANKS
    rounded: float = RANKS_BF16  # the same on bfloat16 inputs
    ours: bool = False
    precisions: tuple[str, ...] = ("fp32",)  # of the inputs that it takes
    figures: tuple[str, ...] = CURVES  # where it is shown
    python: str = ""  # the name of the interpreter that it runs under, "" for this one

    def takes(self, shape: Shape) -> bool:
        return shape.precision in self.precisions and shape.figure in self.figures

    def allowed(self, shape: Shape) -> float:
        return self.rounded if shape.precision == "bf16" else self.tolerance


@dataclass(frozen=True)
class Op:
    """What contestants compete in."""

    name: str
    title: str
    products: int  # floors that can't be done without: matrix products of the shape, of all batches of a call
    make: Callable[[Shape], Tensors]
    truth: Callable[[Shape, Tensors], Tensors]
    traffic: Callable[[Shape], float]  # bytes that must move, however it is done
    contestants: tuple[Contestant, ...]
    quick: tuple[Shape, ...]
    full: tuple[Shape, ...]  # beside the quick ones
    scaled: Shape | None = None  # at which it is run on 1, 2, 4 ... threads
    batches: Callable[[Shape], int] = lambda shape: 1  # of a call

    def product(self, shape: Shape) -> str:
        """What the floor multiplies; contests of which this is the same have the same floor."""
        sizes = f"{shape.sessions} x {shape.width} x {shape.negatives or shape.items}"
        return f"{self.batches(shape)} of {sizes}, {shape.precision}, {shape.threads} threads"

    def operations(self, shape: Shape) -> float:
        """Additions and multiplications of a call of the floor."""
        items = shape.negatives or shape.items
        return float(2 * self.batches(shape) * shape.sessions * items * shape.width)


# What must be read and written once. The catalog's gradient is written; a step reads the teacher's catalog as well.


def _matrices(shape: Shape) -> float:
    """Bytes of queries and catalog."""
    return float((shape.sessions + shape.items) * shape.width * (2 if shape.precision == "bf16" else 4))


def _ranking_traffic(shape: Shape) -> float:
    size = shape.stop - shape.start
    return float(_matrices(shape) + shape.sessions * min(shape.items / 8, 4 * size))


def _loss_traffic(shape: Shape) -> float:
    return 2 * _matrices(shape)


def _pass_traffic(shape: Shape) -> float:
    return float(training.batches_of(shape) * _loss_traffic(shape))


def _step_traffic(shape: Shape) -> float:
    return 3 * _matrices(shape)


def _sampled_traffic(shape: Shape) -> float:
    """The vectors of the negatives are read, each once; the gradient of the whole catalog is written."""
    vectors = min(shape.items, shape.negatives * (1 if shape.shared else shape.sessions))
    return float(_matrices(shape) + vectors * shape.width * (2 if shape.precision == "bf16" else 4))


# --- who takes part ---


def _floor(prepare: Callable[[Shape, Tensors], Call]) -> Contestant:
    task = Task(prepare, verdicts.compare_product)
    return Contestant(FLOOR, "torch", task, precisions=ANY, figures=("", "V", "threads", "form"))


def _ours(prepare: Callable[..., Call], compare: Compare, tolerance: float, rounded: float) -> tuple[Contestant, ...]:
    """Our op as it is and, on float32 inputs, in bfloat16."""
    task, in_bf16 = Task(prepare, compare), Task(partial(prepare, precision="bf16"), compare)
    return (
        Contestant(OURS, OURS, task, tolerance, rounded, True, ANY, ("", "V", "threads")),
        Contestant(f"{OURS}, bf16", OURS, in_bf16, rounded, rounded, True),
    )


_SLICE, _BEST, _LOSS = verdicts.compare_slice, verdicts.compare_best, verdicts.compare_loss
_WHOLE_LOSS = partial(verdicts.compare_loss, variant="whole_")
_UNSORTED = partial(rankers.torch_topk, ordered=False)
_MINING = ("sentence_transformers.util", "datasets")

_OF_RANK_SLICE = (
    _floor(rankers.product),
    *_ours(rankers.our_slice, _SLICE, RANKS, RANKS_BF16),
    Contestant("mm, topk", "torch", Task(rankers.torch_topk, _SLICE), precisions=ANY),
    Contestant("mm, topk unsorted", "torch", Task(_UNSORTED, _SLICE), precisions=ANY, figures=("", "V", "threads")),
    Contestant("mm, kthvalue", "torch", Task(rankers.torch_kthvalue, _SLICE), figures=TABLE),
    Contestant("mm, numpy argpartition", "numpy", Task(rankers.numpy_argpartition, _SLICE), figures=TABLE),
    Contestant("Faiss IndexFlatIP", "faiss-cpu", Task(rankers.faiss_flat, _SLICE, ("faiss",))),
    Contestant("usearch exact", "usearch", Task(rankers.usearch_exact, _SLICE, ("usearch.index",)), figures=TABLE),
    Contestant(
        "mine_hard_negatives, 16",
        "sentence-transformers",
        Task(rankers.mine_hard_negatives, verdicts.compare_some, _MINING),
        figures=TABLE,
    ),
)

_OF_TOP_K = (
    _floor(rankers.product),
    *_ours(rankers.our_best, _BEST, RANKS, RANKS_BF16),
    Contestant("mm, topk", "torch", Task(rankers.torch_topk, _BEST), precisions=ANY, figures=("", "V", "threads")),
    Contestant("mm, topk in blocks", "torch", Task(rankers.torch_blocks, _BEST), precisions=ANY),
    Contestant("mm, numpy argpartition", "numpy", Task(rankers.numpy_argpartition, _BEST), figures=TABLE),
    Contestant("Faiss IndexFlatIP", "faiss-cpu", Task(rankers.faiss_flat, _BEST, ("faiss",))),
    Contestant("usearch exact", "usearch", Task(rankers.usearch_exact, _BEST, ("usearch.index",)), figures=TABLE),
    Contestant(
        "semantic_search",
        "sentence-transformers",
        Task(rankers.semantic_search, _BEST, _MINING[:1]),
        figures=TABLE,
    ),
)

_NO_KEPT = partial(losses.our_full, max_saved_bytes=0)
_SLICE_NO_KEPT = partial(losses.our_slice_loss, max_saved_bytes=0)
_CHUNKS = "F.linear_cross_entropy"

_OF_FULL_SOFTMAX = (
    _floor(losses.products),
    *_ours(losses.our_full, _LOSS, LOSS, LOSS_BF16),
    Contestant(f"{OURS}, max_saved_bytes=0", OURS, Task(_NO_KEPT, _LOSS), LOSS, ours=True),
    Contestant(
        "F.cross_entropy",
        "torch",
        Task(losses.torch_cross_entropy, _LOSS),
        LOSS,
        LOSS_BF16,
        precisions=ANY,
        figures=("", "V", "threads"),
    ),
    Contestant(f"{_CHUNKS}, auto", "torch", Task(losses.torch_linear_cross_entropy, _LOSS), LOSS, figures=TABLE),
    Contestant(f"{_CHUNKS}, best", "torch", Task(losses.torch_linear_cross_entropy_best, _LOSS, tunes=True), LOSS),
    Contestant(
        "Cut Cross-Entropy",
        "cut-cross-entropy",
        Task(losses.cut_cross_entropy, _LOSS, ("cut_cross_entropy",), losses.compile_cut_cross_entropy),
        LOSS,
    ),
    Contestant("Liger", "liger-kernel", Task(losses.liger, _LOSS, ("liger_kernel",)), LOSS, figures=TABLE),
)

_OF_SLICE_LOSS = (
    _floor(losses.products),
    *_ours(losses.our_slice_loss, _LOSS, LOSS, LOSS_BF16),
    Contestant(f"{OURS}, max_saved_bytes=0", OURS, Task(_SLICE_NO_KEPT, _LOSS), LOSS, ours=True),
    Contestant("advanced indexing", "torch", Task(losses.indexed, _LOSS), LOSS),
    Contestant("gather", "torch", Task(losses.gathered, _LOSS), LOSS),
    Contestant("masked_fill", "torch", Task(losses.masked, _LOSS), LOSS),
    Contestant("streamed, bits", OURS, Task(losses.our_slice_streamed, _LOSS), LOSS, ours=True, figures=("form",)),
    Contestant("gathered, ids", OURS, Task(losses.our_slice_gathered, _LOSS), LOSS, ours=True, figures=("form",)),
)

_SPARSE = partial(losses.our_sampled, sparse_grad=True)

_OF_SAMPLED_SOFTMAX = (
    _floor(losses.products),
    *_ours(losses.our_sampled, _LOSS, LOSS, LOSS_BF16),
    Contestant(f"{OURS}, sparse_grad", OURS, Task(_SPARSE, _LOSS), LOSS, ours=True),
    Contestant("gather, einsum", "torch", Task(losses.gather_einsum, _LOSS, tunes=True), LOSS),
    Contestant("RePlay CESampled", "replay-rec", None, LOSS, figures=TABLE, python="replay"),
)

_OF_STEP = (
    _floor(losses.products),
    *_ours(losses.our_step, _LOSS, LOSS, LOSS_BF16),
    Contestant("published", "torch", Task(partial(losses.ranked_step, way=published), _LOSS), LOSS),
    Contestant("strong", "torch", Task(partial(losses.ranked_step, way=strong), _WHOLE_LOSS), LOSS),
)

_PASS = verdicts.compare_pass

_OF_SASREC = (
    _floor(training.products),
    Contestant(OURS, OURS, Task(training.our_sasrec, _PASS), 0.0, ours=True),
    Contestant(f"{OURS}, bf16", OURS, Task(partial(training.our_sasrec, precision="bf16"), _PASS), 0.0, ours=True),
    Contestant("RecBole SASRec", "recbole", None, 0.0, python="recbole"),
    Contestant("RecTools SASRec", "rectools", None, 0.0, python="rectools"),
)

_STEP = verdicts.compare_step

_OF_ALTERREC = (
    _floor(losses.products),
    Contestant(OURS, OURS, Task(training.our_alterrec, _STEP), LOSS, ours=True),
    Contestant(
        f"{OURS}, bf16", OURS, Task(partial(training.our_alterrec, precision="bf16"), _STEP), LOSS_BF16, ours=True
    ),
    Contestant("published", "torch", Task(training.published_alterrec, _STEP), LOSS),
)

# --- at which shapes: the paper's Amazon-French, a smaller shop, curves over V, one shape for threads ---

_FRENCH = Shape(40_258, 300)
_SHOP = Shape(3_800, 128, sessions=500)
_QUICK_CURVE, _FULL_CURVE = (10_000, 160_000), (40_000, 400_000, 1_000_000)
_QUICK_SHORT, _FULL_SHORT = (10_000, 40_000), (160_000, 400_000)  # where calls are long


def _curve(sizes: tuple[int, ...], **more: Any) -> tuple[Shape, ...]:
    return tuple(Shape(items, 128, figure="V", **more) for items in sizes)


def _form(share: int) -> Shape:
    """A slice of one item in `share`, for the crossover of its two forms."""
    return Shape(40_258, 128, stop=40_258 // share, figure="form")


def _slice_curve(sizes: tuple[int, ...]) -> tuple[Shape, ...]:
    return tuple(Shape(items, 128, figure="V", start=20, stop=min(20_000, items // 2)) for items in sizes)


_SLICED = replace(_FRENCH, start=20, stop=20_000)
_SHOP_SLICED = replace(_SHOP, start=6, stop=1_800)
_BEST_20 = replace(_FRENCH, stop=20)
_SCALED = Shape(40_258, 128, figure="threads")
_SAMPLED = Shape(100_000, 128, negatives=2_000)

OPS = (
    Op(
        "rank_slice",
        "Ranks of the whole catalog, as a set",
        1,
        truth.make_ranking,
        truth.ranking_truth,
        _ranking_traffic,
        _OF_RANK_SLICE,
        quick=(_SLICED, replace(_SLICED, precision="bf16"), *_slice_curve(_QUICK_CURVE)),
        full=(_SHOP_SLICED, *_slice_curve(_FULL_CURVE)),
        scaled=replace(_SCALED, start=20, stop=20_000),
    ),
    Op(
        "top_k",
        "The best items of the whole catalog, in order",
        1,
        truth.make_ranking,
        truth.ranking_truth,
        _ranking_traffic,
        _OF_TOP_K,
        quick=(_BEST_20, *_curve(_QUICK_SHORT, stop=20)),
        full=(
            replace(_SHOP, stop=20),
            replace(_BEST_20, precision="bf16"),
            *_curve((*_FULL_SHORT, 1_000_000), stop=20),
        ),
        scaled=replace(_SCALED, stop=20),
    ),
    Op(
        "full_softmax",
        "Cross-entropy over the whole catalog, forward and backward",
        3,
        truth.make_loss,
        truth.loss_truth,
        _loss_traffic,
        _OF_FULL_SOFTMAX,
        quick=(_FRENCH, *_curve(_QUICK_SHORT)),
        full=(_SHOP, *_curve(_FULL_SHORT)),
        scaled=_SCALED,
    ),
    Op(
        "slice_cross_entropy",
        "Cross-entropy over a slice, forward and backward",
        3,
        truth.make_loss,
        truth.loss_truth,
        _loss_traffic,
        _OF_SLICE_LOSS,
        quick=(_SLICED, *(_form(share) for share in (8, 128))),
        full=(
            _SHOP_SLICED,
            *_slice_curve((10_000, 40_000, 160_000, 400_000)),
            *(_form(share) for share in (16, 32, 64)),
        ),
    ),
    Op(
        "sampled_softmax",
        "Cross-entropy over sampled negatives, forward and backward",
        3,
        truth.make_loss,
        truth.loss_truth,
        _sampled_traffic,
        _OF_SAMPLED_SOFTMAX,
        quick=(_SAMPLED, replace(_SAMPLED, shared=True)),
        full=_curve((10_000, 160_000, 1_000_000), negatives=2_000),
    ),
    Op(
        "step",
        "A training step's kernel part: slice, loss and gradients",
        4,
        truth.make_step,
        truth.step_truth,
        _step_traffic,
        _OF_STEP,
        quick=(_SLICED,),
        full=(_SHOP_SLICED, *_slice_curve((10_000, 40_000, 160_000))),
    ),
    Op(
        "sasrec",
        "SASRec end to end: one pass over the same sessions, with the same width, layers, heads, batch and dropout",
        3,
        training.make_sessions,
        training.sessions_truth,
        _pass_traffic,
        _OF_SASREC,
        quick=(),
        full=(Shape(2_000, 64, training=True), Shape(10_000, 64, training=True)),
        batches=training.batches_of,
    ),
    Op(
        "alterrec",
        "AlterRec's ID phase end to end: one step against ranks of the text network, optimiser included",
        4,
        training.make_alterrec,
        training.alterrec_truth,
        _step_traffic,
        _OF_ALTERREC,
        quick=(),
        full=(replace(_SLICED, training=True),),
    ),
)
