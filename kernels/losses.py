"""What both losses share: the logits of target and positives, which meet one log-sum-exp a session, and their part of
the gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shapes, tiles
from .tiles import launch

LARGEST_DLOGIT = 2.0**14  # in float16


@dataclass(frozen=True)
class Terms:
    """What a logit has beside its dot product, and whether it is checked: one compile-time constant."""

    HAS_BIAS: bool
    HAS_LOG_Q: bool
    CHECK: bool


@dataclass(frozen=True)
class Problem:
    """Logits are ``(q . e_i + bias_i) * scale - log_q_i``; see `slice_cross_entropy` and `sampled_softmax`."""

    query: Tensor  # (B, d)
    catalog: Tensor  # (V, d)
    pos_ids: Tensor  # (B, 1 + P) int64: target and positives; below 0 for none, all of them where the target is ignored
    positive_weight: float
    scale: float  # 1 / temperature
    temperature: Tensor | None  # () float32 in its place, which the kernels read
    bias: Tensor | None  # (V,); items with -inf are no negatives
    log_q: Tensor | None  # (V,)
    precision: str  # "fp32", "bf16" or "fp16"
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
        temperature_tensor: Tensor | None,
        bias: Tensor | None,
        log_q: Tensor | None,
        ignore_index: int,
        precision: str,
        check: bool,
    ) -> Problem:
        """Of the op's arguments, of any strides."""
        pos_ids = target.long().contiguous().unsqueeze(1)
        if positives is not None or ignore_index >= 0:
            none = (pos_ids == ignore_index) | (pos_ids < 0)
            pos_ids = pos_ids if positives is None else torch.cat([pos_ids, positives.long()], 1)
            pos_ids = pos_ids.masked_fill(none, -1)
        return cls(
            tiles.readable(query),
            tiles.readable(catalog),
            pos_ids,
            positive_weight,
            1.0 / temperature,
            temperature_tensor,
            None if bias is None else bias.contiguous(),
            None if log_q is None else log_q.contiguous(),
            precision,
            tiles.no_error(check, 1, query.device),
        )

    @property
    def product(self) -> str:
        """How products are computed: "bf16", "fp16", "tf32" or "ieee"."""
        return shapes.product_of(self.precision)

    @property
    def ignored(self) -> Tensor:
        """(B, 1) bool: rows whose target is ignored."""
        return self.pos_ids[:, :1] < 0

    def grad_dtype(self, needs: list[bool]) -> torch.dtype:
        """Of the query's gradient; `needs` as the backward passes have it."""
        return torch.float32 if needs[3] else self.query.dtype

    def floats(self, *shape: int) -> Tensor:
        """Uninitialised, float32."""
        return torch.empty(shape, dtype=torch.float32, device=self.query.device)

    def form(self, block_d: int) -> tiles.Form:
        return tiles.Form.of(self.precision, self.query, self.catalog, block_d)

    def arguments(self, block_d: int) -> dict[str, Any]:
        """The arguments of a kernel with logits, with block_d of the width at a time."""
        return {
            "Query": self.query,
            "Catalog": self.catalog,
            "Bias": self.bias,
            "LogQ": self.log_q,
            "PosIds": self.pos_ids,
            "Bad": self.bad,
            "B": self.query.shape[0],
            "V": self.catalog.shape[0],
            "scale": self.scale,
            "Temperature": self.temperature,
            "stride_qb": tiles.strides(self.query),
            "stride_cv": tiles.strides(self.catalog),
            "K": self.pos_ids.shape[1],
            "TERMS": Terms(self.bias is not None, self.log_q is not None, self.bad is not None),
            "FORM": self.form(block_d),
        }


