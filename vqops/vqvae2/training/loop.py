"""The loop of both trainings: steps, rows of metrics, validations, checkpoints, and when to stop."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.progress import Progress
from vqops.vqvae2.training.interruption import GivenUp, Interruption, interruption
from vqops.vqvae2.training.meters import Meter
from vqops.vqvae2.training.optimization import learning_rate, set_learning_rate
from vqops.vqvae2.training.processes import Stopping, is_first

ROW_EVERY = 10  # steps between two rows of metrics


class Training(ABC):
    """A training as the loop sees it."""

    module: nn.Module
    optimizer: Optimizer
    options: Any  # with steps, lr, warmup, grad_clip and eval_every
    progress: Progress
    meter: Meter  # the first of its figures is the loss, which must stay finite
    schedule: str  # of the learning rate
    go_on: str  # the command that goes on with this training
    finished = False  # whether more steps would not help
    interrupted = Interruption()  # that of the loop it is in

    @abstractmethod
    def loss(self, batch: Any, step: int) -> Tensor:
        """The loss [] of a batch, which the meter takes in too."""

    @abstractmethod
    def validate(self, step: int) -> dict[str, float]:
        """Metrics on held-out data, with names that begin with val_."""

    @abstractmethod
    def record(self, row: dict[str, float]) -> None:
        """Write and show a row of metrics. Called in the first process only."""

    def after_step(self, step: int) -> None:  # noqa: B027  for those who need it, as save is
        """Called when the parameters have moved."""

    def save(self, step: int, last: bool) -> None:  # noqa: B027
        """Write a checkpoint if one is due, as it is after the last step. Called in the first process only."""


def run_steps(training: Training, batches: Iterable[Any], first_step: int = 0) -> Interruption:
    """Train until the batches end, a signal asks to stop, or more steps would not help. Returns what asked, if any.

    Raises InputError if the loss is no longer finite, or if a batch cannot be loaded: then with a checkpoint.
    """
    options, parameters = training.options, list(training.module.parameters())
    stopping, stop, step = Stopping(first_step), False, first_step
    with training.progress, interruption() as interrupted:
        training.interrupted = interrupted
        for step, batch in loaded(batches, training, first_step):
            rate = learning_rate(options.lr, training.schedule, step, options.steps, options.warmup)
            set_learning_rate(training.optimizer, rate)
            loss = training.loss(batch, step)
            training.optimizer.zero_grad()
            loss.backward()
            if options.grad_clip:
                nn.utils.clip_grad_norm_(parameters, options.grad_clip)
            training.optimizer.step()
            training.after_step(step)
            training.progress.step(step)
            validation_is_due = step % options.eval_every == 0 or step == options.steps
            row_is_due = step % ROW_EVERY == 0 or validation_is_due
            stop = stopping.agreed(step, interrupted.is_set(), row_is_due, parameters[0].device)
            if row_is_due or stop:
                row = {"step": step, **training.meter.row()}
                if not math.isfinite(value := row[training.meter.names[0]]):
                    reason = f" {options.lr} is too high for this data"
                    raise InputError(f"the loss is {value} at step {step}: ", Field("lr"), reason)
                if validation_is_due and not stop:
                    try:
                        row |= training.validate(step)
                    except GivenUp:
                        stop = True
                    except InputError as error:
                        if is_first():
                            training.record(row)
                        raise stopped(error, training, step) from error
                    training.meter.restart()
                if is_first():
                    training.record(row)
            if is_first():
                training.save(step, last=stop or step == options.steps)
            if stop or training.finished:
                break
    ended = step >= options.steps or training.finished
    if interrupted.by_scheduler or (stop and not ended):
        reached = f"after step {step} of {options.steps}"
        training.progress.say(f"interrupted by {interrupted.cause} {reached}; go on: {training.go_on}")
    return interrupted


def loaded(batches: Iterable[Any], training: Training, first_step: int) -> Iterator[tuple[int, Any]]:
    """The steps with their batches. Of one that cannot be loaded the run is told how to go on, from a checkpoint."""
    step = first_step
    try:
        for batch in batches:
            yield (step := step + 1), batch
    except InputError as error:
        raise stopped(error, training, step) from error


def stopped(error: InputError, training: Training, step: int) -> InputError:
    """The error with how to go on: from a checkpoint at this step if this process writes them, else from the last."""
    if not is_first():
        return InputError(*error.args, f"; go on: {training.go_on}")
    if step:
        training.save(step, last=True)
    return InputError(*error.args, f"; stopped after step {step}, go on: {training.go_on}")
