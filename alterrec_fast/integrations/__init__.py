"""The losses and top-k inside other recommender libraries: a module for each, imported when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


def need(module: str, install: str) -> None:
    """Imports `module`, or raises ImportError with the line that installs it and what it needs, at versions that go."""
    try:
        import_module(module)
    except (ImportError, AttributeError) as error:  # AttributeError: a library that numpy 2 took something from
        raise ImportError(
            f"this integration needs {module.partition('.')[0]}, which cannot be imported ({error}): {install}"
        ) from error


def default_ranks(num_items: int, start: int | None, stop: int | None, where: str) -> tuple[int, int]:
    """Ranks [start, stop) of hard negatives in a catalog of num_items: as given, or by its size.

    By the size V: [20, 2000) from 4,000 items on, [6, V // 2) from 14 on, else [V // 4, V // 2).

    Raises ValueError, with `where` the ranks are set, for a stop beyond the catalog, or below start.
    """
    by_size = (20, 2000) if num_items >= 4000 else (6 if num_items >= 14 else num_items // 4, num_items // 2)
    first, last = by_size[0] if start is None else start, by_size[1] if stop is None else stop
    if last > num_items:
        raise ValueError(f"{where}: stop must be at most {num_items}, the number of items, got {last}")
    if first > last:
        chosen = f"start={first}, stop={last}" + (" by the catalog's size" if stop is None else "")
        if start is None:
            chosen = f"start={first} by the catalog's size, stop={last}"
        raise ValueError(f"{where}: expected 0 <= start <= stop, got {chosen}")
    return first, last


@contextmanager
def comparable(model: nn.Module) -> Iterator[None]:
    """Within, what the model computes does not change from call to call, and a backward pass goes through all of it."""
    modes = [(module, module.training) for module in model.modules()]
    kind = next(model.parameters()).device.type
    model.eval()
    try:
        # cuDNN's recurrent layers have no backward pass in evaluation mode, and autocast rounds more than is compared.
        with torch.backends.cudnn.flags(enabled=False), torch.autocast(kind, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training


def same_scores(ours: Tensor, theirs: Tensor) -> bool:
    """Whether scores (..., V) of as many items differ by rounding alone, next to how far a row's scores are apart.

    Not next to the scores themselves: those of fresh embeddings are all near zero, and so are all wrong ones.
    """
    if ours.shape != theirs.shape:
        return False
    rounding = 8 * torch.finfo(theirs.dtype).eps * theirs.abs().amax(-1, keepdim=True)
    apart = theirs.amax(-1, keepdim=True) - theirs.amin(-1, keepdim=True)
    return bool(((ours - theirs).abs() <= 1e-4 * apart + rounding).all())


def trained_leaves(loss: Tensor) -> set[Tensor]:
    """The leaves of the loss's graph: what a backward pass would give gradients."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return {node.variable for node in seen if hasattr(node, "variable")}


def same_gradients(ours: Tensor, theirs: Tensor) -> bool:
    """Whether the gradients of two losses, for all that the first one trains, differ by rounding alone."""
    leaves = list(trained_leaves(ours))
    pairs = zip(
        torch.autograd.grad(ours, leaves, materialize_grads=True),
        torch.autograd.grad(theirs, leaves, materialize_grads=True),
        strict=True,
    )
    norms = torch.stack([torch.stack([(a - b).norm(), b.norm()]) for a, b in pairs])  # (parameters, 2)
    apart, norm = norms.unbind(1)
    # A gradient that is zero but for rounding, as of a key's bias, is measured by the others.
    return bool((apart <= 1e-3 * norm + 1e-5 * norm.norm()).all())
