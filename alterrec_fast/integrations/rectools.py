"""RecTools 0.19.0: hard negatives and full softmax for its transformer models, through two of its extension points.

    from alterrec_fast.integrations.rectools import FastLightningModule
    SASRecModel(loss="slice", lightning_module_type=FastLightningModule,
                lightning_module_kwargs={"start": 20, "stop": 2000})        # the model ranks for itself, at any n

    from alterrec_fast.integrations.rectools import FrozenTeacherSampler
    model = SASRecModel(loss="sampled_softmax", n_negatives=20, negative_sampler_type=FrozenTeacherSampler,
                        negative_sampler_kwargs={"start": 20, "stop": 2000})
    model.data_preparator.negative_sampler.set_teacher(vectors)             # a frozen teacher, small n

Notation: B sessions, L session length, S positions that may have a target, T that have one, d width, V rows of the
catalog: RecTools' extra tokens (padding, BERT4Rec's mask), then the items, in the order of
``model.data_preparator.get_known_item_ids()``.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from alterrec_fast.integrations import comparable, default_ranks, need, same_scores
from alterrec_fast.ops import checks, dispatch, rank_slice, slice_cross_entropy

INSTALL = 'pip install "rectools[torch]==0.19.0"'
need("rectools", INSTALL)
need("pytorch_lightning", INSTALL)

from rectools.models.nn.transformers.lightning import TransformerLightningModule  # noqa: E402
from rectools.models.nn.transformers.negative_sampler import TransformerNegativeSamplerBase  # noqa: E402
from rectools.models.nn.transformers.similarity import DistanceSimilarityModule  # noqa: E402
from rectools.models.rank import Distance  # noqa: E402

LOSSES = ("full", "slice")


class FastLightningModule(TransformerLightningModule):
    """RecTools' Lightning module with two further losses, which keep at most max_saved_bytes of logits for backward.

    ``loss="full"`` is the value of RecTools' "softmax". ``loss="slice"`` is a softmax over the target and ranks
    [start, stop) of the model's own ranking for this position at this step, without the target. All other losses stay
    RecTools'. Validation is the softmax over all items for "slice", too: negatives that the model picks itself, and
    others drawn at random, would compare nothing from epoch to epoch. It reports "loss" alone, since the logits that
    stock adds are what is not made here.

    Args:
        start, stop: the ranks of "slice". Where left out they follow the catalog's size: 20 to 2000 of 4,000 items and
            more, else 6 to half of the catalog.
        hard_fraction: the share of the slice that is kept; the others are replaced by uniform negatives
            (`RankSlice.mix`).
        label_smoothing: of "full", as in `slice_cross_entropy`.
        learn_temperature: whether the temperature, which starts as RecTools' logits_t, is trained with the model.
        weight: V numbers or None: the weight of a target by its row of the catalog, beside RecTools' own; a list, as
            RecTools stores arguments.
        precision, max_saved_bytes: as in `slice_cross_entropy`.
        args, kwargs: RecTools'.

    Raises TypeError for an argument of another kind and for a similarity module other than RecTools' dot and cosine,
    ValueError for one out of range, and at the first batch ValueError for ranks beyond the catalog and for a model
    whose scores of two sessions are not these.
    """

    def __init__(
        self,
        *args: Any,
        start: int | None = None,
        stop: int | None = None,
        hard_fraction: float = 0.5,
        label_smoothing: float = 0.0,
        learn_temperature: bool = False,
        weight: list[float] | None = None,
        precision: str | None = None,
        max_saved_bytes: int = 256 << 20,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        _check_options(start, stop, hard_fraction)
        checks.check_smoothing(label_smoothing, sliced=self.loss == "slice", has_positives=False)
        checks.check_flag("learn_temperature", learn_temperature)
        if self.loss not in LOSSES and (label_smoothing or learn_temperature or weight is not None):
            raise ValueError(f"label_smoothing, learn_temperature and weight need loss full or slice, got {self.loss}")
        self.label_smoothing = label_smoothing
        class_weight = None if weight is None else torch.tensor(weight, dtype=torch.float32)
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.temperature = (
            torch.nn.Parameter(torch.tensor(float(self.logits_t))) if learn_temperature else self.logits_t
        )
        self.start, self.stop = start, stop
        self.hard_fraction = hard_fraction
        if precision not in dispatch.PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(str, dispatch.PRECISIONS))}, got {precision!r}")
        self.loss_precision = precision
        checks.check_integer("max_saved_bytes", max_saved_bytes)
        if max_saved_bytes < 0:
            raise ValueError(f"max_saved_bytes must be at least 0, got {max_saved_bytes}")
        self.max_saved_bytes = max_saved_bytes
        self._scores_compared = False
        if self.loss in LOSSES:
            _check_similarity(self.torch_model)

    def configure_optimizers(self) -> torch.optim.Adam:
        optimizer = super().configure_optimizers()
        if isinstance(self.temperature, torch.nn.Parameter) and len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": [self.temperature]})
        return optimizer

    def _calc_custom_loss(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.loss not in LOSSES:
            return super()._calc_custom_loss(batch, batch_idx)
        return self._next_item_loss(batch, sliced=self.loss == "slice")

    def _calc_custom_loss_outputs(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        if self.loss not in LOSSES:
            return super()._calc_custom_loss_outputs(batch, batch_idx)
        return {"loss": self._next_item_loss(batch, sliced=False)}

    def _next_item_loss(self, batch: dict[str, Tensor], sliced: bool) -> Tensor:
        """The loss of the targets y (B, S), weighted by yw (B, S), at the last S positions of the sessions.

        sliced: against the slice, else against all items.
        """
        if not self._scores_compared:
            _compare_scores(self.torch_model, batch)
            self._scores_compared = True
        target, weight = batch["y"], batch["yw"]
        sessions, catalog = _vectors(self.torch_model, batch)
        real = target != 0
        query, target, weight = sessions[:, -target.shape[1] :][real], target[real], weight[real]  # (T, d), (T,), (T,)
        # RecTools' softmax has its extra tokens among the candidates, so "full" has them, too.
        first_item = len(self.item_extra_tokens) if self.loss == "slice" else 0
        neg = None
        if sliced:
            start, stop = default_ranks(catalog.shape[0] - first_item, self.start, self.stop, "lightning_module_kwargs")
            neg = rank_slice(
                query.detach(), catalog.detach(), start=start, stop=stop, exclude=target, first_item=first_item
            ).mix(self.hard_fraction)
        losses = slice_cross_entropy(
            query,
            catalog,
            target,
            neg,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            weight=self.class_weight,
            first_item=first_item,
            reduction="none",
            max_saved_bytes=self.max_saved_bytes,
            precision=self.loss_precision,
        )
        losses = losses * weight
        return losses.sum() / (losses > 0).sum().clamp(min=1)  # RecTools' mean: over the rows whose loss is above zero


class FrozenTeacherSampler(TransformerNegativeSamplerBase):
    """Negatives out of ranks [start, stop) of a frozen teacher's ranking for each position, without its target.

    RecTools calls it where batches are collated, with ids alone: for a small n_negatives and a teacher that stands
    still. `FastLightningModule` is for the model's own ranking and for thousands of negatives.

    Args:
        n_negatives: how many to draw for each position, without replacement where the slice has as many.
        start, stop: the teacher's ranks. Where left out they follow the catalog's size: 20 to 2000 of 4,000 items and
            more, else 6 to half of the catalog.
        hard_fraction: the chance of each negative to come from the slice; the others are uniform over all items but the
            target.

    Raises TypeError for an argument of another kind, and ValueError for one out of range.
    """

    def __init__(
        self,
        n_negatives: int,
        start: int | None = None,
        stop: int | None = None,
        hard_fraction: float = 0.5,
        **kwargs: Any,
    ):
        super().__init__(n_negatives, **kwargs)
        checks.check_integer("n_negatives", n_negatives)
        if n_negatives < 1:
            raise ValueError(f"n_negatives must be at least 1, got {n_negatives}")
        _check_options(start, stop, hard_fraction)
        self.start, self.stop = start, stop
        self.hard_fraction = hard_fraction
        self._scores_compared = False
        self._model: Any = None  # a RecTools backbone
        self._items: Tensor | None = None  # a model's: (V, d), vectors alone: (items, d)

    def set_teacher(self, teacher: torch.nn.Module | Tensor) -> None:
        """Takes a copy, on the CPU.

        teacher: the ``torch_model`` of a fitted RecTools model, or vectors of the items, (items, d) float32, bfloat16
            or float16, whose score for a position is the dot product with the mean of the session so far. Either is
            in the order of ``get_known_item_ids()``, which the data set and the filters of RecTools alone decide.

        Raises TypeError for a teacher of another kind or dtype, and for a similarity module other than RecTools' dot
        and cosine; ValueError for vectors that are not (items, d).
        """
        if isinstance(teacher, Tensor):
            if teacher.ndim != 2:
                raise ValueError(f"teacher, where a tensor, must be (items, d), got {tuple(teacher.shape)}")
            if teacher.dtype not in checks.FLOATS:
                raise TypeError(f"teacher, where a tensor, must be float32, bfloat16 or float16, got {teacher.dtype}")
            self._model, self._items = None, teacher.detach().cpu().clone()
            return
        _check_similarity(teacher)
        self._model = deepcopy(teacher).cpu().eval().requires_grad_(False)
        self._items = self._model.item_model.get_all_embeddings()
        self._scores_compared = False

    def get_negatives(
        self,
        batch_dict: dict[str, Tensor],
        lowest_id: int,
        highest_id: int,
        session_len_limit: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, S, n) int64 for the last S = session_len_limit positions, all L by default; ids from lowest_id on.

        Raises RuntimeError without a teacher, and ValueError for one of another number of items or of other scores than
        RecTools', and for ranks beyond the catalog.
        """
        if self._items is None:
            raise RuntimeError("FrozenTeacherSampler has no teacher: call set_teacher(...) before fit")
        rows = highest_id if self._model is not None else highest_id - lowest_id
        if self._items.shape[0] != rows:
            raise ValueError(f"the teacher must have {rows} rows for this data set, it has {self._items.shape[0]}")
        if highest_id - lowest_id < 2:
            raise ValueError(f"negatives need at least 2 items, got {highest_id - lowest_id}")
        size, length = batch_dict["x"].shape
        target = batch_dict["y"]
        real = target != 0
        # Out of one item fewer; those from the target on give way to it.
        negatives = torch.randint(lowest_id, highest_id - 1, (size, session_len_limit or length, self.n_negatives))
        negatives += real[..., None] & (negatives >= target[..., None])
        start, stop = default_ranks(highest_id - lowest_id, self.start, self.stop, "negative_sampler_kwargs")
        query, catalog = self._teach(batch_dict, lowest_id)
        ranked = rank_slice(
            query[:, -negatives.shape[1] :][real],
            catalog,
            start=start,
            stop=stop,
            exclude=target[real],
            first_item=lowest_id,
        )
        hard = ranked.sample(self.n_negatives)
        from_slice = (torch.rand(hard.shape) < self.hard_fraction) & (hard >= 0)
        negatives[real] = torch.where(from_slice, hard, negatives[real])
        return negatives

    @torch.no_grad()
    def _teach(self, batch: dict[str, Tensor], lowest_id: int) -> tuple[Tensor, Tensor]:
        """The teacher's vectors of all positions (B, L, d) and of the catalog (V, d)."""
        if self._model is not None:
            if not self._scores_compared:
                _compare_scores(self._model, batch)
                self._scores_compared = True
            return _vectors(self._model, batch, self._items)
        assert self._items is not None
        catalog = torch.cat((self._items.new_zeros(lowest_id, self._items.shape[1]), self._items))
        count = (batch["x"] >= lowest_id).cumsum(1).clamp(min=1)
        return catalog[batch["x"]].float().cumsum(1) / count[..., None], catalog


