"""All levels in one op, for layers that do nothing but search, average and measure their error."""

from collections.abc import Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from vqops.ops.residual_quantize import LARGEST_Q, residual_quantize_rows
from vqops.quantizers.codebook.codebook import Codebook
from vqops.quantizers.codebook.random_rows import rows_at
from vqops.quantizers.codebook.steps import Step, step_of
from vqops.quantizers.interface.quantizing import Call
from vqops.quantizers.residual.levels import Levels, Way, of_one_codebook
from vqops.quantizers.vector_quantize import VectorQuantize


def fits(way: Way, calls: Sequence[Call]) -> bool:
    """Whether the op does all that these layers do, and the same for each."""
    first = way.layers[0]
    return (
        len(way.layers) <= LARGEST_Q
        and way.networks[-1] is None
        and torch._C._functorch.maybe_current_level() is None  # vmap has no rule for lists of tensors
        and (way.quant_grad_frac == 0 or not first.training)
        and all(is_plain(layer, call) for layer, call in zip(way.layers, calls, strict=True))
        and all(alike(layer, call, first, calls[0]) for layer, call in zip(way.layers, calls, strict=True))
    )


def is_plain(layer: VectorQuantize, call: Call) -> bool:
    codebook = layer._codebook
    if type(codebook) is not Codebook or codebook.vq_bridge is not None or not codebook.is_initted:
        return False
    if not layer.training:
        return True
    more = ("sync_update_v", "codebook_diversity_loss_weight", "orthogonal_reg_weight")
    return not (
        (layer.stochastic_sample_codes and call.temperature is not None)
        or layer._optimizes(call)
        or layer.directional_reparam
        or not layer.route_gradients_to_input
        or layer.commitment_use_cross_entropy_loss
        or layer.has_codebook_loss
        or any(layer.numbers.positive[name] for name in more)
    )


def alike(layer: VectorQuantize, call: Call, other: VectorQuantize, other_call: Call) -> bool:
    return (
        layer.training == other.training
        and layer.rotation_trick == other.rotation_trick
        and call.learning == other_call.learning
        and layer._collects(call) == other._collects(other_call)
        and layer._codebook.moved_by_error == other._codebook.moved_by_error
        and layer._codebook.embed.dtype == other._codebook.embed.dtype
    )


def quantize_together(
    way: Way,
    rows: Tensor,  # [1, N, D]
    mask: Tensor | None,  # [1, N] bool
    calls: Sequence[Call],
    levels: int | Tensor,
    per_level: bool,
) -> Levels:
    """`quantize_in_turn` of layers that fit."""
    first, call, training = way.layers[0], calls[0], way.layers[0].training
    books, D = [layer._codebook for layer in way.layers], rows.shape[-1]
    for book in books:
        book.keep_float32_(numbers=training)
    given = rows if training else rows.detach()
    once = {book: book.searched(call.learning, given) for book in dict.fromkeys(books)}
    searched = [once[book] for book in books]
    prepared = [one.prepared for one in searched]
    packed = None if None in prepared else [one.packed for one in prepared]
    used = len(books) if isinstance(levels, Tensor) else levels
    if not isinstance(levels, Tensor):
        levels = None if used == len(books) else torch.full((), used, device=rows.device)  # without a wait
    gradient = "none" if not training else "rotation" if first.rotation_trick else "straight_through"
    collects = first._collects(call)
    found = residual_quantize_rows(
        given,
        [one.codes for one in searched],
        packed,
        mask,
        levels,
        books[0].metric,
        gradient,
        per_level,
        collects,
        float(call.learning and books[0].moved_by_error),
    )
    losses = losses_of(way.layers, found.error[0], rows, mask, D)
    statistics = found.indices, found.counts, found.sums
    steps = steps_of(way, rows.detach(), *statistics, used) if collects else []
    return Levels(found.quantized, found.indices, losses, steps)


def losses_of(layers: Sequence[VectorQuantize], error: Tensor, rows: Tensor, mask: Tensor | None, D: int) -> Tensor:
    """The commitment losses [Q] of the errors [Q]."""
    if not layers[0].training:
        return torch.zeros_like(error)
    count = max(rows.shape[1], 1) if mask is None else mask.sum().clamp_min(1)
    each = zip(layers, (error / (count * D)).unbind(), strict=True)
    losses = torch.stack(
        [
            layer.numbers.times(level, "commitment_weight") if layer._commits else torch.zeros_like(level)
            for layer, level in each
        ]
    )
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and not losses.requires_grad:
        losses.requires_grad_()
    return losses


def steps_of(way: Way, rows: Tensor, indices: Tensor, counts: Tensor, sums: Tensor, used: int) -> list[Step]:
    books = [layer._codebook for layer in way.layers]
    sizes = [book.codebook_size for book in books]
    residuals = partial(residuals_at, rows, [book.embed.detach() for book in books], indices)
    steps = []
    every = zip(books, counts.split(sizes, 1), sums.split(sizes, 1), indices.unbind(-1), strict=True)
    for level, (book, count, total, chosen) in enumerate(islice(every, used)):
        steps.append(step_of(book, partial(residuals, level), chosen, count, total))
    return of_one_codebook(steps, residuals) if way.shared else steps


def residuals_at(
    rows: Tensor,  # [1, N, D]
    codes: Sequence[Tensor],  # [1, K, D] of each level, as they were searched
    indices: Tensor,  # [1, N, Q]
    level: int,
    row: Tensor,  # [1, M]
) -> Tensor:  # [1, M, D]
    """A level's input at some rows, which the op does not keep."""
    residual = rows_at(rows, row).to(torch.promote_types(rows.dtype, torch.float32))
    chosen = rows_at(indices, row).clamp_min(0)
    for before in range(level):
        residual = residual - codes[before][0, chosen[..., before]].to(residual.dtype)
    return residual
