"""The tensor cores' products by themselves, as the search computes them: to measure on a GPU how far they err.

docs/exactness.md assumes no more than 1.5 (D' + 16) 2^-23 |x| |c|, and nothing else of the hardware.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from vqops.triton_kernels.blocks import ROWS, screen_blocks
from vqops.triton_kernels.bound import tile_product
from vqops.triton_kernels.launch import Kept, cdiv
from vqops.triton_kernels.layout import padded_codes, padded_dimensions


@Kept
@triton.jit
def products_kernel(
    stored,  # [N', D'] float16
    codes,  # [K', D'] float16
    products,  # [N' / BN, K' / BK, BN, BK]: tile by tile, since the places in a matrix would not fit in registers
    WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    block, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BN)[:, None]
    rows = stored + block * BN * WIDTH + n * WIDTH + tl.arange(0, BD)[None, :]
    whole = None
    if BD == WIDTH:
        whole = tl.load(rows)
    product = tile_product(rows, whole, codes, tile * BK, WIDTH, BN, BK, BD)
    place = products + (block * tl.num_programs(1) + tile) * BN * BK
    tl.store(place + (n * BK + tl.arange(0, BK)[None, :]), product)


def products(x: Tensor, codes: Tensor) -> Tensor:
    """x codes^T [N, K] float32 of float16 x [N, D] and codes [K, D], by the instructions and in the order that
    screen.py has for rows of D dimensions."""
    (N, D), K = x.shape, len(codes)
    width, rows, columns = padded_dimensions(D), cdiv(N, ROWS) * ROWS, padded_codes(K)
    stored, codes = pad(x, (0, width - D, 0, rows - N)), pad(codes, (0, width - D, 0, columns - K))
    block = screen_blocks(D, x.device)
    result = x.new_empty((rows // block.rows, columns // block.codes, block.rows, block.codes), dtype=torch.float32)
    with torch.cuda.device_of(x):
        products_kernel[result.shape[:2]](
            stored, codes, result, width, block.rows, block.codes, block.step,
            num_warps=block.warps, num_stages=block.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return result.transpose(1, 2).reshape(rows, columns)[:N, :K]
