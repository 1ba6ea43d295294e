"""What the acceptance asks of a device: time, memory, streams, graphs. CUDA, or Triton's interpreter in its place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# What memory holds before a call: no number as float32 or bfloat16; -1, or an id beyond any catalog, as an integer.
PATTERNS = ((0xFF, 0xFF), (0xC0, 0x7F))
GUARD = 64  # elements on either side of a guarded tensor
SENTINEL = 85  # in every byte of them
PROFILED = 3  # calls whose kernels are timed
MAX_POISONED = 1 << 30  # bytes of large blocks; a call that needs more gets the rest unpoisoned


class NotHereError(RuntimeError):
    """This device, or this installation, has not got what is asked for; the message says why."""


class FaultError(AssertionError):
    """A check found something wrong; the message says what."""


class Cuda:
    """The current CUDA device."""

    kind = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise NotHereError("torch sees no CUDA device")
        self.device = torch.device("cuda", torch.cuda.current_device())
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._flushed = torch.empty(4 * l2, dtype=torch.uint8, device=self.device)

    def facts(self) -> dict[str, str]:
        """What a report says of the device."""
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": torch.cuda.get_device_name(self.device),
            "capability": f"{properties.major}.{properties.minor}, {properties.multi_processor_count} processors",
            "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """Device time of one call, by events, with the L2 cache full of something else."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def by_kernel(self, call: Callable[[], object]) -> dict[str, tuple[float, float]]:
        """For each kernel that one call launches, by its name: how often, and seconds in all."""
        from torch.profiler import ProfilerActivity, profile

        call()
        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(PROFILED):
                self._flushed.zero_()
                call()
            self.synchronize()
        found: dict[str, tuple[float, float]] = {}
        for event in profiler.key_averages():
            seconds = event.self_device_time_total / PROFILED * 1e-6
            if seconds > 0.0 and "FillFunctor<unsigned char>" not in event.key:  # the flush
                found[event.key] = (event.count / PROFILED, seconds)
        return found

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """The most memory that tensors take during one call, beyond what they take before."""
        self.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - held

    def release(self) -> None:
        """Gives cached memory back."""
        torch.cuda.empty_cache()

    def poison(self, pattern: tuple[int, int]) -> None:
        """Fills the memory that the caching allocator will hand out next, small blocks and a large one to be split."""
        self.synchronize()
        torch.cuda.empty_cache()
        value = int.from_bytes(bytes(pattern) * 4, "little", signed=True)
        sizes = [1 << 20] * 64 + [MAX_POISONED]  # blocks of up to 1 MiB come from a pool of their own
        blocks = [torch.full((size // 8,), value, dtype=torch.int64, device=self.device) for size in sizes]
        del blocks

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Within, another stream multiplies matrices, so that programs of both share the processors."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            x = torch.randn(4096, 4096, device=self.device)
            for _ in range(64):
                x = x @ x * 1e-3
        yield
        stream.synchronize()

    def capture(self, call: Callable[[], T]) -> Callable[[], T]:
        """Captures a call in a CUDA graph; what is returned replays it and gives the tensors that it wrote."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # kernels are compiled and loaded before they can be captured
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()

        def replay() -> T:
            graph.replay()
            return found

        return replay


class Interpreted:
    """Triton's interpreter on CPU tensors: the logic without the device."""

    kind = "cpu"

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def facts(self) -> dict[str, str]:
        return {"device": "Triton's interpreter on CPU tensors"}

    def synchronize(self) -> None:
        pass

    def seconds(self, call: Callable[[], object]) -> float:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun

    def by_kernel(self, call: Callable[[], object]) -> dict[str, tuple[float, float]]:
        return {"interpreted": (1.0, self.seconds(call))}

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        call()
        return None

    def release(self) -> None:
        pass

    def poison(self, pattern: tuple[int, int]) -> None:
        """Nothing: what torch.empty returns is poisoned by `guarded`."""

    def busy(self) -> AbstractContextManager[None]:
        raise NotHereError("no second stream on this device")

    def capture(self, call: Callable[[], T]) -> Callable[[], T]:
        raise NotHereError("no CUDA graph on this device")


Device = Cuda | Interpreted


def open_device(kind: str) -> Device:
    """kind: "cuda" or "cpu"."""
    return Cuda() if kind == "cuda" else Interpreted()


@contextmanager
def guarded(pattern: tuple[int, int]) -> Iterator[None]:
    """Within, tensors of torch.empty, zeros and full lie between sentinels, and those of torch.empty hold `pattern`.

    Raises FaultError where a sentinel was overwritten. What C++ allocates has no sentinels.
    """
    guards: list[tuple[Tensor, str]] = []
    originals = {name: getattr(torch, name) for name in ("empty", "zeros", "full")}

    def padded(name: str) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **options: Any) -> Tensor:
            plain = originals[name](*args, **options)
            size = plain.numel()
            memory = torch.cat([plain.new_ones(GUARD), plain.reshape(-1), plain.new_ones(GUARD)])
            for place, guard in (("before", memory[:GUARD]), ("after", memory[GUARD + size :])):
                guard.view(torch.uint8).fill_(SENTINEL)
                guards.append((guard, f"{place} a tensor of {tuple(plain.shape)} {plain.dtype}"))
            inside = memory[GUARD : GUARD + size]
            if name == "empty":
                there = inside.view(torch.uint8)
                there[::2], there[1::2] = pattern
            return inside.view(plain.shape)

        return wrapped

    for name in originals:
        setattr(torch, name, padded(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)
    for guard, where in guards:
        if not bool((guard.view(torch.uint8) == SENTINEL).all()):
            raise FaultError(f"a store out of bounds, {where}")
