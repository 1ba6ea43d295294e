"""Item encoders (one vector for each catalog item) and session encoders (one vector for each prefix of a session).

Notation: V items, d width, F width of the sentence embeddings, T packed tokens, h heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alterrec_fast.model.packing import MaskedPacking, Packing
from alterrec_fast.ops.layer_norm import has_kernels, layer_norm, layer_norm_adam


class IdItems(nn.Module):
    """X: an embedding table under a LayerNorm (AlterRec, section 4.1.1)."""

    def __init__(self, num_items: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_items, width))
        self.norm = nn.LayerNorm(width)

    def forward(self) -> Tensor:
        return _norm(self.norm, self.table)  # (V, d)

    def can_step(self) -> bool:
        """Whether `step` works here: on CUDA, where Triton is present."""
        return has_kernels(self.table, self.norm.weight, self.norm.bias)

    @torch.no_grad()
    def step(self, grad: Tensor, optimizer: torch.optim.Adam) -> None:
        """The table's step of a capturable Adam, by the gradient grad (V, d) of `forward`'s vectors, in one pass.

        The gradients of the LayerNorm's parameters are left in them; the table has none, so that the optimiser's own
        step leaves it alone. Raises ValueError for an optimizer with an option that the kernel does not compute.
        """
        (group,) = optimizer.param_groups
        for option in ("amsgrad", "maximize", "decoupled_weight_decay"):
            if group.get(option):
                raise ValueError(f"an item table's step is that of plain Adam, got {option}={group[option]}")
        grads = layer_norm_adam(self.table, self.norm, grad, optimizer.state[self.table], group)
        self.norm.weight.grad, self.norm.bias.grad = grads


class TextItems(nn.Module):
    """H: an MLP over frozen sentence embeddings (AlterRec, Eq. 1): Linear, ReLU, Dropout, LayerNorm."""

    features: Tensor

    def __init__(self, features: Tensor, width: int, dropout: float):
        super().__init__()
        self.register_buffer("features", features, persistent=False)  # (V, F), from the text cache, not the checkpoint
        self.linear = nn.Linear(features.shape[1], width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self) -> Tensor:
        return _norm(self.norm, self.dropout(F.relu(self.linear(self.features))))  # (V, d)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


class SumItems(nn.Module):
    """Z = X + H (naive fusion, appendix A)."""

    def __init__(self, id_items: IdItems, text_items: TextItems):
        super().__init__()
        self.id, self.text = id_items, text_items

    def forward(self) -> Tensor:
        vectors: Tensor = self.id() + self.text()
        return vectors  # (V, d)


class ConcatItems(nn.Module):
    """Z = [X, H] (naive fusion, appendix A)."""

    def __init__(self, id_items: IdItems, text_items: TextItems):
        super().__init__()
        self.id, self.text = id_items, text_items

    def forward(self) -> Tensor:
        return torch.cat([self.id(), self.text()], 1)  # (V, 2 d)


class MeanSession(nn.Module):
    """The mean of a prefix's items (AlterRec, Eq. 2), for every prefix at once."""

    def forward(self, x: Tensor, packing: Packing | MaskedPacking) -> Tensor:
        return packing.mean(x)  # (T, d)


class TransformerSession(nn.Module):
    """A causal transformer whose output at each token encodes the prefix that ends there (AlterRec, appendix D)."""

    def __init__(self, width: int, layers: int, heads: int, inner: int, max_length: int, dropout: float):
        super().__init__()
        self.position = nn.Parameter(torch.empty(max_length, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, inner, dropout) for _ in range(layers))

    def forward(self, x: Tensor, packing: Packing | MaskedPacking) -> Tensor:
        # A look-up by F.embedding: unlike an index's, its gradient is one kernel on CUDA, with one order of summation.
        x = self.dropout(x + F.embedding(packing.position, self.position))  # (T, d)
        for block in self.blocks:
            x = block(x, packing)
        return x


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each followed by a LayerNorm over the sum with its input."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float):
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_attention = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.norm_forward = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, packing: Packing | MaskedPacking) -> Tensor:
        t, d = x.shape
        qkv = self.qkv(x).view(t, 3, self.heads, d // self.heads)  # (T, 3, h, d / h)
        attention = self.out(packing.attend(qkv))
        x = self.norm_attention(x + self.dropout(attention))
        vectors: Tensor = self.norm_forward(x + self.dropout(self.down(F.relu(self.up(x)))))
        return vectors


def initialise(module: nn.Module, scheme: str, width: int) -> None:
    """ "uniform": every parameter from U(-1/sqrt(d), 1/sqrt(d)), LayerNorms included, as the published code ends up.
    "xavier": Xavier-normal matrices, zero biases, LayerNorms at the identity.
    """
    bound = 1.0 / math.sqrt(width)
    if scheme == "uniform":
        for parameter in module.parameters():
            nn.init.uniform_(parameter, -bound, bound)
    elif scheme == "xavier":
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                nn.init.xavier_normal_(parameter)
            elif "norm" not in name:
                nn.init.zeros_(parameter)
    else:
        raise ValueError(f"init must be 'uniform' or 'xavier', got {scheme!r}")
