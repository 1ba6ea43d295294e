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


class TableItems(nn.Module):
    """An embedding table as it is, which sessions look up and queries are compared with (SASRec)."""

    def __init__(self, num_items: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_items, width))

    def forward(self) -> Tensor:
        return self.table  # (V, d)


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


class GruSession(nn.Module):
    """A GRU without biases over each session, and a Linear back to the width (GRU4Rec as RecBole builds it)."""

    needs_groups = "a GRU goes through groups of sessions"  # the reason why it takes no MaskedPacking

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(width, hidden, bias=False, batch_first=True)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        states = [self.gru(part)[0] for part in packing.spread(self.dropout(x))]  # padding follows each session
        vectors: Tensor = self.out(packing.gather(states))
        return vectors  # (T, d)


def initialise(module: nn.Module, scheme: str, width: int) -> None:
    """ "uniform": every parameter from U(-1/sqrt(d), 1/sqrt(d)), LayerNorms included, as the published code ends up.
    "xavier": Xavier-normal matrices, zero biases, LayerNorms at the identity. "normal": the same with matrices from
    N(0, 0.02 squared), as BERT has it.
    """
    bound = 1.0 / math.sqrt(width)
    if scheme == "uniform":
        for parameter in module.parameters():
            nn.init.uniform_(parameter, -bound, bound)
    elif scheme in ("xavier", "normal"):
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and scheme == "xavier":
                nn.init.xavier_normal_(parameter)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            elif "norm" not in name:
                nn.init.zeros_(parameter)
    else:
        raise ValueError(f"init must be 'uniform', 'xavier' or 'normal', got {scheme!r}")
