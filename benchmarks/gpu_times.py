"""Times on a GPU: each op against what people run today, at the paper's shape and at huge catalogs, and the ceilings.

Contestants of an op take turns on the same inputs. A turn is one call that is not timed, so that memory is where this
contestant left it, and one that is. One that runs out of memory, or is not installed, has a line that says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alterrec_fast.ops import rank_slice, sampled_softmax, slice_cross_entropy, top_k
from alterrec_fast.ops.slices import bits_width, uses_bits

from . import gpu_truth as truth
from .gpu_acceptance import GRAPHED
from .gpu_device import Device, FaultError, NotHereError
from .gpu_journal import Journal, short
from .gpu_loss_checks import require
from .gpu_truth import Source

START, STOP, TOP = 20, 20_000, 20  # the paper's ranks, and a page of recommendations
SAMPLED, SHARED = 1_000, 8_192  # negatives of a session, and of all together
GRAPH_BYTES = 1 << 30  # a graph keeps its memory: torch's only where float32 scores are smaller
MAX_TURNS = 20
SHORTEST = 4e-6  # seconds, of a kernel that is listed
ROWS = 4  # sessions whose ranks are compared with float64

Call = Callable[[], object]
Make = Callable[[], Call]  # prepares, untimed, and returns what is timed


@dataclass(frozen=True)
class Shape:
    """B sessions and V items; `width` numbers of each are stored, zeros behind the d that carry something."""

    name: str
    b: int
    v: int
    d: int
    width: int
    dtype: torch.dtype
    start: int = START
    stop: int = STOP

    @property
    def members(self) -> float:
        """Bytes of a slice."""
        return float(self.b * min(bits_width(self.v), 4 * (self.stop - self.start)))

    def __str__(self) -> str:
        padded = f" padded to {self.width}" if self.width != self.d else ""
        kind = "bf16" if self.dtype == truth.BF16 else "fp32"
        return f"{self.name}: B={self.b}, V={self.v:,}, d={self.d}{padded}, {kind}, ranks {self.start}:{self.stop}"


@dataclass(frozen=True)
class Work:
    """What an op can't do without: operations of products, and bytes read or written once."""

    operations: float
    bytes: float


def shapes(name: str, kind: str) -> list[Shape]:
    """name: "paper", "1M" or "10M"; kind: of the device."""
    if kind == "cpu":
        return [Shape(name, 2, 700, 8, 8, dtype, 5, 300) for dtype in (truth.BF16, truth.FP32)]
    if name == "paper":
        return [Shape(name, 512, 40_258, 300, w, t) for t in (truth.BF16, truth.FP32) for w in (300, 320)]
    v = {"1M": 1_000_000, "10M": 10_000_000}[name]
    return [Shape(name, 512, v, 128, 128, dtype) for dtype in (truth.BF16, truth.FP32)]


# --- ceilings ---


def measure_ceilings(device: Device, journal: Journal, _seed: int) -> None:
    """Bytes a second of a copy, and operations a second of square products, the best of several."""
    cuda = device.kind == "cuda"
    x = torch.empty(1 << (31 if cuda else 22), dtype=torch.uint8, device=device.device)
    y = torch.empty_like(x)
    best = min(device.seconds(lambda: y.copy_(x)) for _ in range(10))
    journal.write("ceiling", "copy", value=2 * x.numel() / best, unit="B/s")
    n = 8_192 if cuda else 256
    for name, dtype in (("bf16", truth.BF16), ("fp32", truth.FP32)):
        a, b = (torch.randn(n, n, device=device.device).to(dtype) for _ in range(2))
        torch.mm(a, b)
        best = min(device.seconds(partial(torch.mm, a, b)) for _ in range(8))
        journal.write("ceiling", name, value=2.0 * n**3 / best, unit="FLOP/s")


def measure_kernels(device: Device, journal: Journal, seed: int) -> None:
    """Where the time of our ops goes, kernel by kernel."""
    for name in ("paper", "1M", "10M"):
        shape = shapes(name, device.kind)[0]
        contest = Contest(device, shape, seed)
        for op in ("rank_slice", "top_k", "full_softmax"):
            if journal.spent() or (name == "10M" and op == "full_softmax"):
                continue
            call = contest.ops()[op][1]["ours"]()
            for kernel, (calls, seconds) in sorted(device.by_kernel(call).items(), key=lambda item: -item[1][1]):
                if seconds >= SHORTEST:
                    journal.write(
                        "kernel", _short_name(kernel), shape=str(shape), op=op, calls=calls, microseconds=1e6 * seconds
                    )
        del contest
        device.release()


