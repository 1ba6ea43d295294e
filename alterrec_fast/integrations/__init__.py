"""Our losses and top-k inside other people's recommenders: a module for each library, imported when asked for."""

from __future__ import annotations

from importlib import import_module


def need(module: str, install: str) -> None:
    """Imports `module`, or raises ImportError with the line that installs it and what it needs, at versions that go."""
    try:
        import_module(module)
    except (ImportError, AttributeError) as error:  # AttributeError: a library that numpy 2 took something from
        raise ImportError(
            f"this integration needs {module.partition('.')[0]}, which cannot be imported ({error}): {install}"
        ) from error
