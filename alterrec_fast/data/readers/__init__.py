"""Readers of raw files by the name of their source; each turns files into a Raw and knows nothing of what follows."""

from collections.abc import Callable
from pathlib import Path

from . import amazon_m2, generic, online_retail, recbole
from .raw import Options, Raw

READERS: dict[str, Callable[[Path, Options], Raw]] = {
    "generic": generic.read,
    "amazon-m2": amazon_m2.read,
    "online-retail": online_retail.read,
    "recbole": recbole.read,
}

__all__ = ["READERS", "Options", "Raw"]
