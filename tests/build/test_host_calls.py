"""What a search asks of the CUDA runtime, counted by a runtime that runs nothing. Slow: half a minute of compiling."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT, NATIVE = Path(__file__).parents[2], Path(__file__).with_name("native")
FILES = ("scan.cu", "screen_float32.cu", "screen_topk_float32.cu")
# Kernels and fills of a call; kernels whose attributes are set in the first call on a GPU, the next, and on another.
CALLS = {
    "nearest": (5, 0, 1, 0, 1),  # Survey, MarkCodes, Pack, Screen, Scan
    "nearest, prepared": (2, 1, 0, 0, 0),  # counters; Screen, Scan
    "few rows": (6, 0, 0, 0, 0),  # and MergeLists
    "few rows, prepared": (3, 1, 0, 0, 0),
    "topk": (5, 0, 1, 0, 1),
    "topk, prepared": (2, 1, 0, 0, 0),
    "no fast pass": (1, 1, 0, 0, 0),
}

pytestmark = pytest.mark.slow


def test_calls_of_a_search(tmp_path):
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        pytest.skip("no CUDA toolkit")
    sources = [ROOT / "csrc/cuda/search" / name for name in FILES]
    command = [nvcc, "-std=c++20", "-fmad=false", "-DVQOPS_WGMMA=1", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", f"-I{Path(torch.__file__).parent}/include", "--cudart=none"]
    program = tmp_path / "host_calls"
    subprocess.run([*command, *sources, *NATIVE.glob("*.c*"), "-o", program], check=True, cwd=tmp_path)
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    found = dict(line.split(": ") for line in said)
    assert int(found.pop("questions")) == 2 * 4  # of two GPUs, once
    assert {name: tuple(map(int, counts.split())) for name, counts in found.items()} == CALLS
