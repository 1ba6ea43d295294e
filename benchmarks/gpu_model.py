"""What the GPU kernels should take on an H100, on paper: `python -m alterrec_fast.benchmarks.gpu_model`.

A prediction, which an H100 took 1.5 to 2.2 times as long as (docs/gpu.md). Three things are put together. Formulas
count each kernel's operations and bytes. The roof is the larger of their times at what was measured on an H100
(`cost_model.H100`). And the machine code for sm_90 says how many instructions a tile takes, which decides how near to
the roof its loop can come.

Passes. A kernel that reads its memory several times reads it from device memory each time where all rows together are
larger than what is assumed of the L2 cache. Kernels that pass over a row's entries also take the time of their
instructions, which are counted in their loops; and a launch takes a gap.

Issue slots. A processor has four schedulers, each of which issues one instruction of one warp in a cycle. A tile of BB
sessions x BV items with a width of d takes 2 BB BV d / 4,096 cycles of the matrix unit, which is 989.4 TFLOP/s of dense
bfloat16 (H100 SXM data sheet) over 132 processors at 1.83 GHz; in that time there are four times as many issue slots. A
loop whose instructions take fewer slots can keep the matrix unit busy, if two blocks share a processor and one compares
as the other multiplies; one that takes more is bound by issue. Where registers and shared memory have room for one
block only, comparing comes on top of the product.

Assumed, not measured: 0.7 of an L2 cache of 50 MB is ours; a launch waits 3 us for the one before, which a CUDA graph
would shorten; a search of a few scores reads the cache alone, and how long its steps wait for each other is not
counted; a scheduler issues in every cycle (no stall that the other block does not cover); the clock under load is the
one at which 132 x 4,096 operations a cycle make the measured 798 TFLOP/s; the blocks of sessions that read the same
tile of the catalog read it from the L2 cache all but once. The L2 cache's own bandwidth was not measured: its traffic
is printed, and what it would have to deliver.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alterrec_fast.benchmarks.cost_model import H100, Chip

PROCESSORS = 132  # of an H100 SXM
SCHEDULERS = 4  # of a processor, an instruction of a warp each in a cycle
LANES = 32
TENSOR = 4096  # operations of a processor's matrix unit in a cycle, dense bfloat16
CLOCK = H100.products / (PROCESSORS * TENSOR)  # cycles a second
CACHE = 0.7 * 50e6  # bytes of the L2 cache that a kernel's rows are assumed to find place in
SECTOR = 32  # bytes that device memory gives at least
GAP = 3e-6  # seconds between two launches
SEARCHED = 24  # bits of a score, and steps of a search
MARKS = ("<!-- gpu_model: begin -->", "<!-- gpu_model: end -->")


# --- operations and bytes ---


@dataclass(frozen=True)
class Call:
    """B sessions against V items of width d. size: the slice's ranks, k2 - k1; wanted: target and positives."""

    sessions: int
    items: int
    width: int
    size: int = 19_980
    wanted: int = 1
    element: int = 2  # bytes of an embedding's element

    @property
    def product(self) -> float:
        """Operations of all scores."""
        return 2.0 * self.sessions * self.items * self.width

    @property
    def matrices(self) -> float:
        """Bytes of queries and catalog, each read once."""
        return float(self.element * self.width * (self.sessions + self.items))


@dataclass(frozen=True)
class Work:
    """What a kernel does, as a lower bound: products once, and each byte of device memory once for each pass."""

    kernel: str
    operations: float  # of the matrix unit, or multiply-adds where there is no product
    bytes: float  # to and from device memory
    slots: float = 0.0  # instructions of warps, where they were counted

    def roof(self, chip: Chip = H100) -> float:
        """Seconds: the larger of both times."""
        return float(max(self.operations / chip.products, self.bytes / chip.memory))

    def seconds(self, chip: Chip = H100) -> float:
        """The roof, or the time of the instructions where that is more."""
        return float(max(self.roof(chip), self.slots / (PROCESSORS * SCHEDULERS * CLOCK)))


def passes(size: float, times: int) -> float:
    """Bytes of device memory that so many passes over `size` bytes take: all of them where the cache has no place."""
    return size * (times if size > CACHE else 1)


