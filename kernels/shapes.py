"""What was tuned: block shapes and warps of kernels, and which of them a call takes on which GPU. Beside their
launchers stand programs for each SM, bytes of buffers, and the warps of `_score_blocks_kernel` and of LayerNorm.

After a change `make gpu-proof` shows spills, on a machine without a GPU, and `python benchmarks/gpu` times on one.

Measured on one H100 80 GB HBM3 on 26 November 2026 with Triton 3.6.0, at B = 512 and V of 40 thousand to 10 million
(docs/gpu.md); elsewhere chosen so that no register is spilled, by the compiled code alone.
"""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

# Read when triton itself reads it: as `triton.jit` decorates a kernel.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_SMS = 2  # as many as let the tests see more than one program on a catalog
ASSUMED_SMS = 132  # where launches are only compiled; grids do not enter the code
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # precisions whose products are of 16 bits


@dataclass(frozen=True)
class Blocks:
    """The fixed shape of a kernel that computes scores: a tile of B sessions x V items, summed over D at a time."""

    b: int
    v: int
    d: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch; D goes to its `tiles.Form`."""
        return {"BLOCK_B": self.b, "BLOCK_V": self.v, "num_warps": self.warps, "num_stages": self.stages}


# Tiles of scores on tensor cores: 32 accumulators a thread, 128 bytes of a row at a time, three buffers of them.
TENSOR_CORES = Blocks(b=64, v=128, d=64, warps=8, stages=3)
# Where tensor cores take operands from shared memory: queries up to this width stay there for a whole program.
RESIDENT_WIDTH = 128
RESIDENT = Blocks(b=128, v=64, d=RESIDENT_WIDTH, warps=8, stages=3)
# float32 without tensor cores: as many scores a thread, since each operand is read from shared memory as often as a
# thread has none of it; with half of them the scan took twice as long.
PLAIN = Blocks(b=64, v=64, d=16, warps=4, stages=2)
# Logits from products that torch computed: as many a thread as the shapes that compute them have.
MULTIPLIED = Blocks(b=32, v=128, d=16, warps=4, stages=1)

# The flash-like loss. There, on 27 November 2026, the full softmax with its gradients takes 1.88 ms at V = 1,000,000,
# d = 128 (a buffer of scores 2.32, a prototype without a running maximum 0.87), 20,000 ids a row as bits 2.31 (by rows
# 5.51), and at V = 200,000 the full softmax 0.43 (0.49) and a slice of bits 0.50 (0.79).
FLASH_ITEMS = 200_000  # catalogs from here on
FLASH_WIDTH = 128  # rows of 16-bit numbers up to here
FLASH_IDS = 200  # a slice of at least V / FLASH_IDS ids becomes bits
FLASH_POSITIVES = 16  # extra positives of a row, at most: backward's loop over them is unrolled
FLASH_PROGRAMS = 6  # an SM runs two or three at a time, as registers allow: either way all end together
FLASH = Blocks(b=64, v=64, d=FLASH_WIDTH, warps=4, stages=3)
EXPAND = {"BLOCK": 1024, "num_warps": 4}
JOIN = {"BLOCK_S": 16, "num_warps": 4}

# Sessions at a time, which bounds the memory beside the result: 512 targets of a training step and the rest of its last
# session are one pass over the catalog.
ROWS = 640

# Kernels that read lists.
FEW = 2048  # scores of a row that are looked at first, of which a thread holds a handful
NARROWED = 4  # times as many or more are not searched before the few have narrowed the search
MANY = 1 << 14  # entries of a row from which on more threads put ids in order
LIMITS = {"num_warps": 4}
SELECT = {"EXCLUDED": 4, "num_warps": 8}
PLACE_IDS = {"BLOCK": 256, "EXCLUDED": 8, "num_warps": 8}
PLACE_BITS = {"BLOCK": 1024, "EXCLUDED": 8, "num_warps": 8}
CLEAR_EXCLUDED = {"EXCLUDED": 128, "num_warps": 4}
ORDER_FEW = {"BLOCK": 1024, "num_warps": 4}
ORDER_MANY = {"BLOCK": 4096, "num_warps": 16}
DIGIT = {"num_warps": 4}
SPLIT_KEYS = {"BLOCK": 256, "num_warps": 4}
LOSS = {"num_warps": 2}
LOSS_WIDTH = 64  # columns of a row at a time
POS_DLOGITS = {"num_warps": 1}
QUERY_SUM = {"BLOCK_D": 128, "num_warps": 2}
GATHER = {"BLOCK_N": 64, "num_warps": 4}  # negatives at a time
GATHER_WIDTH = 64  # columns of their rows at a time
NEGATIVES_A_PROGRAM = 4096  # of a session: sessions alone are enough to fill a GPU
SEGMENT = {"BLOCK_D": 128, "RUN": 16, "num_warps": 1}  # a program looks after the items of RUN entries


def scoring_blocks(precision: str, query: Tensor, catalog: Tensor) -> Blocks:
    """The tile of a kernel that scores, as it fits these inputs."""
    if product_of(precision) == "ieee":
        return PLAIN
    # 128 bytes of a row.
    most = TENSOR_CORES.d if narrow(precision, query, catalog) else TENSOR_CORES.d // 2
    return replace(TENSOR_CORES, d=step(query.shape[1], most))


def resident_blocks(precision: str, query: Tensor, catalog: Tensor) -> Blocks:
    """As `scoring_blocks`, but where tensor cores take operands from shared memory narrow queries stay there while a
    program goes over the catalog, and for wide ones 4 warps have enough registers, on Hopper."""
    blocks = scoring_blocks(precision, query, catalog)
    if not narrow(precision, query, catalog) or not tensor_cores_read_shared(query.device):
        return blocks
    if query.shape[1] > RESIDENT_WIDTH:
        return replace(blocks, warps=4) if is_hopper(query.device) else blocks
    return replace(RESIDENT, d=whole(query.shape[1]))


def scan_blocks(
    precision: str, query: Tensor, catalog: Tensor, has_start: bool, has_stop: bool, has_bias: bool, check: bool
) -> Blocks:
    """The tile of rank_slice's scan; has_start and has_stop as its `Plan` says.

    On Hopper and data-centre Blackwell tensor cores take operands from shared memory. That leaves 4 warps enough
    registers, and two programs share an SM: one compares scores while the tensor cores serve the other. Narrow queries
    then stay in shared memory. Wide ones are read anew for each tile: where only the open zone is looked for,
    registers suffice for twice the sessions, which halves what the catalog takes of the L2 cache's bandwidth.

    On an H100, sessions x items x width, in 16 bits and one dtype: 64 x 128 x width with 4 warps up to RESIDENT_WIDTH;
    above it 64 x 128 x 64 with 4 warps, without a stop zone and for more than 64 sessions 128 x 128 x 64 with 8; with a
    start zone 64 x 128 x 64 with 8.
    """
    blocks, width = scoring_blocks(precision, query, catalog), query.shape[1]
    half = narrow(precision, query, catalog)
    one_dtype = query.dtype == catalog.dtype and (half or precision not in HALVES)
    if check and is_blackwell(query.device):  # a check takes registers that more scores a thread do not leave
        return replace(blocks, v=64)
    if not tensor_cores_read_shared(query.device) or blocks.v < 128 or has_start or not one_dtype:
        return blocks
    if half and width <= RESIDENT_WIDTH:
        if is_hopper(query.device) or has_stop or query.shape[0] <= 64:
            return replace(blocks, warps=4, d=whole(width))
        return replace(blocks, b=128, d=whole(width), stages=2)  # which spills nothing on Blackwell
    if half and not has_stop and query.shape[0] > 64:
        # On Blackwell a bias takes registers that twice the sessions do not leave.
        return blocks if has_bias and is_blackwell(query.device) else replace(blocks, b=128, stages=4)
    return replace(blocks, warps=4)


def fallback_blocks(precision: str, query: Tensor, catalog: Tensor) -> Blocks:
    """The tile of rank_slice's fallback, whose scores need more registers each."""
    return replace(scoring_blocks(precision, query, catalog), v=32, warps=8)


