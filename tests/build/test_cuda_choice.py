"""Whether CUDA is built, with which toolkit, and for which GPUs. Nothing is compiled but a stand-in for the driver."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
ALL, TOO_OLD = ("80", "90a", "100", "120"), "is too old, the kernels need 8.0"


def fake_nvcc(folder, prints):
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho '{prints}'\n")
    nvcc.chmod(0o755)
    return nvcc


def fake_toolkit(folder):
    fake_nvcc(folder, "Cuda compilation tools, release 12.9, V12.9.86")
    (folder / "include").mkdir()
    (folder / "include/cuda_runtime.h").touch()
    return folder


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
def test_decision(setup, request_, sources, torch_cuda, toolkit, reason):
    why = setup.why_no_cuda(request_, sources, torch_cuda, toolkit)
    assert why is None if reason is None else reason in why


@pytest.mark.parametrize("value, message", [("1", "VQOPS_CUDA=1, but there are no CUDA"), ("yes", "0, 1 or empty")])
def test_what_cannot_be_done_is_an_error(setup, tmp_path, monkeypatch, value, message):
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
def test_architectures_that_nvcc_knows(setup, tmp_path, monkeypatch, known, built):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("VQOPS_CUDA_ARCHS", "all")
    nvcc = fake_nvcc(tmp_path, "\n".join(f"compute_{a}" for a in known.split()))
    flags, why = setup.gpu_flags(str(nvcc))
    assert [flag.rpartition("=")[2] for flag in flags] == built.split()
    assert all(flag.startswith("-gencode=arch=compute_") for flag in flags)
    assert why == "VQOPS_CUDA_ARCHS=all"


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
def test_architectures_of_the_gpus_at_hand(setup, gpus, known, chosen, why):
    assert setup.choose_architectures("", (gpus, "no driver"), known) == (chosen, why)


@pytest.mark.parametrize(
    "flags, of", [(["90a"], "sm_90a"), (["80", "90a"], "sm_80 sm_90a compute_80"), (["100"], "sm_100 compute_100")]
)
def test_ptx_of_the_newest_that_lasts(setup, flags, of):
    assert [flag.rpartition("=")[2] for flag in setup.architecture_flags(flags)] == of.split()


def test_architectures_by_name(setup):
    gpus = [(8, 0)], ""
    assert setup.choose_architectures("all", gpus, ALL) == (ALL, "VQOPS_CUDA_ARCHS=all")
    assert setup.choose_architectures("120, 90a", gpus, ALL) == (["90a", "120"], "VQOPS_CUDA_ARCHS=120, 90a")


@pytest.mark.parametrize("request_", ["90", "sm_80", "9.0a", "80 All"])
def test_wrong_architectures_name_the_allowed(setup, request_):
    with pytest.raises(SystemExit, match=f"VQOPS_CUDA_ARCHS={request_}, .* all, empty or of: 80 90a 100 120"):
        setup.choose_architectures(request_, ([], ""), ALL)


def test_torchs_variable_overrides(setup, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9;9.0a+PTX")
    monkeypatch.setenv("VQOPS_CUDA_ARCHS", "wrong")
    flags, why = setup.gpu_flags("no nvcc")
    assert {flag.rpartition("=")[2] for flag in flags} == {"sm_89", "sm_90a", "compute_90a"}
    assert why == "TORCH_CUDA_ARCH_LIST"


def test_gpus_too_old_leave_cuda_out(setup, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setup, "find_toolkit", lambda: ("toolkit", (13, 0)))
    monkeypatch.setattr(setup, "why_no_cuda", lambda *_: None)
    monkeypatch.setattr(setup, "known_architectures", lambda _: ALL)
    monkeypatch.setattr(setup, "visible_gpus", lambda: ([(7, 5)], ""))
    for name in ("TORCH_CUDA_ARCH_LIST", "VQOPS_CUDA_ARCHS", "VQOPS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    (module,) = setup.extension()["ext_modules"]
    assert "CUDA left out: compute capability 7.5 is too old" in capsys.readouterr().out
    assert not [file for file in module.sources if file.endswith(".cu")]
    monkeypatch.setenv("VQOPS_CUDA", "1")
    with pytest.raises(SystemExit, match=r"VQOPS_CUDA=1, but compute capability 7\.5 is too old"):
        setup.extension()


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
def test_a_driver_that_fails_or_hangs_shows_no_gpu(setup, driver, gpus, why):
    found, said = setup.visible_gpus(driver, seconds=2)
    assert found == gpus and why in said


def test_the_driver_is_asked_for_every_gpu(setup, tmp_path, monkeypatch):
    source = tmp_path / "driver.c"
    source.write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", tmp_path / "libcuda.so.1"], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert setup.visible_gpus()[0] == [(8, 6), (9, 0)]
    for error, why in (("100", "the driver has none"), ("999", "cuInit gives error 999")):
        monkeypatch.setenv("ERROR", error)
        assert setup.visible_gpus() == ([], why)


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_named_toolkit(setup, tmp_path, monkeypatch, variable):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv(variable, str(fake_toolkit(tmp_path)))
    assert setup.find_toolkit() == (str(tmp_path), (12, 9))


def test_toolkit_on_path(setup, tmp_path, monkeypatch):
    toolkit = fake_toolkit(tmp_path / "toolkit")
    link = tmp_path / "bin/nvcc"
    link.parent.mkdir()
    link.symlink_to(toolkit / "bin/nvcc")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(link.parent))
    assert setup.find_toolkit() == (str(toolkit), (12, 9))


def test_nvcc_without_a_toolkit_around_it_is_none(setup, tmp_path, monkeypatch):
    fake_nvcc(tmp_path, "release 12.9")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup.find_toolkit() == (None, None)
