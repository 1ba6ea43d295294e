"""The optimiser of a network: Adam, its learning rate by the plan, and the sum of a table's two gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from alterrec_fast.systems import Epoch
from alterrec_fast.training.config import Config


def adam(network: torch.nn.Module, rate: float, weight_decay: float, device: torch.device) -> torch.optim.Adam:
    """The optimiser of a network; on CUDA its learning rate is a tensor, which graphs read."""
    cuda = device.type == "cuda"
    lr = torch.tensor(rate, device=device) if cuda else rate
    return torch.optim.Adam(network.parameters(), lr, weight_decay=weight_decay, fused=True, capturable=cuda)


def learning_rate(config: Config, epoch: Epoch) -> float:
    """The learning rate of an epoch: stepped by the epochs that its student has had of its own."""
    start, period = {
        "id": (config.lr_id, config.lr_step_id),
        "text": (config.lr_text, config.lr_step_text),
        "fused": (config.lr_id, config.lr_step_id),
    }[epoch.student]
    rate: float = start * config.lr_gamma ** (epoch.own // period)
    return rate


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Sets the learning rate, where it is a tensor in place, and returns it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return rate


def add_rows(matrix: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """matrix (V, d) with rows (T, d) added in place at ids (T,) int64, which may repeat; every sum has one order."""
    if matrix.device.type == "cpu":
        return matrix.index_add_(0, ids, rows)
    # By a sort of the ids; index_add_ adds by atomics there, in whatever order they come. The public index_put_ is the
    # same but reads the ids' range first.
    return torch._index_put_impl_(matrix, [ids], rows, accumulate=True, unsafe=True)
