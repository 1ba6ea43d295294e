"""A SASRec in plain PyTorch before and after: `python examples/sasrec.py`.

The same model learns from the same sessions by `F.cross_entropy` over all scores, by `FullSoftmaxLoss`, and by hard
negatives of its own ranking. Each runs in a process of its own, so that the peak memory is that of one way.
"""

import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alterrec_fast as af

V, D, L = 10_000, 64, 12  # items, of which 0 is padding; width; session length
POPULAR, SESSIONS, BATCH, EPOCHS = 200, 1_000, 50, 3


def peak_mib() -> float:
    """The most memory that this process has held so far, as the system counts it (in KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class SASRec(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(V, D, padding_idx=0)
        self.place = nn.Embedding(L, D)
        self.block = nn.TransformerEncoderLayer(D, 2, 4 * D, dropout=0.1, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(D)
        for table in (self.item, self.place):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, items: Tensor) -> Tensor:
        x = self.item(items) + self.place.weight[: items.shape[1]]
        past = nn.Transformer.generate_square_subsequent_mask(items.shape[1])
        return self.norm(self.block(x, past, is_causal=True))  # (B, L, D)


def sessions(count: int) -> Tensor:
    """(count, L + 1): walks over the popular items, each of which is followed by one of three; padded on the right."""
    follows = torch.randint(1, POPULAR, (POPULAR, 3), generator=torch.Generator().manual_seed(0))
    walk = [torch.randint(1, POPULAR, (count,))]
    for _ in range(L):
        walk.append(follows[walk[-1], torch.randint(0, 3, (count,))])
    length = torch.randint(3, L + 2, (count, 1))
    return torch.stack(walk, 1).masked_fill(torch.arange(L + 1) >= length, 0)


def ndcg(model: SASRec, test: Tensor) -> float:
    model.eval()
    items, target = test[:, :-1], test[:, 1:]
    real = target != 0
    with torch.no_grad():
        ranking = af.top_k(model(items)[real], model.item.weight, k=10, first_item=1)
    hit = ranking.indices == target[real].unsqueeze(1)
    return float((hit / torch.arange(2, 12).log2()).sum(1).mean())


def train(way: str) -> None:
    torch.manual_seed(0)
    data, test = sessions(SESSIONS), sessions(300)
    before, begin = peak_mib(), time.perf_counter()
    model = SASRec()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, fused=True)
    full = af.FullSoftmaxLoss(first_item=1, ignore_index=0)
    sampler = af.RankSliceSampler(10, 1000, hard_fraction=0.5, first_item=1, ignore_index=0)
    sliced = af.SliceCrossEntropy(first_item=1, ignore_index=0)
    for _ in range(EPOCHS):
        for batch in data[torch.randperm(SESSIONS)].split(BATCH):
            items, target = batch[:, :-1], batch[:, 1:]
            query, catalog = model(items), model.item.weight
            if way == "F.cross_entropy":
                loss = F.cross_entropy((query @ catalog.T).flatten(0, 1), target.flatten(), ignore_index=0)
            elif way == "FullSoftmaxLoss":
                loss = full(query, catalog, target)
            else:
                loss = sliced(query, catalog, target, sampler(query, catalog, target))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    seconds, peak = time.perf_counter() - begin, peak_mib() - before
    print(f"{way:18s} {seconds:8.1f} s {peak:8.0f} MiB   NDCG@10 {ndcg(model, test):.3f}", flush=True)


if len(sys.argv) > 1:
    train(sys.argv[1])
else:
    for way in ("F.cross_entropy", "FullSoftmaxLoss", "hard negatives"):
        subprocess.run([sys.executable, __file__, way], check=True)
