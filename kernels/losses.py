"""What both losses share: targets and positives, which meet one log-partition a session, and the query's gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .tiles import launch

NO_FAULT = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Problem:
    """Logits are ``(q . e_i + bias_i) * scale - log_q_i``; see `slice_cross_entropy` and `sampled_softmax`."""

    query: Tensor  # (B, d)
    catalog: Tensor  # (V, d)
    wanted: Tensor  # (B, 1 + P) int64: target and positives; below 0 for none, all of them where the target is ignored
    positive_weight: float
    scale: float  # 1 / temperature
    bias: Tensor | None  # (V,)
    log_q: Tensor | None  # (V,)
    precision: str  # "fp32" or "bf16"
    bad: Tensor | None  # (1,) int64 that gets the least row << 32 | bits of a score that is not finite; None: no check

    @classmethod
    def of(
        cls,
        query: Tensor,
        catalog: Tensor,
        target: Tensor,
        positives: Tensor | None,
        positive_weight: float,
        temperature: float,
        bias: Tensor | None,
        log_q: Tensor | None,
        ignore_index: int,
        bf16: bool,
        check: bool,
    ) -> Problem:
        wanted = target.long().contiguous().unsqueeze(1)
        if positives is not None or ignore_index >= 0:
            none = (wanted == ignore_index) | (wanted < 0)
            wanted = wanted if positives is None else torch.cat([wanted, positives.long()], 1)
            wanted = wanted.masked_fill(none, -1)
        return cls(
            query,
            catalog,
            wanted,
            positive_weight,
            1.0 / temperature,
            None if bias is None else bias.contiguous(),
            None if log_q is None else log_q.contiguous(),
            "bf16" if bf16 else "fp32",
            torch.full((1,), NO_FAULT, dtype=torch.int64, device=query.device) if check else None,
        )

    def floats(self, *shape: int) -> Tensor:
        """Uninitialised, float32."""
        return torch.empty(shape, dtype=torch.float32, device=self.query.device)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that every kernel with scores takes."""
        return {
            "Query": self.query,
            "Catalog": self.catalog,
            "Bias": self.bias,
            "LogQ": self.log_q,
            "Wanted": self.wanted,
            "Bad": self.bad,
            "B": self.query.shape[0],
            "V": self.catalog.shape[0],
            "scale": self.scale,
            "stride_qb": tiles.strides(self.query),
            "stride_cv": tiles.strides(self.catalog),
            "K": self.wanted.shape[1],
            "HAS_BIAS": self.bias is not None,
            "HAS_LOG_Q": self.log_q is not None,
            "CHECK": self.bad is not None,
            **tiles.arithmetic(self.precision, self.query, self.catalog),
        }


@dataclass(frozen=True)
class Kept:
    """Logits that go from forward to backward: of each session's own negatives, and of the wanted items."""

    memory: Tensor  # uint8
    negatives: Tensor | None  # (B, n) float32, a part of `memory`; None where sessions share them or nothing is kept
    wanted: Tensor  # (B, 1 + P) float32, a part of `memory`; empty where nothing is kept

    @classmethod
    def of(cls, p: Problem, memory: Tensor, negatives: Tensor | None) -> Kept:
        """The parts of `memory`; negatives (B, n) or (n,) are those of the problem, None where there is no list."""
        (b, k), floats = p.wanted.shape, memory.view(torch.float32)
        own = negatives.numel() if negatives is not None and negatives.ndim == 2 else 0
        if memory.numel() == 0 and b > 0:
            return cls(memory, None, floats)
        if floats.numel() < own + b * k:
            raise ValueError(f"kept must hold {(own + b * k) * 4} bytes from the forward pass, got {memory.numel()}")
        rows = None if negatives is None or negatives.ndim == 1 else floats[:own].view_as(negatives)
        return cls(memory, rows, floats[own : own + b * k].view(b, k))

    @classmethod
    def empty(cls, p: Problem, size: int, negatives: Tensor | None) -> Kept:
        return cls.of(p, torch.empty(size, dtype=torch.uint8, device=p.query.device), negatives)

    def keep(self, logits: Tensor) -> None:
        """logits (B, 1 + P) of the wanted items."""
        if self.wanted.numel() > 0:
            self.wanted.copy_(logits)


