"""Every layout that torch allows gives what a contiguous copy gives, and nothing outside a tensor is read.

Each tensor ends where its allocation ends, so that under AddressSanitizer (make sanitize) a read beyond it is an error.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import alterrec_fast as af
from tests.ops.loss_helpers import needs_native

CASES = int(os.environ.get("ALTERREC_FAST_LAYOUT_CASES", "60"))


def at_the_end(sizes: tuple[int, ...], draw: random.Random, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """Random integers of [low, high) under random strides and a random offset, in storage that ends with them."""
    dense = [1] * len(sizes)
    for i in reversed(range(len(sizes) - 1)):
        dense[i] = dense[i + 1] * max(1, sizes[i + 1])
    strides = [draw.choice([n, n, n + draw.randrange(4), draw.randrange(4), 0]) for n in dense]
    if len(sizes) == 2 and draw.random() < 0.2:
        strides = [1, max(1, sizes[0])]  # a transpose
    offset = draw.randrange(6)
    used = sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True)) + 1 if all(sizes) else 0
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    storage = torch.randint(low, high, (offset + used,), generator=generator).to(dtype)
    return storage.as_strided(sizes, strides, offset)


def arguments_of(draw: random.Random) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    b, d, v = draw.choice([0, 1, 2, 7]), draw.choice([0, 1, 3, 16, 37]), draw.choice([1, 2, 70, 600, 8_300])
    floats = [torch.float32, torch.float32, torch.bfloat16]
    query = at_the_end((b, d), draw, -2, 3, draw.choice(floats))
    catalog = at_the_end((v, d), draw, -2, 3, draw.choice(floats))
    integer = [torch.int32, torch.int64]
    n = draw.choice([0, 1, 5, 70])
    return (
        query,
        catalog,
        {
            "bias": draw.choice([None, at_the_end((v,), draw, -2, 3, draw.choice(floats))]),
            "log_q": draw.choice([None, at_the_end((v,), draw, -2, 3, torch.float32)]),
            "exclude": draw.choice([None, at_the_end((b, 3), draw, -1, v, draw.choice(integer))]),
            "target": at_the_end((b,), draw, 0, v, draw.choice(integer)),
            "positives": draw.choice([None, at_the_end((b, 3), draw, -1, v, draw.choice(integer))]),
            "neg": at_the_end(draw.choice([(n,), (b, n)]), draw, -1, v, draw.choice(integer)),
            "grad": at_the_end((b,), draw, -2, 3, torch.float32),
        },
    )


def contiguous(x: Any) -> Any:
    return x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x


def with_gradients(losses: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad(losses, inputs, grad, allow_unused=True, materialize_grads=True)
    return [losses.detach(), *(g.to_dense() for g in grads)]


def results(query: Tensor, catalog: Tensor, more: dict[str, Any], sparse: bool, saved: int) -> list[Tensor]:
    """What all ops return for these arguments, and the gradients."""
    v = catalog.shape[0]
    bias, target, positives, grad = (more[name] for name in ("bias", "target", "positives", "grad"))
    ranking: dict[str, Any] = {"bias": bias, "exclude": more["exclude"], "backend": "native"}
    start, stop = v // 5, v - v // 3
    slices = [af.rank_slice(query, catalog, start=start, stop=stop, top=min(v, 2), **ranking)]
    slices.append(af.rank_slice(query, catalog, start=0, stop=min(v, max(1, v // 40)), **ranking))  # as ids
    out = [x for s in slices for x in (s.bits, s.ids, s.top, s.thresholds) if x is not None]
    out += af.top_k(query, catalog, k=min(v, 3), **ranking)
    inputs = [x.detach().requires_grad_() for x in (query, catalog, bias) if x is not None]
    options: dict[str, Any] = {"bias": inputs[2] if bias is not None else None, "positives": positives}
    options |= {"temperature": 0.5, "reduction": "none", "backend": "native"}
    for neg in (*slices, None):
        losses = af.slice_cross_entropy(inputs[0], inputs[1], target, neg, max_saved_bytes=saved, **options)
        out += with_gradients(losses, inputs, grad)
    losses = af.sampled_softmax(
        inputs[0], inputs[1], target, more["neg"], log_q=more["log_q"], sparse_grad=sparse, **options
    )
    return out + with_gradients(losses, inputs, grad)


@needs_native
@pytest.mark.parametrize("seed", range(CASES))
def test_any_layout_gives_what_a_contiguous_copy_gives(seed: int) -> None:
    draw = random.Random(seed)
    query, catalog, more = arguments_of(draw)
    sparse, saved = draw.random() < 0.5, draw.choice([0, 256 << 20])
    ours = results(query, catalog, more, sparse, saved)
    theirs = results(contiguous(query), contiguous(catalog), {k: contiguous(x) for k, x in more.items()}, sparse, saved)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