def _check_options(start: int | None, stop: int | None, hard_fraction: float) -> None:
    for name, rank in (("start", start), ("stop", stop)):
        if rank is not None:
            checks.check_integer(name, rank)
    if (start or 0) < 0 or (stop is not None and stop < (start or 0)):
        raise ValueError(f"expected 0 <= start <= stop, got start={start}, stop={stop}")
    checks.check_fraction("hard_fraction", hard_fraction)


def _check_similarity(model: Any) -> None:
    similarity = getattr(model, "similarity_module", None)
    if similarity is None:
        raise TypeError(
            f"expected the torch_model of a RecTools model or a tensor of vectors, got {type(model).__name__}"
        )
    if not isinstance(similarity, DistanceSimilarityModule):
        name = type(similarity).__name__
        raise TypeError(f"scores must be DistanceSimilarityModule's, dot or cosine; this model's are {name}'s")


def _vectors(model: Any, batch: dict[str, Tensor], items: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(B, L, d) and (V, d), whose dot products are the model's scores; items: its embeddings where known."""
    items = model.item_model.get_all_embeddings() if items is None else items
    sessions = model.encode_sessions(batch, items)
    similarity = model.similarity_module
    if similarity.distance == Distance.COSINE:
        return similarity._get_embeddings_norm(sessions), similarity._get_embeddings_norm(items)
    return sessions, items


@torch.no_grad()
def _compare_scores(model: Any, batch: dict[str, Tensor]) -> None:
    """Raises ValueError where the vectors' scores for two sessions are not the model's own.

    The similarity module is asked for the catalog at the last position, and the model for some items at every one: all
    items at every one are a tensor that must not be made.
    """
    two = {name: values[:2] for name, values in batch.items()}
    with comparable(model):
        items = model.item_model.get_all_embeddings()
        encoded = model.encode_sessions(two, items)
        sessions, catalog = _vectors(model, two, items)
        sampled = torch.linspace(0, items.shape[0] - 1, min(items.shape[0], 100), device=items.device).long()
        same = same_scores(sessions[:, -1:] @ catalog.T, model.similarity_module(encoded[:, -1:], items))
        candidates = sampled.expand(*sessions.shape[:2], -1)
        real = two["x"] != 0  # what a model computes for padding does not matter
        same &= same_scores((sessions @ catalog[sampled].T)[real], model(two, candidate_item_ids=candidates)[real])
    if not same:
        kind = model.similarity_module.distance.value
        raise ValueError(
            f"the scores of {type(model).__name__} with {type(model.similarity_module).__name__} are not those of "
            f"distance={kind!r} between encode_sessions and get_all_embeddings, which is what is ranked and trained "
            "here"
        )
