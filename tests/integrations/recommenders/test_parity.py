"""Systems against RecBole 1.2.1's models of the same weights, every prefix one of its rows; LiGR against RecTools.

Weights are redrawn at a standard deviation of 0.3: the usual 0.02 leaves attention uniform, which hides errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recbole.model.sequential_recommender import CORE, FDSA, GRU4Rec, SASRec, fdsa
from rectools.models.nn.transformers.ligr import LiGRLayers
from torch import Tensor, nn

from alterrec_fast.data.batches import Batch, pack
from alterrec_fast.data.sessions import Dataset, Sessions
from alterrec_fast.model.packing import Packing
from alterrec_fast.model.transformer import Style, stack
from alterrec_fast.systems import epochs
from alterrec_fast.training.alternate import Trainer
from alterrec_fast.training.config import Config

ITEMS, WIDTH, TEXT, LENGTH = 80, 64, 24, 50
STOCK = {"sasrec": SASRec, "gru4rec": GRU4Rec, "core": CORE, "fdsa": FDSA}
SETTINGS = {
    "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "length",
    "NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": LENGTH, "device": "cpu", "loss_type": "CE", "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "initializer_range": 0.02, "hidden_size": WIDTH, "embedding_size": WIDTH, "n_layers": 2,
    "n_heads": 2, "inner_size": 256, "hidden_dropout_prob": 0.5, "attn_dropout_prob": 0.5,
    "selected_features": ["text"], "pooling_mode": "mean", "dnn_type": "trm", "sess_dropout": 0.2,
    "item_dropout": 0.2, "temperature": 0.07,
}  # fmt: skip
GRU_SETTINGS = {"hidden_size": 2 * WIDTH, "num_layers": 1, "dropout_prob": 0.3}


class Fields:
    """What RecBole's models ask of a data set."""

    def __init__(self) -> None:
        self.field2seqlen = {"item_list": LENGTH}

    def num(self, field: str) -> int:
        return ITEMS + 1


class OneFeature(nn.Module):
    """In FDSA's feature layer's place: ReLU(Linear(S)) of each item's text, as UniSRec's repository has it."""

    def __init__(self, *_: Any):
        super().__init__()
        self.linear, self.text = nn.Linear(TEXT, WIDTH), features()

    def forward(self, _: None, items: Tensor) -> Any:
        rows = F.relu(self.linear(self.text.to(self.linear.weight.dtype)))
        return {"item": F.pad(rows, (0, 0, 1, 0))[items].unsqueeze(-2)}, {"item": None}


def features() -> Tensor:
    return torch.randn(ITEMS, TEXT, generator=torch.Generator().manual_seed(1))


def sessions() -> Sessions:
    """Of 2 to 50 items, with repeats, immediate ones too."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([[2, 3, 50, 50], rng.integers(2, 14, 56)])
    items = np.repeat(rng.integers(0, ITEMS, lengths.sum()), rng.integers(1, 3, lengths.sum()))[: lengths.sum()]
    return Sessions(items.astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]))


@pytest.fixture(params=STOCK)
def pair(request: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Trainer, Any]:
    """Our trainer of a system and RecBole's model, of equal weights, both without dropout."""
    name = request.param
    monkeypatch.setattr(fdsa, "FeatureSeqEmbLayer", OneFeature)
    theirs = STOCK[name]({**SETTINGS, **(GRU_SETTINGS if name == "gru4rec" else {})}, Fields())
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    data = Dataset(Path(), sessions(), sessions(), sessions(), {"num_items": ITEMS, "text_columns": []})
    config = Config(variant=name, data="x", width=WIDTH, max_length=LENGTH, device="cpu")
    ours = Trainer(config, data, features(), Path())
    with torch.no_grad():
        for _, mine, parts in weights(ours, theirs):
            mine.copy_(torch.cat(parts))
    ours.recommender.eval()
    return ours, theirs.eval()


def weights(ours: Trainer, theirs: Any) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """(name, our parameter, RecBole's parameters that it is made of, one above the other), the padding row left out."""
    (network,) = ours.recommender.networks.values()
    mine = dict(network.named_parameters())
    # FDSA's attention over features has no say where there is one.
    other = {name: p for name, p in theirs.named_parameters() if not name.startswith("feature_att_layer")}
    assert len(other) == len({name for _, names in names_of(ours.config.variant) for name in names})
    for name, names in names_of(ours.config.variant):
        yield name, mine.pop(name), [other[n][1:] if n == "item_embedding.weight" else other[n] for n in names]
    assert not mine


