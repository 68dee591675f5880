"""The figures of docs/benchmarks.md, drawn from rows. The same rows give the same file."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

COLOURS = {
    "vqops": "#0b6e4f",
    "addmm + argmin": "#c1440e",
    "addmm + argmin, TF32": "#e8926b",
    "cdist + argmin": "#d98f2b",
    "faiss IndexFlatL2": "#6c7a89",
    "scikit-learn": "#3b6fb6",
    "vector-quantize-pytorch": "#8e5ea2",
    "flash-kmeans": "#4a4e69",
    "PyTorch, index_add_": "#b03a5b",
    "PyTorch, one-hot": "#5fa8a0",
}

SETS = {
    "amx_bf16": "#0b6e4f",
    "avx512_bf16": "#4c9f7f",
    "avx512": "#d98f2b",
    "avx2": "#3b6fb6",
    "portable": "#8e5ea2",
}


def add_legend(figure: Figure) -> None:
    """Above the panels, each method once."""
    found = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=4, fontsize=8, frameon=False)


def save(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "vqops", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


def timed(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "p50_ms" in row and not row["method"].startswith("ceiling")]


def draw_search(machine, path: Path) -> None:
    """Time of each peer over that of vqops, a group of bars a shape."""
    rows = [row for row in timed(machine.rows("search", "nearest")) if row["dtype"] == "float32"]
    rows = [row for row in rows if not row["method"].startswith(("vqops", "torch.compile"))]
    shapes, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "method"))
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(methods), 1)
    for number, method in enumerate(methods):
        chosen = [row for row in rows if row["method"] == method]
        at = [shapes.index(row["shape"]) + (number - (len(methods) - 1) / 2) * width for row in chosen]
        heights = [row["times_vqops"] for row in chosen]
        axes.bar(at, heights, width, color=COLOURS[method], label=method)
    axes.axhline(1, color=COLOURS["vqops"], linewidth=1.5, label="vqops")
    axes.set_yscale("log")
    axes.set_xticks(range(len(shapes)), [shape.replace(" ", "\n", 1) for shape in shapes], fontsize=8)
    axes.set_ylabel("search time / that of vqops")
    axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50, 100], minor=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylim(min([1, *(row["times_vqops"] for row in rows)]) / 1.5)
    axes.grid(axis="y", alpha=0.3)
    add_legend(figure)
    save(figure, path)


def draw_growth(machine, path: Path) -> None:
    rows = [row for row in timed(machine.rows("growing", "nearest")) if row["axis"] in ("N", "K", "D")]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for panel, axis in zip(figure.subplots(1, 3, sharey=True), ("N", "K", "D"), strict=True):
        chosen = [row for row in rows if row["axis"] == axis]
        for method in methods:
            line = [row for row in chosen if row["method"] == method]
            points, medians = [row[axis] for row in line], [row["p50_ms"] for row in line]
            panel.plot(points, medians, "o-", markersize=3, color=COLOURS[method], label=method)
            low, high = ([row[key] for row in line] for key in ("p20_ms", "p80_ms"))
            panel.fill_between(points, low, high, color=COLOURS[method], alpha=0.2, linewidth=0)
        fixed = [f"{other} = {chosen[0][other]}" for other in "NDK" if other != axis] if chosen else []
        panel.set(xscale="log", yscale="log", xlabel=axis, title=", ".join(fixed))
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("search, ms (band: p20 to p80)")
    add_legend(figure)
    save(figure, path)


def draw_memory(machine, path: Path) -> None:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for panel, op in zip(figure.subplots(1, 2, sharey=True), ("nearest", "training step"), strict=True):
        rows = machine.rows("memory", op)
        largest = max((row["N"] for row in rows), default=0)
        rows = [row for row in rows if row["N"] == largest and row["extra_mb"] > 0]
        methods = list(dict.fromkeys(row["method"] for row in rows))
        for method in methods:
            line = [row for row in rows if row["method"] == method]
            points, extra = [row["K"] for row in line], [row["extra_mb"] for row in line]
            panel.plot(points, extra, "o-", markersize=3, color=COLOURS[method], label=method)
        panel.set(yscale="log", xlabel="K", title=f"{op}, N = {largest}, D = 64")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("peak extra memory, MB")
    add_legend(figure)
    save(figure, path)


def draw_sets(machine, path: Path) -> None:
    """Rates of the sets of kernels and of the peers over that of sgemm, a panel a shape, a group of bars a kind."""
    rows = [row for row in timed(machine.rows("sets")) if "share_of_ceiling" in row]
    shapes, kinds, found = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "data", "method"))
    methods = sorted(found, key=lambda method: not method.startswith("vqops"))
    width = 0.8 / len(methods)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for panel, shape in zip(figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0], shapes, strict=True):
        for number, method in enumerate(methods):
            chosen = [row for row in rows if row["shape"] == shape and row["method"] == method]
            at = [kinds.index(row["data"]) + (number - (len(methods) - 1) / 2) * width for row in chosen]
            name = method.removeprefix("vqops ")
            colour = COLOURS[method] if method in COLOURS else SETS[name]
            panel.bar(at, [row["share_of_ceiling"] for row in chosen], width, color=colour, label=name)
        panel.axhline(1, color="black", linewidth=1)
        panel.set_title(shape, fontsize=8)
        panel.set_xticks(range(len(kinds)), kinds, fontsize=7, rotation=30)
        panel.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("rate / that of sgemm")
    add_legend(figure)
    save(figure, path)