def rank_slice_work(
    call: Call, sampled: int, entries: int, groups: int, narrow: tuple[bool, bool] = (False, False), windows: int = 1
) -> list[Work]:
    """sampled: items scored for the bracket; entries: of a row's buffer, 8 bytes each; groups: of tiles, whose
    members are put in order where the result is ids, 0 where it is bits; narrow: whether the sample, and the buffer,
    are searched after a few of their scores; else in 24 passes; windows: in which groups are counted.

    A few are up to 2,048 for each row, each in a sector of its own; then there is one pass. What the stream leaves
    empty, a third of the buffer or less, it fills at its end, when nobody multiplies any more: each entry a sector.
    Ids are written to the buffer, read twice in each window, and written in order; the two numbers of a group are
    cleared, set, read, and one of them written and read.
    """
    b, d = call.sessions, call.width
    few = 2048.0 * SECTOR * b
    sample, scores, buffer = 4.0 * b * sampled, 4.0 * b * entries, 8.0 * b * entries
    words = 0.0 if groups else b * call.items / 8.0
    ids = 4.0 * b * call.size if groups else 0.0
    return [
        Work("_sample_kernel", 2.0 * b * sampled * d, call.element * d * (b + sampled) + sample),
        Work("_limits_kernel", 0.0, few + sample if narrow[0] else passes(sample, SEARCHED)),
        Work("_stream_kernel", call.product, call.matrices + words + buffer),
        Work("_stream_kernel, its end", 0.0, SECTOR * b * entries / 3),
        Work("_select_kernel", 0.0, (few + scores if narrow[1] else passes(scores, SEARCHED)) + buffer / 8),
        Work("_place_kernel", 0.0, buffer + ids),
        Work("_ascending_kernel", 0.0, passes(ids, 2 * windows) + ids + passes(8.0 * b * groups, 4)),
    ]


def top_k_work(call: Call, k: int, block: int) -> list[Work]:
    """block: neighbours of which the best is kept; the k best blocks are scored again, for one session at a time."""
    b, d = call.sessions, call.width
    blocks = math.ceil(call.items / block)
    chosen = min(k, blocks) * block
    return [
        Work("_block_best_kernel", call.product, call.matrices + 8.0 * b * blocks),
        Work("topk of the blocks", 0.0, 2 * 8.0 * b * blocks),
        Work("_score_blocks_kernel", 2.0 * b * chosen * d, b * chosen * (call.element * d + 8.0)),
        Work("topk of the keys", 0.0, 2 * 8.0 * b * chosen),
    ]


def slice_loss_work(call: Call, splits: int) -> list[Work]:
    """Over bits. splits: programs that share the catalog. Backward writes a slope for each score, of some columns at a
    time, and multiplies them with the catalog and with the queries."""
    b, v, d = call.sessions, call.items, call.width
    bits, slopes = b * v / 8.0, float(call.element) * b * v
    return [
        Work("_partition_kernel", call.product, call.matrices + bits + 8.0 * splits * b),
        Work("_loss_kernel", 2.0 * b * call.wanted * d, 8.0 * splits * b + call.element * d * b * (1 + call.wanted)),
        Work("_pulls_kernel", 0.0, b * (16.0 + 16.0 * call.wanted)),
        Work("_slopes_kernel", call.product, call.matrices + bits + slopes),
        Work("mm, the queries' gradient", call.product, slopes + float(call.element) * v * d + 4.0 * b * d),
        Work("mm, the catalog's gradient", call.product, slopes + call.matrices),
    ]


def sampled_softmax_work(call: Call, negatives: int) -> list[Work]:
    """Each session's own negatives, whose rows are read wherever they lie, forward and backward. The catalog's gradient
    is written whole, and reads a session's query, which the L2 cache holds, for each of its negatives."""
    b, n, d = call.sessions, negatives, call.width
    rows = float(b * n) * (call.element * d + 8.0 + 4.0)  # a row, its id, and its logit
    entries = float(b * (n + call.wanted)) * (8.0 + 8.0 + 4.0)  # item, order, and logit or pull
    return [
        Work("_gather_kernel", 2.0 * b * n * d, rows + call.element * b * d),
        Work("_gather_query_grad_kernel", 2.0 * b * n * d, rows + 4.0 * b * d),
        Work("_segment_kernel", 2.0 * b * n * d, entries + call.element * d * (b + float(call.items))),
    ]


