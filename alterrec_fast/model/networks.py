"""Networks: an item encoder, a session encoder and a temperature; and the recommenders made of one or two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alterrec_fast.model.packing import MaskedPacking, Packing


class Network(nn.Module):
    """Scores are ``queries @ catalog.T / temperature``; baselines are other item encoders in the same frame."""

    def __init__(self, items: nn.Module, session: nn.Module, temperature: float):
        super().__init__()
        self.items, self.session, self.temperature = items, session, temperature

    def catalog(self) -> Tensor:
        """(V, d), a vector for each item."""
        vectors: Tensor = self.items()
        return vectors

    def queries(self, catalog: Tensor, items: Tensor, packing: Packing | MaskedPacking) -> Tensor:
        """catalog (V, d), items (T,) int64 -> (T, d): for each token the embedding of the prefix that ends there."""
        encoded: Tensor = self.session(catalog.index_select(0, items), packing)
        return encoded


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

    def catalogs(self) -> dict[str, Tensor]:
        return {name: self.network(name).catalog() for name in self.networks}

    def queries(
        self, catalogs: Mapping[str, Tensor], items: Tensor, packing: Packing | MaskedPacking
    ) -> dict[str, Tensor]:
        """Queries (T, d) of each network; see `Network.queries`."""
        return {name: self.network(name).queries(catalogs[name], items, packing) for name in self.networks}

    def views(self, catalogs: Mapping[str, Tensor]) -> dict[str, View]:
        """ "fused", and where several networks take part or one can be taken apart, each part by its name."""
        parts = tuple((name, self.weights[name] / self.network(name).temperature) for name in self.networks)
        views = {"fused": View(parts, torch.cat([catalogs[name] for name, _ in parts], 1))}
        if len(parts) > 1:
            views |= {part[0]: View((part,), catalogs[part[0]]) for part in parts}
        return views


class NaiveConcat(Recommender):
    """Naive fusion by concatenation: one network whose score is the sum of an ID and a text part (appendix B)."""

    def queries(
        self, catalogs: Mapping[str, Tensor], items: Tensor, packing: Packing | MaskedPacking
    ) -> dict[str, Tensor]:
        whole = super().queries(catalogs, items, packing)
        q_id, q_text = whole["fused"].chunk(2, 1)
        return {**whole, "id": q_id, "text": q_text}

    def views(self, catalogs: Mapping[str, Tensor]) -> dict[str, View]:
        x, h = catalogs["fused"].chunk(2, 1)
        weight = 1.0 / self.network("fused").temperature
        return super().views(catalogs) | {"id": View((("id", weight),), x), "text": View((("text", weight),), h)}
