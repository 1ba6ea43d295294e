"""Hard negatives for a sentence-transformers data set, before and after: `python examples/mining.py`.

Needs `pip install sentence-transformers datasets`. The embeddings are generated: an answer is its question, rotated,
with noise. With your own model leave `embeddings` out. The mined negatives then train a linear map of the questions;
NDCG@10 is over questions that were not trained on. Each way runs in a process of its own, so that the peak memory is
that of one way.
"""

import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from datasets import Dataset

import alterrec_fast as af

QUERIES, TEST, DOCUMENTS, D = 1_000, 500, 30_000, 64


def peak_mib() -> float:
    """The most memory that this process has held so far, as the system counts it (in KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Model:
    """Looks embeddings up: what the stock function needs of a SentenceTransformer."""

    device = torch.device("cpu")
    similarity_fn_name = "cosine"

    def __init__(self, anchors, documents):
        self.anchors, self.documents = anchors, documents

    def encode_query(self, texts, **options):
        return self.anchors[[int(text.split()[1]) for text in texts]].numpy()

    def encode_document(self, texts, **options):
        return self.documents[[int(text.split()[1]) for text in texts]].numpy()

    def similarity(self, a, b):
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a, b):
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)


def mine(way: str) -> None:
    torch.manual_seed(0)
    documents = F.normalize(torch.randn(DOCUMENTS, D), dim=1)
    skew = torch.randn(D, D).triu(1)
    turn = torch.matrix_exp(0.12 * (skew - skew.T))
    anchors = F.normalize(documents[: QUERIES + TEST] @ turn + 0.15 * torch.randn(QUERIES + TEST, D), dim=1)
    corpus = [f"document {i}" for i in range(DOCUMENTS)]
    pairs = Dataset.from_dict({"query": [f"query {i}" for i in range(QUERIES)], "answer": corpus[:QUERIES]})
    options = {"corpus": corpus, "range_min": 10, "range_max": 5_000, "num_negatives": 20, "relative_margin": 0.05}

    if way == "before":
        from sentence_transformers.util import mine_hard_negatives

        options["model"] = Model(anchors, documents)
    else:
        from alterrec_fast.integrations.sentence_transformers import mine_hard_negatives

        options["embeddings"] = (anchors[:QUERIES], documents)
    before, begin = peak_mib(), time.perf_counter()
    mined = mine_hard_negatives(pairs, **options, output_format="n-tuple", verbose=False)
    seconds, peak = time.perf_counter() - begin, peak_mib() - before
    ndcg = train(mined, anchors, documents)
    print(f"{way:8s} {seconds:6.1f} s {peak:8.0f} MiB   {len(mined):,} queries, NDCG@10 {ndcg:.4f}", flush=True)


def train(mined: Dataset, anchors: torch.Tensor, documents: torch.Tensor) -> float:
    """NDCG@10 of the test questions, after training against the mined negatives."""

    def numbers(column: str) -> torch.Tensor:
        return torch.tensor([int(text.split()[1]) for text in mined[column]])

    query, target = numbers("query"), numbers("answer")
    neg = torch.stack([numbers(f"negative_{n}") for n in range(1, 21)], 1)
    weight = torch.eye(D, requires_grad=True)
    optimizer, loss = torch.optim.Adam([weight], lr=0.01), af.SampledSoftmaxLoss(temperature=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss(anchors[query] @ weight, documents, target, neg).backward()
        optimizer.step()
    ranking = af.top_k(anchors[QUERIES:] @ weight.detach(), documents, k=10)
    hit = ranking.indices == torch.arange(QUERIES, QUERIES + TEST).unsqueeze(1)
    return float((hit / torch.arange(2, 12).log2()).sum(1).mean())


if len(sys.argv) > 1:
    mine(sys.argv[1])
else:
    for way in ("before", "after"):
        subprocess.run([sys.executable, __file__, way], check=True)