@dataclass(frozen=True)
class Saved:
    """Logits that go from forward to backward: of each session's own negatives, and of target and positives."""

    memory: Tensor  # uint8
    neg: Tensor | None  # (B, n) float32 in `memory`; None where sessions share negatives or nothing is saved
    pos: Tensor  # (B, 1 + P) float32 in `memory`; empty where nothing is saved

    @classmethod
    def of(cls, p: Problem, memory: Tensor, neg: Tensor | None) -> Saved:
        """The views of `memory`; neg (B, n) or (n,) are the problem's negatives, None where there is no list."""
        (b, k), floats = p.pos_ids.shape, memory.view(torch.float32)
        size = neg.numel() if neg is not None and neg.ndim == 2 else 0
        if memory.numel() == 0 and b > 0:
            return cls(memory, None, floats)
        if floats.numel() < size + b * k:
            raise ValueError(f"saved must hold {(size + b * k) * 4} bytes from the forward pass, got {memory.numel()}")
        rows = None if neg is None or neg.ndim == 1 else floats[:size].view(neg.shape)
        return cls(memory, rows, floats[size : size + b * k].view(b, k))

    @classmethod
    def empty(cls, p: Problem, size: int, neg: Tensor | None) -> Saved:
        return cls.of(p, torch.empty(size, dtype=torch.uint8, device=p.query.device), neg)

    def store(self, pos_logits: Tensor) -> None:
        """pos_logits (B, 1 + P) of target and positives."""
        if self.pos.numel() > 0:
            self.pos.copy_(pos_logits)


@dataclass(frozen=True)
class Dlogits:
    """d loss / d (q . e): of a negative ``weight * exp(logit - lse)``, of target and positives `pos`."""

    weights: Tensor  # (B,)
    lse: Tensor  # (B,), 0 where there are no negatives, whose weight is 0
    pos: Tensor  # (B, 1 + P)

    @classmethod
    def of(cls, p: Problem, grad_losses: Tensor, lse: Tensor, pos_logits: Tensor) -> Dlogits:
        """pos_logits (B, 1 + P) are those of target and positives; grad_losses (B,) of any stride."""
        (b, k), grad = p.pos_ids.shape, grad_losses.float()
        dlogits = cls(p.floats(b), p.floats(b), p.floats(b, k))
        launch(
            _pos_dlogits_kernel,
            (b,),
            PosIds=p.pos_ids,
            PosLogits=pos_logits,
            Lse=lse,
            GradLosses=grad,
            Weights=dlogits.weights,
            SafeLse=dlogits.lse,
            PosDlogits=dlogits.pos,
            stride_grad=grad.stride(0),
            scale=p.scale,
            Temperature=p.temperature,
            positive_weight=p.positive_weight,
            K=k,
            BLOCK_K=triton.next_power_of_2(k),
            **shapes.POS_DLOGITS,
        )
        return dlogits

    def arguments(self) -> dict[str, Tensor]:
        return {"Weights": self.weights, "Lse": self.lse, "PosDlogits": self.pos}

    def ranged(self, p: Problem) -> tuple[Dlogits, Tensor | None]:
        """As a product takes them, and what one of them then stands for, (1,) float32, or None for 1.

        float16 holds neither 1e-6 / B nor a loss scaled by 2 ** 16, but no dlogit is larger than its row's weight: in
        units of a part of the largest weight all fit, and those down to 4e-9 of it keep their digits. Weights that are
        not finite stay so, and change no other row's.
        """
        if p.precision != "fp16" or p.query.shape[0] == 0:
            return self, None
        largest = self.weights.abs().nan_to_num(0.0, posinf=0.0).amax(0, keepdim=True)
        unit = (largest / LARGEST_DLOGIT).clamp(min=torch.finfo(torch.float32).tiny)
        return replace(self, weights=self.weights / unit, pos=self.pos / unit), unit


@triton.jit(do_not_specialize=["stride_grad", "scale", "positive_weight", "K"])
def _pos_dlogits_kernel(
    PosIds,
    PosLogits,
    Lse,
    GradLosses,
    Weights,
    SafeLse,
    PosDlogits,
    stride_grad,
    scale,
    Temperature,
    positive_weight,
    K,
    BLOCK_K: tl.constexpr,
):
    """A session's `Dlogits`."""
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    ids = tl.load(PosIds + row * K + offs_k, mask=offs_k < K, other=-1)
    logits = tl.load(PosLogits + row * K + offs_k, mask=offs_k < K, other=0.0)
    lse = tl.load(Lse + row)
    grad = tl.load(GradLosses + row * stride_grad) * scale_of(scale, Temperature)
    gain = tl.where(offs_k == 0, 1.0, positive_weight) / (1.0 + tl.exp(logits - lse))
    has_negatives = lse != float("-inf")  # NaN goes on, for whoever looks at gradients
    dlogits = tl.where(has_negatives, tl.where(ids >= 0, gain * -grad, 0.0), 0.0)
    tl.store(PosDlogits + row * K + offs_k, dlogits, mask=offs_k < K)
    tl.store(Weights + row, -tl.sum(dlogits, 0))
    tl.store(SafeLse + row, tl.where(has_negatives, lse, 0.0))


