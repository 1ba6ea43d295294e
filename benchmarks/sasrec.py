"""SASRec in plain PyTorch (Kang and McAuley, 2018), as people write it: a causal transformer over padded sessions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SASRec(nn.Module):
    """Item 0 is padding. items (B, L), padded on the right -> a query (B, L, d) at every place."""

    def __init__(
        self, num_items: int, width: int, max_length: int, layers: int = 2, heads: int = 2, dropout: float = 0.2
    ):
        super().__init__()
        self.item = nn.Embedding(num_items, width, padding_idx=0)
        self.position = nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        for table in (self.item, self.position):
            nn.init.normal_(table.weight, std=0.02)
        with torch.no_grad():
            self.item.weight[0] = 0.0

    def forward(self, items: Tensor) -> Tensor:
        place = torch.arange(items.shape[1], device=items.device)
        x = self.dropout(self.item(items) + self.position(place))  # (B, L, d)
        for block in self.blocks:
            x = block(x)
        query: Tensor = self.norm(x)
        return query


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer. What padding on the right sees, nobody reads."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, length, d = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(b, length, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, L, d / h)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, length, d)
        x = x + self.dropout(self.out(attention))
        grown: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.norm_forward(x)))))
        return grown
