"""How packed tokens of sessions of unequal length meet in attention: groups of sessions of nearly equal length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_PADDING = 1.1  # slots computed for each real token, at most, in every group


@dataclass(frozen=True)
class Packing:
    """T tokens of S sessions, session after session, and the slots that they take in groups of equal length.

    Everything that acts on single tokens works on the (T, d) packed form; only what mixes the tokens of a session works
    on the slots: `spread` makes a (b, L, d) tensor for each group, `gather` leads back.
    """

    position: Tensor  # (T,) int64, place of each token in its session, from 0
    token: Tensor  # (P,) int64, the token in each slot; padding repeats a session's last token
    slot: Tensor  # (T,) int64, the slot of each token
    groups: tuple[tuple[int, int], ...]  # (b, L) of each group, whose slots follow each other

    def spread(self, x: Tensor) -> list[Tensor]:
        """x (T, ...) -> (b, L, ...) for each group."""
        slots = x.index_select(0, self.token)
        sizes = [b * length for b, length in self.groups]
        return [
            part.view(b, length, *x.shape[1:])
            for part, (b, length) in zip(slots.split(sizes), self.groups, strict=True)
        ]

    def gather(self, parts: list[Tensor]) -> Tensor:
        """(b, L, ...) for each group -> (T, ...)."""
        return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, self.slot)

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device | str = "cpu") -> Packing:
        """lengths: (S,) int64, the tokens of each session, all at least 1."""
        if len(lengths) == 0 or lengths.min() < 1:
            raise ValueError("lengths must hold at least one session, each of at least one token")
        ends = np.cumsum(lengths)
        starts = ends - lengths
        total = int(ends[-1])
        order = np.argsort(-lengths, kind="stable")
        tokens: list[np.ndarray] = []
        groups: list[tuple[int, int]] = []
        slot, begin = np.empty(total, np.int64), 0
        for members, longest in _groups(lengths[order]):
            chosen = order[begin : begin + members]
            place = np.arange(longest)
            inside = place < lengths[chosen, None]  # (b, L)
            token = starts[chosen, None] + np.minimum(place, lengths[chosen, None] - 1)
            slot[token[inside]] = np.flatnonzero(inside) + sum(b * length for b, length in groups)
            tokens.append(token.ravel())
            groups.append((members, longest))
            begin += members
        return cls(
            position=torch.from_numpy(np.arange(total) - np.repeat(starts, lengths)).to(device),
            token=torch.from_numpy(np.concatenate(tokens)).to(device),
            slot=torch.from_numpy(slot).to(device),
            groups=tuple(groups),
        )


def _groups(descending: np.ndarray) -> list[tuple[int, int]]:
    """(members, longest) of each group of lengths, sorted in descending order; as few groups as MAX_PADDING allows."""
    groups: list[tuple[int, int]] = []
    members = real = longest = 0
    values, counts = np.unique(descending, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        if members and (members + count) * longest <= MAX_PADDING * (real + count * length):
            members, real = members + count, real + count * length
            continue
        if members:
            groups.append((members, longest))
        members, real, longest = count, count * length, length
    groups.append((members, longest))
    return groups
