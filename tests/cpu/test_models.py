"""The ops on models of instructions that this processor may not have: bfloat16 products, AMX tiles.

They are compiled into a package of their own; what users install has no models in it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processor import environment

ROOT = Path(__file__).parents[2]
MODELS = ["bf16_model", "amx_model"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a package that has the models."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "target"))
    shutil.copy(ROOT / "setup.py", source)
    shutil.copytree(ROOT / "csrc", source / "csrc", ignore=shutil.ignore_patterns("cuda"))
    shutil.copytree(ROOT / "vqops", target / "vqops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with_models = source / "with_models"
    with_models.write_text(f'#!/bin/sh\nexec {compiler} -DVQOPS_BF16_MODEL "$@"\n')
    with_models.chmod(0o755)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(target)]
    variables = {**os.environ, "CXX": str(with_models), "VQOPS_CUDA": "0"}
    done = subprocess.run(command, cwd=source, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run(built, model, *arguments):
    """In the folder of that package: Python looks there first."""
    variables = environment(VQOPS_CPU=model)
    variables["PYTHONPATH"] = os.pathsep.join([str(built), variables["PYTHONPATH"]])
    return subprocess.run([sys.executable, *arguments], cwd=built, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("model", MODELS)
def test_what_breaks_error_bounds(built, model):
    result = run(built, model, Path(__file__).with_name("test_kernels.py"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"set: {model}"], result.stdout


@pytest.mark.parametrize("model", MODELS)
def test_the_ops(built, model):
    """Dtypes, heads, masks, metrics, prepared codebooks, residual levels, threads."""
    names = "test_search.py", "test_quantize.py", "test_residual_quantize.py"
    tests = [ROOT / "tests" / "ops" / name for name in names]
    result = run(built, model, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "compiled", *tests)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr


PRODUCTS = """
import torch, vqops

def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

crowded = normal(2, 40).repeat_interleave(200, 0) + 2e-3 * normal(400, 40)  # closer than a bfloat16
for x, codes in ((normal(800, 8), normal(3000, 8)), (normal(800, 40), crowded)):
    print(*vqops.search_statistics(x, codes).tolist())
"""


def test_three_products_of_tiles_leave_few_candidates(built):
    """In few dimensions at once; else for rows that one product leaves more than their lists hold."""
    result = run(built, "amx_model", "-c", PRODUCTS)
    assert result.returncode == 0, result.stderr
    (certified, *_), (*_, again, _) = (map(int, line.split()) for line in result.stdout.splitlines())
    assert certified > 780
    assert again == 0
