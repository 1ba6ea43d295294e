"""What the tests ask of a device: memory, streams, graphs. CUDA, or Triton's interpreter in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

T = TypeVar("T")

# What memory holds before a call: no number as float32 or bfloat16; -1, or an id beyond any catalog, as an integer.
PATTERNS = ((0xFF, 0xFF), (0xC0, 0x7F))
GUARD = 64  # elements on either side of a guarded tensor
SENTINEL = 85  # in every byte of them
MAX_POISONED = 1 << 30  # bytes of large blocks; a call that needs more gets the rest unpoisoned


class FaultError(AssertionError):
    """A check found something wrong; the message says what."""


class Cuda:
    """The current CUDA device."""

    kind = "cuda"

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def synchronize(self) -> None:
        torch.cuda.synchronize()

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
        """Within, another stream multiplies matrices, so that programs of both share the SMs."""
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

    def synchronize(self) -> None:
        pass

    def poison(self, pattern: tuple[int, int]) -> None:
        """Nothing: what torch.empty returns is poisoned by `guarded`."""

    def busy(self) -> AbstractContextManager[None]:
        pytest.skip("no second stream on this device")

    def capture(self, call: Callable[[], T]) -> Callable[[], T]:
        pytest.skip("no CUDA graph on this device")


Device = Cuda | Interpreted


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
                as_bytes = inside.view(torch.uint8)
                as_bytes[::2], as_bytes[1::2] = pattern
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
