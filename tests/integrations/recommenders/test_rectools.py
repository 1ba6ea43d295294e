"""RecTools 0.19.0 itself, on a tiny generated data set."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pytorch_lightning import Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel, SASRecModel
from rectools.models.nn.transformers.similarity import DistanceSimilarityModule, SimilarityModuleBase
from rectools.models.nn.transformers.torch_backbone import TransformerTorchBackbone

from alterrec_fast.integrations.rectools import FastLightningModule, FrozenTeacherSampler

ITEMS = 60
SETTINGS = {"n_factors": 16, "n_blocks": 1, "n_heads": 2, "session_max_len": 6, "batch_size": 32, "lr": 0.01}


def trainer() -> Trainer:
    return Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def long_trainer() -> Trainer:
    return Trainer(
        max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )


def last_of_each(interactions: pd.DataFrame) -> np.ndarray:
    """The validation mask: every session's last item."""
    return (
        interactions.groupby(Columns.User)[Columns.Datetime].transform("max") == interactions[Columns.Datetime]
    ).values


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """100 sessions in which items follow one another."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(100):
        item = int(rng.integers(ITEMS))
        for time in range(int(rng.integers(4, 8))):
            rows.append((f"u{user}", f"i{item}", 1.0 + time % 2, pd.Timestamp("2026-01-01") + pd.Timedelta(days=time)))
            item = (3 * item + int(rng.integers(2))) % ITEMS
    columns = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]
    return Dataset.construct(pd.DataFrame(rows, columns=columns))


def fitted(dataset: Dataset, kind: Any = SASRecModel, **changes: Any) -> Any:
    seed_everything(1, verbose=False)
    return kind(**{**SETTINGS, "get_trainer_func": trainer, **changes}).fit(dataset)


def recommended(model: Any, dataset: Dataset) -> pd.DataFrame:
    users = dataset.user_id_map.external_ids
    return model.recommend(users, dataset, k=5, filter_viewed=False)


def one_batch(model: Any) -> dict[str, torch.Tensor]:
    model.lightning_model.eval()
    return next(iter(model.data_preparator.get_dataloader_train()))


@pytest.mark.parametrize("distance", ["dot", "cosine"])
@pytest.mark.parametrize("kind", [SASRecModel, BERT4RecModel])
def test_full_trains_as_softmax_does(dataset: Dataset, kind: Any, distance: str) -> None:
    common = {"similarity_module_kwargs": {"distance": distance}, "lightning_module_kwargs": {"logits_t": 0.5}}
    stock = fitted(dataset, kind, loss="softmax", **common)
    ours = fitted(dataset, kind, loss="full", lightning_module_type=FastLightningModule, **common)
    losses = [model.fit_trainer.callback_metrics["train_loss"] for model in (ours, stock)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    items = [model.torch_model.item_model.get_all_embeddings() for model in (ours, stock)]
    torch.testing.assert_close(*items, rtol=1e-3, atol=1e-4)
    theirs = recommended(stock, dataset)
    pd.testing.assert_frame_equal(recommended(ours, dataset), theirs, rtol=1e-3)
    assert len(theirs) == 5 * 100


@pytest.mark.parametrize("loss", ["full", "slice"])
def test_fifty_steps_under_autocast_to_float16(dataset: Dataset, loss: str) -> None:
    options: dict[str, Any] = {"learn_temperature": True, "weight": [1] * (ITEMS + 1)}
    if loss == "full":
        options["label_smoothing"] = 0.1
    with torch.autocast("cpu", torch.float16):
        model = fitted(
            dataset,
            loss=loss,
            lightning_module_type=FastLightningModule,
            lightning_module_kwargs=options,
            get_trainer_func=long_trainer,
        )
    module = model.lightning_model
    assert model.fit_trainer.global_step >= 50
    assert all(p.isfinite().all() for p in module.parameters()) and float(module.temperature) != 1.0
    assert float(model.fit_trainer.callback_metrics["train_loss"]) < 4.0  # of log 61 = 4.11 at the start
    assert len(recommended(model, dataset)) == 5 * 100


def test_full_trains_as_softmax_does_under_autocast_to_float16(dataset: Dataset) -> None:
    losses = []
    for loss, options in (("full", {"lightning_module_type": FastLightningModule}), ("softmax", {})):
        with torch.autocast("cpu", torch.float16):
            model = fitted(dataset, loss=loss, get_trainer_func=long_trainer, **options)
        losses.append(model.fit_trainer.callback_metrics["train_loss"])
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)  # of 4.11 at the start; without autocast they reach 2.95


def test_stocks_losses_stay_stocks(dataset: Dataset) -> None:
    stock = recommended(fitted(dataset, loss="BCE"), dataset)
    ours = recommended(fitted(dataset, loss="BCE", lightning_module_type=FastLightningModule), dataset)
    pd.testing.assert_frame_equal(ours, stock)
    with pytest.raises(ValueError, match="loss focal is not supported"):
        fitted(dataset, loss="focal", lightning_module_type=FastLightningModule)
    options = {"learn_temperature": True}
    with pytest.raises(ValueError, match="learn_temperature and weight need loss full or slice, got BCE"):
        fitted(dataset, loss="BCE", lightning_module_type=FastLightningModule, lightning_module_kwargs=options)


@pytest.mark.parametrize("distance", ["dot", "cosine"])
@pytest.mark.parametrize("kind", [SASRecModel, BERT4RecModel])
def test_slice_is_a_softmax_over_the_models_own_ranks(dataset: Dataset, kind: Any, distance: str) -> None:
    options = {"start": 2, "stop": 20, "hard_fraction": 1.0, "logits_t": 0.5}
    model = fitted(
        dataset,
        kind,
        loss="slice",
        lightning_module_type=FastLightningModule,
        lightning_module_kwargs=options,
        similarity_module_kwargs={"distance": distance},
    )
    batch, extra = one_batch(model), model.data_preparator.n_item_extra_tokens
    with torch.no_grad():
        scores = model.torch_model(batch)  # (B, L, V)
        loss = model.lightning_model._calc_custom_loss(batch, 0)
    real = batch["y"] != 0
    scores, target, weight = scores[real], batch["y"][real], batch["yw"][real]
    ranks = scores[:, extra:].sort(dim=1, descending=True).indices[:, 2:20] + extra
    logits = torch.cat((scores.gather(1, target[:, None]), scores.gather(1, ranks)), dim=1) / 0.5
    logits[:, 1:] = logits[:, 1:].masked_fill(ranks == target[:, None], -torch.inf)
    rows = torch.nn.functional.cross_entropy(logits, torch.zeros_like(target), reduction="none")
    assert loss.item() == pytest.approx((rows * weight).mean().item(), rel=1e-4)


def test_slice_learns_and_validates(dataset: Dataset) -> None:
    model = fitted(
        dataset,
        loss="slice",
        lightning_module_type=FastLightningModule,
        lightning_module_kwargs={"start": 1, "stop": 40},
        get_trainer_func=long_trainer,
        get_val_mask_func=last_of_each,
    )
    metrics = model.fit_trainer.callback_metrics
    assert metrics["train_loss"] < 2.5  # of 40 candidates, chance is above 3.4
    assert metrics["val_loss"] < 5.0  # of all 60 after 100 sessions, where "full" has 4.2 as well
    found = recommended(model, dataset)
    assert len(found) == 5 * 100


def test_a_fitted_model_survives_pickle(dataset: Dataset) -> None:
    model = fitted(
        dataset,
        loss="slice",
        lightning_module_type=FastLightningModule,
        lightning_module_kwargs={"start": 3, "stop": 30},
    )
    again = pickle.loads(pickle.dumps(model))
    assert (again.lightning_model.start, again.lightning_model.stop) == (3, 30)
    pd.testing.assert_frame_equal(recommended(again, dataset), recommended(model, dataset))


class Angle(SimilarityModuleBase):
    """A similarity that is none of RecTools'."""


