"""What a run shows: a progress bar with its figures on a terminal, one line per validation anywhere else."""

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from vqops.vqvae2.metrics import psnr


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
        self.console.print(line, soft_wrap=True, markup=False)

    def step(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def row(self, row: dict[str, float]) -> None:
        """Show a row of metrics; one with a validation stays on screen."""
        self.figures.plain = summary(row)
        if "val_mse" in row:
            held_out = f"held-out mse {row['val_mse']:.5f} ({psnr(row['val_mse']):.1f} dB)"
            self.say(f"step {row['step']:>6}  {self.figures.plain}  {held_out}")


def summary(row: dict[str, float]) -> str:
    levels = [key.removeprefix("used_") for key in row if key.startswith("used_")]
    codes = "  ".join(f"{name} {row[f'perplexity_{name}']:.0f} ({row[f'used_{name}']:.0%} used)" for name in levels)
    codes = f"perplexity {codes}  " if codes else ""
    return f"loss {row['loss']:.4f}  mse {row['mse']:.5f}  {codes}{row['images_per_second']:.0f} images/s"