def _short_name(kernel: str) -> str:
    """A C++ kernel's name without its arguments and most of its template's."""
    plain = kernel.removeprefix("void ").split("(")[0]
    return plain if len(plain) <= 60 else f"{plain[:28]}...{plain[-28:]}"


# --- contests ---


class Contest:
    """Inputs of one shape, and the contestants of each op on them."""

    def __init__(self, device: Device, shape: Shape, seed: int) -> None:
        self.device, self.shape, source = device, shape, Source(seed, device.device)
        pad = (0, shape.width - shape.d)
        self.query = F.pad(source.normal(shape.b, shape.d), pad).to(shape.dtype)
        self.catalog = F.pad(source.normal(shape.v, shape.d) / shape.d**0.5, pad).to(shape.dtype)
        self.target = source.ids(0, shape.v, shape.b)
        self.negatives = source.ids(0, shape.v, shape.b, min(SAMPLED, shape.v))
        self.shared = source.ids(0, shape.v, min(SHARED, shape.v))

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.query.detach().requires_grad_(), self.catalog.detach().requires_grad_()

    def trained(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Call:
        """Forward, and both gradients."""
        query, catalog = self.leaves()
        return lambda: torch.autograd.grad(loss(query, catalog), (query, catalog))

    def graphed(self, call: Call) -> Make:
        return lambda: self.device.capture(call)

    def ops(self) -> dict[str, tuple[Work, dict[str, Make]]]:
        """For each op what it can't do without, and its contestants; ours come first."""
        s = self.shape
        row, product = s.width * self.query.element_size(), 2.0 * s.b * s.v * s.d
        catalog, listed = s.v * row, s.b * (s.stop - s.start)
        # Bits are as good as all items; of a list only its items are multiplied, of which no row is read twice.
        over_slice = Work(3 * product, 3.0 * catalog + s.members)
        if not uses_bits(s.v, s.stop - s.start):
            over_slice = Work(6.0 * listed * s.d, 2.0 * min(listed, s.v) * row + catalog + s.members)
        gathered = s.b * (self.negatives.shape[1] + 1)
        return {
            "rank_slice": (Work(product, catalog + s.members), self.rank_slice()),
            "top_k": (Work(product, catalog + s.b * TOP * 12), self.top_k()),
            "full_softmax": (Work(3 * product, 3.0 * catalog), self.full_softmax()),
            "slice_cross_entropy": (over_slice, self.slice_cross_entropy()),
            "sampled_softmax": (Work(6.0 * gathered * s.d, 2.0 * gathered * row + catalog), self.sampled()),
            "sampled_softmax, shared": (
                Work(6.0 * s.b * self.shared.numel() * s.d, 2.0 * self.shared.numel() * row + catalog),
                self.sampled_shared(),
            ),
        }

    def rank_slice(self) -> dict[str, Make]:
        s, ours = self.shape, self.our_slice

        def torchs(ordered: bool) -> Call:
            return lambda: torch.topk(self.query @ self.catalog.T, s.stop, sorted=ordered).indices[:, s.start :]

        made: dict[str, Make] = {
            "ours": lambda: ours,
            "torch mm, topk": lambda: torchs(True),
            "torch mm, topk unsorted": lambda: torchs(False),
            "torch mm alone": lambda: lambda: self.query @ self.catalog.T,
            "Faiss GPU": lambda: self.faiss(s.stop),
        }
        made[GRAPHED] = self.graphed(ours)
        if 4 * s.b * s.v <= GRAPH_BYTES:
            made["torch mm, topk unsorted, CUDA graph"] = self.graphed(torchs(False))
        return made

    def our_slice(self) -> Any:
        return rank_slice(self.query, self.catalog, start=self.shape.start, stop=self.shape.stop, backend="triton")

    def top_k(self) -> dict[str, Make]:
        ours: Call = lambda: top_k(self.query, self.catalog, k=TOP, backend="triton")  # noqa: E731
        torchs: Call = lambda: torch.topk(self.query @ self.catalog.T, TOP)  # noqa: E731
        made: dict[str, Make] = {
            "ours": lambda: ours,
            "torch mm, topk": lambda: torchs,
            "Faiss GPU": lambda: self.faiss(TOP),
        }
        made[GRAPHED] = self.graphed(ours)
        if 4 * self.shape.b * self.shape.v <= GRAPH_BYTES:
            made["torch mm, topk, CUDA graph"] = self.graphed(torchs)
        return made

    def faiss(self, k: int) -> Call:
        """Exact search by inner product, in float32; building the index is not timed."""
        import faiss
        import faiss.contrib.torch_utils

        index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), self.shape.width)
        index.add(self.catalog.float())
        query = self.query.float()
        return lambda: index.search(query, k)

    def full_softmax(self) -> dict[str, Make]:
        def ours(q: Tensor, e: Tensor) -> Tensor:
            return slice_cross_entropy(q, e, self.target, backend="triton")

        def torchs(q: Tensor, e: Tensor) -> Tensor:
            return F.cross_entropy(q @ e.T, self.target)

        def cut() -> Call:
            from cut_cross_entropy import linear_cross_entropy

            return self.trained(lambda q, e: linear_cross_entropy(q, e, self.target))

        made: dict[str, Make] = {
            "ours": lambda: self.trained(ours),
            "torch F.cross_entropy": lambda: self.trained(torchs),
            "Cut Cross-Entropy": cut,
            GRAPHED: self.graphed(self.trained(ours)),
        }
        if 4 * self.shape.b * self.shape.v <= GRAPH_BYTES:
            made["torch F.cross_entropy, CUDA graph"] = self.graphed(self.trained(torchs))
        return made

    def slice_cross_entropy(self) -> dict[str, Make]:
        """Over one slice, made before: the loss and both gradients alone."""
        s = self.shape

        def ours() -> Call:
            neg = self.our_slice()
            return self.trained(lambda q, e: slice_cross_entropy(q, e, self.target, neg, backend="triton"))

        def torchs() -> Call:
            ids = torch.topk(self.query @ self.catalog.T, s.stop, sorted=False).indices[:, s.start :]

            def loss(q: Tensor, e: Tensor) -> Tensor:
                y, own = q @ e.T, self.target[:, None]
                kept = y.gather(1, ids).masked_fill(ids == own, -torch.inf)
                return F.cross_entropy(torch.cat([y.gather(1, own), kept], 1), torch.zeros_like(self.target))

            return self.trained(loss)

        return {"ours": ours, "torch gather": torchs}

    def sampled(self) -> dict[str, Make]:
        return self.ours_sampled(self.negatives) | {"torch gather, einsum": lambda: self.trained(self.torch_sampled)}

    def torch_sampled(self, q: Tensor, e: Tensor) -> Tensor:
        own = self.target[:, None]
        y = torch.einsum("bd,bnd->bn", q, e[self.negatives]).masked_fill(self.negatives == own, -torch.inf)
        return F.cross_entropy(torch.cat([(q * e[self.target]).sum(1, keepdim=True), y], 1), own[:, 0] * 0)

    def sampled_shared(self) -> dict[str, Make]:
        def torchs(q: Tensor, e: Tensor) -> Tensor:
            own = self.target[:, None]
            y = (q @ e[self.shared].T).masked_fill(self.shared == own, -torch.inf)
            return F.cross_entropy(torch.cat([(q * e[self.target]).sum(1, keepdim=True), y], 1), own[:, 0] * 0)

        return self.ours_sampled(self.shared) | {"torch gather, mm": lambda: self.trained(torchs)}

    def ours_sampled(self, negatives: Tensor) -> dict[str, Make]:
        def engine(name: str) -> Call:
            require(name, self.query)
            return self.trained(lambda q, e: sampled_softmax(q, e, self.target, negatives, backend=name))

        return {"ours, CUDA C++": lambda: engine("native"), "ours, Triton": lambda: engine("triton")}


