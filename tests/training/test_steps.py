"""One training step against the paper's formulas written out, and what every epoch trains with."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import alterrec_fast as af
from alterrec_fast.data.batches import Batch, most_tokens, pack
from alterrec_fast.data.sessions import Dataset
from alterrec_fast.model.packing import Packing
from alterrec_fast.systems import Epoch, epochs
from alterrec_fast.training.alternate import Trainer
from alterrec_fast.training.config import VARIANTS, Config
from alterrec_fast.training.steps import MOST_PADDED, GraphedStep, StaticBatch, is_padded
from tests.training.test_training import history, small

K1, K2, P, BETA, TAU = 3, 90, 2, 0.25, 0.5


def trainer(shop: Dataset, run: Path, **changes: Any) -> Trainer:
    """Untrained, without dropout, so that a step can be repeated; the text is noise, which serves as well."""
    settings = {"k1": K1, "k2": K2, "positives": P, "positive_weight": BETA, "temperature_text": TAU, "dropout": 0.0}
    config = small(shop, run, init="xavier", **settings | changes)
    return Trainer(config, shop, torch.randn(shop.num_items, 12, generator=torch.manual_seed(0)), run)


def step(made: Trainer, epoch: Epoch) -> tuple[Batch, float]:
    """A step on the first 20 sessions, the gradients left in place."""
    batch = pack(made.dataset.train, np.arange(20), 50)
    losses, _ = made.gradients(epoch, batch, made.teacher(epoch))
    return batch, float(losses["loss"])


@pytest.mark.parametrize("variant", ["alterrec", "alterrec_aug"])
@pytest.mark.parametrize("student", ["id", "text"])
def test_a_step_is_the_loss_of_the_paper(variant: str, student: str, shop: Dataset, tmp_path: Path) -> None:
    """Eq. (8) to (11): the other network ranks the catalog; its ranks [k1, k2) are negatives, [0, p) positives."""
    made = trainer(shop, tmp_path, variant=variant)
    epoch = next(epoch for epoch in epochs(made.config) if epoch.teacher and epoch.student == student)
    batch, loss = step(made, epoch)
    found = {name: [x.grad for x in net.parameters()] for name, net in made.recommender.networks.items()}

    made.recommender.zero_grad()
    items, target = torch.from_numpy(batch.items), torch.from_numpy(batch.targets)
    scores = {}
    for name in ("id", "text"):
        network = made.recommender.network(name)
        vectors = network.vectors()
        scores[name] = network.queries(vectors, items, Packing.of(batch.lengths)) @ vectors.catalog.T
    ranking = scores["text" if student == "id" else "id"].argsort(descending=True, stable=True)
    y = scores[student] / (TAU if student == "text" else 1.0)
    negative = torch.zeros_like(y, dtype=torch.bool).scatter(1, ranking[:, K1:K2], True)
    negative.scatter_(1, target[:, None], False)
    z = y.masked_fill(~negative, -torch.inf).logsumexp(1, keepdim=True)
    expected = F.softplus(z - y.gather(1, target[:, None])).sum(1)
    if variant == "alterrec_aug":
        expected = expected + BETA * F.softplus(z - y.gather(1, ranking[:, :P])).sum(1)
    expected.mean().backward()

    assert loss == pytest.approx(expected.mean().item(), rel=1e-4)
    for grad, parameter in zip(found[student], made.recommender.network(student).parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-5)
    teacher = "text" if student == "id" else "id"
    assert all(grad is None for grad in found[teacher])  # frozen


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_hard_fraction_is_the_share_of_the_slice(fraction: float, shop: Dataset, tmp_path: Path) -> None:
    made = trainer(shop, tmp_path, hard_fraction=fraction)
    epoch = next(epoch for epoch in epochs(made.config) if epoch.teacher)
    batch = pack(shop.train, np.arange(100), 50)
    items, packing = torch.from_numpy(batch.items), Packing.of(batch.lengths)
    teacher = made.teacher(epoch)
    torch.manual_seed(0)
    neg, positives = made._negatives(epoch, items, packing, teacher)
    network = made.recommender.network(epoch.teacher)
    hard = af.rank_slice(network.queries(teacher, items, packing), teacher.catalog, start=K1, stop=K2).mask()
    size, rest = K2 - K1, shop.num_items - (K2 - K1)
    assert positives is None
    assert float((neg.mask() & hard).sum(1).double().mean()) == pytest.approx(fraction * size, rel=0.04)
    # The others enter with chance (1 - f) n / V each, the law of `RankSlice.mix`.
    entered = (1 - fraction) * size / shop.num_items * rest
    assert float((neg.mask() & ~hard).sum(1).double().mean()) == pytest.approx(entered, rel=0.04)


@pytest.mark.parametrize("variant", ["random", "alterrec_aug"])
def test_random_epochs_draw_as_many_negatives_as_the_slice_has(variant: str, shop: Dataset, tmp_path: Path) -> None:
    made = trainer(shop, tmp_path, variant=variant)
    plan = [epoch for epoch in epochs(made.config) if epoch.teacher is None]
    assert len(plan) == (made.config.m_max if variant == "random" else 2 * made.config.m_random)
    batch = pack(shop.train, np.arange(100), 50)
    neg, positives = made._negatives(plan[-1], torch.from_numpy(batch.items), Packing.of(batch.lengths), None)
    assert positives is None
    assert neg.mask().sum(1).double().mean() == pytest.approx(K2 - K1, rel=0.03)


def test_the_loss_of_naive_concatenation_has_its_parts(shop: Dataset, tmp_path: Path) -> None:
    """Appendix B: each part's loss is that of its own share of the score, over the same negatives."""
    made = trainer(shop, tmp_path, variant="nfrec_concat", k1=0, k2=shop.num_items)
    batch = pack(shop.train, np.arange(20), 50)
    losses, _ = made.gradients(next(epochs(made.config)), batch, None)
    recommender, target = made.recommender, torch.from_numpy(batch.targets)
    with torch.no_grad():
        vectors = recommender.vectors()
        queries = recommender.queries(vectors, torch.from_numpy(batch.items), Packing.of(batch.lengths))
        for name, key in (("fused", "loss"), ("id", "loss_id"), ("text", "loss_text")):
            view = recommender.views(vectors)[name]
            expected = F.cross_entropy(view.query(queries) @ view.catalog.T, target)  # the slice is the whole catalog
            assert float(losses[key]) == pytest.approx(expected.item(), rel=1e-4)


