"""The losses as modules, for queries in rows (B, d) or in padded sequences (B, L, d).

Notation: B sessions, L session length, V items, d width, T rows whose target is not ignored, N negatives, P positives.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alterrec_fast.ops import RankSlice, checks, dispatch, sampled_softmax, slice_cross_entropy


class _Loss(nn.Module):
    """What the three have in common: options, and rows made out of sequences."""

    def __init__(
        self,
        temperature: float,
        positive_weight: float,
        ignore_index: int,
        reduction: str,
        precision: str | None,
        check: bool | None,
        backend: str,
    ):
        super().__init__()
        checks.check_loss(temperature, positive_weight, reduction)
        self.temperature = temperature
        self.positive_weight = positive_weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.precision = precision
        self.check = check
        self.backend = backend

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"

    def _kept_with(self, name: str, rows: int, target: Tensor, kept: Tensor | None) -> Tensor | None:
        """The rows to keep for negatives that are of `rows` rows: the real ones, or all."""
        if torch.compiler.is_compiling():
            if rows == target.numel():
                return None
            # From an eager sampler: only the number of rows says how many targets are real, until the graph runs.
            real = target.reshape(-1) != self.ignore_index
            if dispatch.choose_check(self.check, target):
                expected = f"{name} must have a row for each of the targets that are not ignored, or for all"
                torch._assert_async(real.sum() == rows, expected)
            return torch.nonzero_static(real, size=rows).squeeze(1)
        count = target.numel() if kept is None else kept.numel()
        if rows == count:
            return kept
        if rows == target.numel():
            return None
        raise ValueError(
            f"{name} must have a row for each of the {count} targets that are not ignored, or for all "
            f"{target.numel()}, got {rows} rows"
        )

    def _reduced(self, rows: Tensor, target: Tensor, kept: Tensor | None) -> Tensor:
        """rows: the loss of every row that was kept -> a scalar, or target's shape with zeros where it is ignored."""
        if self.reduction == "none":
            if kept is None:
                return rows.view(target.shape)
            return rows.new_zeros(target.numel()).index_copy(0, kept, rows).view(target.shape)
        total = rows.sum()
        return total if self.reduction == "sum" else total / (target != self.ignore_index).sum().clamp(min=1)


