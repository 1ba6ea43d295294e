"""Hard negatives for your own recommender, before and after: `python examples/hard_negatives.py`.

A model of item vectors learns which item follows which, against ranks [20, 2000) of its own ranking of the catalog,
half of them replaced by uniform negatives: first in plain torch, by `topk` and `gather` of the (B, V) scores, then by
`rank_slice` and `slice_cross_entropy`, which make no such matrix. Each runs in a process of its own, so that the peak
memory is that of one way.
"""

import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

import alterrec_fast as af

V, D, B, STEPS = 20_000, 64, 256, 150
START, STOP = 20, 2000


def before(query: Tensor, catalog: Tensor, target: Tensor) -> Tensor:
    scores = query @ catalog.T
    neg = scores.topk(STOP).indices[:, START:]
    neg = neg.where(torch.rand(neg.shape) < 0.5, torch.randint(0, V, neg.shape))
    negatives = scores.gather(1, neg).masked_fill(neg == target[:, None], -torch.inf)
    logits = torch.cat([scores.gather(1, target[:, None]), negatives], 1)
    return F.cross_entropy(logits, torch.zeros_like(target))


def after(query: Tensor, catalog: Tensor, target: Tensor) -> Tensor:
    neg = af.rank_slice(query, catalog, start=START, stop=STOP).mix(0.5)
    return af.slice_cross_entropy(query, catalog, target, neg)


def peak_mib() -> float:
    """The most memory that this process has held so far, as the system counts it (in KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train(way: str) -> None:
    torch.manual_seed(0)
    follows = torch.randperm(V)  # what is to be learnt
    memory, begin = peak_mib(), time.perf_counter()
    source, catalog = torch.nn.Embedding(V, D), torch.nn.Embedding(V, D)
    optimizer = torch.optim.Adam([*source.parameters(), *catalog.parameters()], lr=0.02, fused=True)
    for _ in range(STEPS):
        item = torch.randint(0, 2000, (B,))
        loss = {"before": before, "after": after}[way](source(item), catalog.weight, follows[item])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    seconds, mib = time.perf_counter() - begin, peak_mib() - memory

    ranking = af.top_k(source.weight[:2000].detach(), catalog.weight.detach(), k=10)
    hit = ranking.indices == follows[:2000, None]
    ndcg = float((hit / torch.arange(2, 12).log2()).sum(1).mean())
    print(f"{way:7s} {seconds:6.1f} s  {mib:6.0f} MiB  NDCG@10 over the items seen {ndcg:.3f}", flush=True)


if len(sys.argv) > 1:
    train(sys.argv[1])
else:
    for way in ("before", "after"):
        subprocess.run([sys.executable, __file__, way], check=True)
