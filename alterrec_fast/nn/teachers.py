"""Who ranks the catalog for a sampler when it is not the model being trained: a copy of it, or other vectors.

Notation: B sessions, L session length, V items, f width of the teacher's vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class TeacherCopy:
    """A copy of a model that stands still, or follows the model slowly, and ranks in its stead.

    Each `update` moves the copy's parameters to ``decay * copy + (1 - decay) * model``; buffers are taken over. Call it
    after every step for a slow copy (decay near 1), once an epoch for a copy frozen in between (decay 0), or never. The
    copy runs in eval mode and without gradients.

    Args:
        model: what to copy; of a DistributedDataParallel its module.
        vectors: ``vectors(copy, *inputs) -> (query, catalog)``: query of target's shape and a last dimension, catalog
            (V, f). For a SASRec: ``lambda model, items: (model(items), model.item_embedding.weight)``.
        decay: in [0, 1].

    Raises ValueError for another decay.
    """

    def __init__(self, model: nn.Module, vectors: Callable[..., tuple[Tensor, Tensor]], decay: float = 0.0):
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        self.vectors = vectors
        self.copy = AveragedModel(_unwrapped(model), multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.copy.update_parameters(_unwrapped(model))  # the first call copies, all later ones average
        self.copy.eval().requires_grad_(False)

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        return self.vectors(self.copy.module, *inputs)

    def update(self, model: nn.Module) -> None:
        self.copy.update_parameters(_unwrapped(model))

    def state_dict(self) -> dict[str, Any]:
        """The copy's own tensors, as in `nn.Module.state_dict`, and the number of its updates."""
        return self.copy.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; RuntimeError where it is of another model."""
        self.copy.load_state_dict(state)


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


def _unwrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, DistributedDataParallel):
        module: nn.Module = model.module
        return module
    return model
