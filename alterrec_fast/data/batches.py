"""Batches of whole sessions as packed tokens: every prefix of a session is one training example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from alterrec_fast.data.sessions import Sessions

CHUNK = 1 << 16  # sessions whose lengths are looked up together; batches do not cross it


@dataclass(frozen=True)
class Batch:
    """S sessions of at least 2 items as T packed tokens; the item after each token is that token's target.

    items, targets: (T,) int64. lengths: (S,) int64, tokens of each session, one less than its items; they sum to T.
    """

    items: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray


def plan(
    sessions: Sessions, max_length: int, targets: int, rng: np.random.Generator | None = None
) -> Iterator[np.ndarray]:
    """Session indices of each batch, (S,) int64: whole sessions, cut to their last max_length items, with about
    `targets` targets a batch. Shuffled by `rng`, or in order without one.
    """
    order = np.arange(len(sessions)) if rng is None else rng.permutation(len(sessions))
    for begin in range(0, len(order), CHUNK):
        chunk = order[begin : begin + CHUNK]
        ends = np.cumsum(_lengths(sessions, chunk, max_length) - 1)
        cuts = np.searchsorted(ends, np.arange(targets, ends[-1], targets), side="right") + 1
        yield from (part for part in np.split(chunk, np.unique(cuts)) if len(part))


def pack(sessions: Sessions, which: np.ndarray, max_length: int) -> Batch:
    """The sessions `which` (S,), cut to their last max_length items, as one batch."""
    length = _lengths(sessions, which, max_length)
    first = sessions.offsets[which + 1] - length
    tokens = length - 1
    ends = np.cumsum(tokens)
    place = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - tokens), tokens)
    return Batch(sessions.items[place].astype(np.int64), sessions.items[place + 1].astype(np.int64), tokens)


def _lengths(sessions: Sessions, which: np.ndarray, max_length: int) -> np.ndarray:
    length: np.ndarray = np.minimum(sessions.offsets[which + 1] - sessions.offsets[which], max_length)
    return length