def loss_blocks(precision: str, query: Tensor, catalog: Tensor) -> Blocks:
    """The tile of a loss over the columns of a score matrix."""
    return MULTIPLIED if product_of(precision) == "ieee" else resident_blocks(precision, query, catalog)


def flash_blocks(width: int, extras: bool, device: torch.device) -> Blocks:
    """The tile of the flash-like loss; `extras` for what takes more registers: a bias, a check, positives.

    Two sums, of scores and of embeddings, fit the registers of 4 warps only where tensor cores read shared memory and
    write registers, and on AMD, whose lanes have twice as many.
    """
    blocks = replace(FLASH, d=whole(width))
    if is_hopper(device) and not extras:
        return blocks
    return replace(blocks, warps=8, stages=2) if is_cuda(device) else replace(blocks, warps=4, stages=1)


def sample_registers(precision: str, device: torch.device) -> dict[str, int]:
    """For more programs on an SM the sample without tensor cores would spill."""
    return {"maxnreg": 168} if is_cuda(device) and product_of(precision) == "ieee" else {}


def scan_registers(has_start: bool, device: torch.device) -> dict[str, int]:
    """To have two programs on an SM, NVIDIA's assembler would spill a few of the scan's registers."""
    return {"maxnreg": 168} if is_blackwell(device) and has_start else {}


