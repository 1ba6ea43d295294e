"""What the baselines are beyond the architectures that tests/integrations hold against RecBole and RecTools."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from alterrec_fast.data.sessions import Dataset
from alterrec_fast.model.packing import MaskedPacking, Packing
from alterrec_fast.model.transformer import LiGRBlock
from alterrec_fast.systems import build
from alterrec_fast.systems.sasrec import pca
from alterrec_fast.training.config import Config
from tests.training.test_steps import trainer

SIZES = {"width": 8, "layers": 1, "inner": 16}


def test_principal_components_are_those_of_the_singular_values() -> None:
    features = torch.randn(50, 12) * torch.arange(1, 13) + 5.0
    found = pca(features, 4)
    centred = features - features.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = (u * s)[:, :4]
    torch.testing.assert_close(found * (found[0] * expected[0]).sign(), expected, rtol=1e-3, atol=1e-3)
    directions = torch.linalg.lstsq(centred, found).solution  # (F, 4)
    assert (directions.gather(0, directions.abs().argmax(0, keepdim=True)) > 0).all()
    assert pca(features, 20).shape == (50, 12)


@pytest.mark.parametrize("width", [8, 40])
def test_llm2sasrec_starts_from_the_text(width: int) -> None:
    features = torch.randn(30, 12)
    torch.manual_seed(0)
    start = build(Config(variant="sasrec", width=width), 30, None).state_dict()
    torch.manual_seed(0)
    made = build(Config(variant="llm2sasrec", width=width), 30, features).state_dict()
    table, known = made.pop("networks.id.items.table"), min(width, 12)
    assert torch.equal(table[:, :known], pca(features, width))
    assert torch.equal(table[:, known:], start.pop("networks.id.items.table")[:, known:])
    assert made.keys() == start.keys() and all(torch.equal(made[name], start[name]) for name in made)


def test_random_features_follow_the_seed_alone() -> None:
    """Twice the same without a seed of torch's, since a run that is loaded builds its networks anew."""
    text = torch.randn(30, 12)

    def drawn(seed: int) -> torch.Tensor:
        made = build(Config(variant="fdsa_random_features", seed=seed, **SIZES), 30, text)
        return made.network("fused").get_buffer("items.features")

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert float(drawn(0).std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("kind", ["groups", "mask"])
def test_weighed_sums_are_softmax_means_of_prefixes(kind: str) -> None:
    lengths = [3, 1, 4]
    session = torch.tensor(np.repeat([0, 1, 2], lengths))
    packing = Packing.of(np.array(lengths))
    logits, x = 30 * torch.randn(8), torch.randn(8, 5)
    found = (packing if kind == "groups" else MaskedPacking.of(packing.position, session)).weigh(logits, x)
    for token in range(8):
        prefix = slice(token - int(packing.position[token]), token + 1)
        torch.testing.assert_close(found[token], logits[prefix].softmax(0) @ x[prefix])


def test_core_scores_are_cosines(shop: Dataset, tmp_path: Path) -> None:
    made = trainer(shop, tmp_path, variant="core").recommender.eval()
    items, packing = torch.tensor([1, 2, 3]), Packing.of(np.array([3]))
    with torch.no_grad():
        vectors = made.vectors()
        query = made.queries(vectors, items, packing)["id"]
    torch.testing.assert_close(query.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(query[0], F.normalize(vectors["id"].inputs[1], dim=0))  # of one item, itself
    assert made.network("id").temperature == 0.07


@pytest.mark.parametrize("variant", ["alterrec", "ensemble", "sasrec"])
def test_any_transformer_takes_ligr_blocks(variant: str) -> None:
    made = build(Config(variant=variant, block="ligr", **SIZES), 30, torch.randn(30, 12))
    for name in made.networks:
        assert all(isinstance(block, LiGRBlock) for block in made.network(name).session.blocks)


def test_a_gru_can_carry_alterrec() -> None:
    made = build(Config(id_session="gru", text_session="gru", **SIZES), 30, torch.randn(30, 12))
    assert "groups of sessions" in made.needs_groups
    assert not build(Config(**SIZES), 30, torch.randn(30, 12)).needs_groups
