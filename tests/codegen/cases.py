"""The launchers' calls that `tests.codegen.compiled` compiles, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from alterrec_fast.kernels import shapes
from torch import Tensor

from alterrec_fast.ops.slices import bits_width, exclude_lists, uses_bits


@dataclass(frozen=True)
class Case:
    """A launcher and the shapes that it ships for. `run` is called on the meta device."""

    name: str
    run: Callable[[], object]
    product: str  # "bf16", "fp16", "tf32" or "ieee": how the launcher's kernels multiply


B, V = 512, 40_258  # the paper's shape; sizes do not enter the code, forms do


def _inputs(product: str, d: int, dtype: torch.dtype | None, b: int = B) -> tuple[Tensor, Tensor]:
    """Query and catalog without memory; `dtype` None for the one that this product is for."""
    chosen = dtype or shapes.HALVES.get(product, torch.float32)
    return torch.empty(b, d, dtype=chosen, device="meta"), torch.empty(V, d, dtype=chosen, device="meta")


def _precision(product: str) -> str:
    """What the ops call a product."""
    return product if product in shapes.HALVES else "fp32"


def _extras(extras: bool, b: int = B) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Lists of excluded items and a bias, empty and None without `extras`."""
    exclude = torch.empty(b, 3, dtype=torch.int64, device="meta") if extras else None
    return exclude_lists(exclude, b, torch.device("meta")), torch.empty(V, device="meta") if extras else None


def rank_slice_case(
    product: str,
    d: int,
    start: int,
    stop: int,
    top: int,
    extras: bool = False,
    dtype: torch.dtype | None = None,
    b: int = B,
) -> Case:
    def run() -> None:
        from alterrec_fast.kernels.rank_slice import rank_slice_fwd

        lists, bias = _extras(extras, b)
        form = (uses_bits(V, stop - start), bits_width(V))
        rank_slice_fwd(
            *_inputs(product, d, dtype, b), start, stop, top, *lists, bias, 1, _precision(product), extras, *form
        )

    source = "" if dtype is None else f" of {dtype}".replace("torch.", "")
    few = "" if b == B else f" B={b}"
    return Case(f"rank_slice {start}:{stop} d={d} {product}{source}{few}{' extras' if extras else ''}", run, product)


def top_k_case(product: str, d: int, k: int, extras: bool = False) -> Case:
    def run() -> None:
        from alterrec_fast.kernels.top_k import top_k_fwd

        lists, bias = _extras(extras)
        top_k_fwd(*_inputs(product, d, None), k, *lists, bias, 1, _precision(product), extras)

    return Case(f"top_k {k} d={d} {product}{' extras' if extras else ''}", run, product)


def loss_case(
    form: str,
    product: str,
    d: int,
    extras: bool = False,
    dtype: torch.dtype | None = None,
    needs: str = "query catalog",
) -> Case:
    """Forward and backward of a loss over "bits", over "all" items, over each session's "own" negatives, or over
    "shared" ones; `needs` names the gradients. The first two are slice_cross_entropy's, the others sampled_softmax's,
    which slice_cross_entropy takes for ids."""

    def run() -> None:
        from alterrec_fast.kernels import sampled_softmax, slice_cross_entropy
        from alterrec_fast.kernels.losses import Dlogits, Problem

        def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        target, positives = meta(B, dtype=torch.int64), meta(B, 3, dtype=torch.int64) if extras else None
        bias, log_q = (meta(V), meta(V) if form in ("own", "shared") else None) if extras else (None, None)
        temperature = meta() if product == "fp16" else None  # also one that the kernels must read
        inputs = (
            *(*_inputs(product, d, dtype), target, positives, 0.5, 0.07, temperature),
            *(bias, log_q, -100, _precision(product)),
        )
        forward, backward = Problem.of(*inputs, extras), Problem.of(*inputs, False)
        wanted = ["query" in needs, "catalog" in needs, extras or "bias" in needs, False]
        if form in ("own", "shared"):
            own = form == "own"
            negatives = meta(*((B, 2048) if own else (2048,)), dtype=torch.int64)
            kept = meta(B, 2048) if own else None
            _, lse, logits = sampled_softmax.sampled_softmax_fwd(forward, negatives, kept)
            x = Dlogits.of(backward, meta(B), lse, logits)
            sampled_softmax.sampled_softmax_bwd(backward, negatives, kept, x, False, wanted)
        else:
            bits = meta(B, bits_width(V), dtype=torch.uint8) if form == "bits" else None
            columns = slice_cross_entropy.Columns.of(forward, 1, bits)
            _, lse, logits = slice_cross_entropy.slice_cross_entropy_fwd(forward, columns)
            x = Dlogits.of(backward, meta(B), lse, logits)
            slice_cross_entropy.slice_cross_entropy_bwd(backward, columns, x, wanted)

    op = "sampled_softmax" if form in ("own", "shared") else "slice_cross_entropy"
    source = "" if dtype is None else f" of {dtype}".replace("torch.", "")
    tail = f"{' extras' if extras else ''}{'' if 'query' in needs else ', ' + needs}"
    return Case(f"{op} {form} d={d} {product}{source}{tail}", run, product)


