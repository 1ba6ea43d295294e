"""Every kernel once or twice at a small ragged shape, for compute-sanitizer: `python -m tests.gpu.small SEED`."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch

from alterrec_fast.ops import RankSlice, rank_slice, sampled_softmax, slice_cross_entropy, top_k
from alterrec_fast.ops.dispatch import why_not_native

from .device import Cuda, Device
from .loss_cases import Positives, call, in_order
from .rank_cases import Ranking, ranges
from .truth import ARITHMETICS, Source


def run_small(device: Device, seed: int) -> None:
    """Every kernel once or twice at a small ragged shape, with rows that miss; what they return is not looked at."""
    source, b, v, d = Source(seed, device.device), 5, 1_500, 40
    for arithmetic in ("bf16", "fp32"):
        for exact, extras in ((False, "ids"), (True, "none")):
            r = Ranking.draw(source, arithmetic, extras, exact, b, v, d if extras == "ids" else 2)
            for form in ("bits", "bits, deep", "ids", "ids, deep"):
                start, stop, top = ranges(v, r.first_item)[form]
                rank_slice(r.query, r.catalog, start=start, stop=stop, top=top, **r.keywords)
            for k in (5, v // 4):
                top_k(r.query, r.catalog, k=k, **r.keywords)
        drawn = Positives.draw(source, b, 0, v)
        query, catalog = (source.normal(n, d).to(ARITHMETICS[arithmetic].query) for n in (b, v))
        options: dict[str, Any] = {"target": drawn.target, "positives": drawn.positives}
        mask = torch.rand(b, v, generator=source.generator, device=device.device) < 0.3
        slices = (None, RankSlice.from_mask(mask), rank_slice(query, catalog, start=3, stop=20, backend="triton"))
        for neg in slices:
            call(slice_cross_entropy, query, catalog, None, neg=neg, backend="triton", **options)
        for negatives in (source.ids(0, v, 70), source.ids(0, v, b, 70)):
            for engine in ("native", "triton"):
                if engine == "native" and why_not_native(query, "sampled_softmax"):
                    continue
                run = partial(call, sampled_softmax, query, catalog, None, neg=negatives, backend=engine)
                run(**options)
                in_order(engine, query, partial(run, **options))
    device.synchronize()


if __name__ == "__main__":
    run_small(Cuda(), int(sys.argv[1]))
