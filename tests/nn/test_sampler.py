"""RankSliceSampler: what its negatives are, for every teacher, and that a run can be broken off or spread out."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import alterrec_fast as af
from tests.conftest import integers
from tests.nn.sasrec import SASRec

V, D, B, L = 300, 8, 5, 4


def batch(seed: int = 0, padding: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query (B, L, D), catalog (V, D), target (B, L) and history (B, L), padded on the right by item 0."""
    g = torch.Generator().manual_seed(seed)
    items = torch.randint(1, V, (B, L + 1), generator=g)
    lengths = torch.randint(1, L + 1, (B, 1), generator=g)
    past = torch.arange(L) >= lengths
    target = items[:, 1:].masked_fill(past, padding)
    return integers(B * L, D, seed).view(B, L, D), integers(V, D, seed + 1), target, items[:, :-1].masked_fill(past, 0)


def expected_sets(query: Tensor, catalog: Tensor, target: Tensor, start: int, stop: int, first: int) -> list[set[int]]:
    """For each row of query (T, d) the items of ranks [start, stop) but the target."""
    order = (query @ catalog[first:].T).sort(dim=1, descending=True, stable=True).indices[:, start:stop] + first
    return [set(row.tolist()) - {int(t)} for row, t in zip(order, target, strict=True)]


def sets(negatives: Tensor) -> list[set[int]]:
    return [set(row.tolist()) - {-1} for row in negatives]


@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(0, 6),
    length=st.integers(0, 4),
    first=st.integers(0, 2),
    start=st.integers(0, 30),
    size=st.integers(0, 60),
    flat=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_live_model_ranks_with_the_queries_of_the_step(
    b: int, length: int, first: int, start: int, size: int, flat: bool, seed: int
) -> None:
    query, catalog = integers(b * length, D, seed).view(b, length, D), integers(V, D, seed + 1)
    target = torch.randint(first, V, (b, length), generator=torch.Generator().manual_seed(seed))
    target[torch.rand(b, length) < 0.4] = -100
    if flat:
        query, target = query.flatten(0, 1), target.flatten()
    sampler = af.RankSliceSampler(start, start + size, first_item=first)
    neg = sampler(query.requires_grad_(), catalog, target)
    real = target != -100
    assert sets(neg.indices()) == expected_sets(query[real], catalog, target[real], start, start + size, first)


def test_a_bias_belongs_to_the_models_own_scores() -> None:
    query, catalog, target, history = batch()
    bias = integers(V, 1, 9).squeeze(1) * 5
    real = target != 0
    wide, with_bias = torch.nn.functional.pad(query[real], (0, 1), value=1), torch.cat([catalog, bias[:, None]], 1)
    sampler = af.RankSliceSampler(3, 40, ignore_index=0)
    neg = sampler(query, catalog, target, bias=bias)
    assert sets(neg.indices()) == expected_sets(wide, with_bias, target[real], 3, 40, 0)
    taught = af.RankSliceSampler(3, 40, ignore_index=0, teacher=lambda _: (query, catalog))
    neg = taught(query, catalog, target, history=history, bias=bias)
    assert sets(neg.indices()) == expected_sets(query[real], catalog, target[real], 3, 40, 0)


@pytest.mark.parametrize("random", ["uniform", "popularity", "log_uniform"])
@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("hard_fraction", [0.0, 0.5, 1.0])
def test_an_item_masked_by_its_bias_is_no_negative(hard_fraction: float, taught: bool, random: str) -> None:
    query, catalog, target, history = batch(2)
    bias = torch.where(torch.arange(V) % 2 == 0, -torch.inf, 0.25)
    sampler = af.RankSliceSampler(
        2,
        60,
        hard_fraction=hard_fraction,
        random=random,
        popularity=torch.ones(V) if random == "popularity" else None,
        teacher=(lambda _: (query, catalog)) if taught else None,
        first_item=1,
        ignore_index=0,
    )
    given = {"history": history, "bias": bias}
    for ids in (
        sampler(query, catalog, target, **given).indices(),
        sampler.sample(query, catalog, target, num_negatives=40, **given),
    ):
        assert (ids[ids >= 0] % 2 == 1).all() and (ids >= 0).any(1).all()
    real = target[target != 0]
    if hard_fraction == 1.0:  # ranks count the other items alone
        scores = query[target != 0] @ catalog[1::2].T
        order = 2 * scores.sort(dim=1, descending=True, stable=True).indices[:, 2:60] + 1
        expected = [set(row.tolist()) - {int(t)} for row, t in zip(order, real, strict=True)]
        assert sets(sampler(query, catalog, target, **given).indices()) == expected
    everything = torch.full((V,), -torch.inf)
    if hard_fraction < 1.0:
        with pytest.raises(ValueError, match="bias is -inf for every item that could be drawn"):
            sampler.sample(query, catalog, target, num_negatives=40, history=history, bias=everything)