def loss_registers(query: Tensor, blocks: Blocks, product: str) -> dict[str, int]:
    """To have more programs on an SM, NVIDIA's assembler spills a few of the losses' registers where the loop over the
    width is short, and on Blackwell elsewhere."""
    tight = (product != "ieee" and triton.cdiv(query.shape[1], blocks.d) == 2) or is_blackwell(query.device)
    return {"maxnreg": 255} if tight and is_cuda(query.device) else {}


def select_options(wide: bool, device: torch.device) -> dict[str, int]:
    """Half as many scores at a time where registers are short: `wide`, for two zones or for excluded items, and by
    other assemblers than Hopper's; for more programs on an SM it would spill."""
    block = FEW // 2 if wide or not is_hopper(device) else FEW
    return {**SELECT, "BLOCK": block, **({"maxnreg": 128} if is_cuda(device) else {})}


def product_of(precision: str) -> str:
    """How products are computed: "bf16", "fp16", or for "fp32" what torch's setting for matrix products allows, "tf32"
    or "ieee", which does without tensor cores."""
    if precision in HALVES:
        return precision
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def narrow(precision: str, query: Tensor, catalog: Tensor) -> bool:
    """Whether rows are read in the 16 bits that are multiplied."""
    return query.dtype == catalog.dtype == HALVES.get(precision)


def step(width: int, most: int) -> int:
    """How much of the width is summed at a time: at least two steps, so that one is copied while another is multiplied,
    if tensor cores, which take 16 at a time, can have them."""
    return min(most, max(16, triton.next_power_of_2(width) // 2))


def whole(width: int) -> int:
    """A step that takes the whole width."""
    return max(16, triton.next_power_of_2(width))


@functools.cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors: how many programs run side by side, one on each."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return INTERPRETED_SMS if INTERPRETED else ASSUMED_SMS


def target(device: torch.device) -> tuple[str, int | str]:
    """What kernels are compiled for on this device: "cuda" and the compute capability, 90 for Hopper, or "hip" and
    AMD's name for it; ("", 0) where they are interpreted."""
    return ("", 0) if INTERPRETED else _target_of(triton.runtime.driver.active, device)


@functools.cache
def _target_of(driver: Any, device: torch.device) -> tuple[str, int | str]:
    with current(device):
        answer = driver.get_current_target()
    return answer.backend, answer.arch


def is_cuda(device: torch.device) -> bool:
    return target(device)[0] == "cuda"


def is_hopper(device: torch.device) -> bool:
    backend, generation = target(device)
    return backend == "cuda" and int(generation) // 10 == 9


def is_blackwell(device: torch.device) -> bool:
    """Of data centres."""
    backend, generation = target(device)
    return backend == "cuda" and int(generation) // 10 == 10


def tensor_cores_read_shared(device: torch.device) -> bool:
    """Whether tensor cores take operands from shared memory: Hopper's and data-centre Blackwell's do."""
    return is_hopper(device) or is_blackwell(device)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Triton asks and launches on the current device, which need not be the tensors': within, it is."""
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        return torch.cuda.device(device)
    return nullcontext()
