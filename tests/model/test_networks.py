"""The packed pass over every prefix equals one padded pass for each prefix; recommenders fuse as the paper says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from alterrec_fast.data.batches import IGNORED, most_tokens, pack, pad, plan
from alterrec_fast.data.sessions import Sessions
from alterrec_fast.model.encoders import (
    ConcatItems,
    GruSession,
    IdItems,
    MeanSession,
    SumItems,
    TextItems,
    initialise,
)
from alterrec_fast.model.packing import MAX_PADDING, MaskedPacking, Packing, pad_heads
from alterrec_fast.model.transformer import Style, TransformerSession
from alterrec_fast.systems import build
from alterrec_fast.training.config import Config

lengths_lists = st.lists(st.integers(1, 12), min_size=1, max_size=30)


def make_sessions(lengths: list[int], num_items: int = 50, seed: int = 0) -> Sessions:
    rng = np.random.default_rng(seed)
    items = rng.integers(0, num_items, sum(lengths)).astype(np.int32)
    return Sessions(items, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


@given(lengths_lists)
def test_packing_spreads_and_gathers(lengths: list[int]) -> None:
    packing = Packing.of(np.array(lengths))
    tokens = torch.arange(sum(lengths)).unsqueeze(1)
    parts = packing.spread(tokens)
    assert torch.equal(packing.gather(parts), tokens)
    assert packing.token.numel() <= MAX_PADDING * packing.slot.numel()
    assert sum(part.shape[0] for part in parts) == len(lengths)
    ends = np.cumsum(lengths)
    assert packing.position.tolist() == [i for n in lengths for i in range(n)]
    starts = {int(end - n): n for end, n in zip(ends, lengths, strict=True)}
    for part in parts:
        for row in part.squeeze(2).tolist():
            n = starts.pop(row[0])  # every session once, its tokens in order, then its last one again
            assert row == [row[0] + min(i, n - 1) for i in range(len(row))]
    assert not starts


@pytest.mark.parametrize("lengths", [[], [0], [3, 0]])
def test_packing_needs_tokens(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Packing.of(np.array(lengths, dtype=np.int64))


def masked(lengths: list[int], padding: int = 0) -> MaskedPacking:
    """The sessions under one mask, and after them `padding` tokens that are sessions of their own."""
    position = [i for n in lengths for i in range(n)] + [0] * padding
    session = np.repeat(np.arange(len(lengths) + padding), lengths + [1] * padding)
    return MaskedPacking.of(torch.tensor(position), torch.from_numpy(session))


STYLES = {
    "transformer": Style(),
    "gelu": Style(activation="gelu", eps=1e-12, norm_input=True),
    "pre": Style("pre"),
    "ligr": Style("ligr"),
}


@pytest.mark.parametrize("kind", ["mean", "transformer", "ligr"])
@given(lengths=lengths_lists, padding=st.integers(0, 5))
def test_one_mask_gives_what_groups_give(kind: str, lengths: list[int], padding: int) -> None:
    """Forward and backward, with heads of odd width; padding changes nothing and gets nothing."""
    torch.manual_seed(0)
    encoder = MeanSession() if kind == "mean" else TransformerSession(10, 2, 2, 16, 12, 0.0, STYLES[kind])
    initialise(encoder, "xavier", 10)
    t, found = sum(lengths), []
    x, weight = torch.randn(t + padding, 10), torch.randn(t, 10)
    for packing, rows in ((Packing.of(np.array(lengths)), x[:t]), (masked(lengths, padding), x)):
        leaf = rows.clone().requires_grad_()
        encoder.zero_grad()
        out = encoder(leaf, packing)[:t]
        (out * weight).sum().backward()
        assert leaf.grad is not None
        assert not leaf.grad[t:].any()
        found.append(
            [out.detach(), leaf.grad[:t], *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["groups", "mask"])
def test_attention_drops_out_its_probabilities(kind: str) -> None:
    """With a value of ones in every token, what comes out is the sum of the probabilities that stay, scaled up."""
    torch.manual_seed(0)
    lengths = [40] * 20
    qkv = torch.ones(sum(lengths), 3, 1, 8)
    packing = Packing.of(np.array(lengths)) if kind == "groups" else masked(lengths)
    torch.testing.assert_close(packing.attend(qkv), torch.ones(sum(lengths), 8))
    kept = packing.attend(qkv, 0.5)[:, 0]
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.1)
    assert float(kept[:20].std()) > 0.05
    assert torch.isin(kept[::40], torch.tensor([0.0, 2.0])).all()  # first tokens have one probability alone


@pytest.mark.parametrize("width", [1, 7, 8, 150])
def test_padded_heads_attend_as_their_true_width_does(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv, weight = torch.randn(3, 2, 9, width, generator=generator), torch.randn(2, 9, width, generator=generator)
    found = []
    for padded in (False, True):
        leaf = qkv.clone().requires_grad_()
        q, k, v = pad_heads(leaf) if padded else leaf
        assert not padded or q.shape[-1] % 8 == 0
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=width**-0.5)[..., :width]
        (out * weight).sum().backward()
        found.append((out.detach(), leaf.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def padded_transformer(encoder: TransformerSession, x: torch.Tensor, width: int) -> torch.Tensor:
    """One prefix x (n, d), padded on the right to `width`, by torch's own layer of the same shape: its last token."""
    n, d = x.shape
    h = F.pad(x + encoder.position[:n], (0, 0, 0, width - n)).unsqueeze(0)
    for block in encoder.blocks:
        layer = torch.nn.TransformerEncoderLayer(d, block.heads, block.up.out_features, 0.0, batch_first=True)
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": block.qkv.weight,
                "self_attn.in_proj_bias": block.qkv.bias,
                "self_attn.out_proj.weight": block.out.weight,
                "self_attn.out_proj.bias": block.out.bias,
                "linear1.weight": block.up.weight,
                "linear1.bias": block.up.bias,
                "linear2.weight": block.down.weight,
                "linear2.bias": block.down.bias,
                "norm1.weight": block.norm_attention.weight,
                "norm1.bias": block.norm_attention.bias,
                "norm2.weight": block.norm_forward.weight,
                "norm2.bias": block.norm_forward.bias,
            }
        )
        padding = (torch.arange(width) >= n).unsqueeze(0)
        causal = torch.ones(width, width, dtype=torch.bool).triu(1)
        h = layer(h, src_mask=causal, src_key_padding_mask=padding)
    return h[0, n - 1]