class FullSoftmaxLoss(_Loss):
    """Cross-entropy over the whole catalog; at most max_saved_bytes of logits are kept for the backward pass.

    Equivalent to ``F.cross_entropy((query @ catalog.T + bias) / temperature, target)``; called like Cut Cross-Entropy's
    ``LinearCrossEntropy``. Padding costs nothing: rows whose target is ignore_index are left out before any product.
    (Not so under torch.compile, whose shapes must not depend on values.)

    Args:
        temperature: above 0; divides the logits.
        first_item: rows of the catalog before it are padding: neither candidates nor targets.
        ignore_index: a target that stands for no row, as in ``nn.CrossEntropyLoss``; 0 suits catalogs padded at item 0.
        reduction: "mean" over the targets that count (0 over none), "sum", or "none" for the target's shape.
        max_saved_bytes: as in `slice_cross_entropy`.
        precision, check, backend: as in `rank_slice`.

    Raises ValueError for a temperature of 0 or less, or another reduction.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        first_item: int = 0,
        ignore_index: int = -100,
        reduction: str = "mean",
        max_saved_bytes: int = 256 << 20,
        precision: str | None = None,
        check: bool | None = None,
        backend: str = "auto",
    ):
        super().__init__(temperature, 1.0, ignore_index, reduction, precision, check, backend)
        self.first_item = first_item
        self.max_saved_bytes = max_saved_bytes

    def forward(self, query: Tensor, catalog: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        """
        Args:
            query: (B, d) or (B, L, d) float32 or bfloat16; gets a gradient.
            catalog: (V, d) float32 or bfloat16, the item embeddings; gets a gradient.
            target: (B,) or (B, L) int32 or int64; ignore_index where there is none.
            bias: (V,), added to the scores; gets a gradient.

        Raises:
            TypeError, ValueError, BackendError: as `slice_cross_entropy` does; rows count the targets not ignored.
        """
        kept = real_rows(query, target, self.ignore_index)
        rows = slice_cross_entropy(
            take_rows(query, kept, 1),
            catalog,
            take_rows(target, kept, 0),
            temperature=self.temperature,
            bias=bias,
            first_item=self.first_item,
            reduction="none",
            ignore_index=self.ignore_index,
            max_saved_bytes=self.max_saved_bytes,
            precision=self.precision,
            check=self.check,
            backend=self.backend,
        )
        return self._reduced(rows, target, kept)


class SliceCrossEntropy(_Loss):
    """`slice_cross_entropy` as a module: each target, and extra positives, against a set of negatives.

    Args:
        temperature, first_item, ignore_index, reduction, max_saved_bytes, precision, check, backend: as in
            `FullSoftmaxLoss`.
        positive_weight: what each of the extra positives counts against the target.

    Raises ValueError for a temperature of 0 or less, a negative positive_weight, or another reduction.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        positive_weight: float = 1.0,
        first_item: int = 0,
        ignore_index: int = -100,
        reduction: str = "mean",
        max_saved_bytes: int = 256 << 20,
        precision: str | None = None,
        check: bool | None = None,
        backend: str = "auto",
    ):
        super().__init__(temperature, positive_weight, ignore_index, reduction, precision, check, backend)
        self.first_item = first_item
        self.max_saved_bytes = max_saved_bytes

    def forward(
        self,
        query: Tensor,
        catalog: Tensor,
        target: Tensor,
        neg: RankSlice | None = None,
        positives: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            query, catalog, target, bias: as in `FullSoftmaxLoss`.
            neg: the negatives, of a row for each target that is not ignored (as `RankSliceSampler` gives them), or of a
                row for every target; None: all items.
            positives: (B, P) or (B, L, P) int32 or int64, further items that should win; -1 is none.

        Raises:
            TypeError, ValueError, BackendError: as `slice_cross_entropy` does; rows count the targets not ignored.
            RuntimeError: under torch.compile, where the rows of `neg` are neither number.
        """
        if not isinstance(neg, RankSlice | None):
            raise TypeError(
                f"neg must be a RankSlice, as sampler(...) gives it, got {_kind(neg)}; ids, as sampler.sample(...) "
                "gives them, are for SampledSoftmaxLoss"
            )
        kept = real_rows(query, target, self.ignore_index)
        if neg is not None:
            kept = self._kept_with("neg", neg.batch_size, target, kept)
        rows = slice_cross_entropy(
            take_rows(query, kept, 1),
            catalog,
            take_rows(target, kept, 0),
            neg,
            positives=_take_positives(positives, target, kept),
            positive_weight=self.positive_weight,
            temperature=self.temperature,
            bias=bias,
            first_item=self.first_item,
            reduction="none",
            ignore_index=self.ignore_index,
            max_saved_bytes=self.max_saved_bytes,
            precision=self.precision,
            check=self.check,
            backend=self.backend,
        )
        return self._reduced(rows, target, kept)


class SampledSoftmaxLoss(_Loss):
    """`sampled_softmax` as a module: each target against negatives given by their ids, with logQ correction.

    Args:
        temperature, ignore_index, reduction, precision, check, backend: as in `FullSoftmaxLoss`.
        log_q: (V,) float, the log of each item's expected count among the negatives, subtracted from the logits of
            targets and negatives; `RankSliceSampler.log_q` gives it. Kept as a buffer outside the state dict.
        positive_weight: what each of the extra positives counts against the target.
        sparse_grad: the catalog's gradient as a coalesced sparse tensor of the touched rows, for ``optim.SparseAdam``.

    Raises ValueError for a temperature of 0 or less, a negative positive_weight, or another reduction.
    """

    log_q: Tensor | None

    def __init__(
        self,
        temperature: float = 1.0,
        log_q: Tensor | None = None,
        positive_weight: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        sparse_grad: bool = False,
        precision: str | None = None,
        check: bool | None = None,
        backend: str = "auto",
    ):
        super().__init__(temperature, positive_weight, ignore_index, reduction, precision, check, backend)
        self.register_buffer("log_q", log_q, persistent=False)
        self.sparse_grad = sparse_grad

    def forward(
        self,
        query: Tensor,
        catalog: Tensor,
        target: Tensor,
        negatives: Tensor,
        positives: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            query, catalog, target, bias: as in `FullSoftmaxLoss`.
            negatives: int32 or int64 ids, -1 is none: (N,) shared by all rows; (T, N) of a row for each target that is
                not ignored, as `RankSliceSampler` gives them; or (B, N) and (B, L, N) of a row for every target.
            positives: as in `SliceCrossEntropy`.

        Raises:
            TypeError, ValueError, BackendError: as `sampled_softmax` does; rows count the targets not ignored.
            RuntimeError: under torch.compile, where the rows of `negatives` (T, N) are not one for each.
        """
        if not isinstance(negatives, Tensor):
            raise TypeError(
                f"negatives must be a tensor of ids, as sampler.sample(...) gives it, got {_kind(negatives)}; a "
                "RankSlice, as sampler(...) gives it, is for SliceCrossEntropy"
            )
        kept = real_rows(query, target, self.ignore_index)
        if negatives.ndim == target.ndim + 1 and negatives.shape[:-1] == target.shape:
            negatives = take_rows(negatives, kept, 1)
        elif negatives.ndim == 2:
            kept = self._kept_with("negatives", negatives.shape[0], target, kept)
        elif negatives.ndim != 1:
            raise ValueError(
                f"negatives must be (N,), (T, N) with a row for each target that is not ignored, or "
                f"{_with_last(target, 'N')}, got {tuple(negatives.shape)}"
            )
        rows = sampled_softmax(
            take_rows(query, kept, 1),
            catalog,
            take_rows(target, kept, 0),
            negatives,
            log_q=self.log_q,
            positives=_take_positives(positives, target, kept),
            positive_weight=self.positive_weight,
            temperature=self.temperature,
            bias=bias,
            reduction="none",
            ignore_index=self.ignore_index,
            sparse_grad=self.sparse_grad,
            precision=self.precision,
            check=self.check,
            backend=self.backend,
        )
        return self._reduced(rows, target, kept)


def real_rows(query: Tensor, target: Tensor, ignore_index: int) -> Tensor | None:
    """(T,) the flat places of the targets that are not ignored; None where that is all, and under torch.compile.

    Raises ValueError unless query is (B, d) or (B, L, d) and target its shape without the last dimension.
    """
    if query.ndim not in (2, 3):
        raise ValueError(f"query must be (B, d) or (B, L, d), got {tuple(query.shape)}")
    if target.shape != query.shape[:-1]:
        raise ValueError(f"target must be {tuple(query.shape[:-1])}, as the query is, got {tuple(target.shape)}")
    if torch.compiler.is_compiling():
        return None
    kept = (target.reshape(-1) != ignore_index).nonzero().squeeze(1)
    return None if kept.numel() == target.numel() else kept


def take_rows(x: Tensor, kept: Tensor | None, trailing: int) -> Tensor:
    """x (B, *) or (B, L, *), * of `trailing` dimensions -> its rows at the flat places `kept`, or all B L rows."""
    if x.ndim - trailing == 2:
        if kept is not None:  # two indices, since flattening an expanded tensor would copy all of it
            length = x.shape[1]
            return x[kept // length, kept % length]
        x = x.flatten(0, 1)
    elif kept is not None:
        x = x[kept]
    return x if trailing == 0 or x.stride(-1) == 1 else x.contiguous()


def _take_positives(positives: Tensor | None, target: Tensor, kept: Tensor | None) -> Tensor | None:
    if positives is None:
        return None
    if positives.ndim != target.ndim + 1 or positives.shape[:-1] != target.shape:
        raise ValueError(f"positives must be {_with_last(target, 'P')}, got {tuple(positives.shape)}")
    return take_rows(positives, kept, 1)


def _kind(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _with_last(target: Tensor, name: str) -> str:
    return f"({', '.join(map(str, target.shape))}, {name})"
