"""A SASRec as people write it in plain PyTorch, small enough to be read beside the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SASRec(nn.Module):
    """Item 0 is padding. items (B, L), padded on the right -> a query (B, L, d) at every place."""

    def __init__(self, num_items: int, width: int, max_length: int, dropout: float = 0.2):
        super().__init__()
        self.item = nn.Embedding(num_items, width, padding_idx=0)
        self.position = nn.Embedding(max_length, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 4 * width, dropout, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, items: Tensor) -> Tensor:
        x = self.item(items) + self.position.weight[: items.shape[1]]
        future = torch.full((items.shape[1], items.shape[1]), -torch.inf, device=items.device).triu(1)
        query: Tensor = self.norm(self.block(x, future))
        return query
