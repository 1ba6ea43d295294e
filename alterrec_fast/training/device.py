"""The device of a run, the precision of its products, and the memory that it took."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from alterrec_fast.training.config import Config, ConfigError

_log = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """The device that a config names; raises ConfigError where this machine or this torch does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        raise ConfigError(f"device {name!r} is not there ({str(error).splitlines()[0]})") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return device


def on_this_machine(config: Config) -> Config:
    """The config of a trained run as it can be opened here: where its GPU is missing, on the device that "auto" gives;
    the log says so.
    """
    try:
        pick_device(config.device)
    except ConfigError:
        if not config.device.startswith("cuda"):
            raise
        config, trained_on = config.replace(device="auto", backend="auto"), config.device
        _log.warning("the run's device %r is not on this machine; it is opened on %s", trained_on, pick_device("auto"))
    return config


class Precision:
    """How matrix products of a run are computed: those of slices and losses, and those of encoders."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device

    @property
    def ops(self) -> str | None:
        """Of slices and losses: as set, else on CUDA bf16."""
        return self.config.precision or ("bf16" if self.device.type == "cuda" else None)

    @property
    def encoders(self) -> str | None:
        """As set, else on CUDA TF32 unless `precision` asks for float32."""
        if self.config.encoder_precision or self.device.type != "cuda":
            return self.config.encoder_precision
        return "fp32" if self.config.precision == "fp32" else "tf32"

    def op_options(self) -> dict[str, Any]:
        """Keywords of an op, which is called within `of_ops`: TF32 is float32 under torch's setting for it."""
        return {"backend": self.config.backend, "precision": "fp32" if self.ops == "tf32" else self.ops}

    def of_ops(self) -> AbstractContextManager[None]:
        return _products(self.ops)

    def of_encoders(self) -> AbstractContextManager[object]:
        """Parameters stay float32 within."""
        if self.encoders == "bf16" and self.device.type == "cuda":
            # A cache of rounded weights would outlive the graph that was captured with it.
            return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
        return _products(self.encoders)


@contextlib.contextmanager
def _products(precision: str | None) -> Iterator[None]:
    """Within, float32 matrix products on CUDA are of TF32 for "tf32", are not for "fp32", and else as torch is set."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    if precision in ("fp32", "tf32"):
        setting.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


def peak_memory() -> int:
    """Bytes: the process's peak, and on a GPU the most that was allocated there."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return host + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