def test_another_similarity_is_refused(dataset: Dataset) -> None:
    with pytest.raises(TypeError, match="dot or cosine; this model's are Angle's"):
        fitted(dataset, loss="slice", lightning_module_type=FastLightningModule, similarity_module_type=Angle)


class Scaled(DistanceSimilarityModule):
    """Scores that are twice RecTools'."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 2 * super().forward(*args, **kwargs)


class ScaledCatalog(DistanceSimilarityModule):
    def _get_full_catalog_logits(self, *args: torch.Tensor) -> torch.Tensor:
        return 2 * super()._get_full_catalog_logits(*args)


class ScaledBackbone(TransformerTorchBackbone):
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 2 * super().forward(*args, **kwargs)


@pytest.mark.parametrize("loss", ["full", "slice"])
@pytest.mark.parametrize(
    "changes",
    [
        {"similarity_module_type": Scaled},
        {"similarity_module_type": ScaledCatalog},
        {"backbone_type": ScaledBackbone, "similarity_module_kwargs": {"distance": "cosine"}},
    ],
)
def test_scores_of_ones_own_are_refused_at_the_first_batch(dataset: Dataset, loss: str, changes: Any) -> None:
    common = {"lightning_module_type": FastLightningModule, "lightning_module_kwargs": {"start": 1, "stop": 30}}
    with pytest.raises(ValueError, match=r"scores of .* with .* are not those of distance='(dot|cosine)' between"):
        fitted(dataset, loss=loss, **common, **changes)


def test_a_teacher_with_scores_of_its_own_is_refused(dataset: Dataset) -> None:
    teacher = fitted(dataset, loss="softmax", similarity_module_type=Scaled)
    sampler = FrozenTeacherSampler(2, start=0, stop=5)
    sampler.set_teacher(teacher.torch_model)
    with pytest.raises(ValueError, match="scores of TransformerTorchBackbone with Scaled are not those of"):
        sampler.get_negatives(one_batch(teacher), 1, teacher.data_preparator.item_id_map.size)


@pytest.mark.parametrize("loss", ["full", "slice"])
def test_validation_is_over_all_items_and_draws_nothing(dataset: Dataset, loss: str) -> None:
    model = fitted(
        dataset,
        loss=loss,
        lightning_module_type=FastLightningModule,
        lightning_module_kwargs={"start": 1, "stop": 30},
        get_val_mask_func=last_of_each,
    )
    batch = one_batch(model)
    model.lightning_model._scores_compared = False  # the comparison is to draw nothing either
    with torch.no_grad():
        scores, state = model.torch_model(batch), torch.get_rng_state()
        found = model.lightning_model._calc_custom_loss_outputs(batch, 0)["loss"]
    assert torch.equal(torch.get_rng_state(), state)
    real, extra = batch["y"] != 0, model.data_preparator.n_item_extra_tokens if loss == "slice" else 0
    rows = torch.nn.functional.cross_entropy(scores[real][:, extra:], batch["y"][real] - extra, reduction="none")
    assert found.item() == pytest.approx((rows * batch["yw"][real]).mean().item(), rel=1e-5)


def test_default_ranks_follow_the_catalogs_size(dataset: Dataset) -> None:
    model = fitted(dataset, loss="slice", lightning_module_type=FastLightningModule)
    assert model.fit_trainer.callback_metrics["train_loss"] > 0
    sampler = FrozenTeacherSampler(3, hard_fraction=1.0)
    sampler.set_teacher(vectors(ITEMS))
    x = torch.randint(1, ITEMS + 1, (4, 5))
    negatives = sampler.get_negatives({"x": x, "y": x}, 1, ITEMS + 1)
    query = vectors(ITEMS)[x - 1].cumsum(1)
    ranks = (query @ vectors(ITEMS).T).sort(dim=2, descending=True, stable=True).indices[..., 6 : ITEMS // 2] + 1
    assert (negatives[..., None] == ranks[..., None, :]).any(-1).all()


def test_ranks_beyond_the_catalog_are_named_by_the_option(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=f"lightning_module_kwargs: stop must be at most {ITEMS}, .*, got 2000"):
        fitted(dataset, loss="slice", lightning_module_type=FastLightningModule, lightning_module_kwargs={"stop": 2000})
    sampler = FrozenTeacherSampler(2, start=ITEMS)
    sampler.set_teacher(vectors(ITEMS))
    with pytest.raises(
        ValueError, match=f"negative_sampler_kwargs: expected .*, got start={ITEMS}, stop=30 by the cat"
    ):
        sampler.get_negatives({"x": torch.ones(1, 1).long(), "y": torch.ones(1, 1).long()}, 1, ITEMS + 1)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"start": 2.0}, TypeError, r"start must be an integer, got float 2\.0"),
        ({"stop": "30"}, TypeError, "stop must be an integer, got str '30'"),
        ({"hard_fraction": "x"}, TypeError, "hard_fraction must be a number, got str 'x'"),
        ({"start": 9, "stop": 3}, ValueError, "expected 0 <= start <= stop, got start=9, stop=3"),
        ({"start": -1}, ValueError, "expected 0 <= start <= stop, got start=-1, stop=None"),
        ({"hard_fraction": -0.5}, ValueError, r"hard_fraction must lie in \[0, 1\], got -0\.5"),
    ],
)
def test_options_are_checked(dataset: Dataset, options: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        FrozenTeacherSampler(2, **options)
    with pytest.raises(kind, match=message):
        fitted(dataset, loss="slice", lightning_module_type=FastLightningModule, lightning_module_kwargs=options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"max_saved_bytes": 1e6}, TypeError, "max_saved_bytes must be an integer, got float"),
        ({"max_saved_bytes": -1}, ValueError, "max_saved_bytes must be at least 0, got -1"),
        ({"precision": "int8"}, ValueError, "precision must be one of None, fp32, bf16, fp16, got 'int8'"),
    ],
)
def test_options_of_the_loss_are_checked(dataset: Dataset, options: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        fitted(dataset, loss="full", lightning_module_type=FastLightningModule, lightning_module_kwargs=options)


def vectors(rows: int) -> torch.Tensor:
    return torch.randint(-9, 10, (rows, 8), generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("lowest", [1, 2])
@pytest.mark.parametrize("limit", [None, 1])
def test_negatives_lie_in_the_teachers_ranks(lowest: int, limit: int | None) -> None:
    torch.manual_seed(0)
    teacher, length = vectors(ITEMS), 5
    x = torch.randint(lowest, ITEMS + lowest, (4, length))
    x[0, :3] = 0
    y = torch.randint(lowest, ITEMS + lowest, (4, length))
    y[0, :2] = 0
    sampler = FrozenTeacherSampler(6, start=5, stop=15, hard_fraction=1.0)
    sampler.set_teacher(teacher)
    batch = {"x": x, "y": y if limit is None else y[:, -1:]}
    negatives = sampler.get_negatives(batch, lowest, ITEMS + lowest, limit)
    assert negatives.shape == (4, limit or length, 6)
    assert lowest <= negatives.min() and negatives.max() < ITEMS + lowest
    for row, column in (batch["y"] != 0).nonzero().tolist():
        so_far = x[row] if limit else x[row, : column + 1]
        seen = so_far[so_far >= lowest] - lowest
        query = teacher[seen].sum(0) / max(len(seen), 1)
        ranks = (teacher @ query).sort(descending=True, stable=True).indices[5:15] + lowest
        drawn = negatives[row, column]
        assert set(drawn.tolist()) <= set(ranks.tolist()) - {int(batch["y"][row, column])}
        assert drawn.unique().numel() == 6


def test_hard_fraction_is_the_share_of_the_slice() -> None:
    torch.manual_seed(0)
    sampler = FrozenTeacherSampler(10, start=0, stop=20, hard_fraction=0.25)
    sampler.set_teacher(vectors(2000))
    x = torch.randint(1, 2001, (50, 4))
    negatives = sampler.get_negatives({"x": x, "y": x}, 1, 2001)
    query = vectors(2000)[x - 1].cumsum(1)
    ranks = (query @ vectors(2000).T).sort(dim=2, descending=True, stable=True).indices[..., :20] + 1
    share = (negatives[..., None] == ranks[..., None, :]).any(-1).float().mean()
    assert share.item() == pytest.approx(0.25, abs=0.05)


def test_uniform_negatives_are_never_the_target_and_all_others_alike() -> None:
    torch.manual_seed(0)
    sampler = FrozenTeacherSampler(500, start=0, stop=2, hard_fraction=0.0)
    sampler.set_teacher(vectors(5))
    x = torch.tensor([[2, 3, 4, 5, 6, 0]]).expand(20, -1)
    negatives = sampler.get_negatives({"x": x, "y": x}, 2, 7)
    for place in range(5):
        counts = torch.bincount(negatives[:, place].flatten(), minlength=7) / 10_000
        assert counts[place + 2] == 0
        torch.testing.assert_close(counts[2:].sort().values[1:], torch.full((4,), 0.25), rtol=0, atol=0.03)
    assert negatives.min() >= 2 and negatives.max() < 7


@pytest.mark.parametrize("distance", ["dot", "cosine"])
def test_a_copied_model_teaches(dataset: Dataset, distance: str) -> None:
    teacher = fitted(dataset, loss="softmax", similarity_module_kwargs={"distance": distance})
    batch = one_batch(teacher)
    sampler = FrozenTeacherSampler(4, start=3, stop=9, hard_fraction=1.0)
    sampler.set_teacher(teacher.torch_model)
    scores = teacher.torch_model(batch).detach()[..., 1:]
    for parameter in teacher.torch_model.parameters():
        parameter.data.zero_()  # the teacher is a copy
    size = teacher.data_preparator.item_id_map.size
    negatives = sampler.get_negatives(batch, 1, size)
    ranks = scores.sort(dim=2, descending=True).indices[..., 3:9] + 1
    real = batch["y"] != 0
    assert (negatives[..., None] == ranks[..., None, :]).any(-1)[real].all()
    assert not (negatives == batch["y"][..., None])[real].any()


def taught(dataset: Dataset, teacher: Any, **changes: Any) -> Any:
    """A model trained against 10 negatives out of the teacher's ranks."""
    seed_everything(1, verbose=False)
    model = SASRecModel(
        **SETTINGS,
        loss="sampled_softmax",
        n_negatives=10,
        negative_sampler_type=FrozenTeacherSampler,
        negative_sampler_kwargs={"start": 1, "stop": 30},
        **changes,
    )
    model.data_preparator.negative_sampler.set_teacher(teacher)
    return model.fit(dataset)


