"""Hard negatives for a sentence-transformers data set, before and after: `python examples/mining.py`.

Needs `pip install sentence-transformers datasets`. The embeddings are made up: an answer is its question, turned, with
noise; with a model of your own leave `embeddings` out. What was mined then trains a linear map of the questions, whose
NDCG@10 is of questions not trained on. Each function runs in a process of its own, so that its peak memory is its own.
"""

import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from alterrec_fast.benchmarks.own_process import Memory
from datasets import Dataset

import alterrec_fast as af

QUERIES, TEST, DOCUMENTS, D = 1_000, 500, 30_000, 64


class Model:
    """What stock needs of a SentenceTransformer, which looks embeddings up."""

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
    memory, begin = Memory(), time.perf_counter()
    mined = mine_hard_negatives(pairs, **options, output_format="n-tuple", verbose=False)
    seconds, peak = time.perf_counter() - begin, memory.peak_mib()
    ndcg = train(mined, anchors, documents)
    print(f"{way:8s} {seconds:6.1f} s {peak:8.0f} MiB   {len(mined):,} queries, NDCG@10 {ndcg:.4f}", flush=True)


def train(mined: Dataset, anchors: torch.Tensor, documents: torch.Tensor) -> float:
    """NDCG@10 of the test questions, after training against the mined negatives."""

    def numbers(column: str) -> torch.Tensor:
        return torch.tensor([int(text.split()[1]) for text in mined[column]])

    query, target = numbers("query"), numbers("answer")
    negatives = torch.stack([numbers(f"negative_{n}") for n in range(1, 21)], 1)
    weight = torch.eye(D, requires_grad=True)
    optimizer, loss = torch.optim.Adam([weight], lr=0.01), af.SampledSoftmaxLoss(temperature=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss(anchors[query] @ weight, documents, target, negatives).backward()
        optimizer.step()
    _, found = af.top_k(anchors[QUERIES:] @ weight.detach(), documents, k=10)
    hit = found == torch.arange(QUERIES, QUERIES + TEST).unsqueeze(1)
    return float((hit / torch.arange(2, 12).log2()).sum(1).mean())


if len(sys.argv) > 1:
    mine(sys.argv[1])
else:
    for way in ("before", "after"):
        subprocess.run([sys.executable, __file__, way], check=True)