@triton.jit
def scale_of(scale, Temperature):
    """What multiplies scores: `scale`, or 1 over the number that Temperature holds."""
    if Temperature is None:
        return scale
    else:
        return 1.0 / tl.load(Temperature)


@triton.jit
def widened(x, FORM: tl.constexpr):
    """Loaded values as float32, rounded to the 16 bits that products are of."""
    if FORM.PRODUCT == "bf16":
        return tiles.round_bf16(x)
    elif FORM.PRODUCT == "fp16":
        return x.to(tl.float16).to(tl.float32)
    else:
        return x.to(tl.float32)


@triton.jit
def shift_of(Bias, LogQ, items, known, scale, TERMS: tl.constexpr):
    """What an item's logit is besides its dot product, NaN for ids beyond the catalog, which are not `known`; and which
    of the known may be candidates: those whose bias is not -inf."""
    shift = tl.where(known, 0.0, float("nan"))
    allowed = known
    if TERMS.HAS_BIAS:
        bias = tl.load(Bias + items, mask=known, other=0.0).to(tl.float32)
        shift += bias * scale
        allowed &= bias != float("-inf")
    if TERMS.HAS_LOG_Q:
        shift -= tl.load(LogQ + items, mask=known, other=0.0).to(tl.float32)
    return shift, allowed


