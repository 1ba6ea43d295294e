"""The losses as modules, for queries in rows (B, d) or in padded sequences (B, L, d).

Notation: B sessions, L session length, V items, d width, T rows whose target is not ignored, N negatives, P positives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alterrec_fast.nn.buffers import KeepsDtype
from alterrec_fast.ops import RankSlice, checks, dispatch, sampled_softmax, slice_cross_entropy


class _Loss(KeepsDtype):
    """What the three have in common: options, and rows made out of sequences."""

    weight: Tensor | None
    temperature: float | nn.Parameter

    def __init__(
        self,
        temperature: float | nn.Parameter,
        positive_weight: float,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        precision: str | None,
        check: bool | None,
        backend: str | None,
    ):
        super().__init__()
        checks.check_loss(temperature, positive_weight, reduction)
        checks.check_integer("ignore_index", ignore_index)
        checks.check_flag("check", check)
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            raise TypeError(
                "temperature must be a number or an nn.Parameter, got a tensor: it would be neither moved nor trained"
            )
        if weight is not None:
            checks.check_tensor("weight", weight)
        self.register_buffer("weight", weight, persistent=False)
        self.temperature = temperature if isinstance(temperature, nn.Parameter) else float(temperature)
        self.positive_weight = float(positive_weight)
        self.ignore_index = int(ignore_index)
        self.reduction = reduction
        self.precision = precision
        self.check = check
        self.backend = backend

    def extra_repr(self) -> str:
        temperature = self.temperature if isinstance(self.temperature, float) else "learned"
        return f"temperature={temperature}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"

    def _options(self) -> dict[str, Any]:
        """What every op takes."""
        return {
            "positive_weight": self.positive_weight,
            "temperature": self.temperature,
            "weight": self.weight,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "precision": self.precision,
            "check": self.check,
            "backend": self.backend,
        }

    def _rows_of_negatives(self, count: int, target: Tensor, rows: Tensor | None) -> Tensor | None:
        """The rows to take for negatives of `count` rows: those whose target is not ignored, or all (None)."""
        if torch.compiler.is_compiling():
            if count == target.numel():
                return None
            # From an eager sampler: only the number of rows says how many targets are real, until the graph runs.
            real = target.reshape(-1) != self.ignore_index
            if dispatch.choose_check(self.check, target):
                expected = "neg must have a row for each of the targets that are not ignored, or for all"
                torch._assert_async(real.sum() == count, expected)
            return torch.nonzero_static(real, size=count).squeeze(1)
        real_count = target.numel() if rows is None else rows.numel()
        if count == real_count:
            return rows
        if count == target.numel():
            return None
        raise ValueError(
            f"neg must have a row for each of the {real_count} targets that are not ignored, or for all "
            f"{target.numel()}, got {count} rows"
        )

    def _of_target(self, losses: Tensor, target: Tensor, rows: Tensor | None) -> Tensor:
        """losses of the rows taken -> target's shape, with zeros where it is ignored; a scalar stays one."""
        if self.reduction != "none":
            return losses
        if rows is not None:
            losses = losses.new_zeros(target.numel()).index_copy(0, rows, losses)
        return losses.view(target.shape)


