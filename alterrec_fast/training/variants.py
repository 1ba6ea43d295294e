"""The variants by name: which networks each is made of, and which of them every epoch trains against what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alterrec_fast.model.encoders import (
    ConcatItems,
    IdItems,
    MeanSession,
    SumItems,
    TextItems,
    TransformerSession,
    initialise,
)
from alterrec_fast.model.networks import NaiveConcat, Network, Recommender
from alterrec_fast.training.config import Config

BOTH = ("alterrec", "alterrec_aug", "random")
NAIVE = ("nfrec_sum", "nfrec_concat")


@dataclass(frozen=True)
class Epoch:
    """One pass over the training targets by one network."""

    number: int  # from 1
    student: str  # the network that is trained
    teacher: str | None  # the frozen network whose rank slices are the negatives; None: uniform negatives
    own: int  # epochs that the student was trained for before


def epochs(config: Config) -> Iterator[Epoch]:
    """The plan of a run: Algorithm 1 for the variants of two networks, m_max epochs of the only network for others."""
    if config.variant not in BOTH:
        only = {"id_only": "id", "text_only": "text"}.get(config.variant, "fused")
        yield from (Epoch(n + 1, only, None, n) for n in range(config.m_max))
        return
    other = {"id": "text", "text": "id"}
    own = {"id": 0, "text": 0}
    warm = config.m_random
    for n in range(config.m_max):
        if n < 2 * warm:
            student, teacher = ("id" if n < warm else "text"), None
        else:
            student = "id" if (n - 2 * warm) % (2 * config.m_gap) < config.m_gap else "text"
            teacher = None if config.variant == "random" else other[student]
        yield Epoch(n + 1, student, teacher, own[student])
        own[student] += 1


def needs_text(config: Config) -> bool:
    return config.variant != "id_only"


def build(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """The recommender of a variant, initialised from the torch random state. features: (V, F), None for id_only."""
    d = config.width

    def id_items() -> IdItems:
        return IdItems(num_items, d)

    def text_items() -> TextItems:
        assert features is not None
        return TextItems(features, d, config.dropout)

    def session(kind: str) -> torch.nn.Module:
        if kind == "mean":
            return MeanSession()
        inner = config.inner or 4 * d
        return TransformerSession(d, config.layers, config.heads, inner, config.max_length, config.dropout)

    if config.variant in NAIVE:  # the mean of the fused items, as in appendix A
        items = (SumItems if config.variant == "nfrec_sum" else ConcatItems)(id_items(), text_items())
        networks = {"fused": Network(items, MeanSession(), config.temperature_fusion)}
        weights = {"fused": 1.0}
    else:
        networks, weights = {}, {}
        if config.variant != "text_only":
            networks["id"] = Network(id_items(), session(config.id_session), config.temperature_id)
            weights["id"] = config.alpha if config.variant in BOTH else 1.0
        if config.variant != "id_only":
            networks["text"] = Network(text_items(), session(config.text_session), config.temperature_text)
            weights["text"] = 1.0 - config.alpha if config.variant in BOTH else 1.0
    for network in networks.values():
        initialise(network, config.init, d)
    return (NaiveConcat if config.variant == "nfrec_concat" else Recommender)(networks, weights)
