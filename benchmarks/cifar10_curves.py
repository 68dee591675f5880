"""Training curves on CIFAR-10: record ours, and draw them beside the known ones.

    python -m benchmarks.cifar10_curves CIFAR10.npz    train one and two levels, record, draw
    python -m benchmarks.cifar10_curves                draw what is recorded

The .npz holds x_train and x_val, uint8 [N, 32, 32, 3]. A record is JSON lines: what was run where, then the metrics of
`vqops train`. known.jsonl holds points of other implementations: step, MSE on [0, 1] of the training batches,
perplexity.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from matplotlib.figure import Figure

from benchmarks.rows import environment
from vqops.vqvae2 import TrainOptions, train

RESULTS = Path(__file__).parent / "results" / "cifar10_curves"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "cifar10_curves.png"
RECORDS = {1: "one_level.jsonl", 2: "two_levels.jsonl"}


def record(data: str, levels: int) -> None:
    with TemporaryDirectory() as folder:
        options = TrainOptions(
            data=data, data_key="x_train", val_key="x_val", levels=levels, steps=1500, out=Path(folder) / "run"
        )
        metrics = (train(options) / "metrics.jsonl").read_text()
    command = f"vqops train --data CIFAR10.npz --data-key x_train --val-key x_val --levels {levels} --steps 1500"
    description = {"command": command, "threads": torch.get_num_threads(), **environment()}
    (RESULTS / RECORDS[levels]).write_text(json.dumps(description) + "\n" + metrics)


def draw() -> None:
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    errors, perplexities = figure.subplots(1, 2)
    known = [json.loads(line) for line in (RESULTS / "known.jsonl").read_text().splitlines()]
    for curve in known:
        errors.plot(curve["step"], curve["mse"], "o--", alpha=0.6, label=curve["name"])
        for level, values in curve["perplexity"].items():
            perplexities.plot(curve["step"], values, "o--", alpha=0.6, label=f"{curve['name']}, {level}")
    for levels, name in RECORDS.items():
        rows = [json.loads(line) for line in (RESULTS / name).read_text().splitlines()[1:]]
        steps = [row["step"] for row in rows]
        label = f"vqops, {levels} level{'s' * (levels > 1)}"
        line, = errors.plot(steps, [row["mse"] for row in rows], label=label)
        validated = [row for row in rows if "val_mse" in row]
        errors.plot(
            [row["step"] for row in validated],
            [row["val_mse"] for row in validated],
            "x",
            color=line.get_color(),
            label=f"{label}, held out",
        )
        for key in [key for key in rows[0] if key.startswith("perplexity_")]:
            perplexities.plot(steps, [row[key] for row in rows], label=f"{label}, {key.partition('_')[2]}")
    errors.set(title="MSE on [0, 1]", xlabel="step", xlim=(0, 1550), yscale="log", ylim=(0.004, 0.08))
    perplexities.set(title="perplexity of the codes in a batch", xlabel="step", xlim=(0, 1550), ylim=(0, 512))
    for axes in (errors, perplexities):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))  # hides no curve
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for levels in RECORDS:
            record(sys.argv[1], levels)
    draw()
