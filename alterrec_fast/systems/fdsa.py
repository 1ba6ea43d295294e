"""FDSA: two transformers, one over item IDs and one over item text, joined in the query."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alterrec_fast.model.networks import ItemVectors, Network, Recommender
from alterrec_fast.model.packing import MaskedPacking, Packing
from alterrec_fast.model.transformer import stack
from alterrec_fast.systems.system import RECBOLE, System, initialised, one_network, recbole_style

if TYPE_CHECKING:
    from alterrec_fast.training.config import Config


class FdsaItems(nn.Module):
    """Rows are the table beside ReLU(Linear(S)) of the frozen features S; the catalog is the table alone."""

    features: Tensor

    def __init__(self, num_items: int, features: Tensor, width: int):
        super().__init__()
        self.register_buffer("features", features, persistent=False)  # (V, F)
        self.table = nn.Parameter(torch.empty(num_items, width))
        self.linear = nn.Linear(features.shape[1], width)

    def forward(self) -> ItemVectors:
        text = F.relu(self.linear(self.features))  # (V, d)
        return ItemVectors(torch.cat([self.table, text], 1), self.table)


class FdsaSession(nn.Module):
    """A stack of causal blocks for each half of the rows, over the same positions and under the same LayerNorm."""

    def __init__(self, config: Config):
        super().__init__()
        d, style = config.width, recbole_style(config)
        self.position = nn.Parameter(torch.empty(config.max_length, d))
        self.norm = nn.LayerNorm(d, style.eps)
        self.dropout = nn.Dropout(config.dropout)
        shape = (d, config.layers, config.heads, config.inner or 4 * d, config.dropout, style)
        self.streams = nn.ModuleDict({"id": stack(*shape), "text": stack(*shape)})
        self.join = nn.Linear(2 * d, d)

    def forward(self, x: Tensor, packing: Packing | MaskedPacking) -> Tensor:
        position = F.embedding(packing.position, self.position)
        encoded = []
        for rows, blocks in zip(x.chunk(2, 1), self.streams.values(), strict=True):
            assert isinstance(blocks, nn.ModuleList)
            h = self.dropout(self.norm(rows + position))  # (T, d)
            for block in blocks:
                h = block(h, packing)
            encoded.append(h)
        query: Tensor = self.dropout(self.norm(self.join(torch.cat(encoded, 1))))
        return query


def fdsa(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """Two transformers, over item IDs and over item text, joined in the query

    Zhang et al., "Feature-level Deeper Self-Attention Network for Sequential Recommendation", 2019, in the form of
    UniSRec's repository, which AlterRec compares with: one feature, the sentence embedding, and the full softmax over
    the ID table. Scores are equal to those of RecBole 1.2.1's FDSA with that feature and equal weights.
    """
    assert features is not None
    network = Network(
        FdsaItems(num_items, features, config.width),
        FdsaSession(config),
        config.temperature_fusion,
        num_items * config.item_bias,
    )
    return initialised(config, {"fused": network})


def fdsa_random_features(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """FDSA on random vectors in place of item text

    What UniSRec's repository trains as FDSA: its initialisation overwrites the loaded text features with N(0, 0.02
    squared), frozen. Beside `fdsa` it says what the text is worth.
    """
    assert features is not None
    drawn = torch.randn(features.shape, generator=torch.Generator().manual_seed(config.seed)) * 0.02
    return fdsa(config, num_items, drawn)


ENTRIES = {
    "fdsa": System(fdsa, one_network("fused"), text=True, defaults=RECBOLE),
    "fdsa_random_features": System(fdsa_random_features, one_network("fused"), text=True, defaults=RECBOLE),
}
