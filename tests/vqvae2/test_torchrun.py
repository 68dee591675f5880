"""`torchrun -m vqops train`: two processes with half the batch each are one with the whole."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from promises import REPEATS
from torch.testing import assert_close

pytest.importorskip("tyro")
pytest.importorskip("safetensors")

from vqops.vqvae2 import InputError, TrainOptions, train
from vqops.vqvae2.files.config_file import read_options, written
from vqops.vqvae2.files.run_folder import check_output, created
from vqops.vqvae2.training.train import of_this_attempt

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


def started(folder: Path, *flags: str, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, "--max-restarts", str(restarts), "-m", "vqops", "train", *flags],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(folder: Path, *flags: str) -> str:
    process = started(folder, *flags)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return said


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


# Processes that end


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.02)


def process_of(rank: int, launcher: subprocess.Popen) -> int:
    """The id of one of the launcher's processes."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == launcher.pid and f"\0RANK={rank}\0" in (folder / "environ").read_text():
                return int(folder.name)
        except OSError:  # it has ended
            continue
    raise AssertionError(f"no process of rank {rank}")


LONG = ("--config", "options.toml", "--steps", "60", "--checkpoint-every", "5", "--eval-every", "60")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_job_goes_on_when_a_process_was_killed(runs):
    """With the very same command, and bit for bit as the job that was left alone."""
    folder = runs[1].parent
    torchrun(folder, *LONG, "--out", "alone")
    launcher = started(folder, *LONG, "--out", "killed", restarts=1)
    wait_for(folder / "killed" / "train_state.pt", launcher)
    os.kill(process_of(1, launcher), signal.SIGKILL)
    said, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, errors
    assert re.search(r"^killed: resumed from step \d+$", said, re.MULTILINE)
    assert "vqops train: another process of the job has ended, so this one ends" in errors
    assert "Traceback" not in errors
    ours, theirs = (torch.load(folder / name / "train_state.pt", weights_only=True) for name in ("killed", "alone"))
    assert ours["step"] == 60
    REPEATS.same(ours["module"], theirs["module"])


@pytest.mark.slow
def test_signal_to_the_launcher_saves(runs):
    folder = runs[1].parent
    launcher = started(folder, *LONG[:3], "100000", *LONG[4:6], "--out", "signalled")
    wait_for(folder / "signalled" / "train_state.pt", launcher)
    launcher.terminate()
    said, _ = launcher.communicate(timeout=60)
    step = torch.load(folder / "signalled" / "train_state.pt", weights_only=True)["step"]
    assert f"interrupted by SIGTERM after step {step} of 100000; go on: vqops train --resume signalled\n" in said


def test_what_a_job_that_is_started_again_does(runs, tmp_path, monkeypatch):
    """It goes on in the folder that it began, and takes no other job's for its own."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    run = tmp_path / "run"
    options = TrainOptions(out=run, steps=OPTIONS.steps)
    assert of_this_attempt(options) == options
    with pytest.raises(InputError, match=r"^out is needed with torchrun --max-restarts"):
        of_this_attempt(TrainOptions())
    with created(run):
        pass
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert of_this_attempt(options).overwrite  # it was killed before it had written its options
    (run / "config.toml").write_text(written(OPTIONS))
    again = of_this_attempt(replace(OPTIONS, out=run, overwrite=True))
    assert (again.resume, again.lr) == (run, OPTIONS.lr)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert of_this_attempt(options) == options
    with pytest.raises(InputError, match="is not empty"):
        check_output(run)
