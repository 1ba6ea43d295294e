"""SASRec, and what differs from it in one part: the encoder (GRU4Rec, eSASRec) or the table's start (LLM2SASRec)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from alterrec_fast.model.encoders import TableItems
from alterrec_fast.model.networks import Network, Recommender
from alterrec_fast.model.transformer import Style
from alterrec_fast.systems.system import (
    CONSTANT,
    RECBOLE,
    System,
    initialised,
    one_network,
    recbole_style,
    session_encoder,
)

if TYPE_CHECKING:
    from alterrec_fast.training.config import Config


def _over_one_table(config: Config, num_items: int, session: nn.Module) -> Recommender:
    """A session encoder over a table that queries are compared with as it is."""
    items = TableItems(num_items, config.width)
    return initialised(config, {"id": Network(items, session, config.temperature_id, num_items * config.item_bias)})


def sasrec(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """A causal transformer over item IDs

    Kang and McAuley, "Self-Attentive Sequential Recommendation", 2018, in RecBole 1.2.1's form: post-LayerNorm with
    GELU, a LayerNorm over the sum with positions, dropout also of the attention, and the full softmax in place of a
    binary loss over one negative. Scores are equal to RecBole's with equal weights.
    """
    return _over_one_table(config, num_items, session_encoder(config, "transformer", recbole_style(config)))


def gru4rec(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """A GRU over item IDs

    Named after Hidasi et al. 2016; the architecture is RecBole 1.2.1's GRU4Rec (Tan et al., "Improved Recurrent Neural
    Networks for Session-based Recommendations", 2016), with the full softmax. Scores are equal to RecBole's with equal
    weights; all matrices start from Xavier's normal law, where RecBole's GRU has the uniform one.
    """
    return _over_one_table(config, num_items, session_encoder(config, "gru"))


def esasrec(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """SASRec with LiGR blocks

    Tikhonovich et al., "eSASRec", 2025, as RecTools builds it, with the full softmax in place of 256 sampled negatives,
    positions counted from the session's start, and no dropout of item vectors. Its blocks are equal to RecTools'.
    """
    style = Style(config.block, attention_dropout=config.dropout)
    return _over_one_table(config, num_items, session_encoder(config, "transformer", style))


def llm2sasrec(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """SASRec whose item table starts from the text's principal components

    Harte et al., "Leveraging Large Language Models for Sequential Recommendation", 2023 (extended: arXiv 2402.01339):
    sentence embeddings, centred and reduced to the width, neither whitened nor normalised. Columns beyond their width
    keep SASRec's start.
    """
    assert features is not None
    made = sasrec(config, num_items, features)
    start = pca(features, config.width)
    with torch.no_grad():
        made.network("id").get_parameter("items.table")[:, : start.shape[1]] = start
    return made


def pca(features: Tensor, width: int) -> Tensor:
    """features (V, F) -> (V, min(width, F)) float32: centred, in the directions of largest variance, largest first.

    Each direction's entry of largest magnitude is positive, so that the result does not depend on the solver.
    """
    centred = features.double() - features.double().mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    directions = directions.flip(1)[:, :width]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))  # (1, width)
    components: Tensor = centred @ (directions * largest.sign())
    return components.float()


ENTRIES = {
    "sasrec": System(sasrec, one_network("id"), ("id",), defaults=RECBOLE),
    "gru4rec": System(gru4rec, one_network("id"), ("id",), defaults={"dropout": 0.3, "init": "xavier"} | CONSTANT),
    "esasrec": System(
        esasrec, one_network("id"), ("id",), defaults={"block": "ligr", "dropout": 0.2, "init": "xavier"} | CONSTANT
    ),
    "llm2sasrec": System(llm2sasrec, one_network("id"), ("id",), text=True, defaults=RECBOLE),
}
