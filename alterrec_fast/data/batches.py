"""Batches of whole sessions as packed tokens: every prefix of a session is one training example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from alterrec_fast.data.sessions import Sessions

CHUNK = 1 << 16  # sessions whose lengths are looked up together; batches do not cross it
IGNORED = -100  # the target of padding
TOKEN_UNIT = 16  # padded batches are of a multiple of so many tokens


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


def most_tokens(sessions: Sessions, max_length: int, targets: int) -> int:
    """The tokens that no batch of `plan` exceeds, a multiple of TOKEN_UNIT."""
    longest = 1
    for begin in range(0, len(sessions), CHUNK):
        which = np.arange(begin, min(begin + CHUNK, len(sessions)))
        longest = max(longest, int(_lengths(sessions, which, max_length).max()) - 1)
    return -(-(targets + longest) // TOKEN_UNIT) * TOKEN_UNIT  # a batch ends with the session that passes `targets`


def pad(batch: Batch, out: np.ndarray) -> None:
    """Fills out (4, n) int64 with the batch's items, targets, places in their sessions, and numbers of the sessions.

    Tokens beyond the batch's T are sessions of their own, of item 0, whose target is IGNORED. Raises ValueError where
    n is less than T.
    """
    t = len(batch.items)
    if t > out.shape[1]:
        raise ValueError(f"a batch of {t} tokens does not fit {out.shape[1]}")
    items, targets, position, session = out
    starts = np.cumsum(batch.lengths) - batch.lengths
    items[:t], targets[:t] = batch.items, batch.targets
    position[:t] = np.arange(t) - np.repeat(starts, batch.lengths)
    session[:t] = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    items[t:], targets[t:], position[t:] = 0, IGNORED, 0
    session[t:] = -1 - np.arange(out.shape[1] - t)


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
