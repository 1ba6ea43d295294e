"""RankSlice: for each session a set of catalog items, as packed bits or as a list of ids, whichever is smaller."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from alterrec_fast.ops.checks import check_fraction, check_integer, check_tensor
from alterrec_fast.ops.random_sets import bernoulli_bits, bernoulli_ids, weighted_ids

WORD = 64  # items a row of bits is padded to, so that engines may read it as bytes, int32 or int64 words
BLOCK_BYTES = 32 << 20  # what one row block of an unpacked slice may take


def bits_width(num_items: int) -> int:
    """Bytes in one packed row of `num_items` items."""
    return -(-num_items // WORD) * (WORD // 8)


def uses_bits(num_items: int, size: int) -> bool:
    """Whether a slice of `size` ranks is stored as bits (V / 8 bytes a row) rather than as int32 ids (4 n);
    csrc/binding_rank_slice.cpp decides by the same rule."""
    return bits_width(num_items) <= 4 * size


def pack_bits(mask: Tensor) -> Tensor:
    """mask (B, V) bool -> (B, bits_width(V)) uint8; item i is bit i % 8 of byte i // 8, and the tail is zero."""
    b, v = mask.shape
    padded = mask.new_zeros(b, bits_width(v) * 8)
    padded[:, :v] = mask
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)  # made on the device: nothing is copied to it
    weights = torch.ones_like(places).bitwise_left_shift_(places)
    return (padded.view(b, bits_width(v), 8) * weights).sum(2, dtype=torch.uint8)


