"""Rank slices of huge catalogs, losses over them, and AlterRec trained on top."""

from alterrec_fast.ops import BackendError, RankSlice, rank_slice, sampled_softmax, slice_cross_entropy, top_k

__version__ = "0.1.0"
__all__ = ["BackendError", "RankSlice", "rank_slice", "sampled_softmax", "slice_cross_entropy", "top_k"]
