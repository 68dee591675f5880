"""The CPU kernels under the address and undefined-behaviour sanitizers, as a program without torch."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = sorted(path for path in (ROOT / "csrc" / "cpu").rglob("*.cpp") if path.name != "ops.cpp")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("native") / "kernels"
    flags = ["-std=c++20", "-O1", "-g", "-ffp-contract=off", "-DVQOPS_BF16_MODEL"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [*sorted(Path(__file__).with_name("native").glob("*.cpp")), *KERNELS]
    subprocess.run([compiler, *flags, "-Wno-psabi", *sources, "-o", target, "-pthread"], check=True)
    return target


SETS = ["amx_bf16", "avx512_bf16", "avx512", "avx2", "portable", "bf16_model", "amx_model"]


@pytest.mark.slow
@pytest.mark.parametrize("instructions", SETS)
def test_kernels_under_sanitizers(program, instructions):
    result = subprocess.run([program], env={**os.environ, "VQOPS_CPU": instructions}, capture_output=True, text=True)
    if "this processor has no such instructions" in result.stderr:
        pytest.skip(f"this processor has no {instructions}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 failures" in result.stdout
