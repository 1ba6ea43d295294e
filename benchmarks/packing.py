"""Ways to give every prefix its session embedding, side by side: `python -m alterrec_fast.benchmarks.packing`.

Each runs the forward and backward of the two-layer transformer over one batch of about 512 tokens: length groups (what
the package does), one block-diagonal mask over all tokens, and rows padded to 50 as in the published code (one row a
session here; the published code pads every prefix). torch.nested is not among them: in torch 2.13 its jagged layout has
no attention backend on the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alterrec_fast.model.encoders import Block, TransformerSession, initialise
from alterrec_fast.model.packing import Packing

Attention = Callable[[Tensor], Tensor]  # qkv (T, 3, h, d / h) -> (T, h, d / h)
MAX_LENGTH = 50


def length_groups(lengths: np.ndarray) -> Attention:
    packing = Packing.of(lengths)

    def attend(qkv: Tensor) -> Tensor:
        parts = [part.permute(2, 0, 3, 1, 4) for part in packing.spread(qkv)]
        mixed = [F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2) for q, k, v in parts]
        return packing.gather(mixed)

    return attend


def one_mask(lengths: np.ndarray) -> Attention:
    session = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    place = torch.arange(len(session))
    mask = (session[:, None] == session) & (place[:, None] >= place)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(1, 2, 0, 3).unsqueeze(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    return attend


def padded(lengths: np.ndarray) -> Attention:
    inside = torch.arange(MAX_LENGTH) < torch.from_numpy(lengths)[:, None]

    def attend(qkv: Tensor) -> Tensor:
        rows = qkv.new_zeros(*inside.shape, *qkv.shape[1:])
        rows[inside] = qkv
        q, k, v = rows.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return mixed[inside]

    return attend


WAYS = {"length groups": length_groups, "one mask": one_mask, "padded to 50": padded}


def step(encoder: TransformerSession, x: Tensor, position: Tensor, attend: Attention) -> Tensor:
    """Forward and backward of the encoder with this attention; returns its output."""
    h = x + encoder.position[position]
    for block in encoder.blocks:
        assert isinstance(block, Block)
        t, d = h.shape
        mixed = attend(block.qkv(h).view(t, 3, block.heads, d // block.heads)).reshape(t, d)
        h = block.norm_attention(h + block.out(mixed))
        h = block.norm_forward(h + block.down(F.relu(block.up(h))))
    h.square().mean().backward()
    return h.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    encoder = TransformerSession(options.width, 2, 2, 4 * options.width, MAX_LENGTH, 0.0)
    initialise(encoder, "xavier", options.width)
    rng = np.random.default_rng(0)
    print(f"{torch.get_num_threads()} threads, width {options.width}, median of {options.rounds} interleaved rounds")
    print("| sessions | " + " | ".join(f"{name}, ms" for name in WAYS) + " |\n| --- |" + " --- |" * len(WAYS))
    for title, mean in (("Amazon-like, mean 3.5 tokens", 3.5), ("Online-Retail-like, mean 20 tokens", 20.0)):
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(options.rounds):
            lengths = np.minimum(rng.geometric(1.0 / mean, options.tokens), MAX_LENGTH - 1)
            lengths = lengths[: max(1, int(np.searchsorted(np.cumsum(lengths), options.tokens)))]
            x = torch.randn(int(lengths.sum()), options.width)
            position = Packing.of(lengths).position
            expected = None
            for name, way in WAYS.items():
                attend = way(lengths)
                encoder.zero_grad(set_to_none=True)
                begun = time.perf_counter()
                found = step(encoder, x, position, attend)
                times[name].append(time.perf_counter() - begun)
                expected = found if expected is None else expected
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        print(f"| {title} | " + " | ".join(f"{1e3 * statistics.median(times[name]):.1f}" for name in WAYS) + " |")


if __name__ == "__main__":
    main()
