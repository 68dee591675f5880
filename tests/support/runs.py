"""A run of `vqops train` in which every option shows, and whether two runs are the same, bit for bit."""

import json
import os
from pathlib import Path

import torch
from promises import REPEATS

from vqops.vqvae2 import TrainOptions

TINY = TrainOptions(
    steps=8,
    batch_size=4,
    image_size=12,
    channels=8,
    codebook_size=16,
    code_dim=4,
    eval_every=5,
    checkpoint_every=2,
    schedule="cosine",
    warmup=3,
    grad_clip=0.05,
    weight_ema=0.9,
    device="cpu",
)


def state_of(run: Path) -> dict:
    return torch.load(run / "train_state.pt", weights_only=True)


def check_equal(a: object, b: object, where: str = "state") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        REPEATS.same(a, b, where=where)
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            check_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (left, right) in enumerate(zip(a, b, strict=True)):
            check_equal(left, right, f"{where}[{number}]")
    else:
        assert a == b, where


def check_same_run(run: Path, whole: Path) -> None:
    """Weights, averages, optimizer, codebooks, random state; the model file; the steps of the metrics."""
    check_equal(state_of(run), state_of(whole))
    assert "exp_avg" in str(state_of(run)["optimizer"])
    steps, expected = ([json.loads(line)["step"] for line in (x / "metrics.jsonl").open()] for x in (run, whole))
    assert steps == sorted(set(steps))
    assert set(expected) <= set(steps)
    assert {name for name in os.listdir(run) if name.startswith(".")} == {".lock", ".writer"}
