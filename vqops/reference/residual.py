"""Residual quantization: each level quantizes what the levels before it have left of a row."""

from collections.abc import Callable

import torch
from torch import Tensor

from vqops.reference.blocks import row_blocks
from vqops.reference.code_sums import RUN, add_rows, code_sums
from vqops.reference.distance import squared_error, unit
from vqops.reference.quantize import to_codes
from vqops.reference.quantize_backward import quantize_backward, rotate_back
from vqops.reference.search import nearest


def rows_of_level(
    mask: Tensor | None,  # [H, N] bool
    levels: Tensor | None,  # () int64
    level: int,
    like: Tensor,  # [H, N, ...]
) -> Tensor | None:  # [H, N] bool
    """The rows that a level takes: none from `levels` on."""
    if levels is None:
        return mask
    runs = (levels > level).expand(like.shape[:2])
    return runs if mask is None else mask & runs


def codes_and_rest(
    rest: Tensor,  # [H, N, D], float32 or float64
    start: Tensor,  # [H, N, D], that the error is measured from
    codebook: Tensor,  # [H, K, D]
    indices: Tensor,  # [H, N]
    mask: Tensor | None,  # [H, N] bool
    square: Callable[[Tensor, Tensor], Tensor] = squared_error,
) -> tuple[Tensor, Tensor, Tensor]:  # codes, what they leave [H, N, D] of rest's dtype, error [H, N] float64
    """A subtraction in float64, rounded once: between float32 values it is that of float32, to the bit."""
    wide = rest.double()
    codes, error = to_codes(wide, start, codebook, indices, mask, square)
    return codes.to(rest.dtype), (wide - codes).to(rest.dtype), error


