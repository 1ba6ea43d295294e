"""Modules for a training loop of your own: the losses, and a sampler of hard negatives with its teachers."""

from alterrec_fast.nn.losses import FullSoftmaxLoss, SampledSoftmaxLoss, SliceCrossEntropy
from alterrec_fast.nn.sampler import RankSliceSampler
from alterrec_fast.nn.teachers import TeacherCopy

__all__ = ["FullSoftmaxLoss", "RankSliceSampler", "SampledSoftmaxLoss", "SliceCrossEntropy", "TeacherCopy"]
