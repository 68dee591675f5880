"""What a command says while it works: a bar with the time left on a terminal, a line now and then anywhere else."""

import time
from collections.abc import Collection, Iterator
from datetime import timedelta
from typing import TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

Batch = TypeVar("Batch")
LINE_EVERY = 60.0  # seconds, where there is no terminal


def say(line: str, console: Console | None = None) -> None:
    line = line.encode(errors="replace").decode()  # names of files need not be UTF-8
    (console or Console(highlight=False)).print(line, soft_wrap=True, markup=False)


def bar_of(what: str, console: Console | None = None, **options: bool) -> Bar:
    columns = what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn()
    return Bar(*columns, console=console, **options)


class Counting:
    """A context manager around work on `total` things, of which `done` are done already."""

    def __init__(self, what: str, total: int, done: int = 0, quiet: bool = False):
        self.what, self.total, self.first, self.quiet = what, total, done, quiet
        self.console = Console(highlight=False, quiet=quiet)
        self.bar = bar_of(what, self.console, transient=True, disable=quiet or not self.console.is_terminal)
        self.task = self.bar.add_task(what, total=total, completed=done)

    def __enter__(self) -> "Counting":
        self.started = self.said = time.monotonic()
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def reach(self, done: int) -> None:
        """Show that so many are done."""
        self.bar.update(self.task, completed=done)
        now = time.monotonic()
        if now - self.said > LINE_EVERY and not self.console.is_terminal and self.first < done < self.total:
            left = (now - self.started) * (self.total - done) / (done - self.first)
            say(f"{self.what}: {done} of {self.total}, {timedelta(seconds=round(left))} left", self.console)
            self.said = now


def counted(what: str, batches: Collection[Batch]) -> Iterator[Batch]:
    """The batches one after the other, counted on screen."""
    with Counting(what, len(batches)) as counting:
        for done, batch in enumerate(batches, start=1):
            yield batch
            counting.reach(done)


class Progress:
    """A context manager around the steps of a training; a quiet one shows nothing."""

    def __init__(self, steps: int, quiet: bool = False):
        self.console = Console(highlight=False, quiet=quiet)
        self.bar = bar_of("training")
        self.task = self.bar.add_task("training", total=steps)
        self.figures = Text()
        self.live = Live(Group(self.bar, self.figures), console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> "Progress":
        if self.console.is_terminal and not self.console.quiet:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def say(self, line: str) -> None:
        say(line, self.console)

    def step(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def row(self, step: int, figures: str, held_out: str) -> None:
        """Show the figures of a row of metrics; those with a validation stay on screen."""
        self.figures.plain = figures
        if held_out:
            self.say(f"step {step:>6}  {figures}  held-out {held_out}")
