"""Rank slices of huge catalogs, losses over them, and AlterRec trained on top."""

from typing import TYPE_CHECKING, Any

from alterrec_fast.ops import (
    BackendError,
    RankSlice,
    TopK,
    backend,
    rank_slice,
    sampled_softmax,
    slice_cross_entropy,
    top_k,
)

if TYPE_CHECKING:
    from alterrec_fast.nn.fused_item_embedding import FusedItemEmbedding
    from alterrec_fast.nn.losses import FullSoftmaxLoss, SampledSoftmaxLoss, SliceCrossEntropy
    from alterrec_fast.nn.sampler import RankSliceSampler
    from alterrec_fast.nn.teachers import TeacherCopy
    from alterrec_fast.run import train, train_seeds
    from alterrec_fast.trained import load
    from alterrec_fast.training.config import Config

__all__ = [
    "BackendError",
    "Config",
    "FullSoftmaxLoss",
    "FusedItemEmbedding",
    "RankSlice",
    "RankSliceSampler",
    "SampledSoftmaxLoss",
    "SliceCrossEntropy",
    "TeacherCopy",
    "TopK",
    "backend",
    "load",
    "rank_slice",
    "sampled_softmax",
    "slice_cross_entropy",
    "top_k",
    "train",
    "train_seeds",
]

_LAZY = {
    "Config": "alterrec_fast.training.config",
    "FullSoftmaxLoss": "alterrec_fast.nn.losses",
    "FusedItemEmbedding": "alterrec_fast.nn.fused_item_embedding",
    "RankSliceSampler": "alterrec_fast.nn.sampler",
    "SampledSoftmaxLoss": "alterrec_fast.nn.losses",
    "SliceCrossEntropy": "alterrec_fast.nn.losses",
    "TeacherCopy": "alterrec_fast.nn.teachers",
    "load": "alterrec_fast.trained",
    "train": "alterrec_fast.run",
    "train_seeds": "alterrec_fast.run",
}


def __getattr__(name: str) -> Any:
    """What is not an op, on first use: the ops, losses and sampler need nothing but torch and numpy."""
    if name == "__version__":
        from importlib.metadata import version

        return version("alterrec-fast")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from alterrec_fast.extras import needs_train

    with needs_train(f"alterrec_fast.{name}"):
        return getattr(import_module(_LAZY[name]), name)