def test_a_session_does_not_meet_its_own_items() -> None:
    query, catalog, target, history = batch()
    sampler = af.RankSliceSampler(0, V - 1, exclude_history=True, first_item=1, ignore_index=0)
    neg = sampler(query, catalog, target, history=history)
    rows = [b for b in range(B) for t in target[b].tolist() if t != 0]
    for row, found in zip(rows, sets(neg.indices()), strict=True):
        assert found == set(range(1, V)) - set(history[row].tolist()) - set(target[row].tolist())
    ids = sampler.sample(query, catalog, target, num_negatives=200, history=history)
    assert all(found <= whole for found, whole in zip(sets(ids), sets(neg.indices()), strict=True))
    random = af.RankSliceSampler(0, 200, exclude_history=True, first_item=1, ignore_index=0, hard_fraction=0)
    for found in (
        random(query, catalog, target, history=history).indices(),
        random.sample(query, catalog, target, num_negatives=400, history=history),
    ):
        assert all(row <= whole for row, whole in zip(sets(found), sets(neg.indices()), strict=True))
        assert (found >= 0).sum() > 0.4 * found.numel()
    last = af.RankSliceSampler(0, V - 1, exclude_history=True, first_item=1)(
        query[:, -1], catalog, target[:, 0], history=history
    )
    assert sets(last.indices())[0] == set(range(1, V)) - set(history[0].tolist()) - {int(target[0, 0])}


def test_vectors_of_another_modality_teach_by_the_mean_of_the_items_so_far() -> None:
    query, catalog, target, history = batch(3)
    text = torch.randn(V, 20)
    sampler = af.RankSliceSampler(2, 50, teacher=text, first_item=1, ignore_index=0)
    neg = sampler(query, catalog, target, history=history)
    means = [text[history[b, : place + 1]].mean(0) for b, place in (target != 0).nonzero().tolist()]
    real = target[target != 0]
    assert sets(neg.indices()) == expected_sets(torch.stack(means), text, real, 2, 50, 1)
    last = sampler(query[:, -1], catalog, target[:, 0], history=history)
    whole = torch.stack([text[h[h > 0]].mean(0) for h in history])
    assert sets(last.indices()) == expected_sets(whole, text, target[:, 0], 2, 50, 1)


def test_a_copy_teaches_with_its_own_weights_and_follows_slowly() -> None:
    torch.manual_seed(0)
    model = SASRec(V, D, L, dropout=0.5)
    first = copy.deepcopy(model.state_dict())
    teacher = af.TeacherCopy(model, lambda m, items: (m(items), m.item.weight), decay=0.75)
    _, _, target, history = batch(4)
    sampler = af.RankSliceSampler(0, 60, teacher=teacher, first_item=1, ignore_index=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    old = SASRec(V, D, L)
    old.load_state_dict(first)
    query = old.eval()(history)
    neg = sampler(model(history), model.item.weight, target, history=history)
    real = target != 0
    assert sets(neg.indices()) == expected_sets(query[real], old.item.weight, target[real], 0, 60, 1)
    assert sets(sampler(model(history), model.item.weight, target, inputs=(history,)).indices()) == sets(neg.indices())
    teacher.update(model)
    for name, value in teacher.copy.module.state_dict().items():
        torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * model.state_dict()[name])
    assert not any(p.requires_grad for p in teacher.copy.parameters()) and model.training
    still = af.TeacherCopy(model, teacher.vectors)
    with torch.no_grad():
        model.item.weight.zero_()
    assert still.copy.module.item.weight.any()
    still.update(model)  # decay 0 takes over all
    assert not still.copy.module.item.weight.any()