# --- machine code ---


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str  # without a predicate
    target: str  # the label that it jumps to, or ""


@dataclass(frozen=True)
class Tile:
    """Instructions of one warp for one tile, on the way around the loop over tiles."""

    product: int  # up to the end of the last product: copies, their addresses, barriers, matrix-unit instructions
    rest: int  # behind it, in every trip
    guarded: list[int] = field(default_factory=list)  # stores of candidates that a warp without any jumps over
    matrix: int = 0  # matrix-unit instructions among `product`

    def issued(self, chance: float = 1.0) -> float:
        """What is not product, if each guarded part runs with this chance."""
        return self.rest + chance * sum(self.guarded)


_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
_LABEL = re.compile(r"^(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")


def parse(code: str) -> tuple[list[Instruction], dict[str, int]]:
    """nvdisasm's text -> instructions in order, and where each label stands among them."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := _LINE.match(line):
            target = _TARGET.search(match[2]) if match[2].startswith("BRA") else None
            found.append(Instruction(int(match[1], 16), match[2], target[1] if target else ""))
    return found, labels


def tile_of(code: str, matrix_instructions: int, matrix: str = "HGMMA") -> Tile:
    """Counts a trip around the outermost loop that multiplies.

    matrix_instructions: of a warp and a tile, by its shape. A loop within, over parts of the width, counts as many
    times as makes up that number. Forward jumps within the loop guard what they jump over: parts that store to device
    memory are `guarded`, others, the edges of the catalog, run in two tiles of thousands and are not counted. Nothing
    behind the last wait for the matrix unit is product, but copies for the next tile behind the last guarded part, and
    what comes with them. Addresses that the compiler computes elsewhere count against us.
    """
    listing, labels = parse(code)

    def multiplies(begin: int, end: int) -> int:
        return sum(one.text.startswith(matrix) for one in listing[begin:end])

    back = [(labels[one.target], i + 1) for i, one in enumerate(listing) if one.target and labels[one.target] <= i]
    loops = [(begin, end) for begin, end in back if multiplies(begin, end)]
    if not loops:
        raise ValueError(f"expected a loop with {matrix}, found none")
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    times = [1.0] * len(listing)
    inner = [loop for loop in loops if loop != (first, last) and first <= loop[0] and loop[1] <= last]
    if inner:
        begin, end = min(inner, key=lambda loop: loop[1] - loop[0])
        outside = multiplies(first, last) - multiplies(begin, end)
        trips = (matrix_instructions - outside) / multiplies(begin, end)
        times[begin:end] = [trips] * (end - begin)
    guarded, stored = [], last
    for i in range(first, last):
        target = labels.get(listing[i].target, -1)
        if i < target < last and times[i] == 1.0:
            part = listing[i + 1 : target]
            if any(one.text.startswith("STG") for one in part):
                guarded.append(len(part))
                stored = target
            times[i + 1 : target] = [0.0] * len(part)
    counted = sum(times[i] for i in range(first, last) if listing[i].text.startswith(matrix))
    if counted != matrix_instructions:
        raise ValueError(f"expected {matrix_instructions} {matrix} for a tile, found {counted:g}")
    ends = [i for i in range(first, last) if listing[i].text.startswith((matrix, "WARPGROUP.DEPBAR"))]
    behind = max(ends) + 1
    if not any(one.text.startswith(("LDGSTS", "UTMALDG")) for one in listing[stored:last]):
        stored = last
    product = sum(times[first:behind]) + sum(times[stored:last])
    return Tile(round(product), round(sum(times[behind:stored])), guarded, round(counted))


@dataclass(frozen=True)
class Scan:
    """Instructions of a warp in a trip of each loop of a kernel that passes over a row's entries."""

    few: int  # a step of the search among a few, which registers hold
    once: int  # of the pass over all entries
    step: int  # of a search's step, beside
    read: int  # of a search's trip over what is near
    after: int  # of passes over what is near
    warps: int
    block: int  # entries of a trip

    def slots(self, rows: int, entries: int, near: int) -> float:
        """Of all rows: one pass over their entries, and searches of SEARCHED steps; near: entries that they read."""
        passed, trips = math.ceil(entries / self.block), math.ceil(near / self.block)
        search = SEARCHED * (self.few + self.step + trips * self.read)
        return float(rows * self.warps * (search + passed * self.once + trips * self.after))


