"""The step of codebooks that a batch makes: of one, or of all levels of a residual quantizer together."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vqops.dispatch.calls import runs_itself
from vqops.dispatch.library import takes_cpu_kernel
from vqops.quantizers.codebook.codebook import Codebook, UpdateWeight
from vqops.quantizers.codebook.failure import joined
from vqops.quantizers.codebook.random_rows import Choice, choose_rows, rows_at
from vqops.quantizers.codebook.ranks import num_ranks, sum_over_ranks


class Step(NamedTuple):
    """What a batch says of a codebook, for `take_steps_`."""

    codebook: Codebook
    counts: Tensor  # [H, K]
    sums: Tensor  # [H, K, D]
    indices: Tensor  # [H, N], -1 for rows that dead codes must not restart from
    rows_at: Callable[[Tensor], Tensor] | None  # these, [H, K] -> [H, K, D]; None: no code is replaced
    moves: bool  # whether the codes follow the averages
    weight: UpdateWeight | None = None
    accumulate: bool = False


@torch.no_grad()
def take_steps_(steps: Sequence[Step]) -> None:
    """Take a batch's statistics of all ranks into the averages, the codes from these, and replace dead codes.

    A codebook that no rank has a valid row for stays as it is: a batch of nothing, or of nothing but NaN, is no
    evidence that codes die. Everything that can fail comes before any change. With `accumulate`, this rank's statistics
    are only kept, and the next step of the codebook adds them to its own. One collective for all codebooks, and a small
    one more for those that replace dead codes; all of them exchange, or none (`sync`).
    """
    due, kept = [], []
    for step in with_pending(steps):
        (kept if step.accumulate else due).append(step)
    if due:
        move_(due)
    for step in kept:
        step.codebook.pending = step.counts.float(), step.sums


def with_pending(steps: Sequence[Step]) -> list[Step]:
    """The steps with sums of rows `as_codes`, and those that waited; without those that say nothing."""
    waiting = {step.codebook: step.codebook.pending for step in steps}
    had = {codebook for codebook, pending in waiting.items() if pending is not None}
    told = []
    for step in steps:
        counts, sums = step.counts, step.codebook.sums_of_codes(step.counts, step.sums)
        if (before := waiting.pop(step.codebook, None)) is not None:
            counts, sums = counts + before[0], sums + before[1]
        elif step.indices.shape[1] == 0 and num_ranks(step.codebook.sync) == 1 and step.codebook not in had:
            continue
        told.append(step if sums is step.sums else step._replace(counts=counts, sums=sums))
    return told


def move_(steps: Sequence[Step]) -> None:
    sync = steps[0].codebook.sync
    replacing = [step for step in steps if step.rows_at is not None]
    chosen, vectors = [], []
    if replacing:
        valid = [step.indices >= 0 for step in replacing]
        chosen = choose_rows(valid, [step.counts.shape[1] for step in replacing], sync)
        vectors = [vectors_of(step, choice) for step, choice in zip(replacing, chosen, strict=True)]
    counts, sums = [step.counts for step in steps], [step.sums for step in steps]
    summed = sum_over_ranks(*counts, *sums, *vectors, dtype=torch.float32, sync=sync)
    counts, sums, vectors = summed[: len(steps)], summed[len(steps) : 2 * len(steps)], summed[2 * len(steps) :]
    scales = [scale_of(*one) for one in zip(steps, counts, sums, strict=True)]
    books = {step.codebook for step in steps}
    with restored_if_one_fails(books):
        for step, *statistics in zip(steps, counts, sums, scales, strict=True):
            step.codebook.average_(*statistics, step.moves)
        for step, choice, vector in zip(replacing, chosen, vectors, strict=True):
            step.codebook.replace_dead_(vector, choice.distinct)
    for book in books:
        if book.pending is not None:  # a Module takes long to set an attribute
            book.pending = None


def restored_if_one_fails(books: set[Codebook]) -> AbstractContextManager:
    """One codebook moves by an op that does all or nothing; of several, some would have moved when one has no memory.
    The compiled one on a CPU needs none, and copies would take as long as the step where codes outnumber rows."""
    if len(books) == 1 or all(takes_cpu_kernel(book.embed) for book in books):
        return nullcontext()
    return joined([book.restored_on_failure() for book in books])


def vectors_of(step: Step, choice: Choice) -> Tensor:  # [H, K, D] float32, zero where another rank has the row
    if step.indices.shape[1] == 0:
        return torch.zeros_like(step.sums)
    return step.rows_at(choice.row).float().masked_fill(~choice.mine.unsqueeze(-1), 0)


def step_of(
    codebook: Codebook,
    x: Tensor | Callable[[Tensor], Tensor],  # [H, N, D], or its rows at [H, K] -> [H, K, D]
    indices: Tensor,  # [H, N], -1 for the rows that take no part
    counts: Tensor,  # [H, K]
    sums: Tensor,  # [H, K, D]
    ema_update: bool | None = None,
    weight: UpdateWeight | None = None,
    accumulate: bool = False,
) -> Step:
    """The step of a codebook that was searched with x."""
    moves = codebook.averages(ema_update) and not codebook.manual_ema_update
    rows = None
    if codebook.replaces_dead:
        rows = partial(rows_at, codebook.as_codes(x)) if isinstance(x, Tensor) else x
    return Step(codebook, counts, sums, indices, rows, moves, weight, accumulate)


def scale_of(step: Step, counts: Tensor, sums: Tensor) -> Tensor | None:  # [H, K]
    """How far each code's averages move: not at all in a head without a row. None where all move all the way."""
    weight = step.weight
    if weight is None and all_have_rows(step.indices):
        return None
    scale = counts.any(-1, keepdim=True).expand_as(counts)  # bool: ema_update_ takes it as it is
    if weight is None:
        return scale
    weight = weight if isinstance(weight, Tensor) else weight(sums, counts.float())
    step.codebook.check_update_weight(weight)
    return scale * weight.detach().float()


def all_have_rows(indices: Tensor) -> bool:  # [H, N]
    """Whether each head has a row with a code, as far as the host sees at once: on a CPU, by their first rows."""
    readable = type(indices) is Tensor and indices.device.type == "cpu" and runs_itself()  # no fake one
    return readable and indices.shape[1] > 0 and min(indices.select(1, 0).tolist()) >= 0