@pytest.mark.parametrize("random", ["uniform", "popularity", "log_uniform"])
def test_random_negatives_follow_their_law(random: str) -> None:
    items, rows, first = 40, 4000, 2
    popularity = torch.arange(items).float() if random == "popularity" else None
    weights = {
        "uniform": torch.ones(items),
        "popularity": torch.arange(items).float(),
        "log_uniform": torch.tensor([0.0] * first + [math.log((k + 2) / (k + 1)) for k in range(items - first)]),
    }[random]
    weights[:first] = 0
    law = weights / weights.sum()
    options = {"hard_fraction": 0.0, "random": random, "popularity": popularity, "first_item": first}
    sampler = af.RankSliceSampler(0, 10, **options)
    query, catalog, target = torch.zeros(rows, 1), torch.zeros(items, 1), torch.full((rows,), first)
    drawn = sampler.sample(query, catalog, target, num_negatives=10)
    assert ((drawn == -1).float().mean() - law[first]).abs() < 5 / math.sqrt(drawn.numel())  # drawn was the target
    counts = torch.bincount(drawn[drawn >= 0], minlength=items)
    law[first] = 0
    assert (counts / drawn.numel() - law).abs().max() < 5 / math.sqrt(drawn.numel())
    share = sampler(query, catalog, target).mask().float().mean(0)
    enters = law * 10 if random != "uniform" else (law > 0) * 10 / items
    assert (share - enters.clamp(max=1)).abs().max() < 5 * math.sqrt(0.25 / rows)


def test_log_q_turns_popular_negatives_into_the_full_softmax() -> None:
    """The corrected loss over many negatives is the loss over all items (TensorFlow's candidate sampling)."""
    torch.manual_seed(0)
    popularity = torch.rand(V) ** 3 + 0.01
    sampler = af.RankSliceSampler(0, 10, hard_fraction=0, random="popularity", popularity=popularity)
    query, catalog, target = torch.randn(30, D), 0.5 * torch.randn(V, D), torch.randint(0, V, (30,))
    negatives = sampler.sample(query, catalog, target, num_negatives=40_000)
    log_q = sampler.log_q(num_negatives=40_000, num_items=V)
    torch.testing.assert_close(log_q.exp().sum(), torch.tensor(40_000.0), rtol=1e-4, atol=0)
    counts = torch.bincount(negatives[negatives >= 0], minlength=V) / 30
    torch.testing.assert_close(counts, log_q.exp(), rtol=0.2, atol=5)
    # log_q of the target is subtracted as well, which makes it count once, like a negative that came up as expected.
    corrected = af.SampledSoftmaxLoss(log_q=log_q)(query, catalog, target, negatives)
    y = query @ catalog.T
    others = y.scatter(1, target[:, None], -torch.inf).logsumexp(1)
    expected = torch.nn.functional.softplus(others - y.gather(1, target[:, None])[:, 0] + log_q[target]).mean()
    torch.testing.assert_close(corrected, expected, rtol=0.01, atol=0)
    rare = af.RankSliceSampler(0, 1, hard_fraction=0, random="popularity", popularity=torch.tensor([5.0, 0, 2, 1]))
    torch.testing.assert_close(rare.log_q(num_negatives=8, num_items=4), torch.tensor([5.0, 1, 2, 1]).log())


def test_a_share_of_the_hard_ones_is_traded() -> None:
    query, catalog = integers(400, D, 1), integers(V, D, 2)
    target = torch.zeros(400, dtype=torch.int64)
    hard = af.RankSliceSampler(20, 80)(query, catalog, target).mask()
    sampler = af.RankSliceSampler(20, 80, hard_fraction=0.25)
    mixed = sampler(query, catalog, target).mask()
    assert abs((mixed & hard).sum() / hard.sum() - 0.25) < 0.02
    assert abs((mixed & ~hard).sum() / (~hard).sum() - 0.75 * 60 / V) < 0.02
    ids = sampler.sample(query, catalog, target, num_negatives=8)
    assert ids.shape == (400, 8) and hard.gather(1, ids[:, :2]).all()
    assert not hard.gather(1, ids[:, 2:].clamp(min=0)).all(1).any()


