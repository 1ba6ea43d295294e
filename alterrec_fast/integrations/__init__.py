"""Our losses and top-k inside other people's recommenders: a module for each library, imported when asked for."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor


def need(module: str, install: str) -> None:
    """Imports `module`, or raises ImportError with the line that installs it and what it needs, at versions that go."""
    try:
        import_module(module)
    except (ImportError, AttributeError) as error:  # AttributeError: a library that numpy 2 took something from
        raise ImportError(
            f"this integration needs {module.partition('.')[0]}, which cannot be imported ({error}): {install}"
        ) from error


def same_scores(ours: Tensor, theirs: Tensor) -> bool:
    """Whether scores (..., V) of as many items differ by rounding alone, next to how far a row's scores are apart.

    Not next to the scores themselves: those of fresh embeddings are all near zero, and so are all wrong ones.
    """
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours.float(), theirs.float()
    apart = theirs.amax(-1, keepdim=True) - theirs.amin(-1, keepdim=True)
    rounding = 1e-6 * theirs.abs().amax(-1, keepdim=True)
    return bool(((ours - theirs).abs() <= 1e-4 * apart + rounding).all())
