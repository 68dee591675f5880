import pytest
import torch

import vqops
from vqops import _C, info


@pytest.fixture
def lines():
    return info.report().splitlines()


def line_of(lines, start):
    return next(line for line in lines if line.startswith(start))


def test_versions(lines):
    assert vqops.__version__ in line_of(lines, "vqops:")
    assert torch.__version__ in line_of(lines, "torch:")


def test_what_is_built_and_used(lines):
    assert _C.instruction_set() in _C.instruction_sets.split()
    assert line_of(lines, "CPU kernels:").endswith(f"in use: {_C.instruction_set()}")
    assert line_of(lines, "CPU threads:").split()[-1] == str(torch.get_num_threads())
    assert _C.cuda in line_of(lines, "CUDA kernels:")


def test_every_op_has_a_row_with_its_default_first(lines):
    for op, by_device in vqops.implementations().items():
        assert line_of(lines, f"{op} ").split()[1].strip(",") == by_device["cpu"][0]


@pytest.mark.parametrize("package", ["triton", "numpy"])
def test_a_package_that_is_not_there_is_said_to_be_missing(monkeypatch, package):
    def nothing(name):
        raise info.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(info.metadata, "version", nothing)
    assert line_of(info.report().splitlines(), {"triton": "Triton", "numpy": "numpy"}[package]).endswith("not found")


def test_columns_line_up():
    assert info.table([["a", "bb", "c"], ["aaa", "b", ""]]) == "a    bb  c\naaa  b"


H100, L4, B300 = ("H100", (9, 0)), ("L4", (8, 9)), ("B300", (10, 3))


@pytest.mark.parametrize(
    "built, devices, bare",
    [
        ("13.0 for sm_90a", [H100], ""),
        ("13.0 for sm_80 compute_80", [L4, H100], ""),
        ("13.0 for sm_80 sm_90a sm_100 sm_120 compute_120", [L4, H100, B300, ("later", (15, 1))], ""),
        ("13.0 for sm_80", [H100, L4], "H100 (sm_90)"),
        ("13.0 for sm_90a", [L4, H100, B300], "L4 (sm_89), B300 (sm_103)"),
        ("13.0 for compute_90a", [B300], "B300 (sm_103)"),
        ("13.0 for sm_90a", [], ""),
        ("left out: VQOPS_CUDA=0", [H100], ""),
    ],
)
def test_a_gpu_without_code_is_named_with_the_command_that_rebuilds(built, devices, bare):
    said = info.cuda_kernels(built, devices)
    assert said.startswith(built)
    assert said.removeprefix(built).partition(".")[0] == (f"; no code for {bare}" if bare else "")
    assert said.endswith("pip install --force-reinstall --no-deps .") == bool(bare)


def test_the_line_of_the_kernels_asks_the_devices_at_hand(monkeypatch):
    monkeypatch.setattr(info, "cuda_devices", lambda: [H100])
    monkeypatch.setattr(info.choice, "table", lambda _device: info.choice.Table((), None, ("a.json: it is broken",)))
    monkeypatch.setattr(info.triton_kernels, "why_not", lambda _device: "Triton needs a C compiler")
    monkeypatch.setattr(info._C, "cuda", "13.0 for sm_80")
    lines = info.report().splitlines()
    assert "no code for H100 (sm_90)" in line_of(lines, "CUDA kernels:")
    assert line_of(lines, "CUDA devices:").endswith(" H100 (sm_90)")
    assert lines[-3:] == [
        'H100 (sm_90): no record, which `vqops check` would make, so every op takes "pytorch"',
        "  triton: Triton needs a C compiler",
        "  not counted: a.json: it is broken",
    ]
