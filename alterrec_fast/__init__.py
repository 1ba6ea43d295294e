"""Rank slices of huge catalogs, losses over them, and AlterRec trained on top."""

from typing import TYPE_CHECKING, Any

from alterrec_fast.ops import BackendError, RankSlice, rank_slice, sampled_softmax, slice_cross_entropy, top_k

if TYPE_CHECKING:
    from alterrec_fast.run import load, train, train_seeds
    from alterrec_fast.training.config import Config

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "Config",
    "RankSlice",
    "load",
    "rank_slice",
    "sampled_softmax",
    "slice_cross_entropy",
    "top_k",
    "train",
    "train_seeds",
]

_TRAINER = {
    "Config": "alterrec_fast.training.config",
    "load": "alterrec_fast.run",
    "train": "alterrec_fast.run",
    "train_seeds": "alterrec_fast.run",
}


def __getattr__(name: str) -> Any:
    """The trainer's names, on first use: the ops alone need nothing but torch and numpy."""
    if name not in _TRAINER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_TRAINER[name]), name)
