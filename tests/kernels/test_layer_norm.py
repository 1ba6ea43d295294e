"""LayerNorm of item tables in Triton, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from alterrec_fast.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd

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
