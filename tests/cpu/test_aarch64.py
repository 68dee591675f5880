"""The CPU kernels for 64-bit ARM: cross compiled as setup.py would there, and those without torch run under emulation.

Debian has what this needs: g++-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user.
"""

import os
import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from implementations import REQUIRED

ROOT = Path(__file__).parents[2]
NATIVE = sorted(Path(__file__).with_name("native").glob("*.cpp"))
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
WITH_TORCH = ("csrc/cpu/ops.cpp", "csrc/module.cpp")
WARNINGS = ("-Wall", "-Wextra", "-Werror")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def extension():
    """What setup.py would build with the cross compiler, without CUDA."""
    for tool in (COMPILER, EMULATOR):
        if not shutil.which(tool):
            (pytest.fail if "aarch64" in REQUIRED else pytest.skip)(f"there is no {tool}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("CXX", COMPILER)
        patch.setenv("VQOPS_CUDA", "0")
        (module,) = runpy.run_path("setup.py")["extension"]()["ext_modules"]
    return module


@pytest.fixture(scope="module")
def program(extension, tmp_path_factory):
    target = tmp_path_factory.mktemp("aarch64") / "kernels"
    sources = [*NATIVE, *(source for source in extension.sources if source not in WITH_TORCH)]
    flags = [*extension.extra_compile_args["cxx"], *WARNINGS, "-DVQOPS_BF16_MODEL", "-static", "-pthread"]
    subprocess.run([COMPILER, *flags, *sources, "-o", target], cwd=ROOT, check=True)
    return target


def emulate(program, instructions):
    environment = {**os.environ, "VQOPS_CPU": instructions}
    return subprocess.run([EMULATOR, program], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("asked, ran", [("", "portable"), ("bf16_model", "bf16_model"), ("amx_model", "amx_model")])
def test_kernels(program, asked, ran):
    result = emulate(program, asked)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == f"{ran}: 0 failures\n"


def test_sets_of_other_processors_are_left_out(program):
    result = emulate(program, "avx2")
    assert result.returncode != 0
    assert "VQOPS_CPU=avx2, but it must be one of: portable\n" in result.stderr


@pytest.mark.parametrize("source", WITH_TORCH)
def test_what_includes_torch_compiles(extension, source):
    python = sysconfig.get_paths()["include"]
    if source == "csrc/module.cpp" and "aarch64-linux-gnu" in Path(python, "pyconfig.h").read_text():
        pytest.skip("the headers of this Python are for its own processor")
    folders = [f"-isystem{folder}" for folder in (*extension.include_dirs, python)]
    macros = [f"-D{name}={value}" for name, value in extension.define_macros]
    flags = [*extension.extra_compile_args["cxx"], *macros, *folders, *WARNINGS, "-fsyntax-only"]
    subprocess.run([COMPILER, *flags, source], cwd=ROOT, check=True)
