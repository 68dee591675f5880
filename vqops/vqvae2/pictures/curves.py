"""The curves of a training: its metrics over the steps."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vqops.vqvae2.files.run_folder import atomically

ROW = dict[str, float]  # the metrics of a step, by name


@dataclass(frozen=True)
class Panel:
    """One plot: metrics and constants by label, and settings of matplotlib's axes."""

    lines: dict[str, str]  # label by metric; those of a validation are marked
    settings: dict[str, Any]
    constants: dict[str, float] = field(default_factory=dict)
    from_zero: bool = False


def training_panels(rows: list[ROW]) -> tuple[Panel, ...]:
    """MSE, perplexity and share of codes used, each level a line."""
    keys = dict.fromkeys(key for row in rows for key in row)
    perplexity, used = (
        {key: key.removeprefix(name) for key in keys if key.startswith(name)} for name in ("perplexity_", "used_")
    )
    errors = {"mse": "training", "val_mse": "held out"}
    return (
        Panel(errors, {"title": "error of the images", "ylabel": "MSE, values in [0, 1]", "yscale": "log"}),
        Panel(perplexity, {"title": "codes in use, in a batch", "ylabel": "perplexity"}, from_zero=True),
        Panel(used, {"title": "codes used since the last row", "ylabel": "share of K", "ylim": (0, 1.05)}),
    )


def save_curves(path: Path, rows: list[ROW], panels: tuple[Panel, ...], size: tuple[float, float] = (12, 3.6)) -> None:
    """Write a PNG of `size` inches with the panels beside each other."""
    save_figure(path, curves(rows, panels, size), dpi=110)


def curves(rows: list[ROW], panels: tuple[Panel, ...], size: tuple[float, float] = (12, 3.6)) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        axes.set(xlabel="step", **panel.settings)
        for key, label in panel.lines.items():
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="." if key.startswith("val") else None)
        for (label, value), style in zip(panel.constants.items(), (":", "--"), strict=False):
            axes.axhline(value, color="grey", linestyle=style, label=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        if panel.from_zero:  # last: from then on it keeps its upper end
            axes.set_ylim(bottom=0)
    return figure


def save_figure(path: Path, figure: Figure, dpi: int) -> None:
    with atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
