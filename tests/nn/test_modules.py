"""Losses, sampler and teachers as modules: state, moves, hooks, and what an optimizer finds; and arguments of a wrong
kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import alterrec_fast as af
from tests.nn.sasrec import SASRec

V, D, B, L = 60, 8, 5, 4


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query (B, D), catalog (V, D), target (B,), history (B, L)."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(B, D, generator=g),
        torch.randn(V, D, generator=g),
        torch.randint(1, V, (B,), generator=g),
        torch.randint(1, V, (B, L), generator=g),
    )


def vectors(model: Any, items: Tensor) -> tuple[Tensor, Tensor]:
    return model(items)[:, -1], model.item.weight


class Trained(nn.Module):
    """A model that holds its loss and its sampler, whose teacher is a copy of the model."""

    def __init__(self, **options: Any):
        super().__init__()
        self.model = SASRec(V, D, L)
        teacher = af.TeacherCopy(self.model, vectors, decay=0.5)
        self.sampler = af.RankSliceSampler(2, 20, hard_fraction=0.5, teacher=teacher, **options)
        self.loss = af.SliceCrossEntropy()

    def forward(self, items: Tensor, target: Tensor) -> Tensor:
        query, catalog = vectors(self.model, items)
        return self.loss(query, catalog, target, self.sampler(query, catalog, target, history=items))


def test_an_optimizer_does_not_meet_the_teacher() -> None:
    owner = Trained()
    assert len(list(owner.parameters())) == len(list(owner.model.parameters()))
    assert not any("copy" in name for name, _ in [*owner.named_parameters(), *owner.named_modules()])
    assert list(owner.sampler.parameters()) == list(owner.sampler.teacher.buffers()) == []
    before = copy.deepcopy(owner.sampler.teacher.state_dict())
    optimizer = torch.optim.SGD(owner.parameters(), lr=0.1)
    _, _, target, items = batch()
    owner.requires_grad_(True)
    owner(items, target).backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in owner.sampler.teacher.state_dict().items())
    held = list(owner.sampler.teacher.copy.parameters())
    assert held and not any(parameter.requires_grad or parameter.grad is not None for parameter in held)


def test_a_teacher_stays_in_eval_mode_and_moves_with_its_owner() -> None:
    owner = Trained()
    owner.train()
    assert owner.model.training and owner.sampler.training
    assert not any(module.training for module in owner.sampler.teacher.copy.modules())
    owner.to("meta")
    assert {p.device.type for p in owner.sampler.teacher.copy.parameters()} == {"meta"}
    again = Trained().double()
    assert again.sampler.teacher.copy.module.item.weight.dtype == torch.float64


def test_the_state_of_sampler_and_teacher_is_in_the_owners() -> None:
    torch.manual_seed(0)
    owner, other = Trained(seed=7), Trained(seed=1)
    _, _, target, items = batch()
    owner(items, target)
    state = owner.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    assert state["sampler._extra_state"].tolist() == [7, 1]
    assert {name for name in state if name.startswith("sampler")} >= {"sampler.teacher.copy.module.item.weight"}
    other.load_state_dict(state)
    assert (other.sampler.seed, other.sampler.draws) == (7, 1)
    for one in (owner, other):
        one.eval()
    assert torch.equal(owner(items, target), other(items, target))
    incomplete = {name: value for name, value in state.items() if "_extra_state" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*sampler\._extra_state"):
        other.load_state_dict(incomplete)


def test_hooks_run() -> None:
    _, _, target, items = batch()
    calls: list[str] = []
    owner = Trained()
    for name, module in (("sampler", owner.sampler), ("teacher", owner.sampler.teacher), ("loss", owner.loss)):
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    owner(items, target)
    assert calls == ["teacher", "sampler", "loss"]


def test_half_precision_leaves_counts_alone() -> None:
    popularity = torch.full((V,), 1e6, dtype=torch.float64)
    popularity[3] = 1e-6
    sampler = af.RankSliceSampler(0, 9, hard_fraction=0.0, random="popularity", popularity=popularity)
    log_q = sampler.log_q(num_negatives=10, num_items=V)
    owner = nn.ModuleList([sampler, af.SampledSoftmaxLoss(log_q=log_q), nn.Linear(2, 2)])
    for cast in (owner.half, owner.bfloat16, owner.float):
        cast()
        assert torch.equal(sampler.popularity, popularity) and torch.equal(owner[1].log_q, log_q)
    assert torch.equal(sampler.log_q(num_negatives=10, num_items=V), log_q)
    assert set(owner.state_dict()) == {"0._extra_state", "2.weight", "2.bias"}
    owner.to("meta")
    assert sampler.popularity.device.type == owner[1].log_q.device.type == "meta"


def test_a_model_may_be_its_own_samplers_teacher() -> None:
    """No cycle of modules: state, mode and moves of such a model work."""

    class Model(SASRec):
        def __init__(self) -> None:
            super().__init__(V, D, L)
            self.sampler = af.RankSliceSampler(2, 20, teacher=self.queries)
            self.other = af.RankSliceSampler(2, 20, teacher=self)

        def queries(self, items: Tensor) -> tuple[Tensor, Tensor]:
            return vectors(self, items)

    model = Model()
    names = {name for name, _ in SASRec(V, D, L).named_parameters()}
    assert {name for name, _ in model.named_parameters()} == names
    assert set(model.train().float().state_dict()) == names | {"sampler._extra_state", "other._extra_state"}
    query, catalog, target, items = batch()
    assert model.sampler(query, catalog, target, history=items).batch_size == B


def test_a_teacher_follows_its_own_kind_of_model_only() -> None:
    teacher = af.TeacherCopy(nn.Linear(2, 2), lambda model, x: (model(x), x), decay=0.5)
    for other in (nn.Linear(2, 3), nn.Linear(2, 2, bias=False), nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="model must be of the kind that was copied; "):
            teacher.update(other)
    assert not teacher(torch.ones(1, 2, requires_grad=True))[0].requires_grad


def test_an_engine_set_for_a_block_serves_the_modules() -> None:
    query, catalog, target, _ = batch()
    with af.backend("reference"):
        neg = af.RankSliceSampler(2, 20)(query.double(), catalog.double(), target)  # only the reference has float64
        loss = af.SliceCrossEntropy()(query.double(), catalog.double(), target, neg)
    assert loss.dtype == torch.float64


@pytest.mark.parametrize("strided", ["transposed", "expanded", "windows", "every other"])
@pytest.mark.parametrize("name", ["FullSoftmaxLoss", "SliceCrossEntropy", "SampledSoftmaxLoss"])
def test_any_strides_give_what_contiguous_ones_give(name: str, strided: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def view(rows: int) -> Tensor:
        """(rows, D) of the kind named."""
        if strided == "transposed":
            return torch.randn(D, rows, generator=generator).T
        if strided == "expanded":
            return torch.randn(1, D, generator=generator).expand(rows, D)
        if strided == "windows":
            return torch.randn(rows + D - 1, generator=generator).unfold(0, D, 1)
        return torch.randn(2 * rows, 2 * D, generator=generator)[::2, ::2]

    query, catalog = view(B * L).unflatten(0, (B, L)), view(V)
    target = torch.randint(1, V, (L, B), generator=generator).T
    target = torch.where(target % 3 == 0, -100, target)
    bias = torch.randn(V, 2, generator=generator)[:, 0]
    positives = torch.randint(0, V, (2, B, L), generator=generator).permute(1, 2, 0)
    neg: Any = af.RankSliceSampler(0, 20)(query.contiguous(), catalog.contiguous(), target)
    if name == "SampledSoftmaxLoss":
        neg = torch.randint(0, V, (9, B, L), generator=generator).permute(1, 2, 0)
    options: dict[str, Any] = {"bias": bias}
    if name != "FullSoftmaxLoss":
        options["positives"] = positives
    others = () if name == "FullSoftmaxLoss" else (neg,)
    results = []
    for plain in (False, True):

        def made(x: Any, plain: bool = plain) -> Any:
            return x.contiguous() if plain and isinstance(x, Tensor) else x

        leaves = [x.detach().requires_grad_() for x in (made(query), made(catalog))]
        value = getattr(af, name)(temperature=0.7)(
            *leaves, made(target), *map(made, others), **{key: made(x) for key, x in options.items()}
        )
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(results[0], results[1])


WRONG: list[tuple[Callable[..., Any], str]] = [
    (lambda q, e, t, h: af.FullSoftmaxLoss()(q.numpy(), e, t), r"query must be a torch\.Tensor, got numpy\.ndarray"),
    (lambda q, e, t, h: af.FullSoftmaxLoss()(q, e.tolist(), t), r"catalog must be a torch\.Tensor, got list"),
    (lambda q, e, t, h: af.FullSoftmaxLoss()(q, e, t.tolist()), r"target must be a torch\.Tensor, got list"),
    (lambda q, e, t, h: af.FullSoftmaxLoss()(q, e, t.float()), "target must be int32 or int64, got"),
    (lambda q, e, t, h: af.FullSoftmaxLoss()(q, e, t, "bias"), r"bias must be a torch\.Tensor, got str"),
    (lambda q, e, t, h: af.FullSoftmaxLoss(temperature="1"), "temperature must be a number, got str '1'"),
    (
        lambda q, e, t, h: af.FullSoftmaxLoss(temperature=torch.ones((), requires_grad=True)),
        r"temperature must be a number or an nn\.Parameter, got a tensor: it would be neither moved nor trained",
    ),
    (lambda q, e, t, h: af.SliceCrossEntropy(positive_weight=None), "positive_weight must be a number, got None"),
    (lambda q, e, t, h: af.FullSoftmaxLoss(ignore_index=0.0), r"ignore_index must be an integer, got float 0\.0"),
    (lambda q, e, t, h: af.FullSoftmaxLoss(first_item="1"), "first_item must be an integer, got str '1'"),
    (lambda q, e, t, h: af.SliceCrossEntropy(max_saved_bytes=1e6), "max_saved_bytes must be an integer, got float"),
    (
        lambda q, e, t, h: af.SliceCrossEntropy()(q, e, t, positives=[[1]]),
        r"positives must be a torch\.Tensor, got list",
    ),
    (lambda q, e, t, h: af.SampledSoftmaxLoss(log_q=[0.0]), r"log_q must be a torch\.Tensor, got list"),
    (lambda q, e, t, h: af.SampledSoftmaxLoss(sparse_grad=1), "sparse_grad must be True, False or None, got int 1"),
    (lambda q, e, t, h: af.SampledSoftmaxLoss()(q, e, t, [1, 2]), "neg must be a tensor of ids, .*, got list"),
    (lambda q, e, t, h: af.FullSoftmaxLoss(0.5), "positional argument"),
    (lambda q, e, t, h: af.RankSliceSampler(0, 5.0), r"stop must be an integer, got float 5\.0"),
    (lambda q, e, t, h: af.RankSliceSampler("0", 5), "start must be an integer, got str '0'"),
    (lambda q, e, t, h: af.RankSliceSampler(False, 5), "start must be an integer, got bool False"),
    (lambda q, e, t, h: af.RankSliceSampler(0, 5, hard_fraction="x"), "hard_fraction must be a number, got str 'x'"),
    (lambda q, e, t, h: af.RankSliceSampler(0, 5, first_item=1.0), "first_item must be an integer, got float"),
    (lambda q, e, t, h: af.RankSliceSampler(0, 5, seed=None), "seed must be an integer, got None"),
    (
        lambda q, e, t, h: af.RankSliceSampler(0, 5, exclude_history="no"),
        "exclude_history must be True, False or None, got str",
    ),
    (
        lambda q, e, t, h: af.RankSliceSampler(0, 5, random="popularity", popularity=np.ones(V)),
        r"popularity must be a torch\.Tensor, got numpy\.ndarray",
    ),
    (
        lambda q, e, t, h: af.RankSliceSampler(0, 5, teacher=np.ones((V, 2))),
        r"teacher must be a tensor \(V, f\), a TeacherCopy or a callable, got numpy\.ndarray",
    ),
    (
        lambda q, e, t, h: af.RankSliceSampler(0, 5)(q, e.numpy(), t),
        r"catalog must be a torch\.Tensor, got numpy\.ndarray",
    ),
    (lambda q, e, t, h: af.RankSliceSampler(0, 5)(q, e, [1]), r"target must be a torch\.Tensor, got list"),
    (
        lambda q, e, t, h: af.RankSliceSampler(0, 5, exclude_history=True)(q, e, t, history=h.numpy()),
        r"history must be a torch\.Tensor, got numpy\.ndarray",
    ),
    (
        lambda q, e, t, h: af.RankSliceSampler(0, 5, teacher=lambda *rows: (q, e))(q, e, t, inputs=h),
        r"inputs must be a tuple of what the teacher takes, got a tensor of shape \(5, 4\)",
    ),
    (
        lambda q, e, t, h: af.RankSliceSampler(0, 5).sample(q, e, t, num_negatives=2.5),
        r"num_negatives must be an integer, got float 2\.5",
    ),
    (lambda q, e, t, h: af.RankSliceSampler(0, 5)(q, e, t, h), "positional argument"),
    (lambda q, e, t, h: af.TeacherCopy(lambda x: x, vectors), "model must be an nn.Module, got function"),
    (lambda q, e, t, h: af.TeacherCopy(nn.Linear(1, 1), None), "vectors must be a function .*, got None"),
    (lambda q, e, t, h: af.TeacherCopy(nn.Linear(1, 1), vectors, decay="1"), "decay must be a number, got str '1'"),
    (lambda q, e, t, h: af.TeacherCopy(nn.Linear(1, 1), vectors).update({}), "model must be an nn.Module, got dict"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_a_wrong_kind_is_named_with_its_argument(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(*batch())


def test_integers_of_other_libraries_are_taken() -> None:
    query, catalog, target, _ = batch()
    sampler = af.RankSliceSampler(np.int64(1), np.uint8(9), hard_fraction=np.float32(0.5), first_item=np.int32(1))
    assert sampler.sample(query, catalog, target, num_negatives=np.int64(4)).shape == (B, 4)
    assert "1, 9, hard_fraction=0.5" in repr(sampler)
