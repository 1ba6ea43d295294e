"""Fresh random inputs of every op, what is true of them in float64, and what plain torch makes of them.

Written out from the definitions, without this package's ops. Shapes: B sessions, V items, d width, P positives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FP32, BF16 = torch.float32, torch.bfloat16
BLOCK = 1 << 28  # numbers of the catalog that are widened at a time


@dataclass(frozen=True)
class Arithmetic:
    """The dtypes of the inputs and how they are multiplied."""

    query: torch.dtype
    catalog: torch.dtype
    precision: str | None = None
    tf32: bool = False

    @property
    def bf16(self) -> bool:
        """Whether products are of values rounded to bfloat16."""
        return self.precision == "bf16" or (self.precision is None and BF16 in (self.query, self.catalog))

    @property
    def least(self) -> float:
        """What an error may be of the largest value, however small torch's is (tests/ops/loss_helpers.py)."""
        return 2.0**-7 if self.bf16 else 2.0**-9 if self.tf32 else 4e-6

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, torch multiplies float32 matrices accordingly."""
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if self.tf32 else "ieee"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


ARITHMETICS = {
    "fp32": Arithmetic(FP32, FP32),
    "tf32": Arithmetic(FP32, FP32, tf32=True),
    "bf16": Arithmetic(BF16, BF16),
    "mixed": Arithmetic(FP32, BF16),
    "rounded": Arithmetic(FP32, FP32, "bf16"),
    "widened": Arithmetic(BF16, FP32, "fp32"),
}


class Source:
    """Random numbers of one seed on one device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def integers(self, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        """Whole numbers from -4 to 4: dot products are exact in any arithmetic and order, with many ties."""
        drawn = torch.randint(-4, 5, shape, generator=self.generator, device=self.device, dtype=torch.int8)
        return drawn.to(dtype)

    def normal(self, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=dtype)

    def ids(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def matrix(self, rows: int, width: int, dtype: torch.dtype, exact: bool, strided: bool) -> Tensor:
        """(rows, width); strided: cut out of a wider one, so that rows are not aligned."""
        draw = self.integers if exact else self.normal
        if strided:
            return draw(rows, width + 9, dtype=dtype)[:, 3 : 3 + width]
        return draw(rows, width, dtype=dtype)


def widened(x: Tensor, bf16: bool) -> Tensor:
    """float64 of what is multiplied."""
    return (x.to(BF16) if bf16 else x).double()


# --- ranks ---


def scores_of(query: Tensor, catalog: Tensor, bias: Tensor | None, bf16: bool) -> Tensor:
    """(B, V) float64."""
    step = max(1, BLOCK // catalog.shape[1])
    q = widened(query, bf16)
    scores = torch.cat([q @ widened(part, bf16).T for part in catalog.split(step)], 1)
    return scores + (0.0 if bias is None else bias.double())  # adding 0.0 leaves zeros of one sign, which tie


def torch_scores(query: Tensor, catalog: Tensor, bias: Tensor | None, bf16: bool) -> Tensor:
    """(B, V) float32 by plain torch in the op's own arithmetic: inputs are rounded, sums and scores are not."""
    dtype = BF16 if bf16 else FP32
    step = max(1, BLOCK // catalog.shape[1])
    scores = torch.cat([query.to(dtype).float() @ part.to(dtype).float().T for part in catalog.split(step)], 1)
    return scores if bias is None else scores + bias.float()


def order_of(scores: Tensor, first_item: int) -> Tensor:
    """(B, V - first_item) ids, best first, ties by lower id."""
    return scores[:, first_item:].sort(dim=1, descending=True, stable=True).indices + first_item


def excluded_mask(exclude: Any, shape: torch.Size) -> Tensor:
    """(B, V) bool of any form of `exclude`."""
    if exclude is None:
        return torch.zeros(shape, dtype=torch.bool)
    if isinstance(exclude, tuple):
        values, offsets = exclude
        lists = [values[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    else:
        lists = list(exclude.reshape(shape[0], -1))
    mask = torch.zeros(shape, dtype=torch.bool, device=lists[0].device)
    for row, ids in zip(mask, lists, strict=True):
        row[ids[ids >= 0].long()] = True
    return mask


def mask_of(order: Tensor, start: int, stop: int, items: int) -> Tensor:
    """(B, V) bool: the items at places [start, stop) of each row's order."""
    mask = torch.zeros(order.shape[0], items, dtype=torch.bool, device=order.device)
    return mask.scatter_(1, order[:, start:stop], True)


def misplaced(members: Tensor, truth: Tensor, scores: Tensor, order: Tensor, start: int, stop: int) -> float:
    """How far, by its true score, the item that is in the wrong place is from the nearer end of the slice; at worst.

    members and truth (B, V) bool; 0.0 where they are the same.
    """
    wrong = members ^ truth
    if not bool(wrong.any()):
        return 0.0
    ends = scores.gather(1, order[:, [start, stop - 1]])
    distance = (scores.unsqueeze(2) - ends.unsqueeze(1)).abs().amin(2)
    return float(distance[wrong].max())


# --- losses ---


@dataclass(frozen=True)
class Loss:
    """A loss over negatives that are counted: of session b, item columns[c] is counts[b, c] times a negative.

    Columns are the distinct items that any session meets, so that the truth of a huge catalog stays small.
    """

    columns: Tensor  # (C,) int64, ascending, holds the target and positives too
    counts: Tensor  # (B, C) float32, 0 at the target
    pos_places: Tensor  # (B, 1 + P) places in columns of target and positives, -1 for none
    weight: float
    temperature: float

    @classmethod
    def of(cls, counted: Tensor, target: Tensor, positives: Tensor | None, weight: float, temperature: float) -> Loss:
        """counted (B, V) float32, or ids (B, n) int64 with -1 for none; a negative target stands for no row."""
        pos_ids = target[:, None] if positives is None else torch.cat([target[:, None], positives], 1).long()
        pos_ids = pos_ids.masked_fill(target[:, None] < 0, -1)
        if counted.dtype == torch.int64:
            columns = torch.cat([counted.flatten(), pos_ids.flatten()]).unique()
            columns = columns[columns >= 0]
            counts = torch.zeros(target.shape[0], columns.numel(), device=target.device)
            counts.scatter_add_(1, torch.searchsorted(columns, counted.clamp(min=0)).clamp(max=columns.numel() - 1),
                                (counted >= 0).float())  # fmt: skip
        else:
            columns, counts = torch.arange(counted.shape[1], device=target.device), counted.clone()
        places = torch.searchsorted(columns, pos_ids.clamp(min=0)).masked_fill(pos_ids < 0, -1)
        counts.scatter_(1, places[:, :1].clamp(min=0), counts.gather(1, places[:, :1].clamp(min=0))
                        * (places[:, :1] < 0))  # fmt: skip
        return cls(columns, counts, places, weight, temperature)

    def losses(self, query: Tensor, rows: Tensor, bias: Tensor | None, log_q: Tensor | None) -> Tensor:
        """(B,) from query (B, d), rows (C, d), bias and log_q (C,); differentiable. bfloat16 products, softmax in
        float32, or all in the dtype of the inputs."""
        y = query @ rows.T
        y = y.float() if y.dtype == BF16 else y
        if bias is not None:
            y = y + bias.to(y.dtype)
        y = y / self.temperature
        if log_q is not None:
            y = y - log_q.to(y.dtype)
        some = self.counts.sum(1, keepdim=True) > 0
        counts = torch.where(some, self.counts, 1.0).to(y.dtype)
        z = (y + counts.log()).logsumexp(1, keepdim=True)
        losses = -F.logsigmoid(y.gather(1, self.pos_places.clamp(min=0)) - z)
        weights = torch.full_like(losses, self.weight)
        weights[:, 0] = 1.0
        return torch.where((self.pos_places >= 0) & some, losses * weights, 0.0).sum(1)

    def with_gradients(
        self, query: Tensor, catalog: Tensor, bias: Tensor | None, log_q: Tensor | None, dtype: torch.dtype
    ) -> list[Tensor]:
        """losses, and the gradients of query, of the catalog's rows `columns`, and of their bias, for `row_weights`."""
        q, e = (x.detach().to(dtype).requires_grad_() for x in (query, catalog[self.columns]))
        offset = None if bias is None else bias[self.columns].detach().to(dtype if dtype != BF16 else FP32)
        inputs = [q, e] if offset is None else [q, e, offset.requires_grad_()]
        minus = None if log_q is None else log_q[self.columns]
        losses = self.losses(q, e, offset, minus)
        grads = torch.autograd.grad((losses * row_weights(losses)).sum(), inputs)
        return [losses.detach(), *grads]


def row_weights(losses: Tensor) -> Tensor:
    """Uneven weights of the rows (B,), so that gradients of one row can't stand for another's."""
    return torch.linspace(0.5, 1.5, losses.shape[0], dtype=losses.dtype, device=losses.device)


def error_of(found: Tensor, truth: Tensor) -> float:
    """The largest error as a part of the largest value; infinite where a number is missing."""
    if truth.numel() == 0:
        return 0.0
    wrong = (found.double() - truth.double()).abs().max()
    error = float(wrong / (truth.abs().max() + 1e-30))
    return error if math.isfinite(error) else math.inf
