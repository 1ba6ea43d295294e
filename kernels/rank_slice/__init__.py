"""Rank slices of the whole catalog, in a file for each stage; `rank_slice_fwd` is the op."""

from .launch import rank_slice_fwd

__all__ = ["rank_slice_fwd"]
