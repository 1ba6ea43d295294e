"""CORE: session and item vectors in one space."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alterrec_fast.model.networks import ItemVectors, Network, Recommender
from alterrec_fast.model.packing import MaskedPacking, Packing
from alterrec_fast.systems.system import RECBOLE, System, initialised, one_network, recbole_style, session_encoder

if TYPE_CHECKING:
    from alterrec_fast.training.config import Config

ITEM_DROPOUT = 0.2  # of looked-up rows and of the catalog


class CoreItems(nn.Module):
    """Rows of a table as they are, and a catalog of unit vectors under dropout."""

    def __init__(self, num_items: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_items, width))
        self.dropout = nn.Dropout(ITEM_DROPOUT)

    def forward(self) -> ItemVectors:
        return ItemVectors(self.table, F.normalize(self.dropout(self.table), dim=1))


class CoreSession(nn.Module):
    """The direction of a weighted mean of the prefix's rows; a transformer gives the weights' logits."""

    def __init__(self, transformer: nn.Module, width: int):
        super().__init__()
        self.transformer = transformer
        self.logit = nn.Linear(width, 1)
        self.dropout = nn.Dropout(ITEM_DROPOUT)

    def forward(self, x: Tensor, packing: Packing | MaskedPacking) -> Tensor:
        x = self.dropout(x)  # (T, d)
        logits = self.logit(self.transformer(x, packing)).squeeze(1)  # (T,), which do not depend on later items
        return F.normalize(packing.weigh(logits, x), dim=1)


def core(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """Cosines of item vectors with weighted means of them

    Hou et al., "CORE: Simple and Effective Session-based Recommendation within Consistent Representation Space", 2022,
    its transformer form, as RecBole 1.2.1 builds it. Scores are equal to RecBole's with equal weights.
    """
    transformer = session_encoder(config, "transformer", recbole_style(config))
    session = CoreSession(transformer, config.width)
    network = Network(CoreItems(num_items, config.width), session, config.temperature_id, num_items * config.item_bias)
    return initialised(config, {"id": network})


ENTRIES = {
    "core": System(core, one_network("id"), ("id",), defaults=RECBOLE | {"init": "uniform", "temperature_id": 0.07}),
}
