"""`torchrun -m vqops train`: two processes with half the batch each are one with the whole."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("tyro")
pytest.importorskip("safetensors")

from vqops.vqvae2 import TrainOptions, train
from vqops.vqvae2.files.config_file import read_options, written

OPTIONS = TrainOptions(
    steps=6,
    batch_size=8,
    channels=8,
    codebook_size=16,
    code_dim=4,
    lr=1e-3,
    eval_every=3,
    checkpoint_every=3,
    grad_clip=0.1,
    weight_ema=0.9,
    data="images.npy",
    device="cpu",
)


def torchrun(folder: Path, *flags: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vqops"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "train", *flags], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path, str]:
    """The run of one process, that of two, and what they said."""
    folder = tmp_path_factory.mktemp("torchrun")
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8))
    (folder / "options.toml").write_text(written(OPTIONS))
    said = torchrun(folder, "--config", "options.toml", "--out", "two")
    one = train(replace(OPTIONS, data=str(folder / "images.npy"), out=folder / "one"))
    return one, folder / "two", said


def test_two_processes_are_one(runs):
    one, two = (torch.load(run / "train_state.pt", weights_only=True) for run in runs[:2])
    assert one["step"] == two["step"] == OPTIONS.steps
    for name, value in one["module"].items():
        assert_close(two["module"][name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for here, there in zip(one["average"], two["average"], strict=True):
        assert_close(there, here, rtol=1e-3, atol=1e-5)


def test_metrics_are_those_of_the_joint_batch(runs):
    one, two = ([json.loads(line) for line in (run / "metrics.jsonl").open()] for run in runs[:2])
    assert [row["step"] for row in two] == [3, 6]
    for here, there in zip(one, two, strict=True):
        del here["images_per_second"], there["images_per_second"]
        assert there == pytest.approx(here, rel=1e-3)


def test_only_the_first_process_speaks_and_writes(runs):
    _, two, said = runs
    assert said.count("curves: ") == 1
    assert sorted(set(os.listdir(two)) - {"tensorboard"}) == [
        ".lock", ".writer",
        "config.toml", "curves.png", "metrics.jsonl", "model.safetensors", "reconstructions.png", "train_state.pt",
    ]  # fmt: skip


@pytest.mark.slow  # two more starts of two processes; resuming itself is tested with one
def test_two_processes_resume(runs):
    """With the flags of the run read from its folder."""
    _, two, _ = runs
    torchrun(two.parent, "--resume", "two", "--steps", "8")
    assert torch.load(two / "train_state.pt", weights_only=True)["step"] == 8
    assert read_options(two / "config.toml", TrainOptions).steps == 8
