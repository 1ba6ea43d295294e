"""Random sets of items for `RankSlice.mix` and `uniform`: each item enters independently, with its own chance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BERNOULLI_BITS = 24  # probabilities of random sets are rounded to multiples of 2 ** -24


def bernoulli_bits(
    shape: torch.Size, probability: float, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Bytes whose bits are 1 with the given probability, independently: shape (B, W) uint8.

    Random words are combined along the binary digits of the probability, least significant first: or-ing with a fair
    coin maps the chance x to (1 + x) / 2, and-ing maps it to x / 2. One half costs a single word for 64 items.
    """
    digits = round(probability * 2**BERNOULLI_BITS)
    if digits == 2**BERNOULLI_BITS:
        return torch.full(shape, 255, dtype=torch.uint8, device=device)
    words = (shape[0], shape[1] // 8)
    bits = torch.zeros(words, dtype=torch.int64, device=device)
    trailing = (digits & -digits).bit_length() - 1 if digits else BERNOULLI_BITS
    for place in range(trailing, BERNOULLI_BITS):
        coins = torch.empty(words, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
        bits = bits | coins if digits >> place & 1 else bits & coins
    return bits.view(torch.uint8)


def bernoulli_ids(
    rows: int, first: int, stop: int, probability: float, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """In each row every id of [first, stop) with the given probability, ascending, filled up with `stop`.

    Drawn by geometric gaps, so that the time follows the number of ids drawn and not the catalog.
    """
    span = stop - first
    if probability <= 0.0 or span == 0 or rows == 0:
        return torch.empty(rows, 0, dtype=torch.int64, device=device)
    if probability >= 1.0:
        return torch.arange(first, stop, device=device).expand(rows, -1)
    mean = span * probability
    width = int(mean + 6.0 * math.sqrt(mean) + 16.0)
    last = torch.full((rows, 1), first - 1, dtype=torch.int64, device=device)
    drawn: list[Tensor] = []
    while int(last.min()) < stop:
        uniform = 1.0 - torch.rand(rows, width, dtype=torch.float64, generator=generator, device=device)  # (0, 1]
        gaps = (uniform.log() / math.log1p(-probability)).floor().clamp_(max=span).long() + 1
        drawn.append(last + gaps.cumsum(1))
        last = drawn[-1][:, -1:]
    return torch.cat(drawn, 1).clamp_(max=stop)


def weighted_ids(
    rows: int, first: int, number: float, weights: Tensor, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """In each row every id i of [first, V) with probability number * w_i / sum(w), independently; sorted, each once,
    filled up with V.

    Item i is thrown Poisson(-log(1 - probability)) times, so that it turns up at all with that probability: all throws
    of a row are a Poisson number of draws from one distribution, and the time follows the number of ids drawn.
    """
    stop = weights.shape[0]
    chance = weights.to(device, torch.float64).clone()
    chance[:first] = 0.0
    chance = (number * chance / chance.sum()).clamp(max=1.0 - 2.0**-BERNOULLI_BITS)
    cumulated = (-torch.log1p(-chance)).cumsum(0)
    total = cumulated[-1:]
    throws = torch.poisson(total.expand(rows), generator=generator).long()
    width = int(throws.max()) if rows else 0
    places = torch.rand(rows, width, dtype=torch.float64, generator=generator, device=device) * total
    ids = torch.searchsorted(cumulated, places, right=True)
    ids = ids.masked_fill(torch.arange(width, device=device) >= throws.unsqueeze(1), stop).sort(1).values
    ids[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], stop)
    return ids
