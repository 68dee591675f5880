"""The CUDA kernels compiled for every architecture, without a GPU: they load and register, and what their machine code
needs. Slow: minutes of compilation for each. VQOPS_CUDA_ARCHS names fewer, 90a among them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import machine_code
from benchmarks.rows import read

ROOT = Path(__file__).parents[2]
ASKED = os.environ.get("VQOPS_CUDA_ARCHS", "").replace(",", " ").split() or ["all"]
ARCHITECTURES = [f"sm_{name}" for name in ("80", "90a", "100", "120") if name in ASKED or "all" in ASKED]
SCREENS, TOPKS, PROBES = 4 * 10, 4 * 4, 8  # dtypes of x, and depths
MULTIPLY = {"6ScreenI": SCREENS, "10ScreenTopkI": TOPKS, "18TensorCoreProductsI": PROBES}  # kernels, and how many
OPS = ("ema_update_", "nearest", "nearest_topk", "prepare", "search_statistics")
SUMS = (  # of which there are two kernels
    *("code_sums", "quantize", "quantize_backward"),
    *("residual_quantize", "residual_quantize_backward"),
)
REGISTERED = """
import json, vqops
from vqops.dispatch.library import COMPILED
on_cuda = {name: devices["cuda"] for name, devices in vqops.implementations().items()}
print(json.dumps([vqops._C.cuda, sorted(COMPILED["cuda"]), on_cuda]))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a package with the CUDA kernels alone."""
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("no CUDA toolkit")
    if "sm_90a" not in ARCHITECTURES:
        pytest.skip(f"VQOPS_CUDA_ARCHS={ASKED} has no 90a, whose kernels are compared with the others'")
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "target"))
    shutil.copy(ROOT / "setup.py", source)
    shutil.copytree(ROOT / "vqops", source / "vqops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "csrc", source / "csrc", ignore=shutil.ignore_patterns("cpu"))
    shutil.copy(Path(__file__).with_name("cpu_stub.cpp"), source / "csrc")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    asked = {"VQOPS_CUDA": "1", "VQOPS_CUDA_ARCHS": " ".join(ASKED), "TORCH_CUDA_ARCH_LIST": ""}
    environment = {**os.environ, **asked, "PATH": path}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(target)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # A function of the host called on the device is a warning, and the caller's code is left out. In C7510, C7517 and
    # others ptxas says, as information, that it makes a wgmma wait where the code does not.
    said = (done.stdout + done.stderr).splitlines()
    own = rf"(\S*/{source.name}/)?csrc/\S+: warning"  # ninja gives whole paths; torch has a csrc, too
    assert not [line for line in said if re.match(own, line) or re.search(r"\bC75\d\d\b", line)]
    shutil.copytree(source / "vqops", target / "vqops", dirs_exist_ok=True)
    return target


def dumped(built, *options):
    (library,) = (built / "vqops").glob("_C*.so")
    tool = machine_code.cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump")
    return machine_code.dumped(tool, *options, library)


def functions(built, architecture):
    """Names and machine code."""
    text = dumped(built, "--dump-sass", "--gpu-architecture", architecture)
    parts = [part.partition("\n") for part in text.split("Function : ")]
    return [(name, code) for name, _, code in parts]


@pytest.fixture(scope="module")
def usage(built):
    """(architecture, kernel, registers, stack, local) of every kernel."""
    text = dumped(built, "--dump-resource-usage")
    found, architecture = [], None
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            kernel = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", line):
            found.append((architecture, kernel, *map(int, match.groups())))
    return found


def test_registers_beside_the_reference_and_not_in_its_place(built):
    command = [sys.executable, "-c", REGISTERED]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=built, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, names, on_cuda = json.loads(done.stdout)
    assert all(architecture in said for architecture in ARCHITECTURES)
    two = [f"vqops::{op}_compiled_{order}" for op in SUMS for order in ("atomic", "sorted")]
    probe = "vqops::tensor_core_products_compiled"
    assert names == sorted([f"vqops::{op}_compiled" for op in OPS] + two + [probe])
    assert {op for op, implementations in on_cuda.items() if "compiled" in implementations} == {*OPS, *SUMS}


def ours(usage):
    return [row for row in usage if "vqops4cuda" in row[1] and "cub" not in row[1]]


def multiplies(name):
    return any(kernel in name for kernel in MULTIPLY)


def test_sm_90_without_a_is_an_error(tmp_path):
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        pytest.skip("no CUDA toolkit")
    source = tmp_path / "plain.cu"
    source.write_text(f'#include "{ROOT}/csrc/cuda/wgmma.h"\n__global__ void kernel() {{}}\n')
    command = [nvcc, "-std=c++20", "-DVQOPS_WGMMA=1", "-gencode=arch=compute_90,code=sm_90", "-c", source]
    done = subprocess.run([*command, "-o", tmp_path / "plain.o"], capture_output=True, text=True)
    assert done.returncode != 0 and "sm_90a" in done.stderr


def test_every_architecture_has_every_kernel(usage):
    kernels = [{kernel for a, kernel, *_ in ours(usage) if a == architecture} for architecture in ARCHITECTURES]
    assert len(kernels[0]) > 10
    assert all(other == kernels[0] for other in kernels[1:])


def test_nothing_spills_that_matters(usage):
    """Float64 division and root are calls, around which a few values go to memory; the screening loop has none."""
    assert not [row for row in ours(usage) if max(row[3:]) > 128]
    found = [row for row in ours(usage) if multiplies(row[1])]
    assert len(found) == sum(MULTIPLY.values()) * len(ARCHITECTURES)
    assert not [row for row in found if max(row[3:]) > 0]
    # The workers of a loader wait for registers that the others leave: these would not suffice for another number.
    loaded = {registers for at, name, registers, *_ in found if "LoadedCores" in name and at == "sm_90a"}
    assert loaded == {168}


def test_search_and_probe_use_tensor_cores(built):
    for architecture in ARCHITECTURES:
        found = [(name, code) for name, code in functions(built, architecture) if multiplies(name)]
        assert {kernel: sum(kernel in name for name, _ in found) for kernel in MULTIPLY} == MULTIPLY
        for name, code in found:
            if not any(cores in name for cores in ("WarpgroupCores", "LoadedCores")):
                assert "HMMA.16816.F32" in code
            elif architecture == "sm_90a":  # a build for sm_90 would have none, and be slow without a word
                assert "HGMMA.64x128x16.F32" in code
            else:
                assert "HMMA" not in code  # never launched there


def test_the_documented_machine_code_is_that_of_the_build(built, usage):
    """Where the compiler is the one of the rows; else other counts would say nothing."""
    rows = read(machine_code.FOLDER / "compiled.jsonl")
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if machine_code.version_of(nvcc) != rows[0]["compiler"]:
        pytest.skip(f"the rows are of {rows[0]['compiler']}")
    registers = {(architecture, kernel): of for architecture, kernel, of, *_ in usage}
    for architecture in sorted({row["architecture"] for row in rows} & set(ARCHITECTURES)):
        code_of = dict(functions(built, architecture))
        for row in (row for row in rows if row["architecture"] == architecture):
            (name,) = [name for name in code_of if row["symbol"] in name]
            found = machine_code.counts(code_of[name]) | {"registers": registers[architecture, name]}
            assert found == {key: row[key] for key in found}, "run python -m benchmarks.gpu.machine_code"
