"""Modules for a training loop of your own: losses, an item table, and a sampler of hard negatives with its teachers."""

from alterrec_fast.nn.fused_item_embedding import FusedItemEmbedding
from alterrec_fast.nn.losses import FullSoftmaxLoss, SampledSoftmaxLoss, SliceCrossEntropy
from alterrec_fast.nn.sampler import RankSliceSampler
from alterrec_fast.nn.teachers import TeacherCopy

__all__ = [
    "FullSoftmaxLoss",
    "FusedItemEmbedding",
    "RankSliceSampler",
    "SampledSoftmaxLoss",
    "SliceCrossEntropy",
    "TeacherCopy",
]
