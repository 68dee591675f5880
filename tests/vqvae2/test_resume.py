"""A run that is cut off, anywhere, and resumed ends bit for bit as one that was not."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import processor
import pytest
import torch
from runs import TINY, check_same_run, state_of

pytest.importorskip("safetensors")

from vqops.vqvae2 import InputError, TrainOptions, train
from vqops.vqvae2.files import run_folder
from vqops.vqvae2.files.config_file import read_options
from vqops.vqvae2.training import resume

KILLS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Larger than the crops, and no multiple of the batch, so that the place in the epoch shows."""
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (23, 20, 16), dtype=np.uint8))
    return str(path)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    return train(replace(TINY, data=data, out=tmp_path_factory.mktemp("whole") / "run"))


class Killed(BaseException):
    """Ends a run where it is raised, as a signal would, but leaves the test running."""


@pytest.mark.parametrize(
    "codebook, step",
    [
        ("ema", 3),
        ("gradient", 6),
        *(pytest.param(codebook, 1, marks=pytest.mark.slow) for codebook in ("ema", "gradient")),
        *(pytest.param(codebook, 7, marks=pytest.mark.slow) for codebook in ("ema", "gradient")),
    ],
)
def test_cut_off_run_goes_on_as_if_nothing_had_happened(data, tmp_path, monkeypatch, codebook, step):
    options = replace(TINY, data=data, codebook=codebook)
    whole = train(replace(options, out=tmp_path / "whole"))
    adam_step, calls = torch.optim.Adam.step, []

    def step_and_die(optimizer, *arguments):
        calls.append(optimizer)
        if len(calls) == step:
            raise Killed
        return adam_step(optimizer, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch.optim.Adam, "step", step_and_die)
        train(replace(options, out=tmp_path / "run"))
    torch.rand(step)  # another random state than that of the run
    assert train(replace(options, resume=tmp_path / "run")) == tmp_path / "run"
    check_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("weight_ema", [0.9, 0.0])
def test_interrupted_run_can_be_resumed_and_lengthened(data, tmp_path, weight_ema):
    options = replace(TINY, data=data, schedule="constant", weight_ema=weight_ema)
    shorter = train(replace(options, steps=5, out=tmp_path / "run"))
    train(replace(options, resume=shorter))
    check_same_run(shorter, train(replace(options, out=tmp_path / "whole")))
    assert read_options(shorter / "config.toml", TrainOptions).steps == TINY.steps


@pytest.mark.parametrize("dies_after", ["half the bytes", "all bytes", "the replacement"])
def test_kill_during_a_write_leaves_the_checkpoint_before_or_after(data, whole, tmp_path, monkeypatch, dies_after):
    """At the first checkpoint and a later one; the run loses at most the two steps between checkpoints."""
    save, replaced = torch.save, os.replace

    for victim in (1, 3):
        run, saves = tmp_path / f"run{victim}", []

        def dying_save(state, file, run=run, saves=saves, victim=victim):
            saves.append(state["step"])
            save(state, file)
            file.flush()
            if len(saves) == victim and dies_after != "the replacement":
                if dies_after == "half the bytes":
                    file.truncate(file.tell() // 2)
                written = Path(file.name).read_bytes()
                (run / f".99{victim}.train_state.pt").write_bytes(written)  # a kill cleans nothing up
                raise Killed

        def dying_replace(source, target, saves=saves, victim=victim):
            replaced(source, target)
            if len(saves) == victim and dies_after == "the replacement" and Path(target).name == "train_state.pt":
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(resume.torch, "save", dying_save)
            patch.setattr(run_folder.os, "replace", dying_replace)
            train(replace(TINY, data=data, out=run))
        kept = state_of(run)["step"] if (run / "train_state.pt").exists() else 0
        assert kept == (saves[-1] if dies_after == "the replacement" else (victim - 1) * 2)
        train(replace(TINY, data=data, resume=run))
        check_same_run(run, whole)


KILLER = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
import processor
from vqops.vqvae2 import TrainOptions, train
from vqops.vqvae2.files.config_file import read_options

config, run, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
options = replace(read_options(config, TrainOptions), out=run)
delays, lived = random.Random(0), 0.3
for attempt in range(kills + 1):
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        there = (run / "config.toml").exists()
        train(replace(options, resume=run, out=None) if there else replace(options, overwrite=True))
        os._exit(0)
    if attempt < kills:
        time.sleep(delays.uniform(0, lived))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    lived = min(1.3 * lived, 20)  # so that the run ends on a slow machine too
print(attempt, status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [KILLS, pytest.param(10 * KILLS, marks=pytest.mark.slow)])
def test_killed_many_times(data, whole, tmp_path, kills):
    """kill -9 at random moments, from the first file on; what was forked is a fresh process but for its imports."""
    config = tmp_path / "options.toml"
    config.write_text((whole / "config.toml").read_text())
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(config), str(tmp_path / "run"), str(kills)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env=processor.environment(),
    )
    assert done.returncode == 0, done.stderr
    survived, status = map(int, done.stdout.split())
    assert status == 0, done.stderr
    assert survived >= 2
    check_same_run(tmp_path / "run", whole)


