"""Progress of a run: a bar with its figures on a terminal, one line per validation anywhere else."""

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text


def say(line: str, console: Console | None = None) -> None:
    (console or Console(highlight=False)).print(line, soft_wrap=True, markup=False)


class Progress:
    """A context manager around the steps of a run; a quiet one shows nothing."""

    def __init__(self, steps: int, quiet: bool = False):
        self.console = Console(highlight=False, quiet=quiet)
        self.bar = Bar(
            "training", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn()
        )
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
