"""The columns of a score matrix: the items that a loss scores, which of them are negatives, and a buffer that holds
some columns of all sessions at a time, with torch's products of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import shapes
from .losses import Problem

# Of dlogits at a time; as many again of embeddings, and of their gradient, where dtypes differ.
BUFFER_BYTES = 256 << 20


@dataclass(frozen=True)
class Columns:
    """The items that are scored, and which of them are negatives."""

    count: int  # columns of the score matrix
    first: int  # columns before it are no negatives
    ids: Tensor | None  # (count,): the item of each column, below 0 for none; None: column i is item i
    bits: Tensor | None  # (B, W) int32: column i is a negative of a row if bit i % 32 of word i // 32 is set; None: all

    @classmethod
    def of(cls, p: Problem, first_item: int, bits: Tensor | None) -> Columns:
        """All items from first_item on, of which bits (B, W) uint8 are negatives; None: all of them."""
        b, v = p.query.shape[0], p.catalog.shape[0]
        if bits is None:
            return cls(v, first_item, None, None)
        if bits.shape[0] != b or bits.shape[1] * 8 < v:
            raise ValueError(f"neg.bits must be ({b}, at least {-(-v // 8)}) for {v} items, got {tuple(bits.shape)}")
        whole = F.pad(bits, (0, -bits.shape[1] % 4)) if bits.shape[1] % 4 else bits.contiguous()
        if whole.storage_offset() % 4:  # a view of words must begin at one
            whole = whole.clone()
        return cls(v, first_item, None, whole.view(torch.int32))

    def arguments(self) -> dict[str, Any]:
        return {
            "Ids": self.ids,
            "Bits": self.bits,
            "columns": self.count,
            "first_column": self.first,
            "stride_bits": 0 if self.bits is None else self.bits.stride(0),
            "HAS_IDS": self.ids is not None,
            "HAS_BITS": self.bits is not None,
        }


def dtype_of_products(p: Problem) -> torch.dtype:
    return shapes.HALVES.get(p.precision, torch.float32)


@dataclass(frozen=True)
class Buffer:
    """Memory for a number of each session and of some of the columns, which are taken in turn."""

    memory: Tensor  # (B, width)
    count: int  # columns in all

    @classmethod
    def of(cls, p: Problem, columns: Columns, block: int) -> Buffer:
        """As many whole blocks of columns as BUFFER_BYTES hold, of numbers and of their embeddings in float32, which
        are copied where dtypes differ."""
        (b, d), dtype = p.query.shape, dtype_of_products(p)
        fitting = max(1, BUFFER_BYTES // max(1, dtype.itemsize * b, 4 * d) // block)
        width = block * min(fitting, triton.cdiv(columns.count, block))
        if b * width >= 1 << 31:
            raise ValueError(f"query must have fewer than {(1 << 31) // block:,} rows, got {b:,}")
        return cls(torch.empty(b, width, dtype=dtype, device=p.query.device), columns.count)

    @property
    def width(self) -> int:
        return self.memory.shape[1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Columns [begin, end) that the memory holds at a time."""
        for begin in range(0, self.count, max(1, self.width)):
            yield begin, min(begin + self.width, self.count)


def multiply(p: Problem, columns: Columns, buffer: Buffer, begin: int, end: int) -> None:
    """The products of all queries with the embeddings of columns [begin, end), float32, to the buffer."""
    torch.mm(p.query.float(), embeddings(p, columns, begin, end).float().T, out=buffer.memory[:, : end - begin])


def no_autocast(p: Problem) -> AbstractContextManager[object]:
    """Products are taken in the dtypes that they are given, as the kernels take theirs."""
    kind = p.query.device.type
    enabled = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()


def embeddings(p: Problem, columns: Columns, begin: int, end: int) -> Tensor:
    """(end - begin, d): the catalog's rows of these columns; dlogits of columns that are none are 0."""
    if columns.ids is None:
        return p.catalog[begin:end]
    return p.catalog.index_select(0, columns.ids[begin:end].clamp(0, p.catalog.shape[0] - 1))


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, of two matrices in float32 or two of one 16-bit dtype, which no sum is rounded to."""
    if left.dtype != torch.float32 and left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def multiply_into(out: Tensor, left: Tensor, right: Tensor, unit: Tensor | None) -> None:
    """As `product`, times unit (1,) where that is not None; without a copy where out has the dtype of the product."""
    if unit is None and left.is_cuda and out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(product(left, right) if unit is None else product(left, right).mul_(unit))