@pytest.mark.parametrize("kind", ["mean", "transformer"])
@given(lengths=lengths_lists, seed=st.integers(0, 99))
def test_packed_prefixes_equal_padded_ones(kind: str, lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    encoder = MeanSession() if kind == "mean" else TransformerSession(8, 2, 2, 16, 12, 0.0)
    initialise(encoder, "xavier", 8)
    encoder.eval()
    x = torch.randn(sum(lengths), 8)
    with torch.no_grad():
        packed = encoder(x, Packing.of(np.array(lengths)))
        begin = 0
        for n in lengths:
            for end in range(1, n + 1):
                prefix = x[begin : begin + end]
                alone = prefix.mean(0) if kind == "mean" else padded_transformer(encoder, prefix, 12)
                torch.testing.assert_close(packed[begin + end - 1], alone, atol=1e-5, rtol=1e-5)
            begin += n


@pytest.mark.parametrize("kind", ["mean", "gru", *STYLES])
def test_gradients_do_not_leak_through_padding(kind: str) -> None:
    torch.manual_seed(0)
    encoder: torch.nn.Module = MeanSession() if kind == "mean" else GruSession(8, 12, 0.0)
    if kind in STYLES:
        encoder = TransformerSession(8, 2, 2, 16, 12, 0.0, STYLES[kind])
    initialise(encoder, "xavier", 8)
    lengths, x = np.array([11, 12, 10]), torch.randn(33, 8)
    together, alone = x.clone().requires_grad_(), x.clone().requires_grad_()
    encoder(together, Packing.of(lengths)).square().sum().backward()
    for begin, n in ((0, 11), (11, 12), (23, 10)):
        encoder(alone[begin : begin + n], Packing.of(np.array([n]))).square().sum().backward()
    assert together.grad is not None and alone.grad is not None
    torch.testing.assert_close(together.grad, alone.grad, atol=1e-4, rtol=1e-4)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=40), st.integers(2, 6), st.integers(1, 30))
def test_batches_hold_every_target_once(lengths: list[int], max_length: int, size: int) -> None:
    sessions = make_sessions(lengths)
    seen, targets = [], 0
    for which in plan(sessions, max_length, size, np.random.default_rng(0)):
        batch = pack(sessions, which, max_length)
        seen += which.tolist()
        targets += len(batch.targets)
        assert len(batch.targets) <= size + max_length
        begin = 0
        for session, n in zip(which.tolist(), batch.lengths.tolist(), strict=True):
            whole = sessions[session][-max_length:].tolist()
            assert batch.items[begin : begin + n].tolist() == whole[:-1]
            assert batch.targets[begin : begin + n].tolist() == whole[1:]
            begin += n
    assert sorted(seen) == list(range(len(lengths)))
    assert targets == sum(min(n, max_length) - 1 for n in lengths)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=40), st.integers(2, 6), st.integers(1, 30))
