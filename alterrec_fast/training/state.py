"""Where a run stands, as its checkpoint keeps it, and whether a checkpoint is one of this run's data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from alterrec_fast.data.sessions import DataError, Dataset
from alterrec_fast.errors import FileError
from alterrec_fast.files import naming

if TYPE_CHECKING:  # packages of the extra "train" are imported where they are used: a step needs none of them
    from pydantic import ConfigDict


@dataclass
class State:
    """Where a run stands; all of it goes into the checkpoint, the history without its times."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    data: str = ""  # fingerprint of the data set
    text: str = ""  # key of the text model
    settings: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0  # epochs completed
    step: int = 0  # steps completed of the epoch under way
    best_epoch: int = 0
    best: float = -1.0
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch under way
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, header: dict[str, Any], file: Path) -> State:
        """The state in a checkpoint's header; raises FileError where it cannot be one."""
        from pydantic import TypeAdapter

        with naming(file, "the checkpoint of a run"):
            state = TypeAdapter(cls).validate_python(header)
        numbers = [state.best, *state.sums.values()]
        places = 0 <= state.best_epoch <= state.epoch == len(state.history) - 1 and state.step >= 0
        if not places or not all(map(math.isfinite, numbers)) or bool(state.step) != bool(state.sums):
            raise FileError(f"{file}: epoch {state.epoch}, step {state.step} does not fit its history and sums")
        return state


def check_same_data(dataset: Dataset, data: Any, text: str, trained_text: Any) -> None:
    """Raises DataError unless the data set is the one of fingerprint `data`, and the text model the one of the run."""
    if dataset.fingerprint != data:
        raise DataError(f"{dataset.path} is not the data set that this run was trained on; it was made anew since then")
    if text != trained_text:
        raise DataError(f"the text model is {text or 'none'}, but the run was trained with {trained_text or 'none'}")
