"""Layout of a prepared codebook. No Triton here: fake kernels compute the size as well.

Heads lie one behind the other. A head's sections, in this order, are whole lines of 128 bytes:
  header  [32] int32            see codebook.py
  centre  [D'] float32          subtracted from rows and codes; at least 32 words
  bounds  [K'/64, 4, 64] float32
    start       |C|^2 / 2 less its error; ABSENT for codes left out, also repeats
    radius      at least |C|
    unit        power of two that brings the stored code back
    start_topk  start, with repeats: they count among the k nearest
  codes   [K', D'] float16      -C / unit: a lower bound is then a sum of products
K' is K rounded up to whole tiles, D' is D rounded up to whole steps of the tensor cores' loop. What a tile of 64 codes
needs has one address, since kernels are given the packed memory and find the rest themselves.
"""

from functools import cache

CODES = 128  # K' is a multiple
TILE = 64  # codes whose bounds lie together: a tile of the screening passes
WHOLE = 256  # rows of up to so many dimensions stay on chip for the whole search; longer ones are read in steps
STEP = 64  # dimensions per step

HEADER = 32  # words per head


@cache
def padded_dimensions(D: int) -> int:
    return next((width for width in (16, 32, 64, 128, WHOLE) if width >= D), (D + STEP - 1) // STEP * STEP)


def padded_codes(K: int) -> int:
    return (K + CODES - 1) // CODES * CODES


def packed_bytes(H: int, K: int, D: int) -> int:
    width = padded_dimensions(D)
    return H * (4 * (HEADER + max(width, HEADER)) + padded_codes(K) * (16 + 2 * width))