def measure(device: Device, journal: Journal, seed: int, name: str) -> None:
    """All ops at all shapes of this name; each gets its part of the time that is left."""
    todo = [(shape, op) for shape in shapes(name, device.kind) for op in OPS]
    contest: Contest | None = None
    for i, (shape, op) in enumerate(todo):
        if journal.spent():
            journal.write("time", "all", shape=str(shape), op=op, error="the time of this stage was spent")
            continue
        if contest is None or contest.shape != shape:
            contest = None  # its memory goes before the next one's comes
            device.release()
            contest = Contest(device, shape, seed)
            journal.check(device, f"rank_slice and top_k at {shape}", partial(ranks_are_right, contest))
        now = time.monotonic()
        race(device, journal, contest, op, now + (journal.deadline - now) / (len(todo) - i))


OPS = ("rank_slice", "top_k", "full_softmax", "slice_cross_entropy", "sampled_softmax", "sampled_softmax, shared")


def ranks_are_right(contest: Contest) -> str:
    """Raises FaultError where a few sessions' ranks are further from float64 than rounding explains."""
    s = contest.shape
    found = contest.our_slice()
    values, items = top_k(contest.query, contest.catalog, k=TOP, backend="triton")
    rows = min(ROWS, s.b)
    scores = truth.scores_of(contest.query[:rows], contest.catalog, None, s.dtype == truth.BF16)
    order = truth.order_of(scores, 0)
    members = found.mask_rows(0, rows)
    if not bool((members.sum(1) == s.stop - s.start).all()):
        raise FaultError(f"rank_slice: {members.sum(1).tolist()} members, expected {s.stop - s.start}")
    wrong = truth.misplaced(members, truth.mask_of(order, s.start, s.stop, s.v), scores, order, s.start, s.stop)
    best = scores.gather(1, order[:, :TOP])
    wrong = max(wrong, float((scores.gather(1, items[:rows]) - best).abs().max()))
    wrong = max(wrong, float((values[:rows].double() - best).abs().max())) / float(scores.abs().max())
    if not wrong <= 4e-6:
        raise FaultError(f"an error of {wrong:.1e} of the largest score")
    return f"error {wrong:.1e} in {rows} sessions"