def test_a_run_that_goes_on_draws_what_it_would_have_drawn() -> None:
    query, catalog, target, history = batch(5)

    def make(seed: int) -> af.RankSliceSampler:
        model = torch.nn.Embedding(V, D)
        torch.manual_seed(1)
        teacher = af.TeacherCopy(model, lambda m, items: (m(items), m.weight), decay=0.5)
        return af.RankSliceSampler(5, 60, hard_fraction=0.5, teacher=teacher, seed=seed, ignore_index=0)

    def draw(sampler: af.RankSliceSampler) -> Tensor:
        return sampler(query, catalog, target, history=history).mask()

    one, other = make(4), make(5)
    first, second = draw(one), draw(one)
    assert not torch.equal(first, second)
    assert other.seed != one.seed
    stored = io.BytesIO()
    torch.save(one.state_dict(), stored)
    stored.seek(0)
    third, ids = draw(one), one.sample(query, catalog, target, num_negatives=9, history=history)
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert torch.equal(draw(other), third)
    assert torch.equal(other.sample(query, catalog, target, num_negatives=9, history=history), ids)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"start": 6}, {}, "expected 0 <= start <= stop, got start=6, stop=5"),
        ({"stop": 301}, {}, "rank 301 is beyond the catalog, which holds 300 items"),
        ({"hard_fraction": 1.5}, {}, r"hard_fraction must lie in \[0, 1\], got 1.5"),
        ({"random": "zipf"}, {}, "random must be one of uniform, popularity, log_uniform, got 'zipf'"),
        ({"random": "popularity"}, {}, "popularity goes with random='popularity', got .* popularity None"),
        ({"popularity": torch.ones(3)}, {}, r"got random='uniform' and popularity \(3,\)"),
        (
            {"random": "popularity", "popularity": torch.ones(3), "hard_fraction": 0.0},
            {},
            r"popularity must be \(300,\), got \(3,\)",
        ),
        ({"teacher": torch.ones(3)}, {}, r"teacher, where a tensor, must be \(V, f\), got \(3,\)"),
        ({"teacher": torch.ones(V, 3)}, {}, "history is needed: a teacher of item vectors"),
        (
            {"teacher": torch.ones(7, 3)},
            {"history": torch.ones(B, L).long()},
            r"catalog must be \(300, f\), got \(7, 3\)",
        ),
        (
            {"teacher": lambda: (torch.ones(B, 3), torch.ones(V, 3))},
            {"inputs": ()},
            r"query must be \(5, 4\) and f, got \(5, 3\)",
        ),
        ({"exclude_history": True}, {}, "history is needed: exclude_history keeps"),
        ({"exclude_history": True}, {"history": torch.full((B, L), V)}, "history holds 300, expected ids below 300"),
        ({"teacher": torch.ones(V, 3)}, {"history": torch.full((B, L), V)}, "history holds 300, expected ids below"),
        ({"teacher": torch.ones(V, 3)}, {"history": torch.ones(B).long()}, r"history must be \(5, L\), got \(5,\)"),
        ({"first_item": -1}, {}, "first_item must be at least 0, got -1"),
        ({"seed": -1}, {}, r"seed must lie in \[0, 2 \*\* 63\), got -1"),
        ({"seed": 2**63}, {}, "seed must lie in"),
    ],
)
def test_errors_name_the_value_and_what_was_expected(
    options: dict[str, Any], call: dict[str, Any], message: str
) -> None:
    query, catalog, target, _ = batch(7)
    with pytest.raises(ValueError, match=message):
        af.RankSliceSampler(**{"start": 0, "stop": 5, **options})(query, catalog, target, **call)


def test_other_errors() -> None:
    query, catalog, target, _ = batch(7)
    with pytest.raises(
        TypeError, match=r"teacher, where a tensor, must be float32, bfloat16 or float16, got torch\.int64"
    ):
        af.RankSliceSampler(0, 5, teacher=torch.ones(V, 3).long())
    for options, call, name in (
        ({"exclude_history": True}, {"history": torch.ones(B, L)}, "history"),
        ({}, {"target": target.float()}, "target"),
    ):
        with pytest.raises(TypeError, match=rf"{name} must be int32 or int64, got torch\.float32"):
            af.RankSliceSampler(0, 5, **options)(query, catalog, **{"target": target, **call})
    with pytest.raises(ValueError, match="first_item must be below the 300 items, got 300"):
        af.RankSliceSampler(0, 5, hard_fraction=0, first_item=V).sample(query, catalog, target, num_negatives=3)
    with pytest.raises(TypeError, match=r"teacher must return a tuple \(query, catalog\), got a tensor .*"):
        af.RankSliceSampler(0, 5, teacher=lambda: query)(query, catalog, target, inputs=())
    with pytest.raises(TypeError, match=r"the teacher's catalog must be a torch.Tensor, got int 0"):
        af.RankSliceSampler(0, 5, teacher=lambda: (query, 0))(query, catalog, target, inputs=())
    with pytest.raises(ValueError, match=r"log_q is defined for hard_fraction = 0, got 0\.5"):
        af.RankSliceSampler(0, 5, hard_fraction=0.5).log_q(num_negatives=5, num_items=V)
    with pytest.raises(ValueError, match=r"state must be \(2,\) int64, seed and draws, got \{'draws': 0\}"):
        af.RankSliceSampler(0, 5).load_state_dict({"_extra_state": {"draws": 0}})
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\], got 2"):
        af.TeacherCopy(torch.nn.Linear(2, 2), lambda m: (m, m), decay=2)


