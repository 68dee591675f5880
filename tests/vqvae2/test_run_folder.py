"""A run folder has one writer, and holds whole files when the disk is full."""

import errno
import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import processor
import pytest
import torch
from promises import REPEATS

pytest.importorskip("safetensors")

from vqops.vqvae2 import (
    CompareOptions,
    ExtractOptions,
    InputError,
    TrainOptions,
    TrainPriorOptions,
    compare,
    extract,
    load_prior,
    train,
    train_prior,
)
from vqops.vqvae2.files.lock import locked

TINY = TrainOptions(
    steps=8, batch_size=4, image_size=12, channels=8, codebook_size=16, code_dim=4, checkpoint_every=2, device="cpu"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (23, 16, 16, 3), dtype=np.uint8))
    return str(path)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    return train(replace(TINY, data=data, out=tmp_path_factory.mktemp("whole") / "run"))


def state_of(run: Path) -> dict:
    return torch.load(run / "train_state.pt", weights_only=True)


# One writer

HOLDER = """
import sys, time
from pathlib import Path
from vqops.vqvae2.files.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holder_of(folder: Path) -> subprocess.Popen:
    """A process that holds the folder."""
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env=processor.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_second_writer_is_refused(data, whole, tmp_path):
    codes = extract(ExtractOptions(whole, data, out=tmp_path / "codes", device="cpu"))
    process = holder_of(tmp_path / "held")
    try:
        message = rf"^{tmp_path}/held: process {process.pid} on {socket.gethostname()} is writing here$"
        held = tmp_path / "held"
        for command, options in (
            (train, replace(TINY, data=data, out=held)),
            (train_prior, TrainPriorOptions(codes, level="top", out=held)),
            (compare, CompareOptions(held, data=data)),
            (extract, ExtractOptions(whole, data, out=held)),
        ):
            with pytest.raises(InputError, match=message):
                command(options)
        (held / "config.toml").write_text((whole / "config.toml").read_text())
        with pytest.raises(InputError, match=message):
            train(TrainOptions(resume=held))
    finally:
        process.kill()
        process.wait()
    train(TrainOptions(resume=tmp_path / "held"))  # the lock died with its holder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_outlives_the_writer_is_waited_for(tmp_path):
    """A child has the lock, as a loader of images has where filelock does not close it, and ends a moment later."""
    script = (
        "import fcntl, os, sys, time\n"
        "file = open(sys.argv[1] + '/.lock', 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "if not os.fork():\n"
        "    os.close(1)\n"
        "    while not os.path.exists(sys.argv[1] + '/go'): time.sleep(0.1)\n"
        "    time.sleep(1); os._exit(0)\n"
        "print(os.getpid())"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, timeout=60)
    note = {"pid": int(done.stdout), "host": socket.gethostname(), "job": ""}
    (tmp_path / ".writer").write_text(json.dumps(note | {"host": "another"}))
    with pytest.raises(InputError, match=f"process {note['pid']} on another is writing here"), locked(tmp_path):
        pass
    (tmp_path / ".writer").write_text(json.dumps(note))
    (tmp_path / "go").touch()
    with locked(tmp_path):
        assert json.loads((tmp_path / ".writer").read_text())["pid"] == os.getpid()


def test_file_systems_without_locks_are_written(tmp_path, monkeypatch):
    lock = import_module("vqops.vqvae2.files.lock")
    for error in (NotImplementedError(), OSError(errno.ENOLCK, "no locks")):

        def refuse(self, timeout, error=error):
            raise error

        monkeypatch.setattr(lock.FileLock, "acquire", refuse)
        with locked(tmp_path):
            pass
    monkeypatch.setattr(lock.FileLock, "acquire", lambda self, timeout: os.listdir(tmp_path / "no"))
    with pytest.raises(InputError, match=r"cannot write here \(No such file or directory\)"), locked(tmp_path):
        pass


# Refused writes


@contextmanager
def full_disk(number: int, failing: str, size: int):
    """From the given write of the file of this name on, no file can be longer than so many bytes."""
    resource = pytest.importorskip("resource")
    folder = import_module("vqops.vqvae2.files.run_folder")
    atomically, append_row, seen = folder.atomically, folder.append_row, []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(name: str) -> None:
        seen.append(name)
        if name == failing and seen.count(name) == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    def filling(path: Path):
        fill(path.name)
        return atomically(path)

    def filling_append(run: Path, row: dict) -> None:
        fill("metrics.jsonl")
        append_row(run, row)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("files.run_folder", "networks.checkpoint", "pictures.curves", "pictures.grids"):
            patch.setattr(import_module(f"vqops.vqvae2.{module}"), "atomically", filling)
        patch.setattr(folder, "append_row", filling_append)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "failing, number, kept",
    [
        ("train_state.pt", 2, 2),
        ("model.safetensors", 2, 4),
        ("metrics.jsonl", 3, 4),  # the first is empty
        ("curves.png", 1, 8),
        ("reconstructions.png", 1, 8),
    ],
)
def test_full_disk_leaves_the_last_checkpoint(failing, number, kept, data, whole, tmp_path):
    """The step that the checkpoint is of, one line that names the folder, and nothing half written beside it."""
    run, size = tmp_path / "run", 90 if failing == "metrics.jsonl" else 200
    refused = pytest.raises(InputError, match=rf"^{run}: cannot write here \(File too large\)$")
    with full_disk(number, failing, size), refused:
        train(replace(TINY, data=data, eval_every=3, out=run))
    assert state_of(run)["step"] == kept
    assert {name for name in os.listdir(run) if name.startswith(".")} == {".lock", ".writer"}
    train(TrainOptions(resume=run))
    REPEATS.same(state_of(run)["module"], state_of(whole)["module"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [3, 6, 8]


def test_full_disk_leaves_the_prior_that_was_best(data, whole, tmp_path):
    codes = extract(ExtractOptions(whole, data, out=tmp_path / "codes", device="cpu"))
    options = TrainPriorOptions(codes, level="top", out=tmp_path / "prior", width=8, layers=1, heads=2, device="cpu")
    options = replace(options, steps=6, eval_every=2)
    with full_disk(2, "prior.safetensors", 200), pytest.raises(InputError, match="prior: cannot write here"):
        train_prior(options)
    assert state_of(tmp_path / "prior")["step"] == 2
    assert load_prior(tmp_path / "prior")[1]["step"] == 2
    train_prior(TrainPriorOptions(codes, resume=tmp_path / "prior"))
    again = train_prior(replace(options, out=tmp_path / "whole"))
    REPEATS.same(load_prior(tmp_path / "prior")[0].state_dict(), load_prior(again)[0].state_dict())
