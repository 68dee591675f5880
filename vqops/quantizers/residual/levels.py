"""Level by level: each quantizes what the levels before have left."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vqops.quantizers.codebook.random_rows import rows_at
from vqops.quantizers.codebook.steps import Step
from vqops.quantizers.interface.quantizing import Call
from vqops.quantizers.residual.implicit_codebook import ImplicitCodes
from vqops.quantizers.vector_quantize import VectorQuantize

# Vectors of a level's input: level, rows [1, K] -> [1, K, D].
InputRows = Callable[[int, Tensor], Tensor]


class Levels(NamedTuple):
    """Rows quantized by all levels."""

    quantized: Tensor  # [1, N, D]
    indices: Tensor  # [1, N, Q]
    losses: Tensor  # [Q]; with targets the sum of their mean cross entropies ()
    steps: list[Step]  # of the levels in turn


class Way(NamedTuple):
    """What leads from level to level."""

    layers: Sequence[VectorQuantize]
    networks: Sequence[ImplicitCodes | None]  # that move a level's codes
    quant_grad_frac: float
    shared: bool  # whether all layers have one codebook

    def of_level(self, level: int, call: Call, total: Tensor) -> Call:  # total [1, N, D], the codes so far
        network = self.networks[level]
        return call if network is None else call._replace(network=(network, total))

    def passed_on(self, quantized: Tensor) -> Tensor:
        """What is subtracted of a row, with so much of its gradient."""
        fixed = quantized.detach()
        return fixed if self.quant_grad_frac == 0 else fixed + self.quant_grad_frac * (quantized - fixed)


def quantize_in_turn(
    way: Way,
    rows: Tensor,  # [1, N, D]
    mask: Tensor | None,  # [1, N] bool
    positions: tuple[int, ...],
    calls: Sequence[Call],
    levels: int | Tensor,  # how many are used
    targets: Tensor | None = None,  # [1, N, Q]
) -> Levels:
    """r_0 = x, r_{l+1} = r_l - c of level l, in float32 (float64 for float64 x); quantized is the sum of all c."""
    count = len(way.layers)
    used = count if isinstance(levels, Tensor) else levels
    residual = rows.to(torch.promote_types(rows.dtype, torch.float32))
    total, inputs, indices, losses, steps = torch.zeros_like(residual), [], [], [], []
    for level in range(used):
        layer, call, kept = way.layers[level], calls[level], mask
        if isinstance(levels, Tensor):
            kept = (level < levels).expand(rows.shape[:2]) if mask is None else mask & (level < levels)
        call = way.of_level(level, call, total)
        goal = None if targets is None else targets[..., level]
        found = layer._quantize(residual, kept, positions, call, goal)
        if way.shared and layer._codebook.replaces_dead:
            inputs.append(residual.detach())
        indices.append(found.indices)
        losses.append(torch.where(level < levels, found.loss, 0) if isinstance(levels, Tensor) else found.loss)
        steps += [] if found.step is None else [found.step]
        residual = residual - way.passed_on(found.quantized)
        total = total + found.quantized
    indices += [torch.full_like(indices[0], -1)] * (count - used)
    if targets is None:
        losses = torch.stack([*losses, *[torch.zeros_like(losses[0])] * (count - used)])
    else:
        losses = torch.stack(losses).sum()
    steps = of_one_codebook(steps, lambda level, row: rows_at(inputs[level], row)) if way.shared else steps
    return Levels(total, torch.stack(indices, -1), losses, steps)


def of_one_codebook(steps: list[Step], input_rows: InputRows) -> list[Step]:
    """The steps of levels that share a codebook: its averages move level by level, its codes once, and dead codes
    restart from the rows of any level."""
    if not steps:
        return steps
    steps = [step._replace(moves=False, rows_at=None) for step in steps]
    codebook = steps[-1].codebook
    indices = torch.stack([step.indices for step in steps], -1).flatten(1)  # [1, N levels]
    rows = partial(rows_of_any_level, len(steps), input_rows) if codebook.replaces_dead else None
    steps[-1] = steps[-1]._replace(indices=indices, rows_at=rows, moves=codebook.averages())
    return steps


def rows_of_any_level(levels: int, input_rows: InputRows, row: Tensor) -> Tensor:
    level, row = row % levels, row // levels
    vectors = input_rows(0, row)
    for other in range(1, levels):
        vectors = torch.where((level == other).unsqueeze(-1), input_rows(other, row), vectors)
    return vectors