@dataclass(frozen=True)
class Slopes:
    """d loss / d (q . e): of a negative ``weight * exp(logit - log_partition)``, of the wanted items `pulls`."""

    weights: Tensor  # (B,)
    log_partition: Tensor  # (B,), 0 where there are no negatives, whose weight is 0
    pulls: Tensor  # (B, 1 + P)

    @classmethod
    def of(cls, p: Problem, grad_losses: Tensor, log_partition: Tensor, logits: Tensor) -> Slopes:
        """logits (B, 1 + P) are those of the wanted items."""
        (b, k), grad = p.wanted.shape, grad_losses.float()
        found = cls(p.floats(b), p.floats(b), p.floats(b, k))
        launch(
            _pulls_kernel,
            (b,),
            p.wanted,
            logits,
            log_partition,
            grad,
            found.weights,
            found.log_partition,
            found.pulls,
            grad.stride(0),
            p.scale,
            p.positive_weight,
            k,
            BLOCK_K=triton.next_power_of_2(k),
            num_warps=1,
        )
        return found


@triton.jit(do_not_specialize=["stride_grad", "scale", "positive_weight", "K"])
def _pulls_kernel(
    Wanted,
    Logits,
    LogPartition,
    GradLosses,
    Weights,
    Partition,
    Pulls,
    stride_grad,
    scale,
    positive_weight,
    K,
    BLOCK_K: tl.constexpr,
):
    """A session's `Slopes`."""
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    wanted = tl.load(Wanted + row * K + offs_k, mask=offs_k < K, other=-1)
    logits = tl.load(Logits + row * K + offs_k, mask=offs_k < K, other=0.0)
    partition = tl.load(LogPartition + row)
    grad = tl.load(GradLosses + row * stride_grad)
    gain = tl.where(offs_k == 0, 1.0, positive_weight) / (1.0 + tl.exp(logits - partition))
    some = partition != float("-inf")  # NaN goes on, for whoever looks at gradients
    pulls = tl.where(some, tl.where(wanted >= 0, gain * (-scale * grad), 0.0), 0.0)
    tl.store(Pulls + row * K + offs_k, pulls, mask=offs_k < K)
    tl.store(Weights + row, -tl.sum(pulls, 0))
    tl.store(Partition + row, tl.where(some, partition, 0.0))


@triton.jit
def widened(x, PRODUCT: tl.constexpr):
    """Loaded values as float32, rounded to bfloat16 where products are of bfloat16."""
    if PRODUCT == "bf16":
        return tiles.round_bf16(x)
    else:
        return x.to(tl.float32)


@triton.jit
def shift_of(Bias, LogQ, items, known, scale, HAS_BIAS: tl.constexpr, HAS_LOG_Q: tl.constexpr):
    """What an item's logit is besides its dot product; NaN for ids beyond the catalog, which are not `known`."""
    shift = tl.where(known, 0.0, float("nan"))
    if HAS_BIAS:
        shift += tl.load(Bias + items, mask=known, other=0.0).to(tl.float32) * scale
    if HAS_LOG_Q:
        shift -= tl.load(LogQ + items, mask=known, other=0.0).to(tl.float32)
    return shift


