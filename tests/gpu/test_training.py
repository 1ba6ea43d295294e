"""AlterRec's training step: the same bits as a CUDA graph and one kernel at a time, no waiting, the CPU's gradients."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alterrec_fast.data.batches import Batch, pack, plan
from alterrec_fast.data.sessions import Dataset, Sessions
from alterrec_fast.systems import Epoch, epochs
from alterrec_fast.training import checkpoint
from alterrec_fast.training.alternate import LAST, Trainer
from alterrec_fast.training.config import VARIANTS, Config
from alterrec_fast.training.steps import side_stream

CUDA = torch.device("cuda")
STEPS, WATCHED = 12, 3  # steps that are compared, and the last of them, in which nothing may wait
EPOCHS = {"id": Epoch(5, "id", "text", 2), "text": Epoch(7, "text", "id", 2), "random": Epoch(1, "id", None, 0)}
PAPER, LARGE = (40_258, 300), (100_000, 64)  # V, d
CASES = [
    ("id", PAPER, {}),
    ("text", PAPER, {"precision": "tf32"}),
    ("random", PAPER, {"precision": "fp32"}),
    ("id", PAPER, {"encoder_precision": "bf16", "variant": "alterrec_aug", "hard_fraction": 0.5}),
    ("id", LARGE, {"k1": 20, "k2": 1_000}),  # few ranks of many items are kept as ids
]


def random_sessions(num_items: int, count: int) -> Dataset:
    """`count` sessions of mean length 4.5, items by Zipf's law."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, num_items + 1)
    lengths = 1 + rng.geometric(1 / 3.5, count)
    items = rng.choice(num_items, lengths.sum(), p=weights / weights.sum()).astype(np.int32)
    train = Sessions(items, np.concatenate([[0], np.cumsum(lengths)]))
    few = Sessions(items[: train.offsets[20]], train.offsets[:21])
    return Dataset(Path(), train, few, few, {"num_items": num_items, "text_columns": []})


def trainer(shape: tuple[int, int], data: Dataset, run: Path = Path(), **settings: Any) -> Trainer:
    config = Config(data="random", width=shape[1], **{"device": "cuda", **settings})
    features = torch.randn(shape[0], 64, generator=torch.Generator().manual_seed(0))
    return Trainer(config, data, features, run)


def batches(made: Trainer, count: int) -> list[Batch]:
    config, train = made.config, made.dataset.train
    order = plan(train, config.max_length, config.batch_targets, np.random.default_rng(1))
    return [pack(train, which, config.max_length) for which in itertools.islice(order, count)]


def trained(made: Trainer, epoch: Epoch, waits: bool = True) -> list[Tensor]:
    """Losses of STEPS steps, seeded as a run seeds them, and what they made of the student's parameters.

    Without `waits`, RuntimeError where a step after the first ones waits for the device.
    """
    student = made.recommender.network(epoch.student).train()
    losses = []
    try:
        with side_stream(CUDA):
            run = made.stepper(epoch, made.teacher(epoch))
            for number, batch in enumerate(batches(made, STEPS)):
                if not waits and number == STEPS - WATCHED:
                    torch.cuda.set_sync_debug_mode("error")
                torch.manual_seed(number)
                losses.append(run(batch)[0]["loss"].clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [torch.stack(losses), *(parameter.detach().clone() for parameter in student.parameters())]


@pytest.mark.parametrize(("phase", "shape", "settings"), CASES)
def test_a_graph_computes_the_same_bits_and_nothing_waits(
    phase: str, shape: tuple[int, int], settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    epoch, data = EPOCHS[phase], random_sessions(shape[0], 3_000)
    eager = trained(trainer(shape, data, graph=False, **settings), epoch, waits=False)
    for _ in range(2):
        graphed = trained(trainer(shape, data, graph=True, **settings), epoch)
        assert all(torch.equal(a, b) for a, b in zip(graphed, eager, strict=True))
    assert "CUDA graph" not in caplog.text  # no capture failed
    made = trainer(shape, data, **settings)
    catalog, losses = made.teacher(epoch), []
    made.recommender.network(epoch.student).train()
    for number, batch in enumerate(batches(made, STEPS)):
        torch.manual_seed(number)
        losses.append(made.step(epoch, batch, catalog)[0]["loss"])
    # The optimiser's own step of the item table, which the others take in one pass with its gradient.
    torch.testing.assert_close(torch.stack(losses), eager[0], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_those_of_the_cpu(variant: Any) -> None:
    shape = (1_500, 60)
    data = random_sessions(shape[0], 400)
    for student, teacher in sorted({(e.student, e.teacher) for e in epochs(Config(variant=variant))}, key=str):
        bounds = {"k1": 20, "k2": 700} if teacher else {"k1": 0, "k2": shape[0]}  # all items where they would be drawn
        epoch, results = Epoch(5, student, teacher, 0), []
        for device in ("cpu", "cuda"):
            same: dict[str, Any] = {"precision": "fp32", "dropout": 0.0, "init": "xavier", "variant": variant}
            made = trainer(shape, data, device=device, **same, **bounds)
            for module in made.recommender.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0  # CORE's own too, which no setting turns off
            losses, _ = made.gradients(epoch, batches(made, 1)[0], made.teacher(epoch))
            grads = {name: p.grad for name, p in made.recommender.named_parameters() if p.grad is not None}
            results.append({name: x.double().cpu() for name, x in (losses | grads).items()})
        on_cpu, on_gpu = results
        assert on_cpu.keys() == on_gpu.keys()
        for name, exact in on_cpu.items():
            limit = 2e-5 * exact.norm() + 1e-7  # CORE has gradients that are zero
            assert (on_gpu[name] - exact).norm() <= limit, (student, teacher, name)


def test_a_run_broken_off_and_resumed_ends_in_the_same_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("pydantic", "safetensors", "tqdm"):  # of the extra "train": a step needs none, a whole run does
        pytest.importorskip(package)
    shape, calls, seed = (5_000, 64), itertools.count(), torch.manual_seed
    data = random_sessions(shape[0], 3_000)

    def fresh(run: str) -> Trainer:
        (tmp_path / run / "checkpoints").mkdir(parents=True, exist_ok=True)
        return trainer(shape, data, tmp_path / run, m_random=0, m_gap=1, m_max=2, checkpoint_minutes=1e-9)

    def break_off(number: int) -> torch.Generator:
        if next(calls) == 30:
            raise KeyboardInterrupt
        return seed(number)

    whole, broken = fresh("whole"), fresh("broken")
    whole.fit(lambda line: None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "manual_seed", break_off)
        broken.fit(lambda line: None)
    resumed = fresh("broken")
    assert resumed.resume() and resumed.state.step > 0
    resumed.fit(lambda line: None)
    one, other = (checkpoint.load(made.run / LAST)[0] for made in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert [x.get("loss") for x in whole.state.history] == [x.get("loss") for x in resumed.state.history]
