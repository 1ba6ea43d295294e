"""Our losses and top-k inside other people's recommenders: a module for each library, imported when asked for."""

from __future__ import annotations

from importlib import import_module


def need(module: str, install: str) -> None:
    """Imports `module`, or raises ImportError with the line that installs it."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this integration needs {module.partition('.')[0]}, which is not there: {install}"
        ) from error
