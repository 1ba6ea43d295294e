"""FusedItemEmbedding against dense autograd and torch's optimisers, and the promises of its docstring."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alterrec_fast as af
from alterrec_fast.nn import FusedItemEmbedding, RankSliceSampler, TeacherCopy
from alterrec_fast.ops import RankSlice, library
from tests.conftest import integers

V, D, B = 700, 24, 16
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(bool(library.NO_EXTENSION), reason="the extension is not built")),
]
both_engines = pytest.mark.parametrize("backend", BACKENDS)


class RowwiseAdagrad(torch.optim.Optimizer):
    """What the class says: one state a row of the table, and one for each element of vectors."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                square = p.grad.square().mean(1, keepdim=True) if p.ndim == 2 else p.grad.square()
                self.state[p]["sum"] = self.state[p].get("sum", 0.0) + square
                p -= group["lr"] * p.grad / (self.state[p]["sum"].sqrt() + 1e-10)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "rowwise_adagrad": RowwiseAdagrad,
    "sgd": torch.optim.SGD,
}


class Dense(nn.Module):
    """The same with a parameter whose gradient is dense."""

    def __init__(self, items: FusedItemEmbedding, dtype: torch.dtype):
        super().__init__()
        self.table = nn.Parameter(items.table.detach().to(dtype, copy=True))
        if items.norm_weight is not None and items.norm_bias is not None:
            self.weight = nn.Parameter(items.norm_weight.detach().to(dtype, copy=True))
            self.bias = nn.Parameter(items.norm_bias.detach().to(dtype, copy=True))

    def vectors(self) -> Tensor:
        normed = hasattr(self, "weight")
        return F.layer_norm(self.table, (D,), self.weight, self.bias) if normed else self.table


def batches(number: int, form: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        mask = torch.rand(B, V, generator=generator) < (0.02 if form == "ids" else 0.3)
        ids = torch.where(mask, torch.arange(V), -1).sort(1, descending=True).values
        slices = {"bits": RankSlice.from_mask(mask), "ids": RankSlice.from_indices(ids[:, :32], V), "all": None}
        yield {
            "history": torch.randint(0, V, (B,), generator=generator),
            "mix": torch.randn(D, D, generator=generator).to(dtype) / D**0.5,
            "target": torch.randint(0, V, (B,), generator=generator),
            "neg": slices[form],
            "positives": torch.randint(-1, V, (B, 2), generator=generator),
        }


def train_dense(items: FusedItemEmbedding, form: str, lr: float, accumulate: int, dtype: torch.dtype) -> Dense:
    dense = Dense(items, dtype)
    optimizer = OPTIMIZERS[items.kind](dense.parameters(), lr=lr)
    for i, x in enumerate(batches(20 * accumulate, form, dtype)):
        vectors = dense.vectors()
        query = vectors[x["history"]] @ x["mix"]
        af.slice_cross_entropy(
            query, vectors, x["target"], x["neg"], positives=x["positives"], temperature=0.8, backend="reference"
        ).backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return dense


def train_fused(items: FusedItemEmbedding, form: str, accumulate: int, steps: int = 20) -> FusedItemEmbedding:
    for i, x in enumerate(batches(steps * accumulate, form, torch.float32)):
        query = items(x["history"]) @ x["mix"]
        items.cross_entropy(query, x["target"], x["neg"], positives=x["positives"], temperature=0.8).backward()
        if (i + 1) % accumulate == 0:
            items.step()
    return items


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


@both_engines
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("norm", "form", "accumulate"), [(None, "all", 1), ("layer", "bits", 3), ("layer", "ids", 1), (None, "ids", 3)]
)
def test_twenty_steps_equal_those_on_the_dense_gradient(
    backend: str, optimizer: str, norm: str | None, form: str, accumulate: int
) -> None:
    lr = {"adam": 1e-2, "rowwise_adagrad": 1e-2, "sgd": 0.02}[optimizer]
    items = FusedItemEmbedding(V, D, norm=norm, optimizer=optimizer, lr=lr, seed=3, backend=backend)
    start = copy.deepcopy(items)
    fused = train_fused(items, form, accumulate)
    dense = train_dense(start, form, lr, accumulate, torch.float32)
    exact = train_dense(start, form, lr, accumulate, torch.float64)
    pairs = [(fused.table, dense.table, exact.table)]
    if norm:
        pairs += [(fused.norm_weight, dense.weight, exact.weight), (fused.norm_bias, dense.bias, exact.bias)]
    for ours, theirs, truth in pairs:
        assert distance(ours, theirs) <= 1e-5
        assert distance(ours, truth) <= 2.0 * distance(theirs, truth) + 1e-7