def race(device: Device, journal: Journal, contest: Contest, op: str, deadline: float) -> None:
    """Times the contestants of one op in turn until the deadline, those that were made by then at least once, and
    writes a line for each."""
    work, makers = contest.ops()[op]
    about: dict[str, Any] = {"shape": str(contest.shape), "op": op, "operations": work.operations, "bytes": work.bytes}
    about["dtype"] = "bf16" if contest.shape.dtype == truth.BF16 else "fp32"
    about["ranks"] = [contest.shape.b, contest.shape.stop - contest.shape.start]
    about["result_bytes"] = contest.shape.members
    calls: dict[str, Call] = {}
    peaks: dict[str, int | None] = {}
    turns: dict[str, list[float]] = {}

    def give_up(name: str, error: BaseException) -> None:
        calls.pop(name, None)
        ours = name.startswith("ours") and not isinstance(error, NotHereError | torch.OutOfMemoryError)
        journal.write("time", name, **about, error=short(error), ours_failed=ours)
        device.release()
        device.synchronize()

    for name, make in makers.items():
        if calls and time.monotonic() > deadline:
            journal.write("time", name, **about, error="the time of this op was spent", ours_failed=False)
            continue
        try:
            call = make()
            call()  # compiles, and chooses algorithms
            peaks[name] = None if "CUDA graph" in name else device.peak_bytes(call)  # which keeps its memory
            calls[name], turns[name] = call, []
        except Exception as error:
            give_up(name, error)
    names = list(calls)
    for turn in range(MAX_TURNS):
        for name in names[turn % max(1, len(names)) :] + names[: turn % max(1, len(names))]:
            if name in calls and (not turns[name] or time.monotonic() < deadline):
                try:
                    calls[name]()
                    turns[name].append(device.seconds(calls[name]))
                except Exception as error:
                    give_up(name, error)
        if time.monotonic() > deadline:
            break
    for name in calls:
        found = turns[name]
        journal.write(
            "time", name, **about, seconds=statistics.median(found), fastest=min(found), slowest=max(found),
            turns=len(found), peak_bytes=peaks[name],
        )  # fmt: skip
