"""Hard negatives for your own recommender, before and after: `python examples/hard_negatives.py`.

A model of item vectors learns which item follows which: first by `F.cross_entropy` over all scores, then against ranks
[10, 500) of its own ranking of the catalog, half of them replaced by uniform negatives. The second way makes no (B, V)
tensor. Each runs in a process of its own, so that the peak memory is that of one way.
"""

import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import alterrec_fast as af

V, D, B, STEPS = 20_000, 64, 256, 150


def peak_mib() -> float:
    """The most memory that this process has held so far, as the system counts it (in KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train(way: str) -> None:
    torch.manual_seed(0)
    follows = torch.randperm(V)  # what is to be learnt
    before, begin = peak_mib(), time.perf_counter()
    source, catalog = torch.nn.Embedding(V, D), torch.nn.Embedding(V, D)
    optimizer = torch.optim.Adam([*source.parameters(), *catalog.parameters()], lr=0.02, fused=True)
    for _ in range(STEPS):
        item = torch.randint(0, 2000, (B,))
        query, target = source(item), follows[item]
        if way == "before":
            loss = F.cross_entropy(query @ catalog.weight.T, target)
        else:
            neg = af.rank_slice(query, catalog.weight, start=10, stop=500).mix(0.5)
            loss = af.slice_cross_entropy(query, catalog.weight, target, neg)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    seconds, mib = time.perf_counter() - begin, peak_mib() - before

    ranking = af.top_k(source.weight[:2000].detach(), catalog.weight.detach(), k=10)
    hit = ranking.indices == follows[:2000, None]
    ndcg = float((hit / torch.arange(2, 12).log2()).sum(1).mean())
    print(f"{way:7s} {seconds:6.1f} s  {mib:6.0f} MiB  NDCG@10 over the items seen {ndcg:.3f}", flush=True)


if len(sys.argv) > 1:
    train(sys.argv[1])
else:
    for way in ("before", "after"):
        subprocess.run([sys.executable, __file__, way], check=True)
