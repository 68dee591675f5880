"""What calls launch, by Triton's own launcher. In a process of its own: Triton cannot launch in one that interprets."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks.gpu.page import host_cost
from benchmarks.rows import read
from benchmarks.tables import Machine

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if shutil.which(os.environ.get("CC", "cc")) is None:
    pytest.skip("no C compiler", allow_module_level=True)

# Kernels, and launches of PyTorch, at most.
MOST = {
    "addmm + argmin": (0, 4),
    "nearest": (4, 2),
    "nearest, prepared": (2, 1),
    "quantize with sums": (5, 4),
    "quantize_backward": (1, 0),
    "code_sums": (1, 2),
    "ema_update_": (2, 1),
    "training step": (8, 11),
    "evaluation": (5, 3),
}


def test_no_call_launches_more(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.host_cost", "--rounds", "2", "--out", tmp_path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = read(tmp_path / "host_cost.jsonl")
    found = {row["op"]: (len(row["kernels"]), sum(row["launched_by_pytorch"].values())) for row in rows}
    assert found.keys() == MOST.keys()
    assert {name: tuple(map(max, counts, MOST[name])) for name, counts in found.items()} == MOST
    assert not any(name in row["launched_by_pytorch"] for row in rows for name in ("item", "_local_scalar_dense"))
    assert host_cost(Machine(tmp_path), "figures").count("\n| `") == len(MOST)
