"""Layout of a prepared codebook. No Triton here: fake kernels compute the size as well.

Sections, one after the other, each with all H heads, in units of 128 bytes:
  header      [H, 32] int32        see codebook.py
  centre      [H, D] float32       subtracted from rows and codes
  start       [H, K'] float32      |C|^2 / 2 less its error; ABSENT for codes left out, also repeats
  start_topk  [H, K'] float32      the same with repeats, which count among the k nearest
  radius      [H, K'] float32      at least |C|
  unit        [H, K'] float32      power of two that brings the stored code back
  codes       [H, K', D'] float16  C / unit
K' is K rounded up to whole tiles, D' is D rounded up to whole steps of the tensor cores' loop.
"""

import math
from typing import NamedTuple

from torch import Tensor, float16, float32, int32

CODES = 128  # K' is a multiple: the largest tile of codes
WHOLE = 256  # rows of up to so many dimensions stay on chip for the whole search; longer ones are read in steps
STEP = 64  # dimensions per step

HEADER = 32  # words per head


def padded_dimensions(D: int) -> int:
    return next((width for width in (16, 32, 64, 128, WHOLE) if width >= D), (D + STEP - 1) // STEP * STEP)


def padded_codes(K: int) -> int:
    return (K + CODES - 1) // CODES * CODES


class Packed(NamedTuple):
    header: Tensor
    centre: Tensor
    start: Tensor
    start_topk: Tensor
    radius: Tensor
    unit: Tensor
    codes: Tensor


def sections(H: int, K: int, D: int) -> list[tuple]:
    codes = padded_codes(K)
    return [
        (int32, (H, HEADER)),
        (float32, (H, D)),
        *[(float32, (H, codes))] * 4,
        (float16, (H, codes, padded_dimensions(D))),
    ]


def size_of(dtype, shape) -> int:
    return (dtype.itemsize * math.prod(shape) + 127) // 128 * 128


def packed_bytes(H: int, K: int, D: int) -> int:
    return sum(size_of(dtype, shape) for dtype, shape in sections(H, K, D))


def unpack(memory: Tensor, H: int, K: int, D: int) -> Packed:  # uint8, packed_bytes long
    views, offset = [], 0
    for dtype, shape in sections(H, K, D):
        views.append(memory[offset : offset + size_of(dtype, shape)].view(dtype)[: math.prod(shape)].view(shape))
        offset += size_of(dtype, shape)
    return Packed(*views)
