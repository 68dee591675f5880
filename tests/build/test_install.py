"""The build: what it asks for, what it says, and (slow) every way to install.

The slow tests leave the kernels out, so as to build in seconds, and install into new environments that see the packages
of this one.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

import vqops

ROOT = Path(__file__).parents[2]
NOT_SOURCE = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "runs")

CUDA_KERNEL = """
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

__global__ void twice_kernel(float* x) { x[threadIdx.x] *= 2; }

torch::stable::Tensor twice_cuda(const torch::stable::Tensor& x) {
    auto y = torch::stable::clone(x);
    twice_kernel<<<1, y.numel()>>>(static_cast<float*>(y.data_ptr()));
    return y;
}

STABLE_TORCH_LIBRARY(vqops_stub, m) { m.def("twice(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(vqops_stub, CUDA, m) { m.impl("twice", TORCH_BOX(&twice_cuda)); }
"""
IS_REGISTERED = """
import torch
from vqops import _C
assert "sm_90a" in _C.cuda, _C.cuda
print(torch._C._dispatch_has_kernel_for_dispatch_key("vqops_stub::twice", "CUDA"))
"""

# An editable install would find the missing module in its own folder.
NOT_EDITABLE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]"


def run(*command, cwd, **environment):
    environment = {**os.environ, "PYTHONPATH": "", **environment}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)


def run_well(*command, cwd, **environment):
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def source(tmp_path):
    """The source folder as a release has it, without anything built."""
    return shutil.copytree(ROOT, tmp_path / "source", ignore=NOT_SOURCE)


def pretend(folder, **packages):
    """Packages by name and version, to be found and not to be used."""
    for name, version in packages.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


class TestRequirements:
    @pytest.mark.parametrize(
        "packages, for_wheel",
        [
            ({}, ["setuptools>=77", "torch>=2.10"]),
            ({"setuptools": "84.2.1", "torch": "2.13.0+cpu"}, []),
            ({"setuptools": "77.0.3", "torch": "2.10.0"}, []),
            ({"torch": "2.10.0+cu128"}, ["setuptools>=77"]),
            ({"setuptools": "65.5.0", "torch": "2.10.0+cu128"}, ["setuptools>=77"]),
            ({"setuptools": "77.0.3", "torch": "2.9.1"}, ["torch>=2.10"]),
            ({"setuptools": "77.0.3"}, ["torch>=2.10"]),
        ],
    )
    def test_hooks_return_what_is_missing_and_nothing_else(self, setup, tmp_path, monkeypatch, packages, for_wheel):
        pretend(tmp_path, **packages)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.setattr(setup, "expose_ninja", lambda: True)
        assert setup.get_requires_for_build_wheel() == for_wheel
        assert setup.get_requires_for_build_editable() == for_wheel
        assert setup.get_requires_for_build_sdist() == [need for need in for_wheel if "torch" not in need]

    @pytest.mark.parametrize("torch, needed", [("2.10.0", []), ("2.9.1", ["torch>=2.10", "ninja"])])
    def test_ninja_comes_with_a_torch_that_is_missing(self, setup, tmp_path, monkeypatch, torch, needed):
        pretend(tmp_path, setuptools="77.0.3", torch=torch)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.setattr(setup, "expose_ninja", lambda: False)
        assert setup.get_requires_for_build_wheel() == needed

    def test_ninja_of_an_environment_that_is_not_activated(self, setup, tmp_path, monkeypatch):
        for folder in ("bin", "env"):
            (tmp_path / folder).mkdir()
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.setattr(sys, "executable", str(tmp_path / "env/python"))
        monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))  # not a venv whose maker may have ninja
        assert not setup.expose_ninja() and os.environ["PATH"] == str(tmp_path / "bin")
        (tmp_path / "env/ninja").touch(mode=0o755)
        assert setup.expose_ninja() and shutil.which("ninja") == str(tmp_path / "env/ninja")
        (tmp_path / "bin/ninja").touch(mode=0o755)
        assert setup.expose_ninja() and shutil.which("ninja") == str(tmp_path / "bin/ninja")


class TestEnvironment:
    """The torch of the target is found where the front end of the build hides it."""

    ASK = "import json, setup; print(json.dumps([setup.missing('torch'), hasattr(setup, 'build_editable')]))"

    def make(self, python, folder, **packages):
        run_well(python, "-m", "venv", "--without-pip", folder, cwd=ROOT)
        site = run_well(folder / "bin/python", "-c", "import site; print(site.getsitepackages()[0])", cwd=ROOT)
        pretend(Path(site.strip()), **packages)
        return folder / "bin/python"

    def ask(self, python, **environment):
        return json.loads(run_well(python, "-c", self.ASK, cwd=ROOT, PYTHONDONTWRITEBYTECODE="1", **environment))

    def hide_as_pip_does(self, folder):
        """pip's default: the target's interpreter, and a sitecustomize that takes its packages from sys.path."""
        folder.mkdir()
        hide = "import site, sys; sys.path = [p for p in sys.path if p not in site.getsitepackages()]"
        (folder / "sitecustomize.py").write_text(hide)
        return {"PYTHONPATH": str(folder), "PYTHONNOUSERSITE": "1", "TMPDIR": str(folder)}

    @pytest.mark.parametrize("packages, missing", [({"torch": "2.10.0"}, []), ({}, ["torch>=2.10"])])
    def test_pip(self, tmp_path, packages, missing):
        python = self.make(sys.executable, tmp_path / "target", **packages)
        assert self.ask(python, **self.hide_as_pip_does(tmp_path / "overlay")) == [missing, True]

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="pyvenv.cfg names no command before Python 3.11")
    def test_venv_isolation_and_build(self, tmp_path):
        target = self.make(sys.executable, tmp_path / "target", torch="2.10.0")
        python = self.make(target, tmp_path / "temporary" / "build-env")
        assert self.ask(python, TMPDIR=str(tmp_path / "temporary")) == [[], True]
        (target.parent / "ninja").touch(mode=0o755)
        show = "import os, setup; setup.expose_ninja(); print(os.environ['PATH'])"
        environment = {"TMPDIR": str(tmp_path / "temporary"), "PATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        path = run_well(python, "-c", show, cwd=ROOT, **environment)
        assert path.strip() == os.pathsep.join([str(tmp_path), str(target.parent)])

    def test_the_maker_of_a_lasting_environment_is_not_its_target(self, tmp_path):
        maker = self.make(sys.executable, tmp_path / "maker", torch="2.10.0")
        python = self.make(maker, tmp_path / "target")
        (tmp_path / "temporary").mkdir()
        assert self.ask(python, TMPDIR=str(tmp_path / "temporary")) == [["torch>=2.10"], True]


def test_no_compiler_says_what_to_install(source):
    done = run(sys.executable, "setup.py", "build_ext", cwd=source, PATH=str(source), CXX="")
    assert done.returncode != 0
    assert "there is no C++ compiler" in done.stderr and "apt install g++" in done.stderr


def test_import_from_the_source_folder_says_what_to_do(source):
    done = run(sys.executable, "-c", f"{NOT_EDITABLE}; import vqops", cwd=source)
    assert done.returncode != 0
    assert "vqops._C is not built" in done.stderr and "pip install ." in done.stderr


def test_sdist_has_every_source_and_nothing_built(setup, source):
    if setup.missing("setuptools"):
        pytest.skip("needs setuptools >= 77")
    (source / "vqops/_C.so").touch()
    run_well(sys.executable, "-c", "import setup; setup.build_sdist('dist')", cwd=source, PATH="", CXX="none")
    (archive,) = (source / "dist").iterdir()
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    for folder in ("csrc", "tests", "vqops"):
        packed = {name for name in names if name.startswith(f"{folder}/") and Path(name).suffix}
        assert packed == {
            str(path.relative_to(source))
            for path in (source / folder).rglob("*")
            if path.suffix not in ("", ".so", ".pyc")
        }
    assert names > {"setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md"}


def test_one_version():
    assert metadata.version("vqops") == vqops.__version__
    assert f"## {vqops.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_command():
    (command,) = metadata.entry_points(group="console_scripts", name="vqops")
    assert command.value == "vqops.cli:main"


@pytest.fixture
def small_source(source):
    """Builds in seconds: every op runs as its reference."""
    shutil.rmtree(source / "csrc")
    (source / "csrc").mkdir()
    shutil.copy(ROOT / "csrc/module.cpp", source / "csrc")
    shutil.copy(Path(__file__).with_name("cpu_stub.cpp"), source / "csrc")
    return source


@pytest.fixture
def target(tmp_path):
    """A new environment that sees the packages of this one, torch among them, but not its vqops, and has no pip."""
    seen = tmp_path / "seen"
    seen.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "vqops" not in package.name:
            (seen / package.name).symlink_to(package)
    run_well(sys.executable, "-m", "venv", "--without-pip", tmp_path / "target", cwd=tmp_path)
    python = tmp_path / "target/bin/python"
    site = run_well(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    Path(site, "seen.pth").write_text(str(seen))
    return python


USE = """
from pathlib import Path
import torch, vqops
from vqops import _C
x, codebook = torch.randn(50, 8), torch.randn(20, 8)
assert vqops.nearest(x, codebook).equal(torch.cdist(x.double(), codebook.double()).argmin(1))
assert _C.instruction_sets == "stub", _C.instruction_sets
assert Path(vqops.__file__).with_name("py.typed").exists()
print(vqops.__file__)
"""


def pip(python, *arguments, cwd):
    return run_well(sys.executable, "-m", "pip", "--python", python, *arguments, cwd=cwd, PIP_REQUIRE_VIRTUALENV="0")


@pytest.mark.slow
class TestInstall:
    @pytest.mark.parametrize("editable", [False, True], ids=["plain", "editable"])
    def test_pip_offline(self, small_source, target, editable, tmp_path):
        pip(target, "install", "--no-index", *["-e"] * editable, ".", cwd=small_source)
        used = Path(run_well(target, "-c", USE, cwd=tmp_path).strip())
        assert used.is_relative_to(small_source if editable else tmp_path / "target")
        assert "stub; in use: stub" in run_well(tmp_path / "target/bin/vqops", "info", cwd=tmp_path)

    def test_newest_pip_with_venv_isolation(self, small_source, target, tmp_path):
        pip(target, "install", "--upgrade", "--ignore-installed", "--no-deps", "pip", cwd=tmp_path)
        command = [target, "-m", "pip", "install", "--no-index", "--use-feature=venv-isolation", "."]
        run_well(*command, cwd=small_source)
        run_well(target, "-c", USE, cwd=tmp_path)

    def test_wheel_from_sdist(self, small_source, target, tmp_path):
        if not list(metadata.distributions(name="build")):  # importable is also a folder build/ of an earlier install
            pytest.skip("build is not installed")
        run_well(target, "-m", "build", cwd=small_source)
        (wheel,) = (small_source / "dist").glob("*.whl")
        pip(target, "install", "--no-index", wheel, cwd=tmp_path)
        run_well(target, "-c", USE, cwd=tmp_path)

    def test_uv_offline(self, small_source, target, tmp_path):
        if not shutil.which("uv"):
            pytest.skip("uv is not installed")
        run_well("uv", "pip", "install", "--offline", "--no-deps", "--python", target, ".", cwd=small_source)
        run_well(target, "-c", USE, cwd=tmp_path)

    def test_cuda_kernels_build_and_register_without_a_gpu(self, setup, small_source, target, tmp_path):
        if setup.find_toolkit() == (None, None):
            pytest.skip("no CUDA toolkit")
        (small_source / "csrc/kernel.cu").write_text(CUDA_KERNEL)
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path]
        said = run_well(*command, cwd=small_source, VQOPS_CUDA="1", VQOPS_CUDA_ARCHS="all", TORCH_CUDA_ARCH_LIST="")
        assert "sm_80 sm_90a" in next(line for line in said.splitlines() if line.startswith("vqops: "))
        shutil.copytree(small_source / "vqops", tmp_path / "vqops", dirs_exist_ok=True)
        assert run_well(sys.executable, "-c", IS_REGISTERED, cwd=tmp_path).strip() == "True"
        if shutil.which("readelf"):  # by libtorch a torch with CUDA gives its stream
            (library,) = (tmp_path / "vqops").glob("_C*.so")
            assert "[libtorch.so]" in run_well("readelf", "--dynamic", library, cwd=tmp_path)
