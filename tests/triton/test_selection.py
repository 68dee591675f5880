"""How the Triton implementation is offered and chosen."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import vqops
from vqops import triton_kernels
from vqops.dispatch import library


def run(code: str, **environment) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    given = {"cwd": Path(__file__).parent, "env": kept | environment}
    return subprocess.run(command, **given, check=True, capture_output=True, text=True).stdout


def test_every_op_of_a_step_has_a_triton_implementation():
    soft = ("assignment_entropy", "code_cross_entropy", "soft_codes")
    without = {"check_first_run_", "keep_prepared_", "sample_topk", *soft, *(f"{name}_backward" for name in soft)}
    assert set(triton_kernels.MODULES) == set(library.OPS) - without
    for name, by_device in vqops.implementations().items():
        assert ("triton" in by_device["cuda"]) == (name not in without)


def test_lazy_and_on_the_cpu_only_in_the_interpreter():
    code = "import sys, vqops; print('triton' in sys.modules, vqops.implementations()['nearest']['cpu'])"
    assert run(code) == "False ['compiled', 'pytorch', 'reference']\n"
    assert run(code, TRITON_INTERPRET="1") == "False ['compiled', 'pytorch', 'reference', 'triton']\n"


def test_without_the_interpreter_the_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_kernels, "why_not", triton_kernels.why_not.__wrapped__)
    with pytest.raises(RuntimeError, match="nearest: implementation 'triton' can't run: it runs on CUDA, or on"):
        vqops.nearest(torch.zeros(2, 3), torch.zeros(2, 3), implementation="triton")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(triton_kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"):
        vqops.nearest(torch.zeros(2, 3), torch.zeros(2, 3), implementation="triton")
    with vqops.use_implementation("triton"), pytest.raises(ValueError, match="is named, but there is no Triton"):
        vqops.nearest(torch.zeros(2, 3), torch.zeros(2, 3))
    assert vqops.implementations()["nearest"]["cuda"] == ["pytorch", "reference"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fake_kernels_agree_with_the_layout(dtype):
    from vqops.triton_kernels.layout import packed_bytes

    with torch._subclasses.FakeTensorMode():
        packed = torch.ops.vqops.prepare_triton(torch.empty(2, 100, 20, dtype=dtype))
    assert packed.shape == (0 if dtype == torch.float64 else packed_bytes(2, 100, 20),)
