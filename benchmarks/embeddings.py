"""Queries and catalogs that the benchmarks run on: noise, clusters, popularity, and vectors of a finished run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alterrec_fast.data.batches import pack, plan
from alterrec_fast.model.packing import Packing
from alterrec_fast.run import load

KINDS = ("random", "clustered", "popular")


def embeddings(kind: str, sessions: int, items: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Queries (B, d) and catalog (V, d) of one of KINDS; clusters and popularity follow the order of the catalog."""
    query = torch.randn(sessions, width, generator=generator)
    catalog = torch.randn(items, width, generator=generator)
    if kind == "clustered":
        centers = torch.randn(100, width, generator=generator)
        catalog = 0.5 * catalog + centers[torch.arange(items) * 100 // items]
        query = 0.5 * query + centers[torch.randint(100, (sessions,), generator=generator)]
    if kind == "popular":
        common = torch.randn(1, width, generator=generator)
        popularity = -torch.arange(1, items + 1).log()[:, None]  # Zipf's law: a logarithm of the rank
        catalog = catalog * 0.3 + 0.1 * (popularity - popularity.mean()) * common
        query = query + 0.5 * common
    return query, catalog


@dataclass(frozen=True)
class Vectors:
    """What one step meets; B sessions, V items, d width."""

    teacher_query: Tensor  # (B, d)
    teacher_catalog: Tensor  # (V, d)
    query: Tensor  # (B, d), the student's
    catalog: Tensor  # (V, d), the student's
    target: Tensor  # (B,) int64


def made_up(kind: str, sessions: int, items: int, width: int, generator: torch.Generator) -> Vectors:
    """A teacher and a student that know nothing of each other; the student's logits are of order one."""
    teacher_query, teacher_catalog = embeddings(kind, sessions, items, width, generator)
    query, catalog = embeddings(kind, sessions, items, width, generator)
    target = torch.randint(items, (sessions,), generator=generator)
    return Vectors(teacher_query, teacher_catalog, query, catalog / width**0.5, target)


class Trained:
    """The networks of a finished run of two networks, over random prefixes of its training sessions."""

    def __init__(self, run: Path):
        self.model = load(run)
        networks = self.model.recommender.networks
        if set(networks) != {"id", "text"}:
            raise SystemExit(f"{run}: expected a run with an ID and a text network, got {', '.join(networks)}")
        with torch.no_grad():
            self.catalogs = self.model.recommender.catalogs()

    @property
    def shape(self) -> tuple[int, int]:
        """(V, d) of the run's catalogs."""
        items, width = self.catalogs["id"].shape
        return items, width

    def draw(self, sessions: int, items: int, width: int, generator: torch.Generator) -> Vectors:
        """The text network as teacher, the ID network as student, for `sessions` random prefixes.

        A larger catalog is one of items drawn from the run's, each moved by a twentieth of its length, and a larger
        width turns the vectors in a larger space, so that scores are distributed as the run's are.
        """
        v, d = self.shape
        if items < v or width < d:
            raise ValueError(f"expected at least {v} items and width {d}, got {items} and {width}")
        seed = int(torch.randint(2**31, (1,), generator=generator))
        train = self.model.dataset.train
        which = next(plan(train, self.model.config.max_length, 2 * sessions, np.random.default_rng(seed)))
        batch = pack(train, which, self.model.config.max_length)
        chosen = torch.randperm(len(batch.items), generator=generator)[:sessions]
        with torch.no_grad():
            prefixes = torch.from_numpy(batch.items), Packing.of(batch.lengths)
            queries = self.model.recommender.queries(self.catalogs, *prefixes)
        drawn = torch.cat([torch.arange(v), torch.randint(v, (items - v,), generator=generator)])
        turn = torch.linalg.qr(torch.randn(width, d, generator=generator)).Q.T  # (d, width), orthonormal rows

        def catalog(name: str) -> Tensor:
            rows = self.catalogs[name][drawn]
            rows[v:] += 0.05 * rows.norm(dim=1).mean() / d**0.5 * torch.randn(items - v, d, generator=generator)
            return rows if width == d else rows @ turn

        def query(name: str) -> Tensor:
            return queries[name][chosen] if width == d else queries[name][chosen] @ turn

        target = torch.from_numpy(batch.targets)[chosen]
        return Vectors(query("text"), catalog("text"), query("id"), catalog("id"), target)
