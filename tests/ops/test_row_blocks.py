"""The pieces over row blocks: whatever the cut of the catalog, they make up the op over the whole of it."""

from __future__ import annotations

from functools import reduce

import pytest
import torch

from alterrec_fast.ops import RankSlice, row_blocks, slice_cross_entropy
from alterrec_fast.ops.row_blocks import Block
from alterrec_fast.ops.slice_cross_entropy import SliceLoss
from tests.conftest import integers

B, V, D = 9, 83, 6
CUTS = {
    "one": [0, V],
    "two": [0, 40, V],
    "uneven": [0, 1, 64, 70, V],
    "empty": [0, 0, 30, 30, V, V],
    "single rows": list(range(V + 1)),
}


def problem(form: str, dtype: torch.dtype = torch.float64) -> tuple[SliceLoss, RankSlice | None]:
    generator = torch.Generator().manual_seed(0)
    query, catalog = (integers(n, D, seed).to(dtype) / 2 for n, seed in ((B, 1), (V, 2)))
    target = torch.randint(2, V, (B,), generator=generator)
    positives = torch.randint(2, V, (B, 2), generator=generator)
    mask = torch.rand(B, V, generator=generator) < 0.3
    mask[:, :2] = False
    mask[3] = False  # a row without negatives
    target[4], positives[5, 1], positives[6, 0] = -100, -1, target[6]
    bias = torch.randn(V, generator=generator, dtype=dtype)
    masked = [i for i in range(2, V) if i not in target and i not in positives][:5]
    bias[masked] = -torch.inf
    ids = torch.where(mask, torch.arange(V), -1)
    neg = {"all": None, "bits": RankSlice.from_mask(mask, 2), "ids": RankSlice.from_indices(ids, V, 2)}[form]
    members = None if neg is None else neg.bits if neg.ids is None else neg.ids
    return SliceLoss(query, catalog, target, members, positives, 0.5, 0.7, None, bias, 2, -100, "fp64"), neg


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("form", ["all", "bits", "ids"])
def test_any_cut_of_the_catalog_gives_losses_and_gradients_of_the_whole(form: str, cut: str) -> None:
    p, neg = problem(form)
    inputs = [x.clone().requires_grad_() for x in (p.query, p.catalog, p.bias)]
    expected = slice_cross_entropy(
        inputs[0], inputs[1], p.target, neg, positives=p.positives, positive_weight=0.5, temperature=0.7,
        bias=inputs[2], first_item=2, reduction="none", backend="reference",
    )  # fmt: skip
    weights = torch.linspace(0.5, 1.5, B, dtype=torch.float64)
    grads = torch.autograd.grad((expected * weights).sum(), inputs)

    blocks = [Block(p, p.catalog[a:b], a) for a, b in zip(CUTS[cut], CUTS[cut][1:], strict=False)]
    whole = reduce(row_blocks.join, map(row_blocks.partition, blocks))
    torch.testing.assert_close(row_blocks.losses(p, whole), expected.detach())
    by = row_blocks.weights(p, whole.lse, whole.logits, weights)
    rows, queries, biases = zip(*(row_blocks.gradients(x, whole.lse, by) for x in blocks), strict=True)
    for got, grad in zip((sum(queries), torch.cat(rows), torch.cat(biases)), grads, strict=True):
        torch.testing.assert_close(got, grad)

    ids = torch.cat([p.target.unsqueeze(1), p.positives], 1).clamp(min=0)
    torch.testing.assert_close(row_blocks.query_gradient(p, whole.mean, p.catalog[ids], by), grads[0])


def test_a_block_names_a_score_that_is_not_finite() -> None:
    p, _ = problem("all")
    vectors = p.catalog.clone()
    vectors[7, 0] = torch.inf
    with pytest.raises(ValueError, match="has a score of"):
        row_blocks.partition(Block(p, vectors[5:20], 5, check=True))