@triton.jit
def report(Bad, rows, logits, counts):
    """Notes the least row, and its score, among logits that count but are not finite."""
    wrong = counts & ~(tl.abs(logits) < float("inf"))
    error = (rows << 32) | (logits.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    least = tl.where(wrong, error, 0x7FFFFFFFFFFFFFFF)
    tl.atomic_min(Bad, tl.min(tl.ravel(least), 0))


@triton.jit
def gathered_dots(Query, Catalog, row, items, known, stride_qb, stride_cv, FORM: tl.constexpr):
    """Query[row] . Catalog[items], [items] float32, 0 for items that are not known; row int64."""
    e_rows = Catalog + items[:, None] * (stride_cv * FORM.UNIT_C)
    dots = tl.zeros([items.shape[0]], tl.float32)
    for begin in range(0, FORM.D, FORM.BLOCK_D):
        offs_d = begin + tl.arange(0, FORM.BLOCK_D)
        q = tl.load(Query + row * (stride_qb * FORM.UNIT_Q) + offs_d, mask=offs_d < FORM.D, other=0.0)
        e = tl.load(e_rows + offs_d[None, :], mask=known[:, None] & (offs_d < FORM.D)[None, :], other=0.0)
        dots += tl.sum(widened(e, FORM) * widened(q, FORM)[None, :], 1)
    return dots


@triton.jit(do_not_specialize=["B", "V", "splits", "scale", "positive_weight", "stride_qb", "stride_cv", "K"])
def _loss_kernel(
    Query,
    Catalog,
    Bias,
    LogQ,
    PosIds,
    Tops,
    Sums,
    PosLogits,
    Losses,
    Lse,
    Bad,
    B,
    V,
    splits,
    scale,
    Temperature,
    positive_weight,
    stride_qb,
    stride_cv,
    K,
    TERMS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One session: joins the partial (max, sum) pairs of its splits, scores target and positives, writes its loss."""
    scale = scale_of(scale, Temperature)
    row = tl.program_id(0).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    tops = tl.load(Tops + offs_s * B + row, mask=offs_s < splits, other=float("-inf"))
    sums = tl.load(Sums + offs_s * B + row, mask=offs_s < splits, other=0.0)
    top = tl.max(tops, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(sums * tl.exp(tops - top), 0)
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log(total))

    offs_k = tl.arange(0, BLOCK_K)
    items = tl.load(PosIds + row * K + offs_k, mask=offs_k < K, other=-1)
    real, known = items >= 0, (items >= 0) & (items < V)
    dots = gathered_dots(Query, Catalog, row, items, known, stride_qb, stride_cv, FORM)
    shift, _ = shift_of(Bias, LogQ, items, known, scale, TERMS)
    logits = dots * scale + shift
    if TERMS.CHECK:
        report(Bad, tl.zeros([BLOCK_K], tl.int64) + row, logits, known)
    tl.store(PosLogits + row * K + offs_k, tl.where(real, logits, 0.0), mask=offs_k < K)

    x = lse - logits
    small = tl.exp(-tl.abs(x))
    one_more = 1.0 + small
    log1p = tl.where(one_more == 1.0, small, tl.log(one_more) * (small / (one_more - 1.0)))
    losses = (tl.maximum(x, 0.0) + log1p) * tl.where(offs_k == 0, 1.0, positive_weight)
    loss = tl.sum(tl.where(real, losses, 0.0), 0)
    tl.store(Losses + row, tl.where(lse == float("-inf"), 0.0, loss))
    tl.store(Lse + row, lse)


@triton.jit(do_not_specialize=["B", "V", "splits", "stride_cv", "K"])
def _query_sum_kernel(
    Partial,
    Catalog,
    PosIds,
    PosDlogits,
    Out,
    B,
    V,
    splits,
    stride_cv,
    K,
    FORM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of a session's gradient: the sums of all splits, in their order, and target and positives'."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < FORM.D
    offs_k = tl.arange(0, BLOCK_K)
    items = tl.load(PosIds + row * K + offs_k, mask=offs_k < K, other=-1)
    known = (items >= 0) & (items < V)
    dlogits = tl.load(PosDlogits + row * K + offs_k, mask=offs_k < K, other=0.0)
    e_rows = Catalog + items[:, None] * (stride_cv * FORM.UNIT_C)
    e = tl.load(e_rows + offs_d[None, :], mask=known[:, None] & in_d[None, :], other=0.0)
    total = tl.sum(widened(e, FORM) * dlogits[:, None], 0)
    for split in range(splits):
        total += tl.load(Partial + (split * B + row) * FORM.D + offs_d, mask=in_d, other=0.0)
    tl.store(Out + row * FORM.D + offs_d, total, mask=in_d)


def losses_fwd(p: Problem, tops: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tops, sums (splits, B): the negatives' partial log-sum-exps -> losses (B,), lse (B,), logits (B, 1 + P) of target
    and positives; without negatives the loss is 0 and the lse -inf."""
    b, k = p.pos_ids.shape
    losses, lse, pos_logits = p.floats(b), p.floats(b), p.floats(b, k)
    launch(
        _loss_kernel,
        (b,),
        **p.arguments(shapes.LOSS_WIDTH),
        Tops=tops,
        Sums=sums,
        PosLogits=pos_logits,
        Losses=losses,
        Lse=lse,
        splits=tops.shape[0],
        positive_weight=p.positive_weight,
        BLOCK_K=triton.next_power_of_2(k),
        BLOCK_S=triton.next_power_of_2(tops.shape[0]),
        **shapes.LOSS,
    )
    return losses, lse, pos_logits


def query_bwd(p: Problem, dlogits: Dlogits, partial: Tensor, dtype: torch.dtype) -> Tensor:
    """partial (splits, B, d), the negatives' sums -> the query's gradient, (B, d) in dtype."""
    splits, b, d = partial.shape
    out = torch.empty(p.query.shape, dtype=dtype, device=p.query.device)
    block_d, k = shapes.QUERY_SUM["BLOCK_D"], p.pos_ids.shape[1]
    launch(
        _query_sum_kernel,
        (b, triton.cdiv(d, block_d)),
        Partial=partial,
        Catalog=p.catalog,
        PosIds=p.pos_ids,
        PosDlogits=dlogits.pos,
        Out=out,
        B=b,
        V=p.catalog.shape[0],
        splits=splits,
        stride_cv=tiles.strides(p.catalog),
        K=k,
        FORM=p.form(block_d),
        BLOCK_K=triton.next_power_of_2(k),
        **shapes.QUERY_SUM,
    )
    return out