@both_engines
def test_the_same_bits_for_any_number_of_threads_and_after_saving(backend: str) -> None:
    def run(threads: int, interrupted: bool) -> dict[str, Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            items = FusedItemEmbedding(V, D, norm="layer", lr=1e-2, backend=backend)
            for i, x in enumerate(batches(4, "bits", torch.float32)):
                if interrupted and i == 2:
                    state, items = (
                        items.state_dict(),
                        FusedItemEmbedding(V, D, norm="layer", lr=1e-2, seed=7, backend=backend),
                    )
                    items.load_state_dict(state)
                # No product of torch's in between: those round in another way with more threads.
                items.cross_entropy(items(x["history"]) * x["mix"][0], x["target"], x["neg"]).backward()
                items.step()
            return items.state_dict()
        finally:
            torch.set_num_threads(before)

    first = run(1, False)
    threads = (2, 4) if backend == "native" else ()
    for other in (run(1, True), *(run(n, False) for n in threads)):
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)


@both_engines
def test_after_sparse_losses_alone_adam_is_sparse_adam(backend: str) -> None:
    items = FusedItemEmbedding(V, D, lr=1e-2, backend=backend)
    table = nn.Embedding(V, D, sparse=True)
    table.weight.data.copy_(items.table)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=1e-2)
    before = items.table.clone()
    touched: set[int] = set()
    for i, x in enumerate(batches(3, "all", torch.float32)):
        neg = torch.randint(0, V, (B, 5), generator=torch.Generator().manual_seed(i))
        neg[0, 0], neg[1, 0] = -1, x["target"][1]
        q = items(x["history"]) @ x["mix"]
        items.sampled_softmax(q, x["target"], neg).backward()
        items.step()
        ids = torch.cat([x["history"], x["target"], torch.where(neg < 0, x["target"][0], neg).flatten()])
        touched |= set(ids.tolist())
        distinct, place = ids.unique(return_inverse=True)
        rows = table(distinct)
        own, rest = place.split([B, len(ids) - B])
        local = rest[B:].view(B, 5).clone()
        local[0, 0] = -1
        af.sampled_softmax(rows[own] @ x["mix"], rows, rest[:B], local).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(items.table, table.weight.detach(), rtol=1e-5, atol=1e-6)
    alone = [i for i in range(V) if i not in touched]
    assert torch.equal(items.table[alone], before[alone])


@both_engines
def test_sampled_softmax_takes_the_ops_options(backend: str) -> None:
    """Vectors over all items, and sequences, as the op over the whole table has them."""
    items, g = FusedItemEmbedding(V, D, backend=backend), torch.Generator().manual_seed(0)
    query, target = torch.randn(3, 4, D, generator=g), torch.randint(V, (3, 4), generator=g)
    target[1, 2:] = -100
    neg = torch.randint(-1, V, (3, 4, 5), generator=g)
    names = ("log_q", "bias", "weight")
    options: dict[str, Any] = {name: torch.rand(V, generator=g) for name in names} | {"temperature": 0.5}
    ours = items.sampled_softmax(query, target, neg, **options)
    expected = af.sampled_softmax(query, items.table, target, neg, **options, backend="reference")
    torch.testing.assert_close(ours, expected)


