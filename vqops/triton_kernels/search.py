"""Search: the nearest codes of each row, certified.

Rows are rounded to fp16 (rows.py) and screened against the prepared codebook (screen.py, screen_topk.py); what the
bounds leave open is queued (queue.py). Rows with few candidates are decided among these in float64 (decide.py), the
others are compared with every code (scan.py), by programs of a fixed grid (finish.py), so that nothing waits for the
host. bound.py has the bounds, docs/exactness.md the proof.
"""

import torch
from torch import Tensor

from vqops.triton_kernels.codebook import prepare
from vqops.triton_kernels.finish import counters_of, finish, workspace_of
from vqops.triton_kernels.layout import padded_dimensions
from vqops.triton_kernels.queue import COUNTERS
from vqops.triton_kernels.screen import CANDIDATES, parts_of, screen, stored_width
from vqops.triton_kernels.screen_topk import candidates_of, screen_topk


def search(x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, prepared: Tensor | None):
    """Indices [H, N], and the counters: rows queued for a decision, rows scanned, rows without a code."""
    (H, N, D), K = x.shape, codebook.shape[1]
    indices = x.new_empty((H, N), dtype=torch.int64)
    counters = counters_of(x)
    if indices.numel() == 0:
        return indices, counters
    with torch.cuda.device_of(x):
        if torch.float64 in (x.dtype, codebook.dtype):
            finish(x, codebook, mask, metric, indices, None, *workspace_of(x), counters)
            return indices, counters
        packed = prepare(codebook, metric) if prepared is None else prepared
        parts = parts_of(H, N, K, D, x.device)
        work, best_at = workspace_of(x, parts, CANDIDATES, stored_width(D))
        screen(x, codebook, packed, mask, metric, work, indices, counters, parts)
        finish(x, codebook, mask, metric, indices, None, work, best_at, counters, CANDIDATES)
    return indices, counters


def nearest(x, codebook, mask=None, metric="euclidean", prepared=None):
    return search(x, codebook, mask, metric, prepared)[0]


def nearest_topk(x, codebook, k, mask=None, metric="euclidean", prepared=None):
    H, N, D = x.shape
    indices = x.new_full((H, N, k), -1, dtype=torch.int64)
    distances = x.new_full((H, N, k), torch.inf, dtype=torch.promote_types(x.dtype, torch.float32))
    counters = counters_of(x)
    if indices.numel() == 0:
        return indices, distances
    with torch.cuda.device_of(x):
        if torch.float64 in (x.dtype, codebook.dtype):
            finish(x, codebook, mask, metric, indices, distances, *workspace_of(x, top=k), counters, top=k)
            return indices, distances
        packed = prepare(codebook, metric) if prepared is None else prepared
        candidates = candidates_of(k)
        work, best_at = workspace_of(x, 1, candidates, padded_dimensions(D), k)
        screen_topk(x, codebook, packed, mask, metric, work, distances, counters, k)
        finish(x, codebook, mask, metric, indices, distances, work, best_at, counters, candidates, k)
    return indices, distances


def search_statistics(x, codebook, metric="euclidean"):
    indices, counters = search(x, codebook, None, metric, None)
    counters = counters[:COUNTERS]
    return torch.cat([indices.numel() - counters.sum(0, keepdim=True), counters])
