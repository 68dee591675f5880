"""Beam search: the codes of all levels whose weighted losses add up to least, among the best paths of each level."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vqops.quantizers.codebook.random_rows import rows_at
from vqops.quantizers.codebook.steps import Step, step_of
from vqops.quantizers.interface.quantizing import Call
from vqops.quantizers.residual.implicit_codebook import moved_codes
from vqops.quantizers.residual.levels import Levels, Way, of_one_codebook


def quantize_by_beam(
    way: Way,
    rows: Tensor,  # [1, N, D]
    mask: Tensor | None,  # [1, N] bool
    positions: tuple[int, ...],
    calls: Sequence[Call],  # with topk, the width of the beam
    levels: int,
    weights: Sequence[float],  # of the levels' losses in the score
) -> Levels:
    """After each level the topk best paths of a row go on, after the last the best one is taken.

    A path's score is minus the sum of its losses, weights[l] |r_l - c|^2 / D. The loss is the mean of those of the
    paths that were taken.
    """
    N, D, count = rows.shape[1], rows.shape[2], len(way.layers)
    residual = rows.to(torch.promote_types(rows.dtype, torch.float32)).view(N, 1, D)
    total = torch.zeros_like(residual)
    scores = torch.zeros_like(residual[..., 0])  # [N, paths]
    indices = torch.empty(N, 1, 0, dtype=torch.int64, device=rows.device)
    losses = residual.new_empty(N, 1, 0)
    for level in range(levels):
        paths = residual.shape[1]
        kept = None if mask is None else mask.unsqueeze(-1).expand(1, N, paths).reshape(1, -1)
        call = way.of_level(level, calls[level], total.reshape(1, -1, D))
        found = way.layers[level]._quantize(residual.reshape(1, -1, D), kept, (*positions, paths), call)
        k = found.indices.shape[-1]
        quantized, chosen = found.quantized.view(N, paths, k, D), found.indices.view(N, paths, k)
        loss = found.loss.view(N, paths, k)
        scores = scores.unsqueeze(-1).expand(N, paths, k)
        if weights[level] > 0:
            # A loss that overflows is a bad path, but a path; a place without a code is none.
            scores = (scores - weights[level] * loss).clamp_min(torch.finfo(loss.dtype).min)
        scores = scores.masked_fill(chosen < 0, -torch.inf).flatten(1)
        residual = (residual.unsqueeze(2) - way.passed_on(quantized)).flatten(1, 2)
        total = (total.unsqueeze(2) + quantized).flatten(1, 2)
        indices = longer(indices, chosen)
        losses = longer(losses, loss)
        width = 1 if level == levels - 1 else calls[level].topk
        if scores.shape[1] > width:
            scores, best = scores.topk(width, dim=1)
            residual, total, indices, losses = (at_paths(t, best) for t in (residual, total, indices, losses))
    total, indices, losses = total.view(1, N, D), indices.view(1, N, levels), losses.view(N, levels)
    means = losses.mean(0) if N else losses.sum(0)
    if mask is not None:
        means = losses.masked_fill(~mask.view(N, 1), 0).sum(0) / mask.sum().clamp_min(1)
    steps = path_steps(way, rows, indices, calls)
    missing = count - levels
    indices = torch.cat([indices, indices.new_full((1, N, missing), -1)], -1)
    return Levels(total, indices, torch.cat([means, means.new_zeros(missing)]), steps)


def longer(paths: Tensor, chosen: Tensor) -> Tensor:  # [N, paths, l], [N, paths, k] -> [N, paths k, l + 1]
    before = paths.unsqueeze(2).expand(*chosen.shape, paths.shape[-1])
    return torch.cat([before, chosen.unsqueeze(-1)], -1).flatten(1, 2)


def at_paths(t: Tensor, best: Tensor) -> Tensor:  # [N, paths, ...], [N, width] -> [N, width, ...]
    return t.gather(1, best.unsqueeze(-1).expand(*best.shape, t.shape[-1]))


@torch.no_grad()
def path_steps(way: Way, rows: Tensor, indices: Tensor, calls: Sequence[Call]) -> list[Step]:
    """The steps of the codes, by the paths that were taken."""
    residual, inputs, steps = rows.to(torch.promote_types(rows.dtype, torch.float32)), [], []
    total = torch.zeros_like(residual)
    for level, chosen in enumerate(indices.unbind(-1)):
        codebook = way.layers[level]._codebook
        if way.layers[level]._collects(calls[level]._replace(topk=None)):
            inputs.append(residual)
            steps.append(step_of(codebook, residual, *codebook.statistics(residual, chosen)))
        codes = moved_codes(codebook.codes_at(chosen), total, way.networks[level])
        residual, total = residual - codes, total + codes
    return of_one_codebook(steps, lambda level, row: rows_at(inputs[level], row)) if way.shared else steps