@both_engines
def test_bfloat16_rounds_up_in_proportion_and_the_same_way_again(backend: str) -> None:
    def run(seed: int) -> Tensor:
        items = FusedItemEmbedding(
            4000, 8, optimizer="sgd", lr=2.0**-10, dtype=torch.bfloat16, seed=seed, backend=backend
        )
        items.table.fill_(1.0)
        ids = torch.arange(4000)
        (items(ids) * -1.0).sum().backward()  # 1 + 2 ** -10: an eighth of the way to the next bfloat16
        items.step()
        return items.table.float()

    table = run(0)
    up = 1.0 + 2.0**-7
    assert set(table.unique().tolist()) == {1.0, up}
    assert abs(float((table == up).float().mean()) - 0.125) < 0.01
    assert torch.equal(table, run(0)) and not torch.equal(table, run(1))


@pytest.mark.skipif(bool(library.NO_EXTENSION), reason="the extension is not built")
def test_engines_draw_the_same_roundings() -> None:
    tables = []
    for backend in ("reference", "native"):
        items = FusedItemEmbedding(300, 20, optimizer="sgd", lr=0.25, dtype=torch.bfloat16, backend=backend)
        (items(torch.arange(300)) * torch.randn(300, 20, generator=torch.Generator().manual_seed(0))).sum().backward()
        items.step()
        tables.append(items.table)
    assert torch.equal(*tables)


@both_engines
def test_ranking_sees_the_rows_under_the_norm(backend: str) -> None:
    items = FusedItemEmbedding(9000, 8, norm="layer", backend=backend, first_item=1)
    items.norm_weight.copy_(torch.linspace(0.5, 2.0, 8))
    query = integers(5, 8, 0)
    vectors = items.vectors()
    best = items.top_k(query, k=7)
    expected = af.top_k(query, vectors, k=7, first_item=1, backend="reference")
    torch.testing.assert_close(best.scores, expected.scores)
    neg = items.rank_slice(query, start=3, stop=50, exclude=torch.arange(5))
    other = af.rank_slice(query, vectors, start=3, stop=50, exclude=torch.arange(5), first_item=1, backend="reference")
    assert (neg.mask() != other.mask()).sum() <= 4  # scores within rounding of a boundary
    target = torch.arange(1, 6)
    sampled = RankSliceSampler(3, 50, first_item=1, backend=backend)(query, items, target)
    assert (sampled.mask() != RankSliceSampler(3, 50, first_item=1)(query, vectors, target).mask()).sum() <= 4


def small(**options: Any) -> FusedItemEmbedding:
    return FusedItemEmbedding(50, 4, backend="reference", **options)


def loss_of(items: FusedItemEmbedding, scale: float = 1.0) -> Tensor:
    query = torch.ones(3, 4) / 2
    return items.cross_entropy(query, torch.tensor([1, 2, 3])) * scale


def test_only_what_was_passed_backward_counts() -> None:
    items = small()
    before = items.table.clone()
    loss_of(items)
    with torch.no_grad():
        items(torch.arange(3))
    items.step()
    assert torch.equal(items.table, before) and int(items.steps) == 0
    loss_of(items).backward()
    items.optimizer.zero_grad()
    items.step()
    assert torch.equal(items.table, before)
    loss_of(items).backward()
    items.step()
    assert not torch.equal(items.table, before) and int(items.steps) == 1


def test_a_table_changed_in_between_raises() -> None:
    items = small()
    late = loss_of(items)
    loss_of(items).backward()
    items.step()
    with pytest.raises(RuntimeError, match=r"changed between .* and its backward pass"):
        late.backward()
    loss_of(items).backward()
    items.table.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"changed between .* and step\(\)"):
        items.step()


def test_padding_rows_never_change() -> None:
    items = small(first_item=2)
    before = items.table.clone()
    with pytest.raises(ValueError, match=r"target: row 0 holds 1, expected .* \[2, 50\)"):
        items.cross_entropy(torch.ones(1, 4), torch.tensor([1]))
    query = items(torch.tensor([[0, 5], [1, 6]])).sum(1)
    items.cross_entropy(query, torch.tensor([3, 4])).backward()
    items.step()
    assert torch.equal(items.table[:2], before[:2]) and not torch.equal(items.table[5], before[5])


