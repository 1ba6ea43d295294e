"""What the registry gives every system: defaults, refusals, item vectors of two kinds, a bias, the full softmax."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alterrec_fast.data.batches import pack
from alterrec_fast.data.sessions import Dataset
from alterrec_fast.model.networks import ItemVectors, Network, Recommender
from alterrec_fast.model.packing import Packing
from alterrec_fast.systems import DEFAULTS, SYSTEMS, epochs
from alterrec_fast.training.alternate import Trainer
from alterrec_fast.training.config import Config, ConfigError, demo_settings, from_mapping
from tests.training.test_steps import trainer


def test_what_is_left_unset_is_the_systems_default() -> None:
    assert (Config().negatives, Config().lr_gamma, Config(variant="sasrec").lr_gamma) == ("uniform", 0.1, 1.0)
    ensemble = Config(variant="ensemble", dropout=0.4)
    assert (ensemble.negatives, ensemble.dropout) == ("full", 0.4)
    changed = ensemble.replace(variant="random")
    assert (changed.negatives, changed.dropout) == ("uniform", 0.4)
    assert Config(variant="ensemble", negatives="uniform").replace(seed=1).negatives == "uniform"


PROCEDURE = {  # of the paper's section 5.1.3 and its published code
    "width": 300, "layers": 2, "heads": 2, "m_random": 2, "m_gap": 2, "m_max": 30, "alpha": 0.5, "positives": 5,
    "positive_weight": 0.5, "negatives": "uniform", "lr_id": 1e-3, "lr_text": 1e-3, "temperature_id": 1.0,
    "temperature_text": 0.07, "init": "uniform", "max_length": 50, "batch_targets": 512, "block": "post",
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "published": {"hard_fraction": 0.5, "lr_gamma": 0.1, "lr_step_id": 2, "lr_step_text": 5, "patience": 15},
    "paper": {"hard_fraction": 1.0, "lr_gamma": 1.0, "patience": 30},
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_as_published_and_what_is_set_overrides_it(name: str) -> None:
    config = Config(preset=name)
    assert vars(config).items() >= (PROCEDURE | PRESETS[name]).items()
    assert Config(preset=name, hard_fraction=0.25, lr_gamma=0.5).replace(seed=1).hard_fraction == 0.25
    assert config.replace(preset=None) == Config()
    assert Config().replace(preset=name) == config == from_mapping(tomllib.loads(config.to_toml()), "toml")
    for system in SYSTEMS.values():
        assert system.presets.get(name, {}).keys() <= DEFAULTS.keys()  # others have a default that would win
    demo = from_mapping({"preset": name, "demo": True} | demo_settings(preset=name), "demo")
    assert vars(demo).items() >= PRESETS[name].items() and demo.width == 64


def test_a_preset_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="preset must be one of published, paper for alterrec, got 'best'"):
        Config(preset="best")
    with pytest.raises(ConfigError, match="preset must be left out for sasrec, got 'paper'"):
        Config(variant="sasrec", preset="paper")


def test_only_networks_that_take_turns_need_epochs_for_both() -> None:
    assert [epoch.own for epoch in epochs(Config(variant="id_only", m_max=3))] == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"m_max must be at least 2 \* m_random = 4"):
        Config(m_max=3)


@pytest.mark.parametrize("variant", sorted(SYSTEMS))
def test_every_entry_says_what_it_is(variant: str) -> None:
    about, empty, *rest = (SYSTEMS[variant].build.__doc__ or "").splitlines()
    assert 10 < len(about) < 100 and not empty and any(rest)


def test_an_entry_refuses_with_its_reason(shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = replace(SYSTEMS["id_only"], refuses={"bf16": "it has no bits to spare", "resume": "it forgets"})
    monkeypatch.setitem(SYSTEMS, "id_only", refusing)
    with pytest.raises(ConfigError, match="id_only does not take bf16: it has no bits to spare"):
        trainer(shop, tmp_path, variant="id_only", precision="bf16")
    with pytest.raises(ConfigError, match="id_only does not take resume: it forgets"):
        trainer(shop, tmp_path, variant="id_only").resume()


class TwoTables(nn.Module):
    """Looked-up rows that differ from the catalog in width and values, and share a parameter with it."""

    def __init__(self, num_items: int, width: int):
        super().__init__()
        self.table, self.wide = nn.Parameter(torch.randn(num_items, width)), nn.Linear(width, 2 * width)

    def forward(self) -> ItemVectors:
        return ItemVectors(self.wide(self.table), F.normalize(self.table, dim=1))


class Halves(nn.Module):
    """The sum of both halves of each row."""

    def forward(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        first, second = x.chunk(2, 1)
        return packing.mean(first + second)


def two_tables(config: Config, num_items: int, features: torch.Tensor | None) -> Recommender:
    """A system of two kinds of item vectors, for this test alone"""
    network = Network(TwoTables(num_items, config.width), Halves(), 0.5, num_items)
    nn.init.normal_(network.bias)
    return Recommender({"id": network}, {"id": 1.0})


def made(shop: Dataset, run: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Trainer:
    monkeypatch.setitem(SYSTEMS, "id_only", replace(SYSTEMS["id_only"], build=two_tables))
    return trainer(shop, run, variant="id_only", **changes)


def test_the_full_softmax_trains_every_parameter(
    shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients equal F.cross_entropy's through autograd, with inputs apart from the catalog and a bias."""
    run = made(shop, tmp_path, monkeypatch, negatives="full")
    batch = pack(shop.train, np.arange(20), 50)
    losses, packing = run.gradients(next(epochs(run.config)), batch, None)
    network = run.recommender.network("id")
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    vectors = network.vectors()
    query = network.session(vectors.inputs[torch.from_numpy(batch.items)], packing)
    loss = F.cross_entropy((query @ vectors.catalog.T + network.bias) / 0.5, torch.from_numpy(batch.targets))
    loss.backward()
    assert float(losses["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: p.grad for name, p in network.named_parameters()}
    assert found.keys() == expected.keys() == {"bias", "items.table", "items.wide.weight", "items.wide.bias"}
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def test_a_bias_is_part_of_every_score(shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the fused view, and where the network is a teacher that ranks."""
    run = made(shop, tmp_path, monkeypatch)
    network, items, packing = run.recommender.network("id"), torch.tensor([3, 4, 5]), Packing.of(np.array([2, 1]))
    with torch.no_grad():
        vectors = run.recommender.vectors()
        view = run.recommender.views(vectors)["fused"]
        scores = view.query(run.recommender.queries(vectors, items, packing)) @ view.catalog.T
        query = network.session(vectors["id"].inputs[items], packing)
        expected = (query @ vectors["id"].catalog.T + network.bias) / 0.5
        torch.testing.assert_close(scores, expected)
        neg, _ = run._negatives(replace(next(epochs(run.config)), teacher="id"), items, packing, vectors["id"])
        assert neg is not None
        ranks = expected.argsort(descending=True, stable=True)[:, run.bounds[0] : run.bounds[1]]
        assert torch.equal(neg.indices(), ranks.sort().values)
