"""Networks: an item encoder, a session encoder and a temperature; and the recommenders made of one or two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alterrec_fast.model.packing import MaskedPacking, Packing


class ItemVectors(NamedTuple):
    """What an item encoder gives; `inputs` and `catalog` are one tensor where sessions look up what is ranked."""

    inputs: Tensor  # (V or more, k), the rows that sessions look up
    catalog: Tensor  # (V, d), what queries are compared with
    bias: Tensor | None = None  # (V,), added to each item's score before the temperature

    @property
    def ranked(self) -> Tensor:
        """(V, d), or with a bias (V, d + 1): its product with `Network.queries` is the score times the temperature."""
        return self.catalog if self.bias is None else torch.cat([self.catalog, self.bias.unsqueeze(1)], 1)

    def detached(self) -> ItemVectors:
        """On the CPU, without gradients."""
        inputs, catalog, bias = (None if tensor is None else tensor.detach().cpu() for tensor in self)
        assert inputs is not None and catalog is not None
        return ItemVectors(inputs, catalog, bias)


class Network(nn.Module):
    """An item encoder, a session encoder and a temperature; scores are ``(query @ catalog.T + bias) / temperature``."""

    def __init__(self, items: nn.Module, session: nn.Module, temperature: float, biased_items: int = 0):
        """items: gives (V, d) or `ItemVectors`. biased_items: V for a bias of each item, 0 for none."""
        super().__init__()
        self.items, self.session, self.temperature = items, session, temperature
        self.bias = nn.Parameter(torch.empty(biased_items)) if biased_items else None

    def vectors(self) -> ItemVectors:
        encoded = self.items()
        inputs, catalog, _ = encoded if isinstance(encoded, ItemVectors) else (encoded, encoded, None)
        return ItemVectors(inputs, catalog, self.bias)

    def queries(self, vectors: ItemVectors, items: Tensor, packing: Packing | MaskedPacking) -> Tensor:
        """items (T,) int64 -> (T, d), as wide as `vectors.ranked`: for each token the embedding of the prefix that ends
        there."""
        encoded: Tensor = self.session(vectors.inputs.index_select(0, items), packing)
        return encoded if self.bias is None else F.pad(encoded, (0, 1), value=1.0)


@dataclass(frozen=True)
class View:
    """One way to score: the networks that take part, each with a weight, and their catalogs side by side."""

    parts: tuple[tuple[str, float], ...]  # (name of a network, weight of its scores)
    catalog: Tensor  # (V, sum of widths)

    def query(self, queries: Mapping[str, Tensor]) -> Tensor:
        """Queries of each network (T, d) -> (T, sum of widths), such that one product with the catalog is the score."""
        return torch.cat([queries[name] * weight for name, weight in self.parts], 1)


class Recommender(nn.Module):
    """One or more networks by name, and how their scores are fused: ``sum_k weight_k * scores_k``.

    With an ID network of weight alpha and a text network of weight 1 - alpha this is AlterRec, Eq. (12).
    """

    def __init__(self, networks: Mapping[str, Network], weights: Mapping[str, float]):
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.weights = dict(weights)

    def network(self, name: str) -> Network:
        network = self.networks[name]
        assert isinstance(network, Network)
        return network

    @property
    def needs_groups(self) -> str:
        """Why a session encoder takes `Packing` alone; empty where all take `MaskedPacking` as well."""
        reasons = (getattr(self.network(name).session, "needs_groups", "") for name in self.networks)
        return next(filter(None, reasons), "")

    def fuse(self, alpha: float) -> None:
        """Weighs the scores of the ID network with alpha, those of the text network with 1 - alpha."""
        self.weights = _weights(alpha)

    def vectors(self) -> dict[str, ItemVectors]:
        return {name: self.network(name).vectors() for name in self.networks}

    def queries(
        self, vectors: Mapping[str, ItemVectors], items: Tensor, packing: Packing | MaskedPacking
    ) -> dict[str, Tensor]:
        """Queries (T, d) of each network; see `Network.queries`."""
        return {name: self.network(name).queries(vectors[name], items, packing) for name in self.networks}

    def views(self, vectors: Mapping[str, ItemVectors]) -> dict[str, View]:
        """ "fused", and where several networks take part or one can be taken apart, each part by its name."""
        ranked = {name: vectors[name].ranked for name in self.networks}
        parts = self._weighed(self.weights)
        views = {"fused": View(parts, torch.cat(list(ranked.values()), 1))}
        if len(parts) > 1:
            views |= {part[0]: View((part,), ranked[part[0]]) for part in parts}
        return views

    def at(self, fused: View, alpha: float) -> View:
        """The fused view, as `fuse(alpha)` would make it, over the same catalog."""
        return replace(fused, parts=self._weighed(_weights(alpha)))

    def _weighed(self, weights: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        return tuple((name, weights[name] / self.network(name).temperature) for name in self.networks)

    def parts(self, query: Tensor, catalog: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The queries (T, d) and catalogs (V, d) that one network's score is the sum of, by name; none by default."""
        return {}


def _weights(alpha: float) -> dict[str, float]:
    return {"id": alpha, "text": 1.0 - alpha}


class NaiveConcat(Recommender):
    """Naive fusion by concatenation: one network whose score is the sum of an ID and a text part (appendix B)."""

    def queries(
        self, vectors: Mapping[str, ItemVectors], items: Tensor, packing: Packing | MaskedPacking
    ) -> dict[str, Tensor]:
        whole = super().queries(vectors, items, packing)
        q_id, q_text = whole["fused"].chunk(2, 1)
        return {**whole, "id": q_id, "text": q_text}

    def views(self, vectors: Mapping[str, ItemVectors]) -> dict[str, View]:
        x, h = vectors["fused"].catalog.chunk(2, 1)
        weight = 1.0 / self.network("fused").temperature
        return super().views(vectors) | {"id": View((("id", weight),), x), "text": View((("text", weight),), h)}

    def parts(self, query: Tensor, catalog: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return dict(zip(("id", "text"), zip(query.chunk(2, 1), catalog.chunk(2, 1), strict=True), strict=True))