def unpack_bits(bits: Tensor, num_items: int) -> Tensor:
    """(B, W) uint8 -> (B, V) bool; the inverse of pack_bits."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    spread = bits.unsqueeze(2).bitwise_right_shift(shifts).bitwise_and_(1)
    return spread.reshape(bits.shape[0], bits.shape[1] * 8)[:, :num_items].bool()


@dataclass(frozen=True, repr=False, eq=False)
class RankSlice:
    """For each of B sessions a set of catalog items; what `rank_slice` returns and `slice_cross_entropy` takes.

    Exactly one of `bits` and `ids` is set. A frozen dataclass of plain tensors, registered as a pytree; torch.load
    reads it with weights_only=True if alterrec_fast is imported. Two are equal if their tensors and sizes are; there is
    no hash, since tensors may change in place.

    Raises:
        TypeError: for a field of a wrong kind or dtype.
        ValueError: for a field of a wrong shape or device. Ids are not looked at: they are checked where they are read.
    """

    bits: Tensor | None  # (B, W) uint8, W = bits_width(V): item i is bit i % 8 of byte i // 8
    ids: Tensor | None  # (B, n) int32, ascending, rows that are shorter end in -1
    top: Tensor  # (B, t) int64, the items of ranks 0..t-1, best first; `exclude` does not shorten it
    thresholds: Tensor  # (B, 2) float32, the scores at ranks start and stop - 1; (+inf, -inf) for an empty slice
    exclude_values: Tensor  # (E,) int64, ids that never enter, by `mix` either; negative ids are none
    exclude_offsets: Tensor  # (B + 1,) int64, row b owns exclude_values[exclude_offsets[b]:exclude_offsets[b + 1]]
    num_items: int  # V
    first_item: int  # rows before it are padding and never members
    size: int  # n = stop - start, the number of ranks asked for

    def __post_init__(self) -> None:
        for name in ("num_items", "first_item", "size"):
            check_integer(name, getattr(self, name))
        if not 0 <= self.first_item <= self.num_items or self.size < 0:
            raise ValueError(
                f"RankSlice: expected 0 <= first_item <= num_items and size >= 0, got first_item={self.first_item}, "
                f"num_items={self.num_items}, size={self.size}"
            )
        if (self.bits is None) == (self.ids is None):
            raise ValueError("RankSlice: exactly one of bits and ids must be given")
        check_tensor("top", self.top)
        b = self.top.shape[0] if self.top.ndim == 2 else -1
        forms: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {
            "bits": (torch.uint8, (b, bits_width(self.num_items))),
            "ids": (torch.int32, (b, "n")),
            "top": (torch.int64, ("B", "t") if b < 0 else (b, "t")),
            "thresholds": (torch.float32, (b, 2)),
            "exclude_values": (torch.int64, ("E",)),
            "exclude_offsets": (torch.int64, (b + 1,)),
        }
        for name, (dtype, shape) in forms.items():
            tensor = getattr(self, name)
            if tensor is None and name in ("bits", "ids"):
                continue
            check_tensor(name, tensor)
            if tensor.dtype != dtype:
                raise TypeError(f"RankSlice: {name} must be {dtype}, got {tensor.dtype}")
            sizes = zip(tensor.shape, shape, strict=False)
            if tensor.ndim != len(shape) or any(isinstance(want, int) and got != want for got, want in sizes):
                expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
                raise ValueError(f"RankSlice: {name} must be ({expected}), got {tuple(tensor.shape)}")
            if tensor.device != self.top.device:
                raise ValueError(f"RankSlice: {name} must be on {self.top.device} as top is, got {tensor.device}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For pickle and torch.load: checks what a file holds."""
        self.__dict__.update(state)
        self.__post_init__()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RankSlice):
            return NotImplemented
        ours, theirs = self._tensors(), other._tensors()
        return (
            (self.num_items, self.first_item, self.size) == (other.num_items, other.first_item, other.size)
            and ours.keys() == theirs.keys()
            and self.device == other.device
            and all(torch.equal(ours[name], theirs[name]) for name in ours)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:
        return self.top.device

    @property
    def batch_size(self) -> int:
        return self.top.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors together."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def __repr__(self) -> str:
        """Sizes, not the tensors, which may be of many megabytes."""
        form = "ids" if self.bits is None else "bits"
        sizes = f"{self.batch_size} sessions, {self.size} of {self.num_items} items as {form}"
        return f"RankSlice({sizes}, {self.nbytes / 2**20:.2f} MiB, {self.device})"

    def to(self, device: torch.device | str) -> RankSlice:
        moved: dict[str, Any] = {name: t.to(device) for name, t in self._tensors().items()}
        return replace(self, **moved)

    def mask(self) -> Tensor:
        """(B, V) bool, for tests and small catalogs."""
        return self.mask_rows(0, self.batch_size)

    def mask_rows(self, begin: int, end: int) -> Tensor:
        """(end - begin, V) bool, the rows [begin, end) of `mask()`."""
        if self.bits is not None:
            return unpack_bits(self.bits[begin:end], self.num_items)
        assert self.ids is not None
        ids = self.ids[begin:end].long()
        mask = torch.zeros(ids.shape[0], self.num_items + 1, dtype=torch.bool, device=self.device)
        mask.scatter_(1, torch.where(ids < 0, self.num_items, ids), True)  # -1 goes to a column that is cut off
        return mask[:, : self.num_items]

    def counts(self) -> Tensor:
        """(B,) int64, members in each row."""
        if self.ids is not None:
            return (self.ids >= 0).sum(1)
        counts = [self.mask_rows(begin, end).sum(1) for begin, end in self._row_blocks()]
        return torch.cat(counts) if counts else self.top.new_zeros(0)

    def indices(self) -> Tensor:
        """(B, n) int64, each row's members in ascending order; shorter rows end in -1.

        n is the number of ranks asked for, or the longest row's length where `mix` made one longer.
        """
        if self.ids is not None:
            return self.ids.long()
        counts = self.counts()
        width = max(self.size, int(counts.max())) if counts.numel() else self.size
        out = torch.full((self.batch_size, width), -1, dtype=torch.int64, device=self.device)
        for begin, end in self._row_blocks():
            row, item = self.mask_rows(begin, end).nonzero(as_tuple=True)
            starts = counts[begin:end].cumsum(0) - counts[begin:end]
            place = torch.arange(row.numel(), device=self.device) - starts[row]
            out[begin + row, place] = item
        return out

    def sample(self, m: int, generator: torch.Generator | None = None) -> Tensor:
        """(B, m) int64: m members of each row, uniformly without replacement; a row with fewer ends in -1."""
        check_integer("m", m)
        if m < 0:
            raise ValueError(f"m must be at least 0, got {m}")
        out = torch.full((self.batch_size, m), -1, dtype=torch.int64, device=self.device)
        if m == 0:
            return out
        for begin, end in self._row_blocks():
            if self.ids is not None:
                member, item = self.ids[begin:end] >= 0, self.ids[begin:end].long()
            else:
                member = self.mask_rows(begin, end)
                item = torch.arange(self.num_items, device=self.device).expand(end - begin, -1)
            key = torch.rand(member.shape, generator=generator, device=self.device).masked_fill(~member, -1.0)
            best = key.topk(min(m, key.shape[1]), dim=1)
            chosen = item.gather(1, best.indices).masked_fill(best.values < 0, -1)
            out[begin:end, : chosen.shape[1]] = chosen
        return out

    def mix(
        self, hard_fraction: float, generator: torch.Generator | None = None, weights: Tensor | None = None
    ) -> RankSlice:
        """Trades members for random items of the catalog; the result is again a set.

        Each member stays with probability f = hard_fraction; each item that is not a member, not excluded and not
        below first_item enters with probability (1 - f) n / V, or (1 - f) n w_i / sum(w) where weights (V,) are given
        (at most 1 - 2 ** -24 then, and never where the weight is zero). f = 1 returns this slice itself.
        """
        check_fraction("hard_fraction", hard_fraction)
        if weights is not None:
            check_weights("weights", weights, self.num_items, self.first_item)
        if hard_fraction == 1.0:
            return self
        number = (1.0 - hard_fraction) * self.size
        enters = number / self.num_items
        drawn = None
        if weights is not None:
            drawn = weighted_ids(self.batch_size, self.first_item, number, weights, self.device, generator)
        if self.bits is not None:
            stay = self.bits & bernoulli_bits(self.bits.shape, hard_fraction, self.device, generator)
            new = (
                bernoulli_bits(self.bits.shape, enters, self.device, generator)
                if drawn is None
                else self._bits_of(drawn)
            )
            return replace(self, bits=stay | new & ~self.bits & self._open_bits())
        assert self.ids is not None
        stays = torch.rand(self.ids.shape, generator=generator, device=self.device) < hard_fraction
        staying = torch.where(stays & (self.ids >= 0), self.ids.long(), self.num_items)
        new = (
            bernoulli_ids(self.batch_size, self.first_item, self.num_items, enters, self.device, generator)
            if drawn is None
            else drawn
        )
        rows = torch.arange(self.batch_size, device=self.device).unsqueeze(1)
        stride = self.num_items + 1
        members = torch.where(self.ids < 0, self.num_items, self.ids.long()) + rows * stride
        taken = torch.cat([members.flatten(), self._excluded_keys(stride)])
        new = torch.where(torch.isin(new + rows * stride, taken), self.num_items, new)
        return replace(self, ids=_compact(torch.cat([staying, new], 1), self.num_items))

    @classmethod
    def uniform(
        cls,
        batch_size: int,
        num_items: int,
        size: int,
        exclude: Tensor | tuple[Tensor, Tensor] | None = None,
        first_item: int = 0,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        weights: Tensor | None = None,
    ) -> RankSlice:
        """Random sets of about `size` items: every item enters with probability size / V, independently.

        The law of `mix(0.0)` on a slice of that size, whatever its members; with `weights` as there.
        """
        for name, value in (("batch_size", batch_size), ("num_items", num_items), ("size", size)):
            check_integer(name, value)
        if not 0 <= size <= num_items - first_item:
            raise ValueError(f"size must lie in [0, {num_items - first_item}], the number of items, got {size}")
        values, offsets = exclude_lists(exclude, batch_size, torch.device(device))
        empty = cls(
            bits=torch.zeros(batch_size, bits_width(num_items), dtype=torch.uint8, device=device),
            ids=None,
            top=torch.empty(batch_size, 0, dtype=torch.int64, device=device),
            thresholds=_no_thresholds(batch_size, device),
            exclude_values=values,
            exclude_offsets=offsets,
            num_items=num_items,
            first_item=first_item,
            size=size,
        )
        if not uses_bits(num_items, size):
            empty = replace(empty, bits=None, ids=torch.empty(batch_size, 0, dtype=torch.int32, device=device))
        return empty.mix(0.0, generator, weights)

    @classmethod
    def from_indices(cls, ids: Tensor, num_items: int, first_item: int = 0) -> RankSlice:
        """ids (B, n) int32 or int64 in any order, repeats count once, -1 is no item -> the same sets as a RankSlice."""
        check_tensor("ids", ids)
        if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"ids must be (B, n) int32 or int64, got {tuple(ids.shape)} {ids.dtype}")
        bad = (ids < -1) | (ids >= num_items) | ((ids >= 0) & (ids < first_item))
        if bad.any():
            row = int(bad.any(1).nonzero()[0])
            value = int(ids[row][bad[row]][0])
            raise ValueError(f"ids: row {row} holds {value}, expected -1 or an id in [{first_item}, {num_items})")
        ordered = torch.where(ids < 0, num_items, ids.long()).sort(1).values
        repeat = torch.zeros_like(ordered, dtype=torch.bool)
        repeat[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        return cls.of_members(_compact(ordered.masked_fill(repeat, num_items), num_items), num_items, first_item)

    @classmethod
    def from_mask(cls, mask: Tensor, first_item: int = 0) -> RankSlice:
        """mask (B, V) bool -> the same sets as a RankSlice; columns below first_item must be False."""
        check_tensor("mask", mask)
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise ValueError(f"mask must be (B, V) bool, got {tuple(mask.shape)} {mask.dtype}")
        if mask[:, :first_item].any():
            raise ValueError(f"mask: a column below first_item = {first_item} is set")
        made = cls.of_members(pack_bits(mask), mask.shape[1], first_item)
        counts = made.counts()
        return replace(made, size=int(counts.max()) if counts.numel() else 0)

    @classmethod
    def of_members(cls, members: Tensor, num_items: int, first_item: int) -> RankSlice:
        """members: (B, W) uint8 as `bits` or (B, n) int32 as `ids` -> the slice, with no `top` and nothing excluded."""
        b, device, as_bits = members.shape[0], members.device, members.dtype == torch.uint8
        return cls(
            bits=members if as_bits else None,
            ids=None if as_bits else members,
            top=torch.empty(b, 0, dtype=torch.int64, device=device),
            thresholds=_no_thresholds(b, device),
            exclude_values=torch.empty(0, dtype=torch.int64, device=device),
            exclude_offsets=torch.zeros(b + 1, dtype=torch.int64, device=device),
            num_items=num_items,
            first_item=first_item,
            size=0 if as_bits else members.shape[1],
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {name: t for name in TENSOR_FIELDS if (t := getattr(self, name)) is not None}

    def _row_blocks(self) -> Iterator[tuple[int, int]]:
        step = max(1, BLOCK_BYTES // max(1, self.num_items))
        for begin in range(0, self.batch_size, step):
            yield begin, min(begin + step, self.batch_size)

    def _excluded_keys(self, stride: int) -> Tensor:
        """row * stride + id for every excluded id; (E',) int64."""
        per_row = self.exclude_offsets.diff()
        row = torch.arange(self.batch_size, device=self.device).repeat_interleave(per_row)
        real = self.exclude_values >= 0
        return row[real] * stride + self.exclude_values[real]

    def _open_bits(self) -> Tensor:
        """(B, W) uint8, the items that may enter: in the catalog, not padding, not excluded."""
        inside = torch.zeros(1, self.num_items, dtype=torch.bool, device=self.device)
        inside[:, self.first_item :] = True
        if self.exclude_values.numel() == 0:  # what follows waits for the device
            return pack_bits(inside)
        return pack_bits(inside) & ~self._bits_at(self._excluded_keys(bits_width(self.num_items) * 8))

    def _bits_of(self, ids: Tensor) -> Tensor:
        """ids (B, n) int64, num_items for no item, repeats allowed -> (B, W) uint8."""
        stride = bits_width(self.num_items) * 8
        keys = ids + torch.arange(self.batch_size, device=self.device).unsqueeze(1) * stride
        return self._bits_at(keys[ids < self.num_items])

    def _bits_at(self, keys: Tensor) -> Tensor:
        """(B, W) uint8 with the bits row * 8 W + id set."""
        width = bits_width(self.num_items)
        bits = torch.zeros(self.batch_size * width, dtype=torch.uint8, device=self.device)
        keys = keys.unique()  # so that adding bits is or-ing them
        bits.index_add_(0, keys // 8, torch.ones_like(keys, dtype=torch.uint8).bitwise_left_shift_((keys % 8).byte()))
        return bits.view(self.batch_size, width)


TENSOR_FIELDS = ("bits", "ids", "top", "thresholds", "exclude_values", "exclude_offsets")


def unchecked_slice(**fields: Any) -> RankSlice:
    """A RankSlice of these fields, all of them, without the checks, which take longer than a small call of an op."""
    made = object.__new__(RankSlice)
    made.__dict__.update(fields)
    return made


def exclude_lists(
    exclude: Tensor | tuple[Tensor, Tensor] | None, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Any form of `exclude` as (values (E,) int64, offsets (B + 1,) int64); raises ValueError on a wrong shape."""
    if exclude is None:
        return (
            torch.empty(0, dtype=torch.int64, device=device),
            torch.zeros(batch_size + 1, dtype=torch.int64, device=device),
        )
    if isinstance(exclude, tuple):
        if len(exclude) != 2:
            raise ValueError(f"exclude as a tuple must be (values, offsets), got {len(exclude)} elements")
        values, offsets = exclude
        check_tensor("exclude values", values)
        check_tensor("exclude offsets", offsets)
        if values.ndim != 1 or offsets.shape != (batch_size + 1,):
            raise ValueError(
                f"exclude as (values, offsets) must be (E,) and ({batch_size + 1},), "
                f"got {tuple(values.shape)} and {tuple(offsets.shape)}"
            )
    else:
        check_tensor("exclude", exclude)
        if exclude.ndim not in (1, 2) or exclude.shape[0] != batch_size:
            raise ValueError(f"exclude must be ({batch_size},) or ({batch_size}, m), got {tuple(exclude.shape)}")
        per_row = 1 if exclude.ndim == 1 else exclude.shape[1]
        values = exclude.reshape(-1)
        offsets = torch.arange(batch_size + 1, device=exclude.device) * per_row
    for name, tensor in (("exclude", values), ("exclude offsets", offsets)):
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    return values.long(), offsets.long()


def check_weights(name: str, weights: Tensor, num_items: int, first_item: int) -> None:
    """Raises ValueError unless there is a finite weight of at least 0 for each item, and one above 0."""
    check_tensor(name, weights)
    if weights.shape != (num_items,):
        raise ValueError(f"{name} must be ({num_items},), got {tuple(weights.shape)}")
    ranked = weights[first_item:].double()
    if not (torch.isfinite(ranked) & (ranked >= 0)).all():
        place = int((~(torch.isfinite(ranked) & (ranked >= 0))).nonzero()[0])
        raise ValueError(f"{name}: item {first_item + place} has {float(ranked[place])}, expected a number from 0 up")
    if not ranked.any():
        raise ValueError(f"{name}: no item from {first_item} on has more than 0")


def _no_thresholds(batch_size: int, device: torch.device | str) -> Tensor:
    thresholds = torch.full((batch_size, 2), math.inf, device=device)
    thresholds[:, 1] = -math.inf
    return thresholds


def _compact(ids: Tensor, num_items: int) -> Tensor:
    """ids (B, n) int64 with num_items for no item -> (B, longest row) int32, ascending, shorter rows end in -1."""
    ordered = ids.sort(1).values
    longest = int((ordered < num_items).sum(1).max()) if ordered.numel() else 0
    return ordered[:, :longest].masked_fill(ordered[:, :longest] == num_items, -1).int()


def _flatten(slice_: RankSlice) -> tuple[list[Any], tuple[int, int, int]]:
    return [getattr(slice_, name) for name in TENSOR_FIELDS], (slice_.num_items, slice_.first_item, slice_.size)


def _unflatten(leaves: Any, static: Any) -> RankSlice:
    """Without checks: leaves need not be tensors, torch maps trees of other things as well."""
    fields = (*TENSOR_FIELDS, "num_items", "first_item", "size")
    return unchecked_slice(**dict(zip(fields, (*leaves, *static), strict=True)))


pytree.register_pytree_node(RankSlice, _flatten, _unflatten, serialized_type_name="alterrec_fast.RankSlice")
torch.serialization.add_safe_globals([RankSlice])
