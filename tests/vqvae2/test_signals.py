"""Ctrl-C, SIGTERM and SIGUSR1: the step is finished, the checkpoint saved, and the run goes on from it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import processor
import pytest
import torch
from promises import REPEATS

pytest.importorskip("safetensors")

from vqops.vqvae2 import CompareOptions, InputError, TrainOptions, compare, train
from vqops.vqvae2.training import processes
from vqops.vqvae2.training.interruption import STOP_SIGNALS, GivenUp, Interruption, exit_code, interruption
from vqops.vqvae2.training.processes import Stopping

TINY = TrainOptions(
    steps=8, batch_size=4, image_size=12, channels=8, codebook_size=16, code_dim=4, eval_every=4, device="cpu"
)
SIZES = ("batch_size", "image_size", "channels", "codebook_size", "code_dim", "device")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (23, 16, 16), dtype=np.uint8))
    return str(path)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    return train(replace(TINY, data=data, out=tmp_path_factory.mktemp("whole") / "run"))


def step_of(run: Path) -> int:
    return torch.load(run / "train_state.pt", weights_only=True)["step"]


def check_same_weights(run: Path, whole: Path) -> None:
    ours, theirs = (torch.load(folder / "train_state.pt", weights_only=True) for folder in (run, whole))
    REPEATS.same(ours["module"], theirs["module"])
    REPEATS.same(ours["optimizer"]["state"], theirs["optimizer"]["state"])


def signalling(patch, number: int, step: int) -> None:
    """The process gets the signal in the middle of this step."""
    adam_step, calls = torch.optim.Adam.step, []

    def step_and_signal(optimizer, *arguments):
        calls.append(optimizer)
        if len(calls) == step:
            signal.raise_signal(number)
        return adam_step(optimizer, *arguments)

    patch.setattr(torch.optim.Adam, "step", step_and_signal)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_signal_saves_and_the_run_goes_on(number, data, whole, tmp_path, monkeypatch, capsys):
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    with monkeypatch.context() as patch:
        signalling(patch, number, 3)
        run = train(replace(TINY, data=data, out=tmp_path / "run"))
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    assert step_of(run) == 3
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    said = capsys.readouterr().out
    assert said.count(f"interrupted by {name} after step 3 of 8; go on: vqops train --resume {run}\n") == 1
    assert (run / "curves.png").exists() == (number == signal.SIGINT)  # a scheduler does not wait for pictures
    assert exit_code() == (0 if number == signal.SIGINT else 128 + number)
    train(TrainOptions(resume=run))
    assert f"{run}: resumed from step 3\n" in capsys.readouterr().out
    assert exit_code() == 0
    check_same_weights(run, whole)


def test_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), interruption() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted.by_user
        signal.raise_signal(signal.SIGINT)


def test_second_sigterm_is_patient():
    """torchrun and schedulers send several; the grace is theirs to end."""
    with interruption() as interrupted:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert interrupted.cause == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ignored_signals_stay_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a job in the background
    try:
        with interruption() as interrupted:
            signal.raise_signal(signal.SIGINT)
        assert not interrupted.is_set()
    finally:
        signal.signal(signal.SIGINT, previous)


def test_outside_of_the_main_thread_nothing_listens():
    found = []

    def listen() -> None:
        with interruption() as interrupted:
            found.append(interrupted)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert not found[0].is_set()


def validated(run: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").open())
    return [(row["step"], row["val_mse"]) for row in rows if "val_mse" in row]


@pytest.mark.parametrize("step", [4, 8])
def test_validation_is_given_up(step, data, whole, tmp_path, monkeypatch, capsys):
    """The state of that step is saved, and the validation made up for by what goes on; also after the last step."""
    meters = import_module("vqops.vqvae2.training.meters")
    sums_of, validations = meters.sums_of, []

    def signal_and_sum(model, batches):
        validations.append(batches)
        if 4 * len(validations) == step:
            signal.raise_signal(signal.SIGTERM)
        return sums_of(model, batches)

    with monkeypatch.context() as patch:
        patch.setattr(meters, "sums_of", signal_and_sum)
        run = train(replace(TINY, data=data, out=tmp_path / "run"))
    assert f"interrupted by SIGTERM after step {step} of 8; go on: " in capsys.readouterr().out
    assert exit_code() == 128 + signal.SIGTERM
    assert step_of(run) == step
    assert validated(run) == validated(whole)[: step // 4 - 1]
    train(TrainOptions(resume=run))
    assert exit_code() == 0
    check_same_weights(run, whole)
    assert validated(run) == validated(whole)


def test_items_end_with_a_signal():
    interrupted, seen = Interruption(), []
    with pytest.raises(GivenUp):
        for item in interrupted.until_set(range(9)):
            seen.append(item)
            if item == 3:
                interrupted.signal = signal.SIGTERM
    assert seen == [0, 1, 2, 3]


def losing_images(patch) -> None:
    """Those of the batches after step 4."""
    crops = import_module("vqops.vqvae2.data.batches").Crops
    item = crops.__getitem__

    def lost(self, position):
        if position[1] is not None and position[1] >= 16:
            raise InputError("x.png: no such image file")
        return item(self, position)

    patch.setattr(crops, "__getitem__", lost)


def test_unreadable_batch_leaves_a_checkpoint(data, whole, tmp_path, monkeypatch):
    message = r"^x\.png: no such image file; stopped after step 4, go on: vqops train --resume "
    with monkeypatch.context() as patch, pytest.raises(InputError, match=message):
        losing_images(patch)
        train(replace(TINY, data=data, out=tmp_path / "run"))
    assert step_of(tmp_path / "run") == 4
    train(TrainOptions(resume=tmp_path / "run"))
    check_same_weights(tmp_path / "run", whole)


def test_another_process_than_the_first_leaves_the_checkpoint_alone(data, tmp_path, monkeypatch):
    """Nor does it say which step was saved."""
    losing_images(monkeypatch)
    monkeypatch.setattr("vqops.vqvae2.training.loop.is_first", lambda: False)
    with pytest.raises(InputError, match=r"^x\.png: no such image file; go on: vqops train --resume "):
        train(replace(TINY, data=data, out=tmp_path / "run"))
    assert not (tmp_path / "run" / "train_state.pt").exists()


# Comparisons


def test_interrupted_comparison_goes_on(data, tmp_path, monkeypatch, capsys):
    """In the second of two trainings: the first is kept, and no other begins."""
    options = CompareOptions(tmp_path / "whole", data=data, val_data=data, steps=6)
    options = replace(options, bottleneck=("none", "vq", "gaussian"), **{name: getattr(TINY, name) for name in SIZES})
    whole = compare(options)
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        signalling(patch, signal.SIGUSR1, 6 + 2)
        compare(replace(options, out=out))
    assert exit_code() == 128 + signal.SIGUSR1
    go_on = f"interrupted by SIGUSR1 after step 2 of 6; go on: vqops compare --resume {out}\n"
    said = capsys.readouterr().out
    assert said.count(go_on) == 1
    assert said.count("validation on ") == 2  # by the whole one and the cut one: not once a model
    assert not (out / "gaussian").exists()
    kept = (out / "none" / "model.safetensors").stat().st_mtime_ns
    out = out.rename(tmp_path / "renamed")
    compare(CompareOptions(resume=out))
    assert (out / "none" / "model.safetensors").stat().st_mtime_ns == kept
    check_same_weights(out / "vq", whole / "vq")
    ours, theirs = ((folder / "comparison.md").read_text().splitlines() for folder in (out, whole))
    assert [line.split("|")[1:-2] for line in ours[:5]] == [line.split("|")[1:-2] for line in theirs[:5]]
    assert ours[-1].endswith("Seconds: of training, without those of processes that were killed.")
    with pytest.raises(InputError, match=r"lr is .* there and cannot change"):
        compare(CompareOptions(resume=out, lr=0.1))


def test_comparison_goes_on_with_the_same_images_only(data, tmp_path):
    """What is there is measured on images that it did not learn."""
    images = np.load(data)
    np.save(tmp_path / "images.npy", images)
    sizes = {name: getattr(TINY, name) for name in SIZES}
    data = str(tmp_path / "images.npy")
    out = compare(CompareOptions(out=tmp_path / "out", bottleneck=("none", "vq"), steps=2, data=data, **sizes))
    shutil.rmtree(out / "vq")
    np.save(tmp_path / "images.npy", images[:-1])
    with pytest.raises(InputError, match=r"none.train_state\.pt was written with images 22, now it is 21$"):
        compare(CompareOptions(resume=out))
    assert not (out / "vq").exists()
    np.save(tmp_path / "images.npy", images)
    for content in ("{", '{"none": "x"}'):
        (out / "seconds.json").write_text(content)
        with pytest.raises(InputError, match=r"^[^\n]*seconds\.json[^\n]*$"):
            compare(CompareOptions(resume=out))


def test_signal_between_two_trainings(data, tmp_path, monkeypatch, capsys):
    module = import_module("vqops.vqvae2.evaluation.compare")
    add_seconds = module.add_seconds

    def signal_and_add(*arguments):
        signal.raise_signal(signal.SIGTERM)
        add_seconds(*arguments)

    monkeypatch.setattr(module, "add_seconds", signal_and_add)
    options = CompareOptions(tmp_path / "out", data=data, bottleneck=("none", "vq"), steps=1)
    compare(replace(options, **{name: getattr(TINY, name) for name in SIZES}))
    assert f"interrupted by SIGTERM; go on: vqops compare --resume {tmp_path}/out\n" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["none"]


# Several processes


class Rank:
    """One of two processes: what the other says is given."""

    def __init__(self, monkeypatch, interrupted: bool = False, seconds: float = 0.0):
        self.now, self.answers, self.other = 0.0, 0, torch.tensor([float(interrupted), seconds])
        monkeypatch.setattr(processes, "num_ranks", lambda: 2)
        monkeypatch.setattr(processes, "sum_over_ranks", self.sum)
        monkeypatch.setattr(processes.time, "perf_counter", lambda: self.now)

    def sum(self, values, dtype):
        self.answers += 1
        return [values + self.other]

    def asked_at(self, seconds: float, steps: int) -> list[int]:
        """The steps after which it asks, where each takes so many seconds."""
        stopping, asked = Stopping(0), []
        for step in range(1, steps + 1):
            self.now += seconds
            before = self.answers
            stopping.agreed(step, False, step % 10 == 0, torch.device("cpu"))
            asked += [step] if self.answers > before else []
        return asked


@pytest.mark.parametrize(
    "seconds, expected",
    [(0.01, [1, 10, 20, 30]), (0.5, [1, 5, 9, 10, 14, 18, 20, 24, 28, 30]), (3.0, list(range(1, 31)))],
)
def test_slow_steps_are_asked_after_more_often(seconds, expected, monkeypatch):
    assert Rank(monkeypatch, seconds=seconds).asked_at(seconds, 30) == expected


def test_one_process_stops_all(monkeypatch):
    Rank(monkeypatch, interrupted=True)
    assert Stopping(0).agreed(1, False, False, torch.device("cpu"))


# As processes of their own, with workers and the whole group signalled


def started(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "vqops", *arguments],
        cwd=folder,
        env=processor.environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.02)


FLAGS = "--steps 100000 --batch-size 4 --image-size 12 --channels 8 --codebook-size 16 --code-dim 4 --device cpu"


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize("workers", ["2", pytest.param("0", marks=pytest.mark.slow)])
def test_signal_to_the_whole_group(data, tmp_path, workers):
    pytest.importorskip("tyro")
    flags = f"--data {data} --out run --num-workers {workers} --checkpoint-every 5 --eval-every 100000"
    process = started(tmp_path, "train", *FLAGS.split(), *flags.split())
    wait_for(tmp_path / "run" / "model.safetensors", process)
    os.killpg(process.pid, signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert errors == ""
    last = said.splitlines()[-1]
    assert last.startswith(f"interrupted by SIGTERM after step {step_of(tmp_path / 'run')} of 100000; go on: ")
    with pytest.raises(ProcessLookupError):  # workers and all, once they are reaped
        for _ in range(300):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")
def test_failed_run_does_not_wait_for_its_workers(data, tmp_path):
    """At its exit multiprocessing terminates what still loads images, and waits for its end."""
    script = (
        "from vqops.vqvae2.training.train import *\n"
        "def fail(*arguments): raise RuntimeError('a defect')\n"
        "VQVAE2Training.after_step = fail\n"
        f"train(TrainOptions(steps=9, batch_size=4, channels=8, num_workers=2, data={data!r}, device='cpu'))"
    )
    failed = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env=processor.environment() | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert failed.returncode == 1
    assert failed.stderr.endswith("RuntimeError: a defect\n")
