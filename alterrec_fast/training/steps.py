"""Training steps on static tensors: batches of one shape on the device, and a step captured as one CUDA graph.

A graph replays launches at the addresses that it was captured with, so each batch is copied to where the last one was.
Nothing here reads from the device: the host goes on to the next batch while the device computes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alterrec_fast.data.batches import Batch, pad
from alterrec_fast.model.packing import MaskedPacking, Packing

AHEAD = 4  # batches that the host may be ahead of the device
MOST_PADDED = 8192  # tokens of a static batch: mask and attention take its square, 4 GB or so with two heads and layers
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """A batch on the device."""

    items: Tensor  # (T,) int64
    target: Tensor  # (T,) int64, IGNORED for padding
    packing: Packing | MaskedPacking

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> Inputs:
        """The tokens of the batch, no more."""
        items, target = (torch.from_numpy(x).to(device) for x in (batch.items, batch.targets))
        return cls(items, target, Packing.of(batch.lengths, device))


def is_padded(tokens: int, device: torch.device) -> bool:
    """Whether batches of up to so many tokens are padded to one shape: on CUDA, unless their square is too large."""
    return device.type == "cuda" and tokens <= MOST_PADDED


class StaticBatch:
    """Room for one batch of up to `size` tokens on the device, which every batch is copied to."""

    def __init__(self, size: int, device: torch.device):
        self.size = size
        self._tensor = torch.zeros(4, size, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"  # an asynchronous copy needs memory that stays where it is
        self._host = [torch.empty(4, size, dtype=torch.int64, pin_memory=pinned) for _ in range(AHEAD)]
        self._copied = [torch.cuda.Event() for _ in range(AHEAD)] if pinned else []
        self._place = 0

    def load(self, batch: Batch) -> None:
        """Copies a batch to the device, in the order of the current stream.

        18 KB for 512 targets, so a stream for copies would cost more than it hides. Waits where the device is AHEAD
        batches behind. Raises ValueError for a batch of more than `size` tokens.
        """
        place = self._place = (self._place + 1) % AHEAD
        if self._copied:
            self._copied[place].synchronize()  # the copy of AHEAD batches ago has left this memory
        pad(batch, self._host[place].numpy())
        self._tensor.copy_(self._host[place], non_blocking=True)
        if self._copied:
            self._copied[place].record()

    def inputs(self) -> Inputs:
        """The batch that was copied last; computed by the device alone."""
        items, target, position, session = self._tensor
        return Inputs(items, target, MaskedPacking.of(position, session))


Step = Callable[[], dict[str, Tensor]]  # a step on static tensors, without arguments; -> its losses


class GraphedStep:
    """A step that runs as it is once, which compiles its kernels, is captured the second time, and replayed from then.

    Each call does the work of one step and gives what the step itself gives, random draws included: a replay takes the
    generator's seed and offset as they are. The tensors returned are overwritten by the next call. Where the capture
    fails, `said` is called with the reason, and the step goes on as it is.
    """

    def __init__(self, step: Step, said: Callable[[str], None]):
        self._step, self._said = step, said
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._losses: dict[str, Tensor] = {}

    def __call__(self) -> dict[str, Tensor]:
        self._calls += 1
        if self._calls == 2:
            self._capture()
        if self._graph is None:
            return self._step()
        self._graph.replay()
        return self._losses

    def _capture(self) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads may do with CUDA as they like meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._losses = self._step()
        except RuntimeError as error:
            self._said(str(error).splitlines()[0])
            return
        self._graph = graph


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Within, CUDA's work goes to a stream that can be captured, which the default one cannot."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