def test_training_against_a_frozen_teacher(dataset: Dataset) -> None:
    model = taught(dataset, fitted(dataset, loss="softmax").torch_model, get_trainer_func=long_trainer)
    assert model.fit_trainer.callback_metrics["train_loss"] < 2.0  # of 11 candidates, chance is 2.4


def test_a_worker_process_samples(dataset: Dataset) -> None:
    model = taught(dataset, vectors(dataset.item_id_map.size), get_trainer_func=trainer, dataloader_num_workers=1)
    assert model.fit_trainer.global_step == 2 * 4  # epochs of 100 sessions in batches of 32


def test_teachers_are_checked(dataset: Dataset) -> None:
    ids = torch.tensor([[1, 2]])
    sampler = FrozenTeacherSampler(2, start=0, stop=5)
    with pytest.raises(RuntimeError, match="set_teacher"):
        sampler.get_negatives({"x": ids, "y": ids}, 1, ITEMS + 1)
    sampler.set_teacher(vectors(ITEMS - 1))
    with pytest.raises(ValueError, match=f"must have {ITEMS} rows for this data set, it has {ITEMS - 1}"):
        sampler.get_negatives({"x": ids, "y": ids}, 1, ITEMS + 1)
    with pytest.raises(ValueError, match=r"teacher, where a tensor, must be \(items, d\), got \(60,\)"):
        sampler.set_teacher(torch.ones(ITEMS))
    with pytest.raises(
        TypeError, match=r"teacher, where a tensor, must be float32, bfloat16 or float16, got torch\.int64"
    ):
        sampler.set_teacher(torch.ones(ITEMS, 2).long())
    for other in (torch.nn.Linear(2, 2), vectors(ITEMS).numpy(), None):
        with pytest.raises(TypeError, match="expected the torch_model of a RecTools model or a tensor of vectors, got"):
            sampler.set_teacher(other)
    with pytest.raises(ValueError, match="n_negatives must be at least 1, got 0"):
        FrozenTeacherSampler(0)
    model = fitted(dataset, loss="softmax").torch_model
    model.similarity_module = Angle()
    with pytest.raises(TypeError, match="dot or cosine"):
        sampler.set_teacher(model)
