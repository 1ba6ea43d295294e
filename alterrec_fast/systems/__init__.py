"""The systems that can be trained, by name; docs/architecture.md says what an entry is.

Below `training/`: a Config takes its defaults from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from alterrec_fast.model.networks import Recommender
from alterrec_fast.systems import alterrec, core, fdsa, sasrec
from alterrec_fast.systems.system import DEFAULTS as DEFAULTS
from alterrec_fast.systems.system import Epoch as Epoch
from alterrec_fast.systems.system import System

if TYPE_CHECKING:
    from alterrec_fast.training.config import Config

SYSTEMS: dict[str, System] = alterrec.ENTRIES | sasrec.ENTRIES | core.ENTRIES | fdsa.ENTRIES


def epochs(config: Config) -> Iterator[Epoch]:
    """The plan of a run."""
    return SYSTEMS[config.variant].plan(config)


def build(config: Config, num_items: int, features: Tensor | None) -> Recommender:
    """The recommender of a run, initialised from the torch random state. features: (V, F), None where text is not read.

    Raises ValueError for settings that do not go together.
    """
    return SYSTEMS[config.variant].build(config, num_items, features)