class _Draw:
    """A collate function that samples in a DataLoader's worker."""

    def __init__(self) -> None:
        self.sampler = af.RankSliceSampler(0, 9, hard_fraction=0)

    def __call__(self, rows: list[int]) -> Tensor:
        target = torch.tensor(rows)
        return self.sampler.sample(torch.zeros(len(rows), 1), torch.zeros(V, 1), target, num_negatives=6)


def test_workers_of_a_data_loader_draw_apart_and_anew_each_epoch() -> None:
    loader = DataLoader(range(8), batch_size=2, num_workers=2, collate_fn=_Draw(), multiprocessing_context="fork")
    draws = [tuple(part.flatten().tolist()) for _ in range(2) for part in loader]
    assert len(set(draws)) == 8


def _train(rank: int, folder: str, steps: int) -> None:
    """One process of a distributed run; stores its parameters, its negatives and its share of the data."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(SASRec(V, D, L, dropout=0.0))
    teacher = af.TeacherCopy(model, lambda m, items: (m(items), m.item.weight), decay=0.5)
    sampler = af.RankSliceSampler(5, 100, hard_fraction=0.5, teacher=teacher, first_item=1, ignore_index=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    drawn, loss = [], af.SliceCrossEntropy(first_item=1, ignore_index=0)
    for step in range(steps):
        _, _, target, history = batch(2 * step + rank)
        query, catalog = model(history), model.module.item.weight
        neg = sampler(query, catalog, target, history=history)
        optimizer.zero_grad()
        loss(query, catalog, target, neg).backward()
        optimizer.step()
        teacher.update(model)
        drawn.append(neg.mask())
    states = [model.module.state_dict(), teacher.copy.module.state_dict()]
    torch.save({"states": states, "drawn": drawn}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_of_a_distributed_run(tmp_path: Path) -> None:
    """They end in one model, which is that of one process over both shares of the data."""
    torch.multiprocessing.spawn(_train, (str(tmp_path), 3), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for one, other in zip(*(r["states"] for r in ranks), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    torch.manual_seed(0)
    model = SASRec(V, D, L, dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = af.SliceCrossEntropy(first_item=1, ignore_index=0)
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(2):
            _, _, target, history = batch(2 * step + rank)
            neg = af.RankSlice.from_mask(ranks[rank]["drawn"][step], first_item=1)
            (loss(model(history), model.item.weight, target, neg) / 2).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ranks[0]["states"][0][name], value, rtol=1e-4, atol=1e-5)


def _train_sparsely(rank: int, folder: str) -> None:
    """One process; its data come from a DataLoader over its share, and its item table has sparse gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.EmbeddingBag(V, D, mode="mean", sparse=True))
    sampler = af.RankSliceSampler(5, 100, hard_fraction=0.5, exclude_history=True)
    loss, optimizer = af.SampledSoftmaxLoss(sparse_grad=True), torch.optim.SparseAdam(model.parameters(), lr=0.1)
    items = torch.randint(V, (2 * B, L), generator=torch.Generator().manual_seed(1))
    data = TensorDataset(items, items.roll(1, 0)[:, 0])
    share = DistributedSampler(data, num_replicas=2, rank=rank)
    drawn = []
    for epoch in range(2):
        share.set_epoch(epoch)
        for history, target in DataLoader(data, batch_size=2, sampler=share):
            query, catalog = model(history), model.module.weight
            negatives = sampler.sample(query, catalog, target, num_negatives=8, history=history)
            assert not (negatives.unsqueeze(2) == torch.cat([history, target[:, None]], 1).unsqueeze(1)).any()
            optimizer.zero_grad()
            loss(query, catalog, target, negatives).backward()
            assert catalog.grad is not None and catalog.grad.is_sparse
            optimizer.step()
            drawn.append(negatives)
    torch.save({"weight": model.module.weight.detach(), "drawn": torch.cat(drawn)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_with_sparse_gradients_and_loaders_of_their_own(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_sparsely, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(ranks[0]["weight"], ranks[1]["weight"])
    assert not torch.equal(ranks[0]["drawn"], ranks[1]["drawn"])


def test_processes_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    draws = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        draws.append(_Draw()([3, 4]))
    assert not torch.equal(*draws)