@triton.jit
def report(Bad, rows, logits, counts):
    """Notes the least row, and its score, among logits that count but are not finite."""
    wrong = counts & ~(tl.abs(logits) < float("inf"))
    found = (rows << 32) | (logits.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    least = tl.where(wrong, found, 0x7FFFFFFFFFFFFFFF)
    tl.atomic_min(Bad, tl.min(tl.ravel(least), 0))


@triton.jit(do_not_specialize=["B", "V", "splits", "scale", "positive_weight", "stride_qb", "stride_cv", "K"])
def _loss_kernel(
    Query,
    Catalog,
    Bias,
    LogQ,
    Wanted,
    Tops,
    Sums,
    Logits,
    Losses,
    LogPartition,
    Bad,
    B,
    V,
    splits,
    scale,
    positive_weight,
    stride_qb,
    stride_cv,
    K,
    HAS_BIAS: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    CHECK: tl.constexpr,
    D: tl.constexpr,
    UNIT_Q: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One session: joins the partial (max, sum) pairs of its splits, scores its wanted items, and writes its loss."""
    row = tl.program_id(0).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    tops = tl.load(Tops + offs_s * B + row, mask=offs_s < splits, other=float("-inf"))
    sums = tl.load(Sums + offs_s * B + row, mask=offs_s < splits, other=0.0)
    top = tl.max(tops, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(sums * tl.exp(tops - top), 0)
    partition = tl.where(total == 0.0, float("-inf"), top + tl.log(total))

    offs_k = tl.arange(0, BLOCK_K)
    items = tl.load(Wanted + row * K + offs_k, mask=offs_k < K, other=-1)
    real, known = items >= 0, (items >= 0) & (items < V)
    dots = tl.zeros([BLOCK_K], tl.float32)
    for begin in range(0, D, BLOCK_D):
        offs_d = begin + tl.arange(0, BLOCK_D)
        q = tl.load(Query + row * (stride_qb * UNIT_Q) + offs_d, mask=offs_d < D, other=0.0)
        e_rows = Catalog + items[:, None] * (stride_cv * UNIT_C)
        e = tl.load(e_rows + offs_d[None, :], mask=known[:, None] & (offs_d < D)[None, :], other=0.0)
        dots += tl.sum(widened(e, PRODUCT) * widened(q, PRODUCT)[None, :], 1)
    logits = dots * scale + shift_of(Bias, LogQ, items, known, scale, HAS_BIAS, HAS_LOG_Q)
    if CHECK:
        report(Bad, tl.zeros([BLOCK_K], tl.int64) + row, logits, known)
    tl.store(Logits + row * K + offs_k, tl.where(real, logits, 0.0), mask=offs_k < K)

    x = partition - logits
    small = tl.exp(-tl.abs(x))
    one_more = 1.0 + small
    log1p = tl.where(one_more == 1.0, small, tl.log(one_more) * (small / (one_more - 1.0)))
    losses = (tl.maximum(x, 0.0) + log1p) * tl.where(offs_k == 0, 1.0, positive_weight)
    loss = tl.sum(tl.where(real, losses, 0.0), 0)
    tl.store(Losses + row, tl.where(partition == float("-inf"), 0.0, loss))
    tl.store(LogPartition + row, partition)


@triton.jit(do_not_specialize=["B", "V", "splits", "stride_cv", "K"])
def _query_sum_kernel(
    Parts,
    Catalog,
    Wanted,
    Pulls,
    Out,
    B,
    V,
    splits,
    stride_cv,
    K,
    D: tl.constexpr,
    UNIT_C: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of a session's gradient: the parts of all splits, in their order, and its wanted items' rows."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    offs_k = tl.arange(0, BLOCK_K)
    items = tl.load(Wanted + row * K + offs_k, mask=offs_k < K, other=-1)
    known = (items >= 0) & (items < V)
    pulls = tl.load(Pulls + row * K + offs_k, mask=offs_k < K, other=0.0)
    e_rows = Catalog + items[:, None] * (stride_cv * UNIT_C)
    e = tl.load(e_rows + offs_d[None, :], mask=known[:, None] & in_d[None, :], other=0.0)
    total = tl.sum(widened(e, PRODUCT) * pulls[:, None], 0)
    for split in range(splits):
        total += tl.load(Parts + (split * B + row) * D + offs_d, mask=in_d, other=0.0)
    tl.store(Out + row * D + offs_d, total, mask=in_d)


def losses_fwd(p: Problem, tops: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tops, sums (splits, B): the negatives' partial log-sum-exps -> losses (B,), log_partition (B,), logits (B, 1 + P)
    of the wanted items; without negatives the loss is 0 and the log-partition -inf."""
    b, k = p.wanted.shape
    losses, log_partition, logits = p.floats(b), p.floats(b), p.floats(b, k)
    launch(
        _loss_kernel,
        (b,),
        **p.arguments(),
        Tops=tops,
        Sums=sums,
        Logits=logits,
        Losses=losses,
        LogPartition=log_partition,
        splits=tops.shape[0],
        positive_weight=p.positive_weight,
        BLOCK_K=triton.next_power_of_2(k),
        BLOCK_D=64,
        BLOCK_S=triton.next_power_of_2(tops.shape[0]),
        num_warps=2,
    )
    return losses, log_partition, logits


def query_bwd(p: Problem, x: Slopes, parts: Tensor) -> Tensor:
    """parts (splits, B, d), the negatives' shares -> the query's gradient, (B, d) in its dtype."""
    splits, b, d = parts.shape
    out = torch.empty(p.query.shape, dtype=p.query.dtype, device=p.query.device)
    constants = p.arguments()
    launch(
        _query_sum_kernel,
        (b, triton.cdiv(d, 128)),
        parts,
        p.catalog,
        p.wanted,
        x.pulls,
        out,
        b,
        p.catalog.shape[0],
        splits,
        constants["stride_cv"],
        p.wanted.shape[1],
        D=d,
        UNIT_C=constants["UNIT_C"],
        PRODUCT=constants["PRODUCT"],
        BLOCK_K=triton.next_power_of_2(p.wanted.shape[1]),
        BLOCK_D=128,
        num_warps=2,
    )
    return out