class _CatalogLoss(_Loss):
    """`slice_cross_entropy` over the rows whose target is not ignored."""

    _op = staticmethod(slice_cross_entropy)

    def __init__(self, first_item: int, max_saved_bytes: int, label_smoothing: float, *options: Any):
        super().__init__(*options)
        checks.check_smoothing(label_smoothing, sliced=False, has_positives=False)
        for name, value in (("first_item", first_item), ("max_saved_bytes", max_saved_bytes)):
            checks.check_integer(name, value)
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self.first_item = int(first_item)
        self.max_saved_bytes = int(max_saved_bytes)
        self.label_smoothing = float(label_smoothing)

    def _loss(
        self,
        query: Tensor,
        catalog: Tensor,
        target: Tensor,
        neg: RankSlice | None,
        positives: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        rows = real_rows(query, target, self.ignore_index)
        if neg is not None:
            rows = self._rows_of_negatives(neg.batch_size, target, rows)
        losses = self._op(
            take_rows(query, rows, 1),
            catalog,
            take_rows(target, rows, 0),
            neg,
            positives=_take_positives(positives, target, rows),
            bias=bias,
            first_item=self.first_item,
            max_saved_bytes=self.max_saved_bytes,
            label_smoothing=self.label_smoothing,
            **self._options(),
        )
        return self._of_target(losses, target, rows)


class FullSoftmaxLoss(_CatalogLoss):
    """Cross-entropy over the whole catalog, in tiles of scores: no (B, V) tensor is made.

    Equivalent to ``F.cross_entropy((query @ catalog.T + bias) / temperature, target)``; called like Cut Cross-Entropy's
    ``LinearCrossEntropy``. Rows whose target is ignore_index are left out before any product. (Not so under
    torch.compile, whose shapes must not depend on values.) Whatever they hold, NaN too, their gradient is exactly zero.

    Args:
        temperature: above 0; divides the logits. A number, or an ``nn.Parameter`` of one element, which is trained.
        label_smoothing, weight: as in ``nn.CrossEntropyLoss``; see `slice_cross_entropy`. The weights are a buffer
            outside the state dict, which keeps its dtype under ``half()``.
        first_item: rows of the catalog before it are padding: neither candidates nor targets.
        ignore_index: a target that stands for no row, as in ``nn.CrossEntropyLoss``; 0 suits catalogs padded at item 0.
        reduction: "mean" over the targets that count (0 over none), "sum", or "none" for the target's shape.
        max_saved_bytes: at most so much of the logits is saved for the backward pass, as in `slice_cross_entropy`; 0
            saves none.
        precision, check, backend: as in `rank_slice`.

    Raises:
        TypeError: for an option of another kind.
        ValueError: for a temperature of 0 or less (where it is a parameter at the call), another number below 0, a
            label_smoothing above 1, or another reduction.
    """

    def __init__(
        self,
        *,
        temperature: float | nn.Parameter = 1.0,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        first_item: int = 0,
        ignore_index: int = -100,
        reduction: str = "mean",
        max_saved_bytes: int = 256 << 20,
        precision: str | None = None,
        check: bool | None = None,
        backend: str | None = None,
    ):
        super().__init__(
            first_item,
            max_saved_bytes,
            label_smoothing,
            temperature,
            1.0,
            weight,
            ignore_index,
            reduction,
            precision,
            check,
            backend,
        )

    def forward(self, query: Tensor, catalog: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        """
        Args:
            query: (B, d) or (B, L, d) float32, bfloat16 or float16; gets a gradient.
            catalog: (V, d) of these, the item embeddings; gets a gradient.
            target: (B,) or (B, L) int32 or int64; ignore_index where there is none.
            bias: (V,), added to the scores; gets a gradient.

        Returns the loss: a scalar, or of target's shape with reduction="none".

        Raises:
            TypeError, ValueError, BackendError: as `slice_cross_entropy` does; rows count the targets not ignored.
        """
        return self._loss(query, catalog, target, None, None, bias)


class SliceCrossEntropy(_CatalogLoss):
    """`slice_cross_entropy` as a module: each target, and extra positives, against a set of negatives.

    Args:
        temperature, first_item, weight, ignore_index, reduction, max_saved_bytes, precision, check, backend: as in
            `FullSoftmaxLoss`, and so are ignored rows.
        positive_weight: what each of the extra positives counts against the target.

    Raises:
        TypeError: for an option of another kind.
        ValueError: as `FullSoftmaxLoss`, and for a negative positive_weight.
    """

    def __init__(
        self,
        *,
        temperature: float | nn.Parameter = 1.0,
        positive_weight: float = 1.0,
        weight: Tensor | None = None,
        first_item: int = 0,
        ignore_index: int = -100,
        reduction: str = "mean",
        max_saved_bytes: int = 256 << 20,
        precision: str | None = None,
        check: bool | None = None,
        backend: str | None = None,
    ):
        super().__init__(
            first_item,
            max_saved_bytes,
            0.0,
            temperature,
            positive_weight,
            weight,
            ignore_index,
            reduction,
            precision,
            check,
            backend,
        )

    def forward(
        self,
        query: Tensor,
        catalog: Tensor,
        target: Tensor,
        neg: RankSlice | None = None,
        *,
        positives: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            query, catalog, target, bias: as in `FullSoftmaxLoss`.
            neg: the negatives, of a row for each target that is not ignored (as `RankSliceSampler` gives them), or of a
                row for every target; None: all items.
            positives: (B, P) or (B, L, P) int32 or int64, further items that should rank high; -1 is none.

        Returns the loss: a scalar, or of target's shape with reduction="none".

        Raises:
            TypeError, ValueError, BackendError: as `slice_cross_entropy` does; rows count the targets not ignored.
            RuntimeError: under torch.compile, where the rows of `neg` are neither number.
        """
        if not isinstance(neg, RankSlice | None):
            raise TypeError(
                f"neg must be a RankSlice, as sampler(...) gives it, got {checks.kind_of(neg)}; ids, as "
                "sampler.sample(...) gives them, are for SampledSoftmaxLoss"
            )
        return self._loss(query, catalog, target, neg, positives, bias)


class SampledSoftmaxLoss(_Loss):
    """`sampled_softmax` as a module: each target against negatives given by their ids, with logQ correction.

    Args:
        temperature, positive_weight, weight, ignore_index, reduction, precision, check, backend: as in
            `SliceCrossEntropy`.
        log_q: (V,) float, the log of each item's expected count among the negatives, subtracted from the logits of
            targets and negatives; `RankSliceSampler.log_q` gives it. A buffer outside the state dict, which keeps its
            dtype under ``half()``.
        sparse_grad: the catalog's gradient as a coalesced sparse tensor of the touched rows, for ``optim.SparseAdam``.

    Raises:
        TypeError: for an option of another kind.
        ValueError: for a temperature of 0 or less, a negative positive_weight, or another reduction.
    """

    log_q: Tensor | None

    def __init__(
        self,
        *,
        temperature: float | nn.Parameter = 1.0,
        log_q: Tensor | None = None,
        positive_weight: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        sparse_grad: bool = False,
        precision: str | None = None,
        check: bool | None = None,
        backend: str | None = None,
    ):
        super().__init__(temperature, positive_weight, weight, ignore_index, reduction, precision, check, backend)
        if log_q is not None:
            checks.check_tensor("log_q", log_q)
        checks.check_flag("sparse_grad", sparse_grad)
        self.register_buffer("log_q", log_q, persistent=False)
        self.sparse_grad = sparse_grad

    def forward(
        self,
        query: Tensor,
        catalog: Tensor,
        target: Tensor,
        neg: Tensor,
        *,
        positives: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            query, catalog, target, positives, bias: as in `SliceCrossEntropy`.
            neg: int32 or int64 ids, -1 is none: (N,) shared by all rows; (T, N) of a row for each target that is not
                ignored, as `RankSliceSampler.sample` gives them; or (B, N) and (B, L, N) of a row for every target.

        Returns the loss: a scalar, or of target's shape with reduction="none".

        Raises:
            TypeError, ValueError, BackendError: as `sampled_softmax` does; rows count the targets not ignored.
            RuntimeError: under torch.compile, where the rows of `neg` (T, N) are not one for each.
        """
        if not isinstance(neg, Tensor):
            raise TypeError(
                f"neg must be a tensor of ids, as sampler.sample(...) gives it, got {checks.kind_of(neg)}; a "
                "RankSlice, as sampler(...) gives it, is for SliceCrossEntropy"
            )
        rows = real_rows(query, target, self.ignore_index)
        if neg.ndim == target.ndim + 1 and neg.shape[:-1] == target.shape:
            neg = take_rows(neg, rows, 1)
        elif neg.ndim == 2:
            rows = self._rows_of_negatives(neg.shape[0], target, rows)
        elif neg.ndim != 1:
            raise ValueError(
                f"neg must be (N,), (T, N) with a row for each target that is not ignored, or "
                f"{_with_last(target, 'N')}, got {tuple(neg.shape)}"
            )
        losses = sampled_softmax(
            take_rows(query, rows, 1),
            catalog,
            take_rows(target, rows, 0),
            neg,
            log_q=self.log_q,
            positives=_take_positives(positives, target, rows),
            bias=bias,
            sparse_grad=self.sparse_grad,
            **self._options(),
        )
        return self._of_target(losses, target, rows)


def real_rows(query: Tensor, target: Tensor, ignore_index: int) -> Tensor | None:
    """(T,) the flat places of the targets that are not ignored; None where that is all, and under torch.compile.

    Raises TypeError for what is no tensor, and ValueError unless query is (B, d) or (B, L, d) and target its shape
    without the last dimension.
    """
    checks.check_tensor("query", query)
    checks.check_tensor("target", target)
    if query.ndim not in (2, 3):
        raise ValueError(f"query must be (B, d) or (B, L, d), got {tuple(query.shape)}")
    if target.shape != query.shape[:-1]:
        raise ValueError(f"target must be {tuple(query.shape[:-1])}, as the query is, got {tuple(target.shape)}")
    if torch.compiler.is_compiling():
        return None
    rows = (target.reshape(-1) != ignore_index).nonzero().squeeze(1)
    return None if rows.numel() == target.numel() else rows


def take_rows(x: Tensor, rows: Tensor | None, trailing: int) -> Tensor:
    """x (B, *) or (B, L, *), * of `trailing` dimensions -> what stands at the flat places `rows`, or all B L rows."""
    if x.ndim - trailing == 2:
        if rows is not None:  # two indices, since flattening an expanded tensor would copy all of it
            length = x.shape[1]
            return x[rows // length, rows % length]
        return x.flatten(0, 1)
    return x if rows is None else x[rows]


def _take_positives(positives: Tensor | None, target: Tensor, rows: Tensor | None) -> Tensor | None:
    if positives is None:
        return None
    checks.check_tensor("positives", positives)
    if positives.ndim != target.ndim + 1 or positives.shape[:-1] != target.shape:
        raise ValueError(f"positives must be {_with_last(target, 'P')}, got {tuple(positives.shape)}")
    return take_rows(positives, rows, 1)


def _with_last(target: Tensor, name: str) -> str:
    return f"({', '.join(map(str, target.shape))}, {name})"
