"""A whole training step of a SASRec, ranking included, is one graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import alterrec_fast as af
from tests.nn.sasrec import SASRec
from tests.ops.loss_helpers import needs_native

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


@needs_native
def test_draws_compile_nothing_anew() -> None:
    sampler = af.RankSliceSampler(10, 100, hard_fraction=0.5, first_item=1, ignore_index=0)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sampler, backend=counter)
    query, catalog, target = torch.randn(B, 16), torch.randn(V, 16), torch.randint(1, V, (B,))
    drawn, graphs = [], []
    for _ in range(4):
        drawn.append(compiled(query, catalog, target).mask())
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[3] and sampler.draws == 4
    assert not torch.equal(drawn[2], drawn[3])


@needs_native
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["slice", "sampled"])
def test_a_compiled_loss_takes_what_an_eager_sampler_gives(name: str, reduction: str) -> None:
    """A row of negatives for each target that is not padding, in batches of several sizes."""
    loss = LOSSES[name]()
    loss.reduction = reduction
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    sampler = af.RankSliceSampler(10, 100, hard_fraction=0.5, first_item=1, ignore_index=0)
    for seed, size in enumerate((B, B, B - 1, B - 2)):
        generator = torch.Generator().manual_seed(seed)
        query, catalog = torch.randn(size, L, 16, generator=generator), torch.randn(V, 16, generator=generator)
        target = torch.randint(1, V, (size, L), generator=generator)
        target[torch.rand(size, L, generator=generator) < 0.4] = 0
        negatives: Any = sampler(query, catalog, target)
        if name == "sampled":
            negatives = sampler.sample(query, catalog, target, num_negatives=30)
        found = []
        for module in (loss, compiled):
            leaves = query.clone().requires_grad_(), catalog.clone().requires_grad_()
            value = module(*leaves, target, negatives)
            found.append((value, *torch.autograd.grad(value.sum(), leaves)))
        torch.testing.assert_close(found[1], found[0])


@needs_native
@pytest.mark.parametrize("name", ["slice", "sampled", "full"])
def test_ignored_rows_may_hold_nan_in_a_graph(name: str) -> None:
    """Fully masked attention makes such rows. Their gradient is exactly zero, and all others are as without them."""
    generator = torch.Generator().manual_seed(0)
    query, catalog = torch.randn(B, L, 16, generator=generator), torch.randn(V, 16, generator=generator)
    target = torch.randint(1, V, (B, L), generator=generator)
    target[:, 4:] = target[0] = 0
    broken = query.masked_fill((target == 0).unsqueeze(-1), torch.nan)
    broken[1, 5] = torch.inf
    loss, sampler = LOSSES[name](), af.RankSliceSampler(10, 100, first_item=1, ignore_index=0)
    ids = torch.randint(1, V, (50,), generator=generator)

    def step(query: Tensor, catalog: Tensor) -> Tensor:
        others = {"slice": (sampler(query, catalog, target),), "sampled": (ids,), "full": ()}[name]
        return loss(query, catalog, target, *others)

    results = []
    for queries, function in ((query, step), (broken, step), (broken, torch.compile(step, backend="aot_eager"))):
        leaves = queries.clone().requires_grad_(), catalog.clone().requires_grad_()
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for ours in results[1:]:
        torch.testing.assert_close(ours, results[0])
        assert torch.equal(ours[1][target == 0], torch.zeros_like(ours[1][target == 0]))


@needs_native
def test_a_copy_teaches_in_the_graph() -> None:
    torch.manual_seed(0)
    model = SASRec(V, 16, L)
    teacher = af.TeacherCopy(model, lambda copy, items: (copy(items), copy.item.weight))
    sampler = af.RankSliceSampler(10, 100, teacher=teacher, first_item=1, ignore_index=0)
    items, target = torch.randint(1, V, (B, L)), torch.randint(1, V, (B, L))
    compiled = torch.compile(sampler, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        query = model(items)
    for _ in range(2):
        drawn = [module(query, model.item.weight, target, history=items).mask() for module in (sampler, compiled)]
        assert torch.equal(*drawn)
        with torch.no_grad():
            model.item.weight.mul_(torch.randn(V, 1))
        teacher.update(model)


@needs_native
def test_a_compiled_loss_refuses_rows_that_do_not_fit() -> None:
    compiled = torch.compile(LOSSES["sampled"](), fullgraph=True, backend="aot_eager")
    target = torch.tensor([[3, 0, 4], [5, 6, 0]])
    for rows in (3, 5):
        with pytest.raises(RuntimeError, match="neg must have a row for each of the targets that are not"):
            compiled(torch.randn(2, 3, 16), torch.randn(V, 16), target, torch.ones(rows, 8, dtype=torch.int64))


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
