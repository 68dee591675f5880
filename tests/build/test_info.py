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
