"""Hard negatives for a sentence-transformers data set, before and after: `python examples/mining.py`.

Needs `pip install sentence-transformers datasets`. The embeddings are made up; with a model of your own leave
`embeddings` out. Each function runs in a process of its own, so that its peak memory is its own.
"""

import resource
import subprocess
import sys
import time

import torch
from datasets import Dataset

QUERIES, DOCUMENTS, D = 1_000, 30_000, 64


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
    generator = torch.Generator().manual_seed(0)
    documents = torch.nn.functional.normalize(torch.randn(DOCUMENTS, D, generator=generator), dim=1)
    noise = torch.randn(QUERIES, D, generator=generator)
    anchors = torch.nn.functional.normalize(documents[:QUERIES] + 0.1 * noise, dim=1)
    corpus = [f"document {i}" for i in range(DOCUMENTS)]
    pairs = Dataset.from_dict({"query": [f"query {i}" for i in range(QUERIES)], "answer": corpus[:QUERIES]})
    options = {"corpus": corpus, "range_min": 10, "range_max": 5_000, "num_negatives": 20, "relative_margin": 0.05}

    if way == "before":
        from sentence_transformers.util import mine_hard_negatives

        options["model"] = Model(anchors, documents)
    else:
        from alterrec_fast.integrations.sentence_transformers import mine_hard_negatives

        options["embeddings"] = (anchors, documents)
    held, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    mined = mine_hard_negatives(pairs, **options, output_scores=True, verbose=False)
    seconds = time.perf_counter() - begin
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024
    mean = sum(scores[1] for scores in mined["scores"]) / len(mined)
    print(f"{way:8s} {seconds:6.1f} s {peak:8.0f} MiB   {len(mined):,} negatives, mean score {mean:.5f}", flush=True)


if len(sys.argv) > 1:
    mine(sys.argv[1])
else:
    for way in ("before", "after"):
        subprocess.run([sys.executable, __file__, way], check=True)
