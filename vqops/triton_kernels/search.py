"""Search: the nearest codes of each row, certified.

Rows are rounded to fp16 (rows.py), screened against the prepared codebook (screen.py, screen_topk.py), and what the
bounds leave open is queued: rows with few candidates are decided among these in float64 (decide.py), the others are
compared with every code (scan.py), by programs of a fixed grid, so that nothing waits for the host. bound.py has the
bounds, docs/exactness.md the proof.
"""

import torch
from torch import Tensor

from vqops.triton_kernels.codebook import prepare
from vqops.triton_kernels.decide import decide
from vqops.triton_kernels.layout import unpack
from vqops.triton_kernels.queue import COUNTERS, LOST
from vqops.triton_kernels.rows import round_rows
from vqops.triton_kernels.scan import scan
from vqops.triton_kernels.screen import screen
from vqops.triton_kernels.screen_topk import screen_topk


def search(x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, prepared: Tensor | None):
    """Indices [H, N], and the counters: rows queued for a decision, rows scanned, rows without a code."""
    H, N, D = x.shape
    indices = x.new_empty((H, N), dtype=torch.int64)
    counters = x.new_zeros(COUNTERS, dtype=torch.int64)
    if indices.numel() == 0:
        return indices, counters
    with torch.cuda.device_of(x):
        if torch.float64 in (x.dtype, codebook.dtype):
            scan(x, codebook, mask, metric, indices, None, None, counters)
            return indices, counters
        packed = unpack(prepare(codebook, metric) if prepared is None else prepared, *codebook.shape)
        rows = round_rows(x, packed, mask, metric, False, indices, counters)
        queue = x.new_empty(H * N, dtype=torch.int64)
        lists = screen(packed, rows, indices, queue, counters, D)
        decide(x, codebook, metric, indices, None, lists, queue, counters)
        scan(x, codebook, None, metric, indices, None, queue, counters)
    return indices, counters


def nearest(x, codebook, mask=None, metric="euclidean", prepared=None):
    return search(x, codebook, mask, metric, prepared)[0]


def nearest_topk(x, codebook, k, mask=None, metric="euclidean", prepared=None):
    H, N, _ = x.shape
    indices = x.new_full((H, N, k), -1, dtype=torch.int64)
    distances = x.new_full((H, N, k), torch.inf, dtype=torch.promote_types(x.dtype, torch.float32))
    counters = x.new_zeros(COUNTERS, dtype=torch.int64)
    if indices.numel() == 0:
        return indices, distances
    with torch.cuda.device_of(x):
        if torch.float64 in (x.dtype, codebook.dtype):
            scan(x, codebook, mask, metric, indices, distances, None, counters, k)
            return indices, distances
        packed = unpack(prepare(codebook, metric) if prepared is None else prepared, *codebook.shape)
        rows = round_rows(x, packed, mask, metric, True, indices, counters)
        queue = x.new_empty(H * N, dtype=torch.int64)
        lists = screen_topk(packed, rows, N, k, queue, counters)
        decide(x, codebook, metric, indices, distances, lists, queue, counters, k)
        scan(x, codebook, None, metric, indices, distances, queue, counters, k)
        lost = (rows.states[:, :N] == LOST.value).unsqueeze(-1)
    return indices, distances.masked_fill_(lost, torch.nan)


def search_statistics(x, codebook, metric="euclidean"):
    indices, counters = search(x, codebook, None, metric, None)
    return torch.cat([indices.numel() - counters.sum(0, keepdim=True), counters])
