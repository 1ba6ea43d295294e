"""A whole training step of a SASRec, ranking included, is one graph."""

from __future__ import annotations

import copy

import pytest
import torch
from alterrec_fast.benchmarks.sasrec import SASRec
from torch import Tensor, nn

import alterrec_fast as af
from tests.loss_helpers import needs_native

V, B, L = 500, 6, 7


class Step(nn.Module):
    """items (B, L), target (B, L) -> the loss of a model that ranks its own negatives."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.model = SASRec(V, 16, L, dropout=0.0)
        self.sampler = af.RankSliceSampler(10, 100, first_item=1, ignore_index=0)
        self.loss = loss

    def forward(self, items: Tensor, target: Tensor) -> Tensor:
        query, catalog = self.model(items), self.model.item.weight
        if isinstance(self.loss, af.SliceCrossEntropy):
            return self.loss(query, catalog, target, self.sampler(query, catalog, target))
        if isinstance(self.loss, af.SampledSoftmaxLoss):
            return self.loss(query, catalog, target, torch.randint(1, V, (50,), device=items.device))
        return self.loss(query, catalog, target)


LOSSES = {
    "slice": lambda: af.SliceCrossEntropy(first_item=1, ignore_index=0),
    "full": lambda: af.FullSoftmaxLoss(first_item=1, ignore_index=0),
    "sampled": lambda: af.SampledSoftmaxLoss(ignore_index=0),
}


@needs_native  # the reference looks at values, which no graph can
@pytest.mark.parametrize(("name", "backend"), [("slice", "inductor"), ("full", "aot_eager"), ("sampled", "aot_eager")])
def test_a_training_step_is_one_graph(name: str, backend: str) -> None:
    torch.manual_seed(0)
    plain = Step(LOSSES[name]())
    step = copy.deepcopy(plain)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (plain, step)]
    for seed in range(3):
        size = B - seed // 2  # the last batch of an epoch is smaller
        items = torch.randint(1, V, (size, L), generator=torch.Generator().manual_seed(seed))
        target = items.roll(-1, 1)
        target[:, -1] = target[: seed + 1, 3:] = 0
        losses = []
        for module, optimizer in zip((plain, compiled), optimizers, strict=True):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            losses.append(module(items, target))
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)
    for theirs, ours in zip(plain.parameters(), step.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
