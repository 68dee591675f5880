"""VQOPS_CHECK=auto: who starts a check, and who never does."""

import multiprocessing
import subprocess
import sys
from collections import namedtuple

import pytest
import torch

from vqops.dispatch import choice, first_use, records

GPU = torch.device("cuda", 1)
Done = namedtuple("Done", "returncode stderr")


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The commands that were started, none of which runs; a GPU without a record."""
    commands = []
    properties = namedtuple("Properties", "name major minor")("NVIDIA H200", 9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(records, "SHIPPED", tmp_path)
    monkeypatch.setenv("VQOPS_GPU_RECORD", str(tmp_path / "own.json"))
    monkeypatch.setenv("VQOPS_CHECK", "auto")
    for name in first_use.RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: None)  # a test may be in a child itself
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or Done(0, ""))
    choice.table.cache_clear()
    yield commands
    choice.table.cache_clear()


def test_the_first_use_checks_that_gpu_once(started, tmp_path, monkeypatch):
    def check(command, **_):
        started.append(command)
        (tmp_path / "own.json").write_text(
            '{"format": 1, "gpu": {"name": "NVIDIA H200", "capability": "9.0"}, "kernels": {}, "rows": []}'
        )
        return Done(0, "")

    monkeypatch.setattr(subprocess, "run", check)
    for _ in range(2):
        assert choice.table(GPU).source == str(tmp_path / "own.json")
    assert started == [[sys.executable, "-m", "vqops", "check", "--device", "cuda:1"]]


def test_without_being_asked_nothing_is_started(started, monkeypatch):
    monkeypatch.delenv("VQOPS_CHECK")
    with pytest.warns(UserWarning, match="`vqops check` tests and times the kernels there, once"):
        choice.table(GPU)
    assert started == []


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda patch: patch.setenv("WORLD_SIZE", "8"), "this is a rank of several"),
        (lambda patch: patch.setenv("SLURM_NTASKS", "2"), "this is a rank of several"),
        (lambda patch: patch.setattr(torch.distributed, "is_initialized", lambda: True), "this is a rank of several"),
        (lambda patch: patch.setattr(first_use, "IMPORTED_IN", 1), "this is a child process"),
        (lambda patch: patch.setattr(multiprocessing, "parent_process", lambda: 1), "this is a child process"),
        (lambda patch: patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True), "is being captured"),
    ],
)
def test_who_never_starts_one(started, monkeypatch, change, why):
    change(monkeypatch)
    with pytest.warns(UserWarning, match=f"VQOPS_CHECK=auto brought no record: .*{why}"):
        assert choice.table(GPU).rows == ()
    assert started == []


@pytest.mark.parametrize(
    "run, why",
    [
        (Done(2, "vqops check: another check of this GPU is running\n"), "another check of this GPU is running"),
        (Done(-9, ""), "it ended with -9"),
        (subprocess.TimeoutExpired("vqops", 600), "it did not end in 600 s"),
        (OSError("no such interpreter"), "no such interpreter"),
        (Done(0, ""), "its folder cannot be written"),
    ],
)
def test_a_check_that_brings_nothing(started, monkeypatch, run, why):
    def fail(command, **_):
        if isinstance(run, Exception):
            raise run
        return run

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.warns(UserWarning, match=f"VQOPS_CHECK=auto brought no record: .*{why}"):
        choice.table(GPU)


@pytest.mark.parametrize("value, allowed", [("auto", True), ("", True), ("yes", False), ("AUTO", False)])
def test_what_the_variable_may_be(monkeypatch, value, allowed):
    monkeypatch.setenv("VQOPS_CHECK", value)
    if allowed:
        return first_use.check_value()
    with pytest.raises(ValueError, match=f'VQOPS_CHECK must be "auto" or not set, got {value!r}'):
        first_use.check_value()
