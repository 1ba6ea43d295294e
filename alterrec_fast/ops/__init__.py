"""The four ops, their specification in plain PyTorch, and the choice of an engine. Knows nothing of models."""

from alterrec_fast.ops.dispatch import BackendError, backend
from alterrec_fast.ops.rank_slice import rank_slice
from alterrec_fast.ops.sampled_softmax import sampled_softmax
from alterrec_fast.ops.slice_cross_entropy import slice_cross_entropy
from alterrec_fast.ops.slices import RankSlice
from alterrec_fast.ops.top_k import TopK, top_k

__all__ = [
    "BackendError",
    "RankSlice",
    "TopK",
    "backend",
    "rank_slice",
    "sampled_softmax",
    "slice_cross_entropy",
    "top_k",
]