def test_schedulers_set_the_learning_rate() -> None:
    items = small(optimizer="sgd", lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(items.optimizer, 1, gamma=0.0)
    loss_of(items).backward()
    items.optimizer.step()
    schedule.step()
    before = items.table.clone()
    loss_of(items).backward()
    items.step()
    assert torch.equal(items.table, before)
    tensor = small(lr=torch.tensor(0.0))
    before = tensor.table.clone()
    loss_of(tensor).backward()
    tensor.step()
    assert torch.equal(tensor.table, before)


def test_a_scaler_scales_back_and_skips() -> None:
    plain, scaled = small(seed=1), small(seed=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss_of(plain).backward()
    plain.step()
    scaler.scale(loss_of(scaled)).backward()
    scaler.step(scaled.optimizer)
    torch.testing.assert_close(scaled.table, plain.table)
    before = scaled.table.clone()
    loss_of(scaled, torch.inf).backward()
    scaled.step(grad_scale=2.0)
    loss_of(scaled).backward()
    scaled.step(found_inf=torch.tensor(1.0))
    assert torch.equal(scaled.table, before) and not scaled._pending


def test_unscaling_before_the_step_is_refused() -> None:
    items, scaler = small(), torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(items)).backward()
    scaler.unscale_(items.optimizer)
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(items.optimizer)


def test_clipping_by_value() -> None:
    items = small(optimizer="sgd", lr=1.0, clip_value=1e-3)
    before = items.table.clone()
    loss_of(items, 100.0).backward()
    items.step()
    assert float((items.table - before).abs().max()) == pytest.approx(1e-3, rel=1e-3)


def test_bias_gets_its_gradient() -> None:
    items, bias = small(), torch.randn(50, requires_grad=True)
    query, target = torch.randn(3, 4), torch.tensor([1, 2, 3])
    items.cross_entropy(query, target, bias=bias).backward()
    (expected,) = torch.autograd.grad(F.cross_entropy(query @ items.table.T + bias, target), bias)
    torch.testing.assert_close(bias.grad, expected)


def test_copies_share_nothing() -> None:
    items = small(norm="layer")
    loss_of(items).backward()
    twin = copy.deepcopy(items)
    assert not twin._pending and twin.optimizer._items is twin
    assert twin.optimizer.param_groups[0]["params"][0] is twin.table
    loss_of(twin).backward()
    twin.optimizer.step()
    assert not torch.equal(twin.table, items.table)
    assert not list(items.parameters()) and items.half().table.dtype == torch.float32


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_a_teacher_follows_the_table(decay: float) -> None:
    items = small(norm="layer")
    model = nn.Sequential(nn.Linear(2, 2), items)
    teacher = TeacherCopy(model, lambda copy, query: (query, copy[1].vectors()), decay=decay)
    before = items.table.clone()
    loss_of(items).backward()
    items.step()
    teacher.update(model)
    torch.testing.assert_close(teacher.copy.module[1].table, decay * before + (1 - decay) * items.table)
    query = torch.ones(2, 4)
    assert teacher(query)[1].shape == (50, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"norm": "batch"}, ValueError, "norm must be"),
        ({"optimizer": "lamb"}, ValueError, "optimizer must be one of"),
        ({"dtype": torch.float16}, TypeError, "dtype must be"),
        ({"momentum": 0.9}, TypeError, "adam takes betas, eps, weight_decay, clip_value, got momentum"),
        ({"clip_norm": 1.0}, ValueError, "the norm of the whole gradient"),
        ({"lr": -1.0}, ValueError, "lr must be at least 0"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas must be"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0"),
        ({"clip_value": 0.0}, ValueError, "clip_value must be above 0"),
        ({"first_item": 51}, ValueError, "first_item must lie in"),
        ({"seed": -1}, ValueError, "seed must lie in"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small(**options)


def test_ids_of_another_kind_raise() -> None:
    with pytest.raises(TypeError, match="ids must be int32 or int64"):
        small()(torch.ones(2))