def scan_of(code: str, warps: int, block: int) -> Scan:
    """The pass is the largest outermost loop that stores to device memory, if there is one; what loops there are in it
    is for excluded items, of which none are assumed. Behind it a loop with another in it is a search, the first one by
    scores; those that follow are for ties, which are not counted."""
    listing, labels = parse(code)
    loops = {(labels[one.target], i + 1) for i, one in enumerate(listing) if one.target and labels[one.target] <= i}
    loops = {(begin, end) for begin, end in loops if end - begin > 1}  # the last jump of a kernel is to itself
    inner = {(a, b) for a, b in loops if any(c <= a and b <= d and (a, b) != (c, d) for c, d in loops)}
    outer = sorted(loops - inner)
    storing = [(a, b) for a, b in outer if any(one.text.startswith("STG") for one in listing[a:b])]
    first, last = max(storing, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    searches = [(a, b) for a, b in outer if a >= last and any(a <= c and d <= b for c, d in inner)]
    read = sum(d - c for c, d in inner if searches and searches[0][0] <= c and d <= searches[0][1])
    step = searches[0][1] - searches[0][0] - read if searches else 0
    flat = [b - a for a, b in outer if a >= last and not any(a <= c and d <= b for c, d in inner)]
    within = sum(b - a for a, b in inner if first <= a and b <= last)
    few = sum(b - a for a, b in outer if b <= first)
    return Scan(few, last - first - within, step, read, sum(flat), warps, block)


def flat_slots(code: str, warps: int, rows: int, trips: int) -> float:
    """Of all rows, at most: every loop that has no other in it runs so many times."""
    listing, labels = parse(code)
    loops = {(labels[one.target], i + 1) for i, one in enumerate(listing) if one.target and labels[one.target] <= i}
    loops = {(begin, end) for begin, end in loops if end - begin > 1}
    outer = {(a, b) for a, b in loops for c, d in loops if (a, b) != (c, d) and a <= c and d <= b}
    return float(rows * warps * trips * sum(end - begin for begin, end in loops - outer))


# --- both together ---


@dataclass(frozen=True)
class Loop:
    """The loop over tiles of a compiled kernel."""

    name: str
    block_b: int
    block_v: int
    width: int  # padded to whole steps
    warps: int
    tile: Tile
    chance: float  # that a warp has a candidate in a guarded part
    resident: bool = False  # queries stay in shared memory
    programs: int = 2  # that share a processor

    @property
    def cycles(self) -> float:
        """Of the matrix unit for a tile."""
        return 2.0 * self.block_b * self.block_v * self.width / TENSOR

    @property
    def slots(self) -> float:
        """Issue slots while the matrix unit is busy with a tile."""
        return SCHEDULERS * self.cycles

    @property
    def product_share(self) -> float:
        return self.warps * self.tile.product / self.slots

    @property
    def rest_share(self) -> float:
        return self.warps * self.tile.issued(self.chance) / self.slots

    @property
    def times(self) -> float:
        """Time of the loop over that of its product alone."""
        if self.programs < 2:
            return max(1.0, self.product_share) + self.rest_share  # nobody multiplies meanwhile
        return max(1.0, self.product_share + self.rest_share)

    def cache_bytes(self, element: int = 2) -> float:
        """From the L2 cache for a tile: its rows of the catalog, and of queries if they do not stay."""
        return float(element * (self.block_v + (0 if self.resident else self.block_b)) * self.width)


def chance_of(share: float) -> float:
    """That one of two neighbours in one of a warp's threads is a candidate, where this share of all items are."""
    return 1.0 - (1.0 - min(1.0, share)) ** (2 * LANES)


def stream_loop(width: int, start: int, stop: int, share: float, top: int = 5) -> Loop:
    """The stream kernel's, compiled for sm_90 in the form that [start, stop) of the paper's catalog has; share: of all
    items that are candidates."""
    from alterrec_fast.benchmarks import gpu_proof

    gpu = next(gpu for gpu in gpu_proof.GPUS if gpu.name == "sm_90")
    case = gpu_proof.rank_slice_case("bf16", width, start, stop, top)
    (launch,) = [one for one in gpu_proof.launches(case, gpu) if one.name == "_stream_kernel"]
    return loop_of(launch, chance_of(share))


def loop_of(launch: Any, chance: float = 0.0) -> Loop:
    from alterrec_fast.benchmarks import gpu_proof

    blocks, warps = launch.options, launch.compiled.metadata.num_warps
    width = launch.steps * blocks["BLOCK_D"]
    # HGMMA multiplies 64 rows by up to 256 columns, 16 of the width at a time, for 4 warps.
    registers, code = gpu_proof.disassembled(launch.compiled)
    columns = re.search(r"HGMMA\.64x(\d+)x16", code)
    if columns is None:
        raise ValueError(f"expected HGMMA.64xNx16 in {launch.name}")
    scores = blocks["BLOCK_B"] * blocks["BLOCK_V"]
    expected = scores * width * 4 // (warps * 64 * int(columns[1]) * 16)
    shape = blocks["BLOCK_B"], blocks["BLOCK_V"], width, warps
    resident = launch.name == "_stream_kernel" and launch.steps == 1
    gpu = next(gpu for gpu in gpu_proof.GPUS if gpu.name == "sm_90")
    fits = gpu_proof.occupancy(gpu, warps, registers, launch.compiled.metadata.shared)
    programs = round(fits * gpu.warps / warps)
    return Loop(launch.name, *shape, tile_of(code, expected), chance, resident, programs)


def plan_of(call: Call, start: int, top: int = 5) -> Any:
    """How the launcher cuts this call for sm_90."""
    import torch
    from alterrec_fast.benchmarks import gpu_proof
    from alterrec_fast.kernels import rank_slice, tiles

    from alterrec_fast.ops.slices import uses_bits

    query = torch.empty(call.sessions, call.width, dtype=torch.bfloat16, device="meta")
    rows, bits = min(call.sessions, rank_slice.ROWS), uses_bits(call.items, call.size)
    blocks = tiles.scoring_blocks("bf16", query, query)
    shape = (rows, call.items, start, start + call.size, top, bits, 0, PROCESSORS, 1.0)
    with gpu_proof.compiling_for(next(gpu for gpu in gpu_proof.GPUS if gpu.name == "sm_90")):
        stream = rank_slice.stream_blocks(rank_slice.plan(*shape, blocks), "bf16", query, query, blocks)
    return rank_slice.plan(*shape, stream)


@dataclass(frozen=True)
class Prediction:
    """A call of rank_slice."""

    call: Call
    works: list[Work]
    loop: Loop
    extra: int  # bytes beside the result
    launches: int

    @property
    def bar(self) -> float:
        """Seconds: the larger of product time and memory time."""
        return next(work for work in self.works if work.kernel == "_stream_kernel").roof()

    @property
    def stream(self) -> float:
        """Seconds of the stream at the pace of its loop."""
        paced = self.call.product * self.loop.width / self.call.width * self.loop.times / H100.products
        return float(max(paced, self.bar))

    @property
    def seconds(self) -> float:
        """The stream, everything else at its roof or its instructions' pace, and the gaps."""
        rest = sum(work.seconds() for work in self.works if work.kernel != "_stream_kernel")
        return float(rest + self.stream + self.launches * GAP)

    @property
    def cache(self) -> float:
        """Bytes a second that the L2 cache must deliver to the stream for that."""
        tiles = math.ceil(self.call.sessions / self.loop.block_b) * math.ceil(self.call.items / self.loop.block_v)
        return tiles * self.loop.cache_bytes() / self.stream

    @property
    def allowed(self) -> float:
        """Bytes of extra memory: 2 B (k2 - k1) pairs of 8 bytes and 64 MiB."""
        return 2.0 * self.call.sessions * self.call.size * 8 + (64 << 20)


def predict(call: Call, start: int = 20) -> Prediction:
    from alterrec_fast.benchmarks import gpu_proof

    cut = plan_of(call, start)
    # The code depends on the form of the call, so a call of the same form on the paper's catalog stands for it. The
    # buffer's room, which has its deviations' worth of slack, stands for the candidates.
    share = cut.entries / call.items
    loop = stream_loop(call.width, start, 20_000 if cut.bits else 500, share)
    extra, found = dry_run(call, start)
    by_name = {launch.name: launch for launch in found if launch.name in SCANS}
    narrow = by_name["_limits_kernel"].options["NARROW"], by_name["_select_kernel"].options["NARROW"]
    entries = {"_limits_kernel": cut.sampled, "_select_kernel": cut.entries, "_place_kernel": cut.entries}
    works = []
    groups = 0 if cut.bits else math.ceil(call.items / (loop.block_v << cut.dealt))
    windows = math.ceil(groups / (cut.entries // 2))
    for work in rank_slice_work(call, cut.sampled, cut.entries, groups, narrow, windows):
        slots = 0.0
        if work.kernel == "_ascending_kernel" and groups:
            (launch,) = [one for one in found if one.name == work.kernel]
            trips = math.ceil(max(groups, windows * call.size) / launch.options["BLOCK"])
            code = gpu_proof.disassembled(launch.compiled)[1]
            slots = flat_slots(code, launch.compiled.metadata.num_warps, call.sessions, trips)
        elif launch := by_name.get(work.kernel):
            options, code = launch.options, gpu_proof.disassembled(launch.compiled)[1]
            scan = scan_of(code, launch.compiled.metadata.num_warps, options[SCANS[work.kernel]])
            near = NEAR[work.kernel] if options.get("NARROW", True) else 1.0
            slots = scan.slots(call.sessions, entries[work.kernel], math.ceil(near * entries[work.kernel]))
        works.append(replace(work, slots=slots))
    return Prediction(call, works, loop, extra, len(found) + TORCH_LAUNCHES)


# What is near the scores sought: of a sample's far end little, of the buffer's entries what Plan.zone has room for.
NEAR = {"_limits_kernel": 1 / 32, "_select_kernel": 1 / 8, "_place_kernel": 0.0}
SCANS = {"_limits_kernel": "CHUNK", "_select_kernel": "BLOCK", "_place_kernel": "BLOCK"}  # and a trip's entries
TORCH_LAUNCHES = 3  # that clear memory


def extra_memory(call: Call, start: int, top: int = 5) -> int:
    """Bytes at the peak that the launcher allocates beside the results."""
    return dry_run(call, start, top)[0]


def dry_run(call: Call, start: int, top: int = 5) -> tuple[int, list[Any]]:
    """`extra_memory`, and what was launched: the launcher runs on tensors without memory, and storages are counted as
    they come and go."""
    import torch
    from alterrec_fast.benchmarks import gpu_proof
    from alterrec_fast.kernels.rank_slice import rank_slice_fwd

    from alterrec_fast.ops.slices import bits_width, exclude_lists, uses_bits

    v, stop = call.items, start + call.size
    meta = torch.device("meta")
    query, catalog = (torch.empty(n, call.width, dtype=torch.bfloat16, device=meta) for n in (call.sessions, v))
    lists = exclude_lists(None, call.sessions, meta)
    form = (uses_bits(v, call.size), bits_width(v))
    gpu = next(gpu for gpu in gpu_proof.GPUS if gpu.name == "sm_90")
    with gpu_proof.compiling_for(gpu) as found, allocations() as peak:
        results = rank_slice_fwd(query, catalog, start, stop, top, *lists, None, 0, "bf16", False, *form)
    return int(peak() - sum(x.untyped_storage().nbytes() for x in results if x is not None)), found


def allocations() -> Any:
    """A context in which bytes of new storages are counted; gives a function that tells the most there were at once."""
    import weakref
    from contextlib import contextmanager

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    users: dict[int, int] = {}
    now = most = 0

    def drop(storage: int, size: int) -> None:
        nonlocal now
        users[storage] -= 1
        if users[storage] == 0:
            del users[storage]
            now -= size

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal now, most
            before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            out = func(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    storage, size = x.untyped_storage()._cdata, x.untyped_storage().nbytes()
                    if storage in before and storage not in users:
                        continue  # of a tensor that was there before
                    now += 0 if storage in users else size
                    users[storage] = users.get(storage, 0) + 1
                    weakref.finalize(x, drop, storage, size)
            most = max(most, now)
            return out

    @contextmanager
    def counting() -> Any:
        with Count():
            yield lambda: most

    return counting()


# --- tables ---


def works_table(works: Sequence[Work]) -> str:
    lines = ["| kernel | GFLOP | MB | ms at the roof | ms of instructions | bound by |"]
    lines.append("| --- |" + " ---: |" * 4 + " --- |")
    for work in works:
        bound = "product" if work.operations / H100.products > work.bytes / H100.memory else "memory"
        bound = "issue" if work.seconds() > work.roof() else bound
        issue = f"{1e3 * work.slots / (PROCESSORS * SCHEDULERS * CLOCK):.3f}" if work.slots else ""
        cells = f"{work.operations / 1e9:,.1f} | {work.bytes / 1e6:,.1f} | {1e3 * work.roof():.3f} | {issue} | {bound}"
        lines.append(f"| `{work.kernel}` | {cells} |")
    return "\n".join(lines)


def loops_table(loops: Sequence[tuple[str, Loop]]) -> str:
    lines = [
        "| loop | tile, warps | programs | product | rest | stores | chance | slots | product's share | rest's share "
        "| times |",
        "| --- | --- |" + " ---: |" * 9,
    ]
    for name, loop in loops:
        tile = loop.tile
        stores = f"{len(tile.guarded)} x {sum(tile.guarded) / max(1, len(tile.guarded)):.0f}"
        cells = [f"{loop.block_b} x {loop.block_v} x {loop.width}, {loop.warps}", loop.programs]
        cells += [tile.product, tile.rest, stores]
        cells += [f"{loop.chance:.0%}", f"{loop.slots:,.0f}", f"{loop.product_share:.0%}", f"{loop.rest_share:.0%}"]
        lines.append(f"| {name} | " + " | ".join(str(cell) for cell in cells) + f" | {loop.times:.2f} |")
    return "\n".join(lines)


def predictions_table(found: Sequence[Prediction]) -> str:
    lines = [
        "| B | V | d | bar, ms | stream, ms | launches | predicted, ms | times | L2 must give, TB/s | extra MiB "
        "| allowed MiB |",
        "|" + " ---: |" * 11,
    ]
    for one in found:
        call = one.call
        cells = [f"{call.sessions}", f"{call.items:,}", f"{call.width}", f"{1e3 * one.bar:.2f}"]
        cells += [
            f"{1e3 * one.stream:.2f}",
            f"{one.launches}",
            f"{1e3 * one.seconds:.2f}",
            f"{one.seconds / one.bar:.2f}",
            f"{one.cache / 1e12:.1f}",
        ]
        cells += [f"{one.extra / 2**20:.0f}", f"{one.allowed / 2**20:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


CALLS = [Call(512, 10_000_000, 128), Call(512, 10_000_000, 320), Call(512, 1_000_000, 128), Call(512, 40_258, 300)]


def report() -> str:
    """Markdown."""
    big, paper = CALLS[0], CALLS[-1]
    found = [predict(call) for call in CALLS]
    loops = [(f"V={one.call.items:,} d={one.call.width}", one.loop) for one in found]
    paper_cut = plan_of(paper, 20)
    share = paper_cut.entries / paper.items
    loops.append(("V=40,258 d=320", stream_loop(320, 20, 20_000, share)))
    parts: list[tuple[str, Callable[[], str]]] = [
        ("`rank_slice`, ranks 20 to 20,000:", lambda: predictions_table(found)),
        ("The stream kernel's loop, instructions of a warp for a tile:", lambda: loops_table(loops)),
        (f"`rank_slice`, B=512, V={big.items:,}, d=128:", lambda: works_table(found[0].works)),
        ("`top_k`, 20 of the same:", lambda: works_table(top_k_work(big, 20, 1024))),
        ("`slice_cross_entropy`, B=512, V=40,258, d=300:", lambda: works_table(slice_loss_work(paper, 99))),
        ("`sampled_softmax`, 2,048 negatives of each session:", lambda: works_table(sampled_softmax_work(paper, 2048))),
    ]
    import triton

    version = f"Triton {triton.__version__}, sm_90."
    return "\n\n".join([version, *(f"{title}\n\n{make()}" for title, make in parts)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="Markdown page between whose marks the tables are put")
    chosen = parser.parse_args()
    text = report()
    print(text)
    if chosen.page:
        page = chosen.page.read_text()
        before, rest = page.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        chosen.page.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
