"""What the Triton kernels compile to, for every architecture, without a GPU. In processes of their own: Triton cannot
compile in one that interprets."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

TENSOR_CORES = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
PRODUCTS = {"screen_kernel", "screen_topk_kernel", "products_kernel"}
DECISIONS = {"finish_kernel", "sample_kernel", "take_off_kernel"}
KERNELS = {
    "survey_kernel", "pack_kernel", "screen_kernel", "screen_topk_kernel", "finish_kernel",
    "norms_kernel", "gather_kernel", "runs_kernel", "fold_kernel", "atomic_kernel", "average_kernel", "codes_kernel",
    "quantize_backward_kernel", "products_kernel", "sample_kernel", "take_off_kernel", "sum_runs_kernel",
    "residual_backward_kernel",
}  # fmt: skip


def compiled(architecture: int, cases: str = "", **environment) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, Path(__file__).with_name("compiler.py"), str(architecture), cases]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(kernels: list[dict], architecture: int) -> None:
    for facts in kernels:
        where = f"{facts['case']}: {facts['kernel']} on sm_{architecture}"
        assert facts["shared"] <= facts["shared_limit"], where
        assert not facts["flushes_denormals"], where
        if facts["kernel"] in PRODUCTS:
            assert TENSOR_CORES[architecture] in facts["tensor_cores"], where
            assert facts["spills_in_loops"] == 0, where
            assert facts["spills"] <= 16, where
        else:
            assert facts["spills"] <= 8, where  # the routines for float64 division and roots save a few registers
        if facts["kernel"] in DECISIONS:
            assert not facts["fused_double"], where
            divides = "cosine" in facts["case"] or facts["kernel"] == "sample_kernel"
            assert divides or not facts["machine_fused_double"], where


@pytest.mark.parametrize(
    "architecture, cases",
    [(89, "nearest, D=64"), (90, "nearest, D=64;nearest in parts, D=64;products, D=64;one of everything")],
)
def test_a_search(architecture, cases):
    kernels = compiled(architecture, cases)
    check(kernels, architecture)
    assert "screen_kernel" in {facts["kernel"] for facts in kernels}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_two_programs_of_a_search_on_a_processor(architecture):
    for programs in (1, 2):
        kernels = compiled(architecture, "nearest, D=8;nearest, D=64", VQOPS_TRITON_PROGRAMS=str(programs))
        found = {facts["programs"] for facts in kernels if facts["kernel"] == "screen_kernel"}
        assert found == {programs}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TENSOR_CORES)
def test_every_kernel(architecture):
    kernels = compiled(architecture)
    check(kernels, architecture)
    assert {facts["kernel"] for facts in kernels} == KERNELS
