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
from vqops.triton_kernels.layout import padded_codes, padded_dimensions


@triton.jit(do_not_specialize=["tiles"])
def products_kernel(
    stored,  # [N', D'] float16
    codes,  # [K', D'] float16
    products,  # [N', K']
    codes_padded, tiles, WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    rows = stored + n[:, None] * WIDTH + tl.arange(0, BD)[None, :]
    whole = None
    if BD == WIDTH:
        whole = tl.load(rows)
    place = products + n[:, None] * codes_padded + tl.arange(0, BK)[None, :]
    before = tl.program_id(1).to(tl.int64)  # 0, in 64 bits
    for tile in range(0, tiles):
        product = tile_product(rows, whole, codes, before + tile * BK, WIDTH, BN, BK, BD)
        tl.store(place + tile * BK, product)


def products(x: Tensor, codes: Tensor) -> Tensor:
    """x codes^T [N, K] float32 of float16 x [N, D] and codes [K, D], by the instructions and in the order that
    screen.py has for rows of D dimensions."""
    (N, D), K = x.shape, len(codes)
    width, rows, columns = padded_dimensions(D), triton.cdiv(N, ROWS) * ROWS, padded_codes(K)
    stored, codes = pad(x, (0, width - D, 0, rows - N)), pad(codes, (0, width - D, 0, columns - K))
    result = x.new_empty((rows, columns), dtype=torch.float32)
    block = screen_blocks(D, x.device)
    with torch.cuda.device_of(x):
        products_kernel[(rows // block.rows, 1)](
            stored, codes, result, columns, columns // block.codes, width, block.rows, block.codes, block.step,
            num_warps=block.warps, num_stages=block.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return result[:N, :K]