def test_padded_batches_have_one_size(lengths: list[int], max_length: int, size: int) -> None:
    sessions = make_sessions(lengths)
    most = most_tokens(sessions, max_length, size)
    out = np.empty((4, most), np.int64)
    for seed in range(3):
        for which in plan(sessions, max_length, size, np.random.default_rng(seed)):
            batch = pack(sessions, which, max_length)
            t = len(batch.items)
            pad(batch, out)
            items, targets, position, session = out
            assert np.array_equal(items[:t], batch.items) and np.array_equal(targets[:t], batch.targets)
            assert not items[t:].any() and (targets[t:] == IGNORED).all()
            assert np.array_equal(position[:t], Packing.of(batch.lengths).position.numpy())
            assert np.array_equal(np.bincount(session[:t]), batch.lengths)
            assert len(np.unique(session[t:])) == most - t and (session[t:] < 0).all() and not position[t:].any()


def test_a_batch_that_is_too_large_is_refused() -> None:
    batch = pack(make_sessions([4, 4]), np.arange(2), 10)
    with pytest.raises(ValueError, match="a batch of 6 tokens does not fit 5"):
        pad(batch, np.empty((4, 5), np.int64))


def test_fused_score_is_the_weighted_sum() -> None:
    """AlterRec, Eq. (12), in one product; and the parts of nfrec_concat, Eq. (14)."""
    torch.manual_seed(0)
    items, packing = torch.tensor([1, 2, 3, 0]), Packing.of(np.array([3, 1]))
    for variant in ("alterrec", "nfrec_concat"):
        config = Config(variant=variant, width=8, alpha=0.3, temperature_text=0.07)
        recommender = build(config, 10, torch.randn(10, 6)).eval()
        with torch.no_grad():
            vectors = recommender.vectors()
            queries = recommender.queries(vectors, items, packing)
            views = recommender.views(vectors)
            scores = {name: view.query(queries) @ view.catalog.T for name, view in views.items()}
            assert set(scores) == {"fused", "id", "text"}
            if variant == "alterrec":
                x = queries["id"] @ vectors["id"].catalog.T
                h = queries["text"] @ vectors["text"].catalog.T / 0.07
                torch.testing.assert_close(scores["fused"], 0.3 * x + 0.7 * h)
            else:
                torch.testing.assert_close(scores["fused"], scores["id"] + scores["text"])


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "decoupled_weight_decay"])
def test_an_item_tables_step_refuses_what_its_kernel_does_not_compute(option: str) -> None:
    items = IdItems(10, 4)
    optimizer = torch.optim.Adam(items.parameters(), **{option: True})
    with pytest.raises(ValueError, match=f"{option}=True"):
        items.step(torch.zeros(10, 4), optimizer)


def test_item_encoders_are_what_the_paper_says() -> None:
    """A LayerNorm over the table; Eq. (1) with its MLP and LayerNorm; and the sum and the two side by side."""
    torch.manual_seed(0)
    features = torch.randn(10, 6)
    ids, text = IdItems(10, 4), TextItems(features, 4, 0.5).eval()
    for encoder in (ids, text):
        initialise(encoder, "uniform", 4)
    x = F.layer_norm(ids.table, (4,), ids.norm.weight, ids.norm.bias)
    mlp = F.relu(features @ text.linear.weight.T + text.linear.bias)
    h = F.layer_norm(mlp, (4,), text.norm.weight, text.norm.bias)
    for encoder, expected in (
        (ids, x),
        (text, h),
        (SumItems(ids, text), x + h),
        (ConcatItems(ids, text), torch.cat([x, h], 1)),
    ):
        torch.testing.assert_close(encoder(), expected)
    assert not torch.equal(text.train()(), h)  # dropout
    assert "features" not in text.state_dict()


def test_each_network_has_the_session_encoder_of_its_setting() -> None:
    made = build(Config(width=8, id_session="mean", text_session="transformer"), 10, torch.randn(10, 6))
    assert isinstance(made.network("id").session, MeanSession)
    assert isinstance(made.network("text").session, TransformerSession)
    for variant in ("nfrec_sum", "nfrec_concat"):  # the mean, appendix A
        assert isinstance(build(Config(variant=variant), 10, torch.randn(10, 6)).network("fused").session, MeanSession)


def test_uniform_initialisation_covers_every_parameter() -> None:
    recommender = build(Config(width=64), 10, torch.randn(10, 6))
    for name, parameter in recommender.named_parameters():
        assert parameter.abs().max() <= 1 / 8, name
        assert parameter.std() > 0.01, name
    with pytest.raises(ValueError, match="'zero'"):
        initialise(recommender, "zero", 64)