def on_static_tensors(made: Trainer) -> Trainer:
    """The trainer with steps as CUDA has them: padded to one shape, under one mask."""
    made.static = StaticBatch(most_tokens(made.dataset.train, made.config.max_length, 128), made.device)
    return made


def plans(variant: str) -> list[tuple[str, str | None]]:
    """(student, teacher) of the kinds of epochs that a variant has."""
    config = Config(variant=variant)
    return sorted({(epoch.student, epoch.teacher) for epoch in epochs(config)}, key=str)


@pytest.mark.parametrize(
    ("variant", "student", "teacher"), [(variant, *plan) for variant in VARIANTS for plan in plans(variant)]
)
def test_padded_steps_equal_steps(
    variant: str, student: str, teacher: str | None, shop: Dataset, tmp_path: Path
) -> None:
    """Losses and gradients; without a teacher all items are negatives, since what is drawn depends on the shape."""
    bounds = {"k1": 0, "k2": shop.num_items} if teacher is None else {}
    made = trainer(shop, tmp_path, variant=variant, **bounds)
    if made.recommender.needs_groups:
        pytest.skip(made.recommender.needs_groups)
    for module in made.recommender.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # CORE's own too, which no setting turns off
    epoch, found = Epoch(5, student, teacher, 0), []
    for _ in range(2):
        batch = pack(shop.train, np.arange(30), 50)
        losses, packing = made.gradients(epoch, batch, made.teacher(epoch))
        grads = {name: p.grad.clone() for name, p in made.recommender.named_parameters() if p.grad is not None}
        found.append(losses | grads)
        made = on_static_tensors(made)
    assert packing.slots > len(batch.items)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert (found[1][name] - value).norm() <= 1e-6 * value.norm() + 1e-7, name  # CORE has gradients that are zero