def flash_case(form: str, d: int, extras: bool = False, needs: str = "query catalog", product: str = "bf16") -> Case:
    """Forward and backward of slice_cross_entropy for a large catalog: over "bits", "ids" or "all" items."""

    def run() -> None:
        from alterrec_fast.kernels import flash_loss
        from alterrec_fast.kernels.losses import Problem

        def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        v = 1_000_000
        query, catalog = (meta(rows, d, dtype=shapes.HALVES[product]) for rows in (B, v))
        target, positives = meta(B, dtype=torch.int64), meta(B, 3, dtype=torch.int64) if extras else None
        bits, ids = meta(B, bits_width(v), dtype=torch.uint8), meta(B, 20_000, dtype=torch.int32)
        neg = {"all": None, "bits": bits, "ids": ids}[form]
        assert flash_loss.is_flash(query, catalog, neg, positives, product)
        temperature = meta() if product == "fp16" else None
        bias = meta(v) if extras else None
        inputs = (query, catalog, target, positives, 0.5, 0.07, temperature, bias, None, -100, product)
        size = flash_loss.saved_bytes(query, catalog, neg, 4 if extras else 1, "query" in needs)
        memory = meta(size, dtype=torch.uint8)
        _, lse = flash_loss.flash_loss_fwd(Problem.of(*inputs, extras), 1, neg, memory)
        wanted = ["query" in needs, "catalog" in needs, extras or "bias" in needs, False]
        flash_loss.flash_loss_bwd(Problem.of(*inputs, False), 1, neg, meta(B), lse, memory, wanted)

    tail = f"{' extras' if extras else ''}{'' if 'query' in needs else ', ' + needs}"
    return Case(f"flash_loss {form} d={d} {product}{tail}", run, product)


def layer_norm_case(d: int) -> Case:
    """Forward, backward, and backward with a step of Adam."""

    def run() -> None:
        from alterrec_fast.kernels.layer_norm import Adam, layer_norm_adam, layer_norm_bwd, layer_norm_fwd

        x, weight, number = (torch.empty(shape, device="meta") for shape in ((V, d), (d,), ()))
        layer_norm_fwd(x, weight, weight, 1e-5)
        layer_norm_bwd(x, x, weight, 1e-5)
        layer_norm_adam(x, x, weight, 1e-5, Adam(x, x, number, number, (0.9, 0.999), 1e-8, 0.0))

    return Case(f"layer_norm d={d}", run, "")


# Every kernel in every form that a launcher chooses, on bf16; every kernel with a product in every arithmetic, and at
# widths on either side of what decides its block and whether rows are masked. "extras" are a bias, excluded items or
# positives and log_q, and `check`.
CASES = [
    rank_slice_case("bf16", 300, 20, 20_000, 5),
    rank_slice_case("bf16", 300, 10_000, 20_000, 5),
    rank_slice_case("bf16", 300, 20, 500, 5),
    rank_slice_case("bf16", 300, 10_000, 10_500, 5),
    rank_slice_case("bf16", 300, 20, 20_000, 5, extras=True),
    *(rank_slice_case("bf16", d, 20, 20_000, 5) for d in (16, 64, 128, 320, 1024)),
    *(rank_slice_case("bf16", d, 20, 500, 5) for d in (64, 100, 128, 320)),
    rank_slice_case("bf16", 128, 20, 500, 5, b=64),
    rank_slice_case("bf16", 128, 20, 500, 5, extras=True),
    rank_slice_case("bf16", 300, 20, 20_000, 5, dtype=torch.float32),
    *(rank_slice_case(product, d, 20, 20_000, 5) for product in ("tf32", "ieee") for d in (64, 300)),
    top_k_case("bf16", 300, 20, extras=True),
    *(top_k_case("bf16", d, 20) for d in (64, 1024)),
    top_k_case("tf32", 300, 20),
    top_k_case("ieee", 300, 20),
    top_k_case("bf16", 300, 5_000, extras=True),
    *(loss_case("bits", "bf16", d) for d in (16, 64, 128, 300, 320, 1024)),
    *(loss_case("bits", "tf32", d) for d in (16, 64, 300, 1024)),
    loss_case("bits", "ieee", 300),  # its scores are torch's, whatever the width
    loss_case("bits", "bf16", 300, extras=True),
    loss_case("bits", "bf16", 300, dtype=torch.float32),
    *(loss_case("all", product, 300) for product in ("bf16", "tf32", "ieee")),
    *(loss_case("shared", product, 300) for product in ("bf16", "tf32", "ieee")),
    loss_case("shared", "bf16", 300, extras=True),
    loss_case("bits", "bf16", 300, needs="bias"),
    *(loss_case("own", "bf16", d) for d in (64, 128, 300, 1024)),
    loss_case("own", "bf16", 300, extras=True),
    loss_case("own", "ieee", 300),
    loss_case("own", "bf16", 300, needs="bias"),
    *(flash_case("all", d) for d in (16, 64, 100, 128)),
    flash_case("ids", 128),
    flash_case("bits", 100, extras=True),
    flash_case("all", 128, extras=True),
    flash_case("all", 128, needs="bias"),
    *(layer_norm_case(d) for d in (16, 128, 300, 1024)),
    # Where float16 is as bfloat16 is, the code differs in the name of its instructions alone.
    rank_slice_case("fp16", 128, 20, 20_000, 5),
    top_k_case("fp16", 300, 20),
    loss_case("bits", "fp16", 300, extras=True),
    loss_case("own", "fp16", 300),
    flash_case("bits", 100, extras=True, product="fp16"),
]
