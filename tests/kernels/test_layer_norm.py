"""LayerNorm of item tables in Triton, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from alterrec_fast.kernels.layer_norm import Adam, layer_norm_adam, layer_norm_bwd, layer_norm_fwd

EPS = 1e-5


@pytest.mark.parametrize(("items", "width"), [(1, 1), (3, 2), (70, 16), (37, 300), (255, 128), (9, 1024)])
def test_layer_norm_is_torchs(items: int, width: int, guarded: list[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3.0 * torch.randn(items, width, generator=generator) + 2.0
    weight, bias = torch.randn(2, width, generator=generator)
    grad = torch.randn(items, width, generator=generator)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    want = F.layer_norm(leaves[0], (width,), *leaves[1:], EPS)
    want.backward(grad.double())
    torch.testing.assert_close(layer_norm_fwd(x, weight, bias, EPS).double(), want, rtol=1e-5, atol=1e-5)
    for found, leaf in zip(layer_norm_bwd(grad, x, weight, EPS), leaves, strict=True):
        torch.testing.assert_close(found.double(), leaf.grad, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("items", "width"), [(1, 3), (37, 300), (70, 16)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_of_adam_is_torchs(items: int, width: int, weight_decay: float, guarded: list[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(items, width, generator=generator)
    weight, bias = torch.randn(2, width, generator=generator)
    leaf = x.clone().requires_grad_()
    gains = [t.clone().requires_grad_() for t in (weight, bias)]
    optimizer = torch.optim.Adam([leaf], 0.01, weight_decay=weight_decay)
    moment, square = torch.zeros_like(x), torch.zeros_like(x)
    for number in (1.0, 2.0, 3.0):
        grad = torch.randn(items, width, generator=generator)
        optimizer.zero_grad()
        F.layer_norm(leaf, (width,), *gains, EPS).backward(grad)
        state = Adam(moment, square, torch.tensor(number), torch.tensor(0.01), (0.9, 0.999), 1e-8, weight_decay)
        found = layer_norm_adam(grad, x, weight, EPS, state)
        for mine, gain in zip(found, gains, strict=True):
            torch.testing.assert_close(mine, gain.grad, rtol=1e-4, atol=1e-4)
            gain.grad = None
        optimizer.step()
        torch.testing.assert_close(x, leaf.detach(), rtol=1e-5, atol=1e-5)
    held = optimizer.state[leaf]
    torch.testing.assert_close(moment, held["exp_avg"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(square, held["exp_avg_sq"], rtol=1e-4, atol=1e-6)