@pytest.mark.parametrize("variant", ["alterrec_aug", "nfrec_concat"])
def test_a_run_on_static_tensors_ends_as_any_run(variant: str, shop: Dataset, tmp_path: Path) -> None:
    """Every step of two epochs, through the steps that CUDA takes but for the capture."""
    losses = []
    for kind in ("as it is", "static"):
        bounds = {"k1": 0, "k2": shop.num_items}
        made = trainer(shop, tmp_path / kind, variant=variant, graph=False, **bounds)
        if kind == "static":
            made = on_static_tensors(made)
        losses.append([])
        for epoch in list(epochs(made.config))[1:3]:
            made.state.step, made.state.sums = 0, {}
            line = made._run_epoch(epoch)
            losses[-1] += [value for name, value in line.items() if name.startswith("loss")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_step_that_cannot_be_captured_says_so_once(
    shop: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = on_static_tensors(trainer(shop, tmp_path, k1=0, k2=1))  # a slice so small is kept as ids
    plan = list(epochs(made.config))
    assert "as chance has it" in made._why_no_graph(plan[0])  # uniform negatives
    assert made._why_no_graph(plan[2]) == ""
    for epoch in (plan[0], plan[1]):
        made.stepper(epoch, None)
    assert caplog.text.count("instead of as a CUDA graph") == 1


def test_a_capture_that_fails_leaves_the_step_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def __exit__(self, *_: Any) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Refusing)
    said: list[str] = []
    calls = iter(range(10))
    graphed = GraphedStep(lambda: {"loss": torch.tensor(next(calls))}, said.append)
    assert [int(graphed()["loss"]) for _ in range(4)] == [0, 1, 2, 3]
    assert said == ["operation not permitted when stream is capturing"]


def test_learning_rates_step_by_each_network_s_own_epochs(
    shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[str, float]] = []
    original = Trainer.gradients

    def watched(self: Trainer, epoch: Epoch, *rest: Any) -> Any:
        used.append((epoch.student, self.optimizers[epoch.student].param_groups[0]["lr"]))
        return original(self, epoch, *rest)

    monkeypatch.setattr(Trainer, "gradients", watched)
    rates = {"lr_id": 0.01, "lr_text": 0.02, "lr_gamma": 0.5, "lr_step_id": 1, "lr_step_text": 2}
    af.train(small(shop, tmp_path / "run", variant="random", m_max=6, **rates))
    lines = history(tmp_path / "run")[1:]
    assert [(line["student"], line["learning_rate"]) for line in lines] == [
        ("id", 0.01), ("text", 0.02), ("id", 0.005), ("text", 0.02), ("id", 0.0025), ("text", 0.01),
    ]  # fmt: skip
    changes = [used[0], *(now for before, now in pairwise(used) if now != before)]
    assert changes == [(line["student"], line["learning_rate"]) for line in lines]


def test_an_epoch_trains_its_student_alone(shop: Dataset, tmp_path: Path) -> None:
    made = trainer(shop, tmp_path, dropout=0.3)
    plan = list(epochs(made.config))
    assert plan[2].student == "id" and plan[2].teacher == "text"
    before = {name: value.clone() for name, value in made.recommender.state_dict().items()}
    modes = []
    original = made.gradients

    def watched(*args: Any) -> Any:
        modes.append((made.recommender.network("id").training, made.recommender.network("text").training))
        return original(*args)

    made.gradients = watched  # type: ignore[method-assign]
    made._run_epoch(plan[2])
    assert set(modes) == {(True, False)}  # dropout for the student, none for the teacher
    for name, value in made.recommender.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("networks.text."), name


def test_batches_are_padded_on_cuda_unless_their_square_is_too_large() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert is_padded(MOST_PADDED, cuda)
    assert not is_padded(MOST_PADDED + 1, cuda) and not is_padded(16, cpu)


def test_every_epoch_has_an_order_of_its_own(shop: Dataset, tmp_path: Path) -> None:
    made = trainer(shop, tmp_path, variant="id_only")
    seen: list[list[int]] = []
    original = made.gradients

    def watched(epoch: Epoch, batch: Batch, catalog: torch.Tensor | None) -> Any:
        seen[-1] += batch.targets.tolist()
        return original(epoch, batch, catalog)

    made.gradients = watched  # type: ignore[method-assign]
    for epoch in list(epochs(made.config))[:2]:
        seen.append([])
        made.state.step, made.state.sums = 0, {}
        made._run_epoch(epoch)
    assert seen[0] != seen[1]
    assert sorted(seen[0]) == sorted(seen[1])


@pytest.mark.parametrize("monitor", ["hits@10", "mrr@20"])
def test_the_best_epoch_is_that_of_the_monitored_metric(monitor: str, shop: Dataset, tmp_path: Path) -> None:
    result = af.train(small(shop, tmp_path / "run", variant="id_only", monitor=monitor, m_max=5, lr_id=0.02))
    scores = [line["validation"]["fused"][monitor] for line in history(tmp_path / "run")]
    assert result.metrics["best_epoch"] == scores.index(max(scores))
    assert af.load(tmp_path / "run").evaluate("validation").metrics()["fused"][monitor] == max(scores)
