"""Contestants that need an interpreter of their own: `PYTHON peers.py FILE_DESCRIPTOR`, run by contest.py.

Knows the standard library, torch and the library in question only; worker.py and verdicts.py lie beside it.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from verdicts import compare_loss
from worker import BATCHES, Call, Shape, Task, Tensors, limit_memory, serve

del sys.path[0]  # this folder, whose other modules have names that libraries may look for


def replay_sampled(shape: Shape, inputs: Tensors) -> Call:
    """RePlay's CESampled with its own head; sessions are sequences of one place."""
    from replay.nn.head import EmbeddingTyingHead
    from replay.nn.loss import CESampled

    catalog = inputs["catalog"].detach().requires_grad_()
    negatives = inputs["negatives"] if shape.shared else inputs["negatives"][:, None]
    inside = torch.ones(shape.sessions, 1, 1, dtype=torch.bool)
    head, loss = EmbeddingTyingHead(), CESampled()

    def logits(hidden: Tensor, ids: Tensor) -> Tensor:
        scores: Tensor = head(hidden, catalog[ids])
        return scores

    loss.logits_callback = logits

    def run(i: int) -> Tensors:
        query = inputs["query"][i % BATCHES].detach().requires_grad_()
        target = inputs["target"][i % BATCHES][:, None, None]
        value = loss(query[:, None], {}, target, negatives, inside[..., 0], inside)
        grad_query, grad_catalog = torch.autograd.grad(value, (query, catalog))
        return {"loss": value.detach(), "grad_query": grad_query, "grad_catalog": grad_catalog}

    return Call(run)


TASKS = {
    "RePlay CESampled": Task(replay_sampled, compare_loss, ("replay.nn.loss",)),
}


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    name, shape, paths, memory = connection.recv()
    limit_memory(memory)
    serve(connection, TASKS[name], Shape(**shape), (Path(paths[0]), Path(paths[1])))


if __name__ == "__main__":
    main()
