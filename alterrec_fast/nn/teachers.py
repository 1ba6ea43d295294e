"""Who ranks the catalog for a sampler when it is not the model being trained: a copy of it, or other vectors.

Notation: B sessions, L session length, V items, f width of the teacher's vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from alterrec_fast.nn.fused_item_embedding import FusedItemEmbedding
from alterrec_fast.ops import checks


class TeacherCopy(nn.Module):
    """A copy of a model that stands still, or follows the model slowly, and ranks in its stead.

    Each `update` moves the copy's parameters to ``decay * copy + (1 - decay) * model``; buffers are taken over. Call it
    after every step for a slow copy (decay near 1), once an epoch for a copy frozen in between (decay 0), or never.

    The copy is a submodule: it moves with ``to``, and the state dict holds it. It is no part of what is trained: its
    parameters require no gradient, ``train()`` leaves it in eval mode, and ``parameters()`` and ``modules()`` of this
    module, and of any that holds it, do not list it (an optimizer, DistributedDataParallel and a count of parameters
    do not meet it); ``teacher.copy.parameters()`` does. In a distributed run copy the wrapped model, whose weights are
    those of all processes. Hooks on the TeacherCopy run at each call.

    Args:
        model: what to copy; of a DistributedDataParallel its module.
        vectors: ``vectors(copy, *inputs) -> (query, catalog)``: query of target's shape and a last dimension, catalog
            (V, f). For a SASRec: ``lambda model, items: (model(items), model.item_embedding.weight)``.
        decay: in [0, 1].

    Raises:
        TypeError: for an argument of another kind.
        ValueError: for another decay.
    """

    def __init__(self, model: nn.Module, vectors: Callable[..., tuple[Tensor, Tensor]], *, decay: float = 0.0):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {checks.kind_of(model)}")
        if not callable(vectors):
            raise TypeError(
                f"vectors must be a function (copy, *inputs) -> (query, catalog), got {checks.kind_of(vectors)}"
            )
        checks.check_number("decay", decay)
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        self.vectors, self.decay = vectors, float(decay)
        self.copy = AveragedModel(_unwrapped(model), multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.copy.update_parameters(_unwrapped(model))  # the first call copies, all later ones average
        self.copy.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """The copy's (query, catalog) for these inputs, without gradients."""
        return self.vectors(self.copy.module, *inputs)

    def update(self, model: nn.Module) -> None:
        """Move the copy towards the model.

        Raises TypeError for what is no module, and ValueError for a model with other parameters than the copied one.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {checks.kind_of(model)}")
        model = _unwrapped(model)
        shapes, expected = (
            {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
            for module in (model, self.copy.module)
        )
        if shapes != expected:
            other = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
            raise ValueError(f"model must be of the kind that was copied; {other[0]} has another shape or is missing")
        # A fused table is made of buffers, which are taken over at once: it moves here.
        pairs = zip(self.copy.module.modules(), model.modules(), strict=True)
        weights = [both for mine, theirs in pairs for both in _weights(mine, theirs)]
        moved = [mine.lerp(theirs, 1.0 - self.decay) for mine, theirs in weights]
        self.copy.update_parameters(model)
        with torch.no_grad():
            for (mine, _), vector in zip(weights, moved, strict=True):
                mine.copy_(vector)

    def train(self, mode: bool = True) -> TeacherCopy:
        """As of any module, but that the copy stays in eval mode."""
        super().train(mode)
        self.copy.eval()
        return self

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """This module alone, so that ``parameters()`` of a model that holds it lists nothing of the copy."""
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self


def mean_of_items(vectors: Tensor, history: Tensor, first_item: int, per_place: bool) -> Tensor:
    """The mean vector of each session's items, for item vectors of another kind, such as text embeddings.

    vectors (V, f); history (B, L) ids, those below first_item are padding -> (B, f), or (B, L, f) where place l holds
    the mean of the items at places 0..l. A session without items has zeros.
    """
    real = history >= max(first_item, 0)
    rows = vectors[history.clamp(min=0)].float() * real.unsqueeze(2)  # (B, L, f)
    if per_place:
        return rows.cumsum(1) / real.cumsum(1).clamp(min=1).unsqueeze(2)
    return rows.sum(1) / real.sum(1).clamp(min=1).unsqueeze(1)


def _weights(mine: nn.Module, theirs: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What a copy averages of a fused table: not its moments; nothing of other modules."""
    if not isinstance(mine, FusedItemEmbedding):
        return []
    pairs = ((getattr(mine, name), getattr(theirs, name)) for name in ("table", "norm_weight", "norm_bias"))
    return [pair for pair in pairs if pair[0] is not None]


def _unwrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, DistributedDataParallel):
        module: nn.Module = model.module
        return module
    return model
