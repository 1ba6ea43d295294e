"""What a table of benchmarks consists of: ops, their cases, and the implementations that are compared."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .worker import Case, Prepare, Tensors

OURS, BASELINE = "alterrec-fast", "torch.mm"  # BASELINE is what every ratio refers to
# Errors up to which a result counts as right. bfloat16 has 8 significant bits: two scores of about the largest one's
# size, each rounded by half a unit, can change places where they are 2 ** -8 of it apart.
RANKS, LOSS = (1e-5, 4e-3), (1e-4, 2e-2)  # (float32, bfloat16)

Error = Callable[[Tensors, Tensors], float]  # (result, truth) -> error; ValueError where it is no result at all
CPU, GPU, BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")
ANY_DTYPE = ("fp32", "bf16")
CURVES = ("", "V")  # values of Case.figure


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op, at its best setting by its public interface."""

    name: str
    prepare: Prepare
    package: str = "torch"  # whose version the record holds
    error: Error | None = None  # None for the op's
    tolerance: tuple[float, float] | None = None  # on (float32, bfloat16) inputs; None for the op's
    ours: bool = False
    dtypes: tuple[str, ...] = ("fp32",)
    figures: tuple[str, ...] = CURVES
    devices: tuple[str, ...] = CPU
    modules: tuple[str, ...] = ()  # imported before memory is measured
    warm: Callable[[], None] | None = None  # called before memory is measured

    def takes(self, case: Case) -> bool:
        return case.dtype in self.dtypes and case.figure in self.figures and case.device in self.devices

    def load(self) -> None:
        """Does what is not to be measured, once in a process."""
        for module in self.modules:
            importlib.import_module(module)
        if self.warm is not None:
            self.warm()


@dataclass(frozen=True)
class Op:
    """An op, what it is measured at, and what is compared."""

    name: str
    title: str
    products: int  # products of the baseline's shape that no implementation can do without
    make: Callable[[Case], Tensors]  # the inputs
    truth: Callable[[Case, Tensors], Tensors]  # in float64
    error: Error
    tolerance: tuple[float, float]
    implementations: tuple[Implementation, ...]  # the baseline first
    quick: tuple[Case, ...] = ()
    full: tuple[Case, ...] = ()  # beside the quick ones
    gpu: tuple[Case, ...] = ()
    threads: Case | None = None  # measured on 1, 2, 4 ... threads

    def allowed(self, implementation: Implementation, case: Case) -> float:
        """The largest error that counts as right."""
        return (implementation.tolerance or self.tolerance)[case.dtype == "bf16"]

    def error_of(self, implementation: Implementation, result: Tensors, truth: Tensors) -> float:
        return (implementation.error or self.error)(result, truth)

    def product(self, case: Case) -> str:
        """What the baseline multiplies; cases of which this is the same share the baseline's times."""
        sizes = f"{case.sessions} x {case.width} x {case.negatives or case.items}"
        return f"{sizes}, {case.dtype}, {case.threads} threads"

    def operations(self, case: Case) -> float:
        """Additions and multiplications of a call of the baseline."""
        return 2.0 * case.sessions * (case.negatives or case.items) * case.width


def ours(prepare: Callable[..., Any], tolerance: tuple[float, float], **more: Any) -> tuple[Implementation, ...]:
    """Our op on the inputs as they are and, on float32 inputs, with precision="bf16"."""
    rounded, figures = (tolerance[1], tolerance[1]), ("", "V", "threads")
    return (
        Implementation(OURS, prepare, OURS, ours=True, **{"dtypes": ANY_DTYPE, "figures": figures, **more}),
        Implementation(
            f"{OURS}, bf16",
            partial(prepare, precision="bf16"),
            OURS,
            None,
            rounded,
            True,
            **{**more, "dtypes": ("fp32",)},
        ),
    )
