"""Each row's nearest code, its error and the sums by code."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vqops.reference.blocks import row_blocks
from vqops.reference.code_sums import code_sums
from vqops.reference.distance import squared_error, unit
from vqops.reference.search import nearest


def gather(codebook: Tensor, indices: Tensor) -> Tensor:  # [H, K, D], [H, N] -> [H, N, D]
    """codebook[h, indices[h, n]]; index -1 reads code 0, for the caller to overwrite."""
    H, K, D = codebook.shape
    code = indices.clamp_min(0) + K * torch.arange(H, device=indices.device).unsqueeze(1)
    return codebook.reshape(H * K, D).index_select(0, code.flatten()).view(*indices.shape, D)


def lost_rows(indices: Tensor, mask: Tensor | None) -> Tensor:  # [H, N], [H, N] bool -> [H, N, 1] bool
    """Rows that should have a code and have none: they are not finite, or no code is."""
    lost = indices < 0 if mask is None else (indices < 0) & mask
    return lost.unsqueeze(-1)


def to_codes(
    x: Tensor,  # [H, N, D]
    start: Tensor,  # [H, N, D], that the error is measured from
    codebook: Tensor,  # [H, K, D]
    indices: Tensor,  # [H, N]
    mask: Tensor | None,  # [H, N] bool
    square: Callable[[Tensor, Tensor], Tensor] = squared_error,
) -> tuple[Tensor, Tensor]:  # quantized [H, N, D], dtype of x; error [H, N] float64
    """The codes of the indices and the rows' distances to them; without an index 0, or NaN for a lost row."""
    q, lost = gather(codebook, indices), lost_rows(indices, mask)
    absent = torch.zeros_like(lost, dtype=torch.float64).masked_fill(lost, math.nan)
    quantized = q.to(x.dtype).where(indices.unsqueeze(-1) >= 0, absent.to(x.dtype))
    return quantized, square(start, q).where(indices >= 0, absent.squeeze(-1))


def quantize(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    mask: Tensor | None = None,  # [H, N] bool
    weight: Tensor | None = None,  # [H, N], for the sums
    metric: str = "euclidean",
    gradient: str = "straight_through",  # for the backward, as codebook_error_scale is
    with_sums: bool = False,
    codebook_error_scale: float = 0.0,
    normalize: bool = True,
    snapshot: bool = True,  # of the codebook, for the backward
    prepared: Tensor | None = None,
    *,
    find_nearest: Callable[..., Tensor] = nearest,
    sum_codes: Callable[..., tuple[Tensor, Tensor]] = code_sums,
) -> tuple[Tensor, ...]:
    """quantized [H, N, D] = c[indices], indices [H, N], error [H, N] = |x - quantized|^2, counts, sums, codebook.

    Counts, sums and the codebook have shape [0] unless asked for. For "cosine", error and sums are those of `unit(x)`,
    but for normalize=False.
    """
    units = metric == "cosine" and normalize
    indices = find_nearest(x, codebook, mask, metric, prepared)
    quantized = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    error = torch.empty(indices.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for rows in row_blocks(x):
        start = unit(x[:, rows]) if units else x[:, rows]
        kept = None if mask is None else mask[:, rows]
        quantized[:, rows], error[:, rows] = to_codes(x[:, rows], start, codebook, indices[:, rows], kept)
    counts, sums = x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.float32)
    if with_sums:
        rows = unit(x).float() if units else x
        counts, sums = sum_codes(rows, indices, codebook.shape[1], weight)
    old = codebook.clone(memory_format=torch.contiguous_format) if snapshot else codebook.new_empty(0)
    return quantized, indices, error, counts, sums, old
