"""How rows of an item table are updated: the rules of torch.optim, over some rows at a time.

Notation: V items, n rows of them, d width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

KINDS = ("adam", "sparse_adam", "rowwise_adagrad", "sgd")  # in the order of the native engine's
_MASK = 0xFFFFFFFF


class Rule(NamedTuple):
    """One step's rule; numbers that depend on the step are ready made: floats, or tensors on the table's device."""

    kind: str
    step_size: Any
    root_correction: Any  # of adam
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    scale: Any  # what gradients are multiplied by first
    clip: float  # and then each element is clipped to [-clip, clip]; inf for none
    key: Any  # of the draws that round to bfloat16

    @classmethod
    def of(cls, kind: str, group: dict[str, Any], steps: Tensor, seed: Tensor, scale: Any, on_host: bool) -> Rule:
        """For step number `steps` (int64, from 1) of an optimiser with these options; on_host: numbers are read."""
        t, lr = (steps.item(), float(group["lr"])) if on_host else (steps.double(), group["lr"])
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        step_size, root = lr, 1.0
        if "adam" in kind:
            step_size, root = lr / (1.0 - beta1**t), (1.0 - beta2**t) ** 0.5
        if kind == "sparse_adam":
            step_size = step_size * root
        key = draw_key(*((int(seed), int(steps)) if on_host else (seed, steps)))
        clip = group["clip_value"]
        return cls(
            kind, step_size, root, beta1, beta2, group.get("eps", 0.0), group["weight_decay"], scale,
            math.inf if clip is None else clip, key,
        )  # fmt: skip

    def step(self, x: Tensor, grad: Tensor, first: Tensor, second: Tensor, by_row: bool = True) -> Tensor:
        """x (n, d) float32 after the step by grad (n, d); first and second, its moments, are updated in place.

        by_row: row-wise Adagrad has one number a row, (n,); else one for each element.
        """
        grad = grad * self.scale
        if self.clip < math.inf:
            grad = grad.clamp(-self.clip, self.clip)
        grad = grad + self.weight_decay * x
        new: Tensor
        if self.kind == "sgd":
            new = x - self.step_size * grad
            return new
        if self.kind == "rowwise_adagrad":
            first += grad.square().mean(1) if by_row else grad.square()
            over = first.sqrt() + self.eps
            new = x - self.step_size * grad / (over.unsqueeze(1) if by_row else over)
            return new
        first += (grad - first) * (1.0 - self.beta1)
        second.mul_(self.beta2).add_(grad.square() * (1.0 - self.beta2))
        over = second.sqrt() if self.kind == "sparse_adam" else second.sqrt() / self.root_correction
        new = x - self.step_size * first / (over + self.eps)
        return new


def mix_bits(x: Any) -> Any:
    """The 32 bits that a number, or an int64 tensor of numbers, of 32 bits is mixed to."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def draw_key(seed: Any, steps: Any) -> Any:
    """32 bits of a seed and a step number, of 64 bits each."""
    return mix_bits((seed & _MASK) ^ mix_bits(((seed >> 32) & _MASK) ^ mix_bits(steps & _MASK)))


def round_at_random(x: Tensor, rows: Tensor, key: Any) -> Tensor:
    """x (n, d) float32 as bfloat16, rounded up with a probability of the part cut off; rows (n,) int64 are its rows'
    numbers. The draws are a function of key, row and place."""
    row_keys = mix_bits((rows & _MASK) ^ mix_bits((rows >> 32) ^ key))
    places = torch.arange(x.shape[1], device=x.device) * 0x9E3779B9
    draws = mix_bits((row_keys.unsqueeze(1) + places) & _MASK) & 0xFFFF
    bits = x.contiguous().view(torch.int32).long() & _MASK
    rounded = (((bits + draws) >> 16) & 0xFFFF).to(torch.int32)
    signed = (rounded - (rounded >= 0x8000) * 0x10000).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isfinite(), signed, x.bfloat16())
