"""Contestants timed in turn on fresh inputs, so that a neighbour disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar


@dataclass(frozen=True)
class Times:
    """Seconds of each round; CPU time, which a neighbour disturbs less, is that of all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def ms(self) -> float:
        return 1e3 * statistics.median(self.wall)

    @property
    def cpu_ms(self) -> float:
        return 1e3 * statistics.median(self.cpu)

    def over(self, other: Times) -> tuple[float, float]:
        """The median of each round's ratio of times to `other`, wall-clock and CPU."""
        pairs = ((self.wall, other.wall), (self.cpu, other.cpu))
        wall, cpu = (statistics.median(a / b for a, b in zip(*pair, strict=True)) for pair in pairs)
        return wall, cpu


T = TypeVar("T")


def race(
    contestants: Mapping[str, Callable[[T], object]], fresh: Callable[[], T], rounds: int, warmup: int = 1
) -> dict[str, Times]:
    """Times each contestant once a round, one after the other, on the inputs that `fresh` gives for that round."""
    times = {name: Times() for name in contestants}
    for i in range(rounds + warmup):
        inputs = fresh()
        for name, contestant in contestants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            contestant(inputs)
            if i >= warmup:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
    return times
