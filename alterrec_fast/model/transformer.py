"""The causal transformer that encodes sessions, with the options in which published ones differ.

Notation: T packed tokens, d width, h heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alterrec_fast.model.packing import MaskedPacking, Packing

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class Style:
    """How a transformer is built; the default is AlterRec's (appendix D)."""

    block: str = "post"  # "post": LayerNorm after each sum, "pre": before each part, "ligr": pre with gates and SwiGLU
    activation: str = "relu"  # of the feed-forward layer: "relu", or "gelu", by erf; LiGR has its own
    eps: float = 1e-5  # of every LayerNorm
    attention_dropout: float = 0.0  # of the attention's probabilities
    norm_input: bool = False  # a LayerNorm over the sum of rows and positions


class TransformerSession(nn.Module):
    """A causal transformer whose output at each token encodes the prefix that ends there (AlterRec, appendix D)."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        inner: int,
        max_length: int,
        dropout: float,
        style: Style | None = None,
    ):
        super().__init__()
        style = style or Style()
        self.position = nn.Parameter(torch.empty(max_length, width))
        self.norm_input = nn.LayerNorm(width, style.eps) if style.norm_input else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.blocks = stack(width, layers, heads, inner, dropout, style)
        self.norm_output = nn.LayerNorm(width, style.eps) if style.block == "pre" else nn.Identity()

    def forward(self, x: Tensor, packing: Packing | MaskedPacking) -> Tensor:
        # A look-up by F.embedding: unlike an index's, its gradient is one kernel on CUDA, with one order of summation.
        x = self.dropout(self.norm_input(x + F.embedding(packing.position, self.position)))  # (T, d)
        for block in self.blocks:
            x = block(x, packing)
        vectors: Tensor = self.norm_output(x)
        return vectors


def stack(width: int, layers: int, heads: int, inner: int, dropout: float, style: Style) -> nn.ModuleList:
    """The blocks of a transformer. Raises ValueError where the width is no multiple of the heads."""
    kinds = {"post": Block, "pre": PreNormBlock, "ligr": LiGRBlock}
    if style.block not in kinds:
        raise ValueError(f"block must be one of {', '.join(kinds)}, got {style.block!r}")
    return nn.ModuleList(kinds[style.block](width, heads, inner, dropout, style) for _ in range(layers))


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each followed by a LayerNorm over the sum with its input."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float, style: Style):
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.heads, self.attention_dropout = heads, style.attention_dropout
        self.activation = ACTIVATIONS[style.activation]
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_attention = nn.LayerNorm(width, style.eps)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.norm_forward = nn.LayerNorm(width, style.eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, packing: Packing | MaskedPacking) -> Tensor:
        x = self.norm_attention(x + self.dropout(self.attend(x, packing)))
        vectors: Tensor = self.norm_forward(x + self.dropout(self.feed(x)))
        return vectors

    def attend(self, x: Tensor, packing: Packing | MaskedPacking) -> Tensor:
        t, d = x.shape
        qkv = self.qkv(x).view(t, 3, self.heads, d // self.heads)  # (T, 3, h, d / h)
        attention: Tensor = self.out(packing.attend(qkv, self.attention_dropout if self.training else 0.0))
        return attention

    def feed(self, x: Tensor) -> Tensor:
        vectors: Tensor = self.down(self.activation(self.up(x)))
        return vectors


class PreNormBlock(Block):
    """The same with each LayerNorm before its part, so that sums go through as they are."""

    def forward(self, x: Tensor, packing: Packing | MaskedPacking) -> Tensor:
        x = x + self.dropout(self.attend(self.norm_attention(x), packing))
        vectors: Tensor = x + self.dropout(self.feed(self.norm_forward(x)))
        return vectors


class LiGRBlock(Block):
    """LiGR (Borisyuk et al. 2025): pre-LayerNorm, a gate on what each part adds, and a SwiGLU without biases."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float, style: Style):
        super().__init__(width, heads, inner, dropout, style)
        self.up = nn.Linear(width, 2 * inner, bias=False)  # what is gated, and what gates it
        self.down = nn.Linear(inner, width, bias=False)
        self.gate_attention = nn.Linear(width, width)
        self.gate_forward = nn.Linear(width, width)

    def forward(self, x: Tensor, packing: Packing | MaskedPacking) -> Tensor:
        x = x + self.gate_attention(x).sigmoid() * self.dropout(self.attend(self.norm_attention(x), packing))
        vectors: Tensor = x + self.gate_forward(x).sigmoid() * self.dropout(self.feed(self.norm_forward(x)))
        return vectors

    def feed(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        vectors: Tensor = self.down(self.dropout(F.silu(gate) * value))
        return vectors
