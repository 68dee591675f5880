"""Block sizes of every kernel, in one place. Chosen from what compiles without spills in the inner loop.

The limits: 255 registers per thread, and 99 KB of shared memory per block on sm_86, sm_89 and sm_120 (163 KB and more
on sm_80, sm_90 and sm_100).
"""

import math
import os
from functools import cache
from typing import NamedTuple

import torch

from vqops.triton_kernels.layout import STEP, WHOLE, padded_dimensions


class Screen(NamedTuple):
    """One program of the screening pass: `rows` of x against all codes, `codes` at a time."""

    rows: int
    codes: int
    step: int  # dimensions at a time; whole rows where D allows
    warps: int
    stages: int
    registers: int | None = None  # at most, of a thread; else as many as there are


# The first whose D and shared memory (KB per block) suffice. 128 x 64 scores on 8 warps leave 32 per thread, beside two
# bounds per slot; twice that spills.
SCREEN = [
    (128, 99, Screen(128, 64, 128, 8, 3)),
    (WHOLE, 163, Screen(128, 64, WHOLE, 8, 3)),
    (WHOLE, 99, Screen(64, 64, WHOLE, 4, 2)),
    (math.inf, 200, Screen(128, 64, STEP, 8, 3)),
    (math.inf, 99, Screen(128, 64, STEP, 8, 2)),
]
# Two programs a processor, in the place of one with twice the registers: comparisons of the one beside products of the
# other. But it spills in the loop, and has not been timed: only where the environment asks for it.
TWO_A_PROCESSOR = [(128, 163, Screen(128, 64, 128, 8, 3, registers=128))]
PROGRAMS = os.environ.get("VQOPS_TRITON_PROGRAMS", "1")
if PROGRAMS not in ("1", "2"):
    raise ValueError(f"VQOPS_TRITON_PROGRAMS must be 1 or 2, got {PROGRAMS}")
# Dimensions up to which rows stay whole, by the major number of the compute capability: Triton 3.6 keeps longer ones in
# registers on sm_100, and spills.
WHOLE_ON = {10: 64}
# nearest_topk reads its rows in steps as well: whole ones pass the shared memory of sm_100 at D = 256, and a second
# stage spills on sm_89.
TOPK = Screen(128, 64, STEP, 8, 1)
ROWS = 128  # rows are padded to a multiple: the largest block of the screening pass


class Sample(NamedTuple):
    """One program of a draw: `rows` against all codes, `codes` at a time, in float32; `few` in float64."""

    rows: int
    codes: int
    step: int  # dimensions at a time
    few: int
    warps: int


class Sizes(NamedTuple):
    """Amounts that a program of the other kernels takes at a time."""

    centre: int  # dimensions whose median is taken
    codes: int  # codes prepared
    values: int  # of rows at memory speed
    gather: tuple[int, int]  # values and rows that get their codes
    decide: int  # rows decided, if each is among up to 16 codes
    scan: tuple[int, int]  # rows and codes compared in float64
    lanes: int  # rows that are walked eight dimensions at a time
    sample: Sample


ON_GPU = Sizes(
    centre=16, codes=32, values=2048, gather=(1024, 32), decide=16, scan=(8, 32), lanes=64,
    sample=Sample(16, 32, 16, 4, 4),
)  # fmt: skip
# An operation costs the same in the interpreter.
INTERPRETED = Sizes(
    centre=128, codes=512, values=16384, gather=(16384, 256), decide=64, scan=(32, 128), lanes=1024,
    sample=Sample(128, 128, 256, 64, 4),
)  # fmt: skip
PROGRAMS_PER_PROCESSOR = 4  # of the kernels that walk a queue
PROCESSORS_INTERPRETED = 3  # enough to share the codes of a row
LEAST_TILES = 4  # of a part of the codes that few rows are screened against


def sizes(device: torch.device) -> Sizes:
    return ON_GPU if device.type == "cuda" else INTERPRETED


def tile(D: int, device: torch.device) -> tuple[int, int]:
    """Rows and dimensions at a time of kernels at memory speed that may walk a row in steps."""
    step = min(max(16, 1 << (D - 1).bit_length()), 256)
    return max(1, sizes(device).values // step), step


def gathered(D: int, device: torch.device) -> tuple[int, int]:
    """The same for rows that get their codes in float64: more of them spill where D is no multiple of 16."""
    step = tile(D, device)[1]
    values, rows = sizes(device).gather
    return min(rows, max(1, values // step)), step


def hot_rows(rows: int) -> int:
    """Of a block of `rows`, so many with one code are summed before they are added: a sum over the block costs about as
    much as the additions of an eighth of its rows (counted in instructions, not measured)."""
    return max(4, rows // 8)


def whole_rows(D: int, device: torch.device) -> tuple[int, int]:
    """Rows at a time, and the power of two that holds one, of kernels at memory speed that need rows whole."""
    width = max(16, 1 << (D - 1).bit_length())
    return max(1, sizes(device).values // width), width


def walked_rows(D: int, wide: bool, device: torch.device) -> tuple[int, int]:
    """The same for rows that walk through levels with their gradients, which take more registers, most in float64."""
    rows, width = whole_rows(D, device)
    return max(1, rows // (4 if wide else 2)), width


def screen_blocks(D: int, device: torch.device) -> Screen:
    """For rows of D dimensions."""
    return first_that_fits(padded_dimensions(D), shared_memory(device), major(device))


@cache
def first_that_fits(width: int, shared: int, major: int) -> Screen:
    reach = width if width <= WHOLE_ON.get(major, WHOLE) else math.inf
    table = TWO_A_PROCESSOR + SCREEN if PROGRAMS == "2" else SCREEN
    block = next(block for most, needed, block in table if reach <= most and shared >= needed * 1024)
    return block._replace(step=min(block.step, width))


@cache  # PyTorch looks them up anew in each call
def properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


def major(device: torch.device) -> int:
    return properties(device).major if device.type == "cuda" else 0


def shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 99 * 1024
    return properties(device).shared_memory_per_block_optin


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS_INTERPRETED
    return properties(device).multi_processor_count


def queue_programs(device: torch.device) -> int:
    """Programs of a kernel that walks a queue whose length only the device knows."""
    return processors(device) * (PROGRAMS_PER_PROCESSOR if device.type == "cuda" else 1)


def screen_parts(blocks: int, tiles: int, device: torch.device) -> int:
    """In how many parts the codes are screened where `blocks` of rows are fewer than the processors."""
    return max(1, min(processors(device) // blocks, tiles // LEAST_TILES))
