"""AlterRec (Li et al. 2024), its ablations, naive fusions (appendix A), and the ensemble without interaction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alterrec_fast.model.encoders import ConcatItems, IdItems, MeanSession, SumItems, TextItems
from alterrec_fast.model.networks import NaiveConcat, Network, Recommender
from alterrec_fast.systems.system import Epoch, System, initialised, one_network, session_encoder

if TYPE_CHECKING:
    from alterrec_fast.training.config import Config


def in_turn(config: Config, interact: bool = True) -> Iterator[Epoch]:
    """Algorithm 1: m_random epochs of each network, then m_gap of each in turn, against ranks of the other one.

    interact: else no epoch has a teacher.
    """
    other = {"id": "text", "text": "id"}
    own = {"id": 0, "text": 0}
    warm = config.m_random
    for n in range(config.m_max):
        if n < 2 * warm:
            student, teacher = ("id" if n < warm else "text"), None
        else:
            student = "id" if (n - 2 * warm) % (2 * config.m_gap) < config.m_gap else "text"
            teacher = other[student] if interact else None
        yield Epoch(n + 1, student, teacher, own[student])
        own[student] += 1


def independently(config: Config) -> Iterator[Epoch]:
    return in_turn(config, interact=False)


def id_network(config: Config, num_items: int) -> Network:
    items, session = IdItems(num_items, config.width), session_encoder(config, config.id_session)
    return Network(items, session, config.temperature_id, num_items * config.item_bias)


def text_network(config: Config, features: Tensor | None) -> Network:
    assert features is not None
    items = TextItems(features, config.width, config.dropout)
    return Network(items, session_encoder(config, config.text_session), config.temperature_text)


def _two(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    made = initialised(config, {"id": id_network(config, num_items), "text": text_network(config, features)})
    made.fuse(config.alpha)
    return made


def alterrec(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """ID and text networks trained in turn, each against hard negatives that the other one ranks

    Li et al., "Enhancing ID and Text Fusion via Alternative Training in Session-based Recommendation", 2024.
    """
    return _two(config, num_items, features)


def alterrec_aug(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """ID and text networks trained in turn, on hard negatives and extra positives of the other one

    AlterRec_aug of the same paper: Eqs. (10) and (11).
    """
    return _two(config, num_items, features)


def random(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """ID and text networks trained in turn, against uniform negatives

    The ablation of the same paper that has no interaction.
    """
    return _two(config, num_items, features)


def ensemble(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """ID and text networks trained independently with the full softmax, their scores added

    No published system under this name: the idea of EnsRec (arXiv 2512.17820), on the networks and with as many epochs
    of each as AlterRec has, so that it tells what the interaction is worth.
    """
    return _two(config, num_items, features)


def id_only(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """The ID network alone

    AlterRec without text, an ablation of the same paper.
    """
    return initialised(config, {"id": id_network(config, num_items)})


def text_only(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """The text network alone

    AlterRec without IDs, an ablation of the same paper.
    """
    return initialised(config, {"text": text_network(config, features)})


def nfrec_sum(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """Naive fusion: one network on the sum of ID and text embeddings

    Appendix A of the same paper; sessions are encoded by the mean.
    """
    return initialised(config, {"fused": _naive(config, num_items, features, SumItems)})


def nfrec_concat(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """Naive fusion: one network on ID and text embeddings side by side

    Appendix A of the same paper; sessions are encoded by the mean.
    """
    return initialised(config, {"fused": _naive(config, num_items, features, ConcatItems)}, NaiveConcat)


def _naive(config: Config, num_items: int, features: Tensor | None, fusion: Any) -> Network:
    assert features is not None
    items: torch.nn.Module = fusion(IdItems(num_items, config.width), TextItems(features, config.width, config.dropout))
    return Network(items, MeanSession(), config.temperature_fusion)


# How the paper's published code trains, and how its text does, which names neither a schedule of the learning rate nor
# an early stop. What else they say is the package's own default.
_PRESETS = {
    "published": {
        "hard_fraction": 0.5, "alpha": 0.5, "lr_gamma": 0.1, "lr_step_id": 2, "lr_step_text": 5, "patience": 15,
    },
    "paper": {"hard_fraction": 1.0, "alpha": 0.5, "lr_gamma": 1.0, "patience": 30},
}  # fmt: skip
_TWO: Any = {"views": ("id", "text"), "text": True, "alternates": True}
_PAPER: Any = {"defaults": {"negatives": "uniform"}, "presets": _PRESETS}

ENTRIES = {
    "alterrec": System(alterrec, in_turn, **_TWO, **_PAPER),
    "alterrec_aug": System(alterrec_aug, in_turn, **_TWO, positives=True, **_PAPER),
    "random": System(random, independently, **_TWO, **_PAPER),
    "ensemble": System(ensemble, independently, **_TWO, presets=_PRESETS),
    "id_only": System(id_only, one_network("id"), ("id",), **_PAPER),
    "text_only": System(text_only, one_network("text"), ("text",), text=True, **_PAPER),
    "nfrec_sum": System(nfrec_sum, one_network("fused"), text=True, **_PAPER),
    "nfrec_concat": System(nfrec_concat, one_network("fused"), ("id", "text"), text=True, **_PAPER),
}
