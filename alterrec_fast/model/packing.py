"""How packed tokens of sessions of unequal length meet: in groups of sessions of nearly equal length, or by one mask.

`Packing` and `MaskedPacking` give the same results; encoders take either. Notation: T tokens, h heads, w their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PADDING = 1.1  # slots computed for each real token, at most, in every group
HEAD_UNIT = 8  # on CUDA fused attention takes only heads whose width is a multiple of it, and products are faster


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

    @property
    def slots(self) -> int:
        """P, the slots that are computed, padding included."""
        return self.token.numel()

    def attend(self, qkv: Tensor, dropout: float = 0.0) -> Tensor:
        """Causal attention within each session: queries, keys and values (T, 3, h, w) -> (T, h w).

        dropout: of the probabilities.
        """
        t, _, heads, width = qkv.shape
        padded = pad_heads(qkv) if qkv.is_cuda else qkv
        mixed = []
        for part in self.spread(padded):
            q, k, v = part.permute(2, 0, 3, 1, 4)  # each (b, h, L, w); padding follows what it could disturb
            options: Any = {"is_causal": True, "scale": width**-0.5, "dropout_p": dropout}
            mixed.append(F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2))
        return self.gather(mixed)[..., :width].reshape(t, heads * width)

    def weigh(self, logits: Tensor, x: Tensor) -> Tensor:
        """logits (T,), x (T, d) -> (T, d): at each token the sum of its session's tokens up to there, weighed by the
        softmax of their logits."""
        sums = []
        for logit, part in zip(self.spread(logits), self.spread(x), strict=True):
            length = part.shape[1]
            past = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            scores = logit.unsqueeze(1).masked_fill(~past, -torch.inf)  # (b, L, L)
            sums.append(scores.softmax(2) @ part)
        return self.gather(sums)

    def mean(self, x: Tensor) -> Tensor:
        """x (T, d) -> (T, d): at each token the mean of its session's tokens up to there."""
        sums = self.gather([part.cumsum(1) for part in self.spread(x)])
        return sums / (self.position + 1).unsqueeze(1)

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


@dataclass(frozen=True)
class MaskedPacking:
    """T tokens of any sessions, all of which meet under one block-diagonal mask.

    Nothing depends on the sessions' lengths but values: shapes are the same for every batch of T tokens, so that a step
    can be a CUDA graph, and every product has one order of summation. The work grows with T squared, which for the 500
    or so tokens of a training step costs less than launches for a few groups of sessions would.
    """

    position: Tensor  # (T,) int64, place of each token in its session, from 0
    mask: Tensor  # (T, T) bool: token i attends to token j, of the same session and not later
    bias: Tensor  # (T, T) float32: 0 where the mask is set, else -inf

    @classmethod
    def of(cls, position: Tensor, session: Tensor) -> MaskedPacking:
        """position (T,): place of each token in its session; session (T,): a number for each session; both int64."""
        mask = (session.unsqueeze(1) == session) & (position.unsqueeze(1) >= position)
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
        return cls(position, mask, bias)

    @property
    def slots(self) -> int:
        """T, padding included."""
        return self.position.numel()

    def attend(self, qkv: Tensor, dropout: float = 0.0) -> Tensor:
        """Causal attention within each session: queries, keys and values (T, 3, h, w) -> (T, h w).

        dropout: of the probabilities.
        """
        t, _, heads, width = qkv.shape
        padded = pad_heads(qkv) if qkv.is_cuda else qkv  # aligned products: a tenth of the encoder's time on an H100
        q, k, v = padded.permute(1, 2, 0, 3)  # each (h, T, w)
        scores = torch.baddbmm(self.bias.expand(heads, t, t), q, k.transpose(1, 2), alpha=width**-0.5)
        shares = scores.softmax(2)
        if dropout:
            shares = F.dropout(shares, dropout)
        return torch.bmm(shares, v).transpose(0, 1)[..., :width].reshape(t, heads * width)

    def weigh(self, logits: Tensor, x: Tensor) -> Tensor:
        """logits (T,), x (T, d) -> (T, d): at each token the sum of its session's tokens up to there, weighed by the
        softmax of their logits."""
        return (self.bias + logits).softmax(1) @ x

    def mean(self, x: Tensor) -> Tensor:
        """x (T, d) -> (T, d): at each token the mean of its session's tokens up to there."""
        return self.mask.to(x.dtype) @ x / (self.position + 1).unsqueeze(1)


def pad_heads(qkv: Tensor) -> Tensor:
    """qkv (..., w) with zeros at the end of each head, up to a multiple of HEAD_UNIT.

    Attention over them with the scale of the true width is the same: zeros add nothing to a product of queries and
    keys, and what comes of values' zeros is cut off.
    """
    missing = -qkv.shape[-1] % HEAD_UNIT
    return F.pad(qkv, (0, missing)) if missing else qkv


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