def test_run_cut_off_before_its_pictures_draws_them(data, whole, tmp_path, monkeypatch):
    def die(*arguments):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(import_module("vqops.vqvae2.training.train"), "save_rows", die)
        train(replace(TINY, data=data, out=tmp_path / "run"))
    run = train(replace(TINY, data=data, resume=tmp_path / "run"))
    assert (run / "reconstructions.png").read_bytes() == (whole / "reconstructions.png").read_bytes()


# Refused, with the run as it was


def refused(message: str, **changes) -> None:
    with pytest.raises(InputError, match=message):
        train(replace(TINY, **changes))


def test_what_does_not_fit_the_run_is_refused(data, whole, tmp_path):
    before = {name: (whole / name).read_bytes() for name in os.listdir(whole) if (whole / name).is_file()}
    refused("no run of vqops train is there", data=data, resume=tmp_path)
    refused("has done its 8 steps: name more with steps", data=data, resume=whole)
    refused("has done its 8 steps", data=data, resume=whole, strides=(4, 2))  # the default, by name
    refused("lr is 0.0003 there and cannot change, got 0.1", data=data, resume=whole, lr=0.1, steps=20)
    refused(r"strides is \(4, 2\) there and cannot change, got \(8, 2\)", data=data, resume=whole, strides=(8, 2))
    refused("out .*other is another", data=data, resume=whole, out=tmp_path / "other")
    assert before == {name: (whole / name).read_bytes() for name in before}


def test_damaged_checkpoint_and_other_data_are_refused(data, tmp_path):
    path = tmp_path / "images.npy"
    path.write_bytes(Path(data).read_bytes())
    run = train(replace(TINY, data=str(path), steps=1, out=tmp_path / "run"))
    np.save(path, np.zeros((9, 20, 16), np.uint8))
    refused("written with images 22, now it is 8", data=str(path), resume=run)
    path.write_bytes(Path(data).read_bytes())
    (run / "train_state.pt").write_bytes((run / "train_state.pt").read_bytes()[:500])
    refused("train_state.pt: not a readable checkpoint", data=str(path), resume=run)


def test_a_checkpoint_of_an_earlier_network_is_refused(data, tmp_path):
    run = train(replace(TINY, data=data, steps=1, out=tmp_path / "run"))
    state = torch.load(run / "train_state.pt")
    del state["about"][resume.NETWORK]
    torch.save(state, run / "train_state.pt")
    refused("train_state.pt was written with version of the network 1, now it is 2", data=data, resume=run)


def test_ctrl_c_is_not_lost_between_checkpoints(data, whole, tmp_path, monkeypatch):
    adam_step, calls = torch.optim.Adam.step, []

    def step_and_press_ctrl_c(optimizer, *arguments):
        calls.append(optimizer)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return adam_step(optimizer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", step_and_press_ctrl_c)
        run = train(replace(TINY, data=data, out=tmp_path / "run"))
    assert state_of(run)["step"] == 3
    train(replace(TINY, data=data, resume=run))
    check_same_run(run, whole)
