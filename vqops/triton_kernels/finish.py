"""What screening leaves open, in one launch: every program takes its share of the decisions, then of the scan."""

import torch
import triton
import triton.language as tl

from vqops.triton_kernels.blocks import queue_programs, sizes
from vqops.triton_kernels.decide import decide
from vqops.triton_kernels.launch import Kept
from vqops.triton_kernels.queue import COUNTERS, ENTRY, sections_of, workspace_bytes
from vqops.triton_kernels.rows import padded_rows
from vqops.triton_kernels.scan import scan
from vqops.triton_kernels.strides import strides


@Kept
@triton.jit(do_not_specialize=["heads", "N", "K", "best_at", "mask_h_stride"])  # top: the loop of one turn is shorter
def finish_kernel(
    x,  # [H, N, D]
    codebook,  # [H, K, D]
    mask,  # [H, N] bool, or None
    indices,  # [H, N, top] int64
    distances,  # [H, N, top], or None
    work,  # uint8, see queue.py
    counters,  # [COUNTERS + programs] int64
    heads, N, padded, K, D, top, best_at,
    h_stride, n_stride, i_stride, c_h_stride, c_k_stride, c_i_stride, mask_h_stride, mask_n_stride,
    COSINE: tl.constexpr, QUEUED: tl.constexpr, SHARED: tl.constexpr, ENTRY: tl.constexpr, COUNTERS: tl.constexpr,
    CANDIDATES: tl.constexpr, DECIDED: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    queue = None
    if QUEUED:
        queue, lists, _, _, _ = sections_of(work, heads.to(tl.int64) * padded, 1, CANDIDATES)
        decide(
            x, codebook, indices, distances, lists, queue, counters, N, D, top, h_stride, n_stride, i_stride,
            c_h_stride, c_k_stride, c_i_stride, COSINE, ENTRY, CANDIDATES, DECIDED,
        )  # fmt: skip
    scan(
        x, codebook, mask, indices, distances, work + best_at.to(tl.int64) * 128, queue, counters, counters + COUNTERS,
        heads, N, K, D, top, h_stride, n_stride, i_stride, c_h_stride, c_k_stride, c_i_stride, mask_h_stride,
        mask_n_stride, COSINE, SHARED, ENTRY, A, B, PARTS,
    )  # fmt: skip


def counters_of(x):
    """Zeros, in each call: a captured graph starts with them, too."""
    return x.new_zeros(COUNTERS + queue_programs(x.device), dtype=torch.int64)


def workspace_of(x, parts: int = 0, candidates: int = 0, width: int = 0, top: int = 1):
    """See queue.py. Without parts: that of a scan of all rows."""
    (H, N, _), rows = x.shape, sizes(x.device).scan[0]
    before = workspace_bytes(H * padded_rows(N), parts, candidates, width) if parts else 0
    return x.new_empty(before + 12 * queue_programs(x.device) * rows * top, dtype=torch.uint8), before


def finish(x, codebook, mask, metric, indices, distances, work, best_at, counters, candidates=0, top=1) -> None:
    """The rows queued, or without candidates all rows."""
    (H, N, D), K = x.shape, codebook.shape[1]
    queued, size, programs = candidates > 0, sizes(x.device), queue_programs(x.device)
    decided = size.decide * 16 // max(candidates, 16)
    # Two programs a processor. The loop over ranks would spill, and in Triton 3.6 what it makes of D = 1.
    registers = 128 if top == 1 and D > 1 else None
    finish_kernel[(programs,)](
        x, codebook, None if queued else mask, indices, distances, work, counters, H, N, padded_rows(N), K, D, top,
        best_at // 128, *strides(x, 3), *strides(codebook, 3), *strides(None if queued else mask, 2),
        metric == "cosine", queued, not queued or H == 1, ENTRY, COUNTERS, max(candidates, 1), decided, *size.scan,
        1 << (programs - 1).bit_length(), enable_fp_fusion=False, num_warps=8, maxnreg=registers,
    )  # fmt: skip
