"""Training loops under autocast to float16, with and without a GradScaler, and what the modules take for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alterrec_fast as af
from tests.nn.sasrec import SASRec

B, L, V, D = 8, 6, 120, 16
LOSSES = ("FullSoftmaxLoss", "SliceCrossEntropy", "SampledSoftmaxLoss")


class Trained(nn.Module):
    """A model, a sampler and a loss whose temperature is trained too, on one batch."""

    def __init__(self, name: str):
        super().__init__()
        torch.manual_seed(0)
        self.model = SASRec(V, D, L)
        self.sampler = af.RankSliceSampler(2, 40, hard_fraction=0.5, first_item=1)
        weight = torch.linspace(0.5, 1.5, V)
        self.loss = getattr(af, name)(temperature=nn.Parameter(torch.tensor(0.5)), ignore_index=0, weight=weight)
        self.items = torch.randint(1, V, (B, L), generator=torch.Generator().manual_seed(1))
        self.target = self.items.roll(-1, 1).index_fill(1, torch.tensor([L - 1]), 0)

    def forward(self) -> Tensor:
        query, catalog = self.model(self.items), self.model.item.weight
        kind = type(self.loss).__name__
        negatives: tuple[Any, ...] = ()
        if kind == "SliceCrossEntropy":
            self.sampler.ignore_index = 0
            negatives = (self.sampler(query, catalog, self.target),)
        if kind == "SampledSoftmaxLoss":
            negatives = (torch.arange(1, V),)
        loss: Tensor = self.loss(query, catalog, self.target, *negatives)
        return loss


def state(owner: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    tensors = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
    return [x.detach().clone() for x in (*owner.parameters(), *tensors)]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_fifty_steps(name: str, scaled: bool) -> None:
    owner = Trained(name)
    optimizer = torch.optim.Adam(owner.parameters(), 1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    losses, skipped = [], 0
    for step in range(50):
        with torch.autocast("cpu", torch.float16):
            loss = owner()
        before = state(owner, optimizer)
        optimizer.zero_grad()
        scaler.scale(loss * (1e38 if scaled and step == 25 else 1.0)).backward()  # overflows once
        scaler.step(optimizer)
        scaler.update()
        if scaled and step == 25:
            skipped = all(torch.equal(*pair) for pair in zip(before, state(owner, optimizer), strict=True))
        losses.append(float(loss.detach()))
    assert loss.dtype == torch.float32 and all(p.isfinite().all() for p in owner.parameters())
    assert losses[-1] < 0.8 * losses[0]
    assert not scaled or (skipped and scaler.get_scale() < 2.0**16)
    assert float(owner.loss.temperature) != 0.5


def test_autocast_to_float16_is_that_precision() -> None:
    g = torch.Generator().manual_seed(0)
    query, catalog = torch.randn(5, D, generator=g), torch.randn(V, D, generator=g)
    target = torch.randint(V, (5,), generator=g)
    with torch.autocast("cpu", torch.float16):
        ours = af.FullSoftmaxLoss()(query, catalog, target)
    assert torch.equal(ours, af.FullSoftmaxLoss(precision="fp16")(query, catalog, target))
    assert not torch.equal(ours, af.FullSoftmaxLoss()(query, catalog, target))


def test_a_half_model_trains_with_float32_losses() -> None:
    query, catalog = torch.randn(5, D).half().requires_grad_(), torch.randn(V, D).half().requires_grad_()
    loss = af.FullSoftmaxLoss(label_smoothing=0.1, weight=torch.ones(V).half())(query, catalog, torch.arange(5))
    loss.backward()
    assert loss.dtype == torch.float32 and query.grad is not None and query.grad.dtype == torch.float16
    expected = F.cross_entropy(query.float() @ catalog.float().T, torch.arange(5), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options_of_the_modules(reduction: str) -> None:
    """Label smoothing and weights of a padded batch, as the op has them."""
    g = torch.Generator().manual_seed(0)
    query, catalog = torch.randn(3, 4, D, generator=g), torch.randn(V, D, generator=g)
    target = torch.randint(V, (3, 4), generator=g).index_fill(1, torch.tensor([3]), -100)
    options: dict[str, Any] = {"weight": torch.rand(V, generator=g), "label_smoothing": 0.2, "reduction": reduction}
    ours = af.FullSoftmaxLoss(**options)(query, catalog, target)
    torch.testing.assert_close(ours, F.cross_entropy((query @ catalog.T).movedim(-1, 1), target, **options))
    temperature = nn.Parameter(torch.tensor(0.5))
    loss = af.FullSoftmaxLoss(temperature=temperature, **options)
    assert dict(loss.named_parameters()) == {"temperature": temperature} and set(loss.state_dict()) == {"temperature"}
    assert "temperature=learned" in repr(loss)
    loss(query, catalog, target).sum().backward()
    assert temperature.grad is not None and temperature.grad != 0