def names_of(variant: str) -> list[tuple[str, list[str]]]:
    """Our parameters' names, and RecBole's for them."""
    names = [("items.table", ["item_embedding.weight"])]
    if variant == "gru4rec":
        names += [(f"session.gru.weight_{x}_l0", [f"gru_layers.weight_{x}_l0"]) for x in ("ih", "hh")]
        return names + [(f"session.out.{x}", [f"dense.{x}"]) for x in ("weight", "bias")]
    here, there, norm = {
        "sasrec": ("session.", "", "norm_input"),
        "core": ("session.transformer.", "net.", "norm_input"),
        "fdsa": ("session.", "", "norm"),
    }[variant]
    names.append((f"{here}position", [f"{there}position_embedding.weight"]))
    stacks = {"blocks": "trm_encoder"}
    if variant == "fdsa":
        stacks = {"streams.id": "item_trm_encoder", "streams.text": "feature_trm_encoder"}
    for kind in ("weight", "bias"):
        names.append((f"{here}{norm}.{kind}", [f"{there}LayerNorm.{kind}"]))
        if variant == "core":
            names.append((f"session.logit.{kind}", [f"net.fn.{kind}"]))
        if variant == "fdsa":
            names.append((f"session.join.{kind}", [f"concat_layer.{kind}"]))
            names.append((f"items.linear.{kind}", [f"feature_embed_layer.linear.{kind}"]))
        for (blocks, encoder), layer in ((pair, layer) for pair in stacks.items() for layer in range(2)):
            block, attention = f"{here}{blocks}.{layer}", f"{there}{encoder}.layer.{layer}.multi_head_attention"
            forward = f"{there}{encoder}.layer.{layer}.feed_forward"
            names += [
                (f"{block}.qkv.{kind}", [f"{attention}.{part}.{kind}" for part in ("query", "key", "value")]),
                (f"{block}.out.{kind}", [f"{attention}.dense.{kind}"]),
                (f"{block}.norm_attention.{kind}", [f"{attention}.LayerNorm.{kind}"]),
                (f"{block}.up.{kind}", [f"{forward}.dense_1.{kind}"]),
                (f"{block}.down.{kind}", [f"{forward}.dense_2.{kind}"]),
                (f"{block}.norm_forward.{kind}", [f"{forward}.LayerNorm.{kind}"]),
            ]
    return names


def their_logits(theirs: Any, batch: Batch) -> Tensor:
    """(T, V): every prefix as one padded row, the padding item's score left out."""
    rows = torch.zeros(len(batch.items), LENGTH, dtype=torch.int64)
    position = Packing.of(batch.lengths).position
    for row, last in enumerate(position.tolist()):
        rows[row, : last + 1] = torch.from_numpy(batch.items[row - last : row + 1]) + 1
    return theirs.full_sort_predict({"item_list": rows, "length": position + 1})[:, 1:]


def test_scores_are_equal(pair: tuple[Trainer, Any]) -> None:
    ours, theirs = pair
    recommender, exact = ours.recommender, ours.config.variant != "core"  # which computes its softmax in float32
    if exact:
        recommender.double(), theirs.double()
    batch = pack(sessions(), np.arange(60), LENGTH)
    with torch.no_grad():
        vectors = recommender.vectors()
        view = recommender.views(vectors)["fused"]
        queries = recommender.queries(vectors, torch.from_numpy(batch.items), Packing.of(batch.lengths))
        scores, expected = view.query(queries) @ view.catalog.T, their_logits(theirs, batch)
    tolerance = 1e-10 if exact else 1e-5
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)


def test_loss_and_gradients_are_equal(pair: tuple[Trainer, Any]) -> None:
    ours, theirs = pair
    batch = pack(sessions(), np.arange(20), LENGTH)
    losses, _ = ours.gradients(next(epochs(ours.config)), batch, None)
    loss = F.cross_entropy(their_logits(theirs, batch), torch.from_numpy(batch.targets))
    loss.backward()
    assert float(losses["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    (network,) = ours.recommender.networks.values()
    mine = dict(network.named_parameters())
    for name, names in names_of(ours.config.variant):
        expected = torch.cat([grads[n][1:] if n == "item_embedding.weight" else grads[n] for n in names])
        assert (mine[name].grad - expected).norm() <= 1e-3 * expected.norm() + 1e-7, name


def test_twenty_steps_have_equal_losses(pair: tuple[Trainer, Any]) -> None:
    ours, theirs = pair
    optimizer = torch.optim.Adam(theirs.parameters(), ours.config.lr_id)
    for step in range(20):
        batch = pack(sessions(), np.arange(6) + 6 * (step % 10), LENGTH)
        losses, _ = ours.step(next(epochs(ours.config)), batch, None)
        loss = F.cross_entropy(their_logits(theirs, batch), torch.from_numpy(batch.targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert float(losses["loss"]) == pytest.approx(loss.item(), abs=1e-4), step


def test_ligr_blocks_are_rectools() -> None:
    theirs = LiGRLayers(2, 32, 4, 0.0).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    ours = stack(32, 2, 4, 128, 0.0, Style("ligr")).double()
    x, future = torch.randn(5, 9, 32, dtype=torch.float64), torch.ones(9, 9, dtype=torch.bool).triu(1)
    found, packing = x.flatten(0, 1), Packing.of(np.full(5, 9))
    for block, layer in zip(ours, theirs.transformer_blocks, strict=True):
        forward, attention = layer.feed_forward, layer.multi_head_attn
        named = {
            "qkv": (attention.in_proj_weight, attention.in_proj_bias),
            "out": attention.out_proj, "norm_attention": layer.layer_norm_1, "norm_forward": layer.layer_norm_2,
            "up": (torch.cat([forward.ff_linear_1.weight, forward.ff_linear_3.weight]), None),
            "down": forward.ff_linear_2,
            "gate_attention": layer.gating_linear_1, "gate_forward": layer.gating_linear_2,
        }  # fmt: skip
        state = {}
        for name, module in named.items():
            weight, bias = module if isinstance(module, tuple) else (module.weight, module.bias)
            state |= {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
        block.load_state_dict(state)
        found, x = block(found, packing), layer(x, future, None)
        torch.testing.assert_close(found, x.flatten(0, 1), rtol=1e-10, atol=1e-10)