def sum_in_runs(values: Tensor) -> Tensor:  # [H, N] -> [H]
    """Runs of 256 values summed in order, then the runs in order."""
    (H, N), device = values.shape, values.device
    runs = -(-N // RUN)
    head = torch.arange(H, device=device).unsqueeze(1)
    run = (torch.arange(N, device=device) // RUN + runs * head).flatten()
    sums = add_rows(values.new_zeros(H * runs), run, values.flatten())
    return add_rows(values.new_zeros(H), head.expand(H, runs).flatten(), sums)


def residual_quantize(
    x: Tensor,  # [H, N, D]
    codebooks: list[Tensor],  # Q of [H, K_q, D]
    mask: Tensor | None = None,  # [H, N] bool
    levels: Tensor | None = None,  # () int64, the levels that run
    metric: str = "euclidean",
    gradient: str = "straight_through",  # for the backward, as per_level and codebook_error_scale are
    per_level: bool = True,
    with_sums: bool = False,
    codebook_error_scale: float = 0.0,
    normalize: bool = True,
    snapshot: bool = True,  # of the codebooks, for the backward
    prepared: list[Tensor] | None = None,
    *,
    find_nearest: Callable[..., Tensor] = nearest,
    sum_codes: Callable[..., tuple[Tensor, Tensor]] = code_sums,
) -> tuple[Tensor, ...]:
    """r_0 = x, indices_l the nearest codes of r_l, r_{l+1} = r_l - c_l, in float32 (float64 for float64 x).

    quantized [H, N, D] = c_0 + c_1 + ..., indices [H, N, Q], error [H, Q] = sum over rows of |r_l - c_l|^2 in
    `sum_in_runs`, counts [H, sum K] and sums [H, sum K, D] of r_l, codebooks [H, sum K, D], one behind the other.

    Counts, sums and the codebooks have shape [0] unless asked for. For "cosine", error and sums are those of
    `unit(r_l)`, but for normalize=False. A row without a code at a level has none at later ones, and is NaN; levels
    that don't run have index -1 and add nothing.
    """
    H, N, _ = x.shape
    real = torch.promote_types(x.dtype, torch.float32)
    units = metric == "cosine" and normalize
    rest = x.to(real, copy=True, memory_format=torch.contiguous_format)
    total = torch.zeros_like(rest)
    indices = torch.empty(H, N, len(codebooks), dtype=torch.int64, device=x.device)
    error = torch.empty(H, len(codebooks), dtype=real, device=x.device)
    distance = torch.empty(H, N, dtype=torch.float64, device=x.device)
    counted = []
    for level, codebook in enumerate(codebooks):
        kept = rows_of_level(mask, levels, level, x)
        chosen = find_nearest(rest, codebook, kept, metric, None if prepared is None else prepared[level])
        indices[..., level] = chosen
        if with_sums:
            counted.append(sum_codes(unit(rest).float() if units else rest, chosen, codebook.shape[1], None))
        for rows in row_blocks(rest):
            start = unit(rest[:, rows]) if units else rest[:, rows]
            here = None if kept is None else kept[:, rows]
            found = codes_and_rest(rest[:, rows], start, codebook, chosen[:, rows], here)
            codes, rest[:, rows], distance[:, rows] = found
            total[:, rows] += codes
        error[:, level] = sum_in_runs(distance)
    counts, sums = x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.float32)
    if with_sums:
        counts, sums = (torch.cat(parts, 1) for parts in zip(*counted, strict=True))
    old = torch.cat(codebooks, 1) if snapshot else codebooks[0].new_empty(0)
    return total.to(x.dtype), indices, error, counts, sums, old


def residual_quantize_backward(
    grad_quantized: Tensor | None,  # [H, N, D]
    grad_error: Tensor | None,  # [H, Q]
    x: Tensor,  # [H, N, D]
    codebooks: Tensor,  # [H, sum K, D], as they were in the forward
    sizes: list[int],  # K of each level
    indices: Tensor,  # [H, N, Q]
    mask: Tensor | None = None,  # [H, N] bool
    levels: Tensor | None = None,  # () int64
    metric: str = "euclidean",
    gradient: str = "straight_through",
    per_level: bool = True,
    codebook_error_scale: float = 0.0,
    normalize: bool = True,
    x_needed: bool = True,
    codebooks_needed: bool = False,
    *,
    backward_of_level: Callable[..., tuple[Tensor, Tensor]] = quantize_backward,
) -> tuple[Tensor, Tensor]:  # grad_x [H, N, D] and grad_codebooks [H, sum K, D], or [0]
    """grad_x = the sum over levels of what `quantize_backward` sends to r_l, whose derivative by x is 1.

    With per_level=False the gradient of quantized is left out of that sum and passes once: turned as x onto the sum of
    the codes for "rotation", else as it is.
    """
    (H, N, _), real = x.shape, torch.promote_types(x.dtype, torch.float32)
    rest = x.to(real, copy=True, memory_format=torch.contiguous_format)
    passing = None if grad_quantized is None or gradient == "none" else grad_quantized.to(real)
    grad_x = torch.zeros_like(rest) if x_needed else x.new_empty(0)
    total, to_codebooks = torch.zeros_like(rest), []
    for level, codebook in enumerate(codebooks.split(sizes, 1)):
        kept, chosen = rows_of_level(mask, levels, level, x), indices[..., level].contiguous()
        g = passing if per_level else None
        e = None if grad_error is None else grad_error[:, level, None].expand(H, N)
        how = metric, gradient, codebook_error_scale, normalize, x_needed, codebooks_needed
        to_rest, to_codebook = backward_of_level(g, e, rest, codebook, chosen, kept, *how)
        if x_needed:
            grad_x += to_rest
        to_codebooks.append(to_codebook)
        for rows in row_blocks(rest):
            here = None if kept is None else kept[:, rows]
            found = codes_and_rest(rest[:, rows], rest[:, rows], codebook, chosen[:, rows], here)
            codes, rest[:, rows], _ = found
            total[:, rows] += codes
    if passing is not None and x_needed and not per_level:
        for rows in row_blocks(rest):
            g = passing[:, rows]
            if gradient == "rotation":
                given = x[:, rows].to(real)
                g = rotate_back(g, given, total[:, rows], given.norm(dim=-1, keepdim=True))
            grad_x[:, rows] += g if mask is None else g.masked_fill(~mask[:, rows, None], 0)
    to_codebooks = torch.cat(to_codebooks, 1) if codebooks_needed else codebooks.new_empty(0)
    return grad_x.to(x.dtype), to_codebooks
