"""The build: what it asks for, what it finds, what it says, and (slow) every way to install.

The slow tests leave the kernels out, so as to build in seconds, and install into new environments that see the packages
of this one.
"""

import importlib.util
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

DRIVER = """
#include <stdlib.h>
int cuInit(unsigned flags) { return getenv("ERROR") ? atoi(getenv("ERROR")) : 0; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int number) { *device = 10 + number; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 75 ? device - 2 : attribute == 76 ? (device == 10 ? 6 : 0) : -1;
    return device < 10;
}
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


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


class TestCuda:
    @pytest.mark.parametrize(
        "request_, sources, torch_cuda, toolkit, reason",
        [
            ("0", ["a.cu"], (13, 0), (13, 0), "VQOPS_CUDA=0"),
            ("", [], (13, 0), (13, 0), "no CUDA kernels"),
            ("1", [], (13, 0), (13, 0), "no CUDA kernels"),
            ("", ["a.cu"], (), (13, 0), "torch is built without CUDA"),
            ("1", ["a.cu"], (), (13, 0), None),
            ("", ["a.cu"], (13, 0), None, "no CUDA toolkit"),
            ("1", ["a.cu"], (), None, "no CUDA toolkit"),
            ("", ["a.cu"], (13, 0), (13, 2), None),
            ("", ["a.cu"], (13, 2), (13, 0), None),
            ("", ["a.cu"], (13, 0), (12, 8), None),
            ("", ["a.cu"], (12, 8), (13, 0), "toolkit 13.0"),
            ("1", ["a.cu"], (12, 8), (13, 0), "toolkit 13.0"),
            ("", ["a.cu"], (12, 8), (11, 8), "toolkit 11.8"),
            ("1", ["a.cu"], (), (11, 8), "toolkit 11.8"),
        ],
    )
    def test_decision(self, setup, request_, sources, torch_cuda, toolkit, reason):
        why = setup.why_no_cuda(request_, sources, torch_cuda, toolkit)
        assert why is None if reason is None else reason in why

    @pytest.mark.parametrize("value, message", [("1", "VQOPS_CUDA=1, but there are no CUDA"), ("yes", "0, 1 or empty")])
    def test_what_cannot_be_done_is_an_error(self, setup, tmp_path, monkeypatch, value, message):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("VQOPS_CUDA", value)
        monkeypatch.setenv("CXX", sys.executable)
        with pytest.raises(SystemExit, match=message):
            setup.extension()

    @pytest.mark.parametrize(
        "known, built",
        [
            ("75 80 90 100 110 120", "sm_80 sm_90a sm_100 sm_120 compute_120"),
            ("75 80 90", "sm_80 sm_90a compute_80"),
        ],
    )
    def test_architectures_that_nvcc_knows(self, setup, tmp_path, monkeypatch, known, built):
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        monkeypatch.setenv("VQOPS_CUDA_ARCHS", "all")
        nvcc = self.fake_nvcc(tmp_path, "\n".join(f"compute_{a}" for a in known.split()))
        flags, why = setup.gpu_flags(str(nvcc))
        assert [flag.rpartition("=")[2] for flag in flags] == built.split()
        assert all(flag.startswith("-gencode=arch=compute_") for flag in flags)
        assert why == "VQOPS_CUDA_ARCHS=all"

    ALL, TOO_OLD = ("80", "90a", "100", "120"), "is too old, the kernels need 8.0"

    @pytest.mark.parametrize(
        "gpus, known, chosen, why",
        [
            ([], ALL, ALL, "no GPU is visible: no driver"),
            ([(9, 0)], ALL, ["90a"], "for the GPUs here"),
            ([(8, 0)], ALL, ["80"], "for the GPUs here"),
            ([(8, 9)], ALL, ["80"], "for the GPUs here"),
            ([(10, 3)], ALL, ["100"], "for the GPUs here"),
            ([(12, 1)], ALL, ["120"], "for the GPUs here"),
            ([(8, 6), (9, 0)], ALL, ["80", "90a"], "for the GPUs here"),
            ([(11, 0)], ALL, ["100"], "for the GPUs here"),  # as PTX, and so
            ([(13, 0)], ALL, ["120"], "for the GPUs here"),
            ([(10, 0)], ("80", "90a"), ["80"], "for the GPUs here"),
            ([(7, 5)], ALL, [], f"compute capability 7.5 {TOO_OLD}"),
            ([(7, 0), (7, 5)], ALL, [], f"compute capability 7.0, 7.5 {TOO_OLD}"),
            ([(7, 5), (9, 0)], ALL, ["90a"], f"for the GPUs here; compute capability 7.5 {TOO_OLD}"),
        ],
    )
    def test_architectures_of_the_gpus_at_hand(self, setup, gpus, known, chosen, why):
        assert setup.choose_architectures("", (gpus, "no driver"), known) == (chosen, why)

    @pytest.mark.parametrize(
        "flags, of", [(["90a"], "sm_90a"), (["80", "90a"], "sm_80 sm_90a compute_80"), (["100"], "sm_100 compute_100")]
    )
    def test_ptx_of_the_newest_that_lasts(self, setup, flags, of):
        assert [flag.rpartition("=")[2] for flag in setup.architecture_flags(flags)] == of.split()

    def test_architectures_by_name(self, setup):
        gpus = [(8, 0)], ""
        assert setup.choose_architectures("all", gpus, self.ALL) == (self.ALL, "VQOPS_CUDA_ARCHS=all")
        assert setup.choose_architectures("120, 90a", gpus, self.ALL) == (["90a", "120"], "VQOPS_CUDA_ARCHS=120, 90a")

    @pytest.mark.parametrize("request_", ["90", "sm_80", "9.0a", "80 All"])
    def test_wrong_architectures_name_the_allowed(self, setup, request_):
        with pytest.raises(SystemExit, match=f"VQOPS_CUDA_ARCHS={request_}, .* all, empty or of: 80 90a 100 120"):
            setup.choose_architectures(request_, ([], ""), self.ALL)

    def test_torchs_variable_overrides(self, setup, monkeypatch):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9;9.0a+PTX")
        monkeypatch.setenv("VQOPS_CUDA_ARCHS", "wrong")
        flags, why = setup.gpu_flags("no nvcc")
        assert {flag.rpartition("=")[2] for flag in flags} == {"sm_89", "sm_90a", "compute_90a"}
        assert why == "TORCH_CUDA_ARCH_LIST"

    def test_gpus_too_old_leave_cuda_out(self, setup, monkeypatch, capsys):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(setup, "find_toolkit", lambda: ("toolkit", (13, 0)))
        monkeypatch.setattr(setup, "why_no_cuda", lambda *_: None)
        monkeypatch.setattr(setup, "known_architectures", lambda _: self.ALL)
        monkeypatch.setattr(setup, "visible_gpus", lambda: ([(7, 5)], ""))
        for name in ("TORCH_CUDA_ARCH_LIST", "VQOPS_CUDA_ARCHS", "VQOPS_CUDA"):
            monkeypatch.delenv(name, raising=False)
        (module,) = setup.extension()["ext_modules"]
        assert "CUDA left out: compute capability 7.5 is too old" in capsys.readouterr().out
        assert not [file for file in module.sources if file.endswith(".cu")]
        monkeypatch.setenv("VQOPS_CUDA", "1")
        with pytest.raises(SystemExit, match=r"VQOPS_CUDA=1, but compute capability 7\.5 is too old"):
            setup.extension()

    def fake_nvcc(self, folder, prints):
        nvcc = folder / "bin/nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\necho '{prints}'\n")
        nvcc.chmod(0o755)
        return nvcc

    def fake_toolkit(self, folder):
        self.fake_nvcc(folder, "Cuda compilation tools, release 12.9, V12.9.86")
        (folder / "include").mkdir()
        (folder / "include/cuda_runtime.h").touch()
        return folder

    @pytest.mark.parametrize(
        "driver, gpus, why",
        [
            ("print(9, 0); print(8, 0); print(9, 0)", [(8, 0), (9, 0)], ""),
            ("", [], "the driver has none"),
            ("import ctypes; ctypes.CDLL('libno.so')", [], "libno.so"),
            ("raise SystemExit('cuInit gives error 999')", [], "cuInit gives error 999"),
            ("import os; os.abort()", [], "the driver ended the process with -6"),
            ("import time; time.sleep(60)", [], "the driver gave no answer in 2 s"),
        ],
    )
    def test_a_driver_that_fails_or_hangs_shows_no_gpu(self, setup, driver, gpus, why):
        found, said = setup.visible_gpus(driver, seconds=2)
        assert found == gpus and why in said

    def test_the_driver_is_asked_for_every_gpu(self, setup, tmp_path, monkeypatch):
        source = tmp_path / "driver.c"
        source.write_text(DRIVER)
        run_well("cc", "-shared", "-fPIC", source, "-o", tmp_path / "libcuda.so.1", cwd=tmp_path)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
        assert setup.visible_gpus()[0] == [(8, 6), (9, 0)]
        for error, why in (("100", "the driver has none"), ("999", "cuInit gives error 999")):
            monkeypatch.setenv("ERROR", error)
            assert setup.visible_gpus() == ([], why)

    @pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
    def test_named_toolkit(self, setup, tmp_path, monkeypatch, variable):
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.setenv(variable, str(self.fake_toolkit(tmp_path)))
        assert setup.find_toolkit() == (str(tmp_path), (12, 9))

    def test_toolkit_on_path(self, setup, tmp_path, monkeypatch):
        toolkit = self.fake_toolkit(tmp_path / "toolkit")
        link = tmp_path / "bin/nvcc"
        link.parent.mkdir()
        link.symlink_to(toolkit / "bin/nvcc")
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.delenv("CUDA_PATH", raising=False)
        monkeypatch.setenv("PATH", str(link.parent))
        assert setup.find_toolkit() == (str(toolkit), (12, 9))

    def test_nvcc_without_a_toolkit_around_it_is_none(self, setup, tmp_path, monkeypatch):
        self.fake_nvcc(tmp_path, "release 12.9")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert setup.find_toolkit() == (None, None)


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
