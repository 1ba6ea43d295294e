"""What the extra "train" brings, and what is said where it is missing: the ops need torch and numpy alone."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from alterrec_fast.errors import MissingExtraError

TRAIN = (
    "filelock", "jinja2", "matplotlib", "polars", "pydantic", "safetensors", "sentence_transformers", "tomli_w", "tqdm",
)  # fmt: skip
INSTALL = "pip install 'alterrec-fast[train]'"


@contextlib.contextmanager
def needs_train(what: str) -> Iterator[None]:
    """Turns the missing of a package of the extra into a MissingExtraError that names the line which installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in TRAIN:
            raise
        raise MissingExtraError(f"{what} needs {package}, which is not installed: {INSTALL}") from error


def missing() -> list[str]:
    """The packages of the extra that are not installed."""
    return [package for package in TRAIN if importlib.util.find_spec(package) is None]
