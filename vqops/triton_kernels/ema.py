"""EMA: two passes, since the smoothing needs the total of all cluster sizes. Each is at memory speed: the averages are
read twice (once from cache) and written once, and so are the codes.
"""

import torch
import triton
import triton.language as tl

from vqops.reference import TINY
from vqops.triton_kernels.blocks import tile
from vqops.triton_kernels.launch import Kept, cdiv
from vqops.triton_kernels.strides import strides

SMALLEST = tl.constexpr(TINY)


@triton.jit
def lerp(start, end, step):
    """As torch.lerp: exact at both ends."""
    return tl.where(step < 0.5, start + step * (end - start), end - (end - start) * (1 - step))


@Kept
@triton.jit(
    do_not_specialize=["codes", "K", "w_h_stride", "w_k_stride"],
    do_not_specialize_on_alignment=["decay"],  # perhaps one of many
)
def average_kernel(
    size,  # [H, K]
    average,  # [H, K, D]
    counts,  # [H, K]
    sums,  # [H, K, D]
    decay,  # 0-d
    weight,  # [H, K], or None
    codes, K, D, w_h_stride, w_k_stride, M: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A code's averages move together or, where one of them would not be finite, not at all."""
    k = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    known = k < codes
    step = 1.0 - tl.load(decay) + tl.zeros((M,), tl.float32)
    if weight is not None:
        h = k // K
        share = tl.load(weight + h * w_h_stride + (k - h * K) * w_k_stride, mask=known, other=0)
        step *= share.to(tl.float32)
    moved_size = lerp(
        tl.load(size + k, mask=known, other=0.0), tl.load(counts + k, mask=known, other=0).to(tl.float32), step
    )
    zero = moved_size * 0.0
    for start in range(0, D, BD):
        i = start + tl.arange(0, BD)[None, :]
        inside = known[:, None] & (i < D)
        at = k[:, None] * D + i
        moved = lerp(
            tl.load(average + at, mask=inside, other=0.0), tl.load(sums + at, mask=inside, other=0.0), step[:, None]
        )
        zero += tl.sum(moved * 0.0, 1)
    finite = known & (zero == 0)
    tl.store(size + k, moved_size, mask=finite)
    for start in range(0, D, BD):
        i = start + tl.arange(0, BD)[None, :]
        inside = finite[:, None] & (i < D)
        at = k[:, None] * D + i
        moved = lerp(
            tl.load(average + at, mask=inside, other=0.0), tl.load(sums + at, mask=inside, other=0.0), step[:, None]
        )
        tl.store(average + at, moved, mask=inside)


@triton.jit
def ratio(average, at, inside, smoothed):
    return tl.div_rn(tl.load(average + at, mask=inside, other=0.0), tl.broadcast_to(smoothed[:, None], at.shape))


@Kept
@triton.jit(do_not_specialize=["codes", "K"])
def codes_kernel(
    size,  # [H, K]
    average,  # [H, K, D]
    total,  # [H], sums of size
    embed,  # [H, K, D]
    codes, K, D, eps, COSINE: tl.constexpr, M: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    known = k < codes
    whole = tl.load(total + k // K, mask=known, other=1.0)
    smoothed = tl.div_rn(tl.load(size + k, mask=known, other=1.0) + eps, whole + K * eps) * whole
    smoothed = tl.where(known, smoothed, 1.0)
    square = tl.zeros((M,), tl.float64)
    zero = tl.zeros((M,), tl.float32)
    for start in range(0, D, BD):
        i = start + tl.arange(0, BD)[None, :]
        inside = known[:, None] & (i < D)
        code = ratio(average, k[:, None] * D + i, inside, smoothed)
        zero += tl.sum(code * 0.0, 1)
        square += tl.sum(code.to(tl.float64) * code.to(tl.float64), 1)
    norm = tl.maximum(tl.sqrt(square), tl.full((M,), SMALLEST, tl.float64))
    finite = known & (zero == 0)
    for start in range(0, D, BD):
        i = start + tl.arange(0, BD)[None, :]
        inside = finite[:, None] & (i < D)
        at = k[:, None] * D + i
        code = ratio(average, at, inside, smoothed)
        if COSINE:
            code = (code.to(tl.float64) / norm[:, None]).to(tl.float32)
        tl.store(embed + at, code, mask=inside)


def ema_update_(cluster_size, embed_avg, embed, counts, sums, decay, eps=1e-5, weight=None, metric="euclidean"):
    H, K, D = embed_avg.shape
    if embed_avg.numel() == 0:
        return
    size, average = cluster_size.contiguous(), embed_avg.contiguous()
    rows, step = tile(D, embed_avg.device)
    grid = (cdiv(H * K, rows),)
    with torch.cuda.device_of(embed_avg):
        average_kernel[grid](
            size, average, counts.contiguous(), sums.contiguous(), decay, weight,
            H * K, K, D, *strides(weight, 2), rows, step, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        put_back(size, cluster_size)
        put_back(average, embed_avg)
        if embed is None:
            return
        codes = embed.contiguous()
        codes_kernel[grid](
            size, average, size.sum(-1), codes, H * K, K, D, eps, metric == "cosine", rows, step,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        put_back(codes, embed)


def put_back(changed, given) -> None:
    """A contiguous copy's values into the buffer that it was made of."""
    if changed.data_ptr() != given.data_ptr():
        given.copy_(changed)
