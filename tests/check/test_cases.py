"""The cases of `vqops check`: what they find, and what they overlook nothing of."""

import os
import subprocess
import sys

import pytest
import torch
from promises import COPIES

import vqops
from vqops.check import cases, inputs, products
from vqops.check.cases import CASES, Case, difference, judge
from vqops.dispatch.library import OPS

CPU = torch.device("cpu")


@pytest.mark.parametrize("implementation", ["pytorch", "compiled"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case, Case)])
def test_what_is_right_is_found_right(name, implementation):
    assert judge(name, implementation, CPU, small=True) == {"wrong": {}}


def test_every_input_and_every_op_with_a_kernel_has_a_case():
    assert {f"nearest {name}" for name in inputs.SEARCHES} <= set(CASES)
    with_kernels = {op for op in OPS if "compiled" in vqops.implementations()[op]["cpu"]}
    with_kernels.remove("keep_prepared_")  # of the CPU alone, where it decides which preparation is there
    assert {case.op for case in CASES.values()} | {"prepare", "search_statistics"} == with_kernels


def test_the_modes_of_a_process_are_given_back():
    torch.use_deterministic_algorithms(False)
    judge("code_sums float32 in order", "compiled", CPU, small=True)
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    judge("code_sums float32 in order", "compiled", CPU, small=True)
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_strides_go_along_to_the_device():
    given = CASES["nearest odd strides"].build(True)
    assert not any(given[name].is_contiguous() for name in ("x", "codebook", "mask"))
    for value in given.values():
        moved = cases.moved_to(CPU, value)
        assert moved.stride() == value.stride() and moved.data_ptr() != value.data_ptr()
        COPIES.same(moved, value)


@pytest.mark.parametrize("fault", ["last index", "second call"])
def test_a_wrong_result_is_found(monkeypatch, fault):
    calls = []

    def wrong(ops, x, codebook, metrics=("euclidean",), mask=None):
        found = vqops.nearest(x, codebook, mask, implementation=ops.implementation)
        calls.append(ops.implementation)
        if ops.implementation == "pytorch" and (fault != "second call" or calls.count("pytorch") == 2):
            found[..., -1] += 1
        return {"indices": found}

    case = CASES["nearest 4096 x 64 x 3000"]
    broken = Case(case.name, case.op, case.build, wrong)
    monkeypatch.setitem(CASES, case.name, broken)
    found = judge(case.name, "pytorch", CPU, small=True)["wrong"]
    expected = {"indices, again"} if fault == "second call" else {"indices, first", "indices, again"}
    assert set(found) == expected
    first = next(iter(found.values()))
    assert first["differ"] == 1 and first["of"] == 50 and first["is"] == first["should be"] + 1


NAN = float("nan")


@pytest.mark.parametrize(
    "found, expected, loose, differ",
    [
        ([1.0, NAN], [1.0, NAN], 0, None),
        ([1.0, 2.0], [1.0, NAN], 0, 1),
        ([1.0, NAN], [1.0, 2.0], 0.5, 1),
        ([1.0, 2.01], [1.0, 2.0], 0.01, None),
        ([1.0, 2.03], [1.0, 2.0], 0.01, 1),
        ([1.01, 200.0], [1.0, 200.0], 1e-3, None),  # relative to the largest
        ([float("inf"), 1.0], [float("inf"), 1.0], 1e-3, None),
        ([float("inf"), 1.0], [3.0, 1.0], 1e-3, 1),
        ([-0.0], [0.0], 0, None),
        ([], [], 1e-3, None),
    ],
)
def test_differences(found, expected, loose, differ):
    assert difference(torch.tensor(found), torch.tensor(expected), loose).get("differ") == differ


def test_shapes_and_dtypes_are_results_too():
    assert "is" in difference(torch.zeros(3), torch.zeros(2), 0)
    assert "is" in difference(torch.zeros(3), torch.zeros(3, dtype=torch.float64), 1.0)


def test_the_compiled_kernels_are_not_their_own_oracle():
    assert cases.oracle("compiled", CPU).implementation == "pytorch"
    assert cases.oracle("pytorch", CPU).implementation == "compiled"
    assert cases.oracle("compiled", torch.device("cuda")).implementation == "compiled"


# The tensor cores' products


def exact_but(cut):
    def product(x, codes):
        return cut(x.double() @ codes.double().mT).float()

    return product


@pytest.mark.parametrize("probe", products.PROBES, ids=lambda probe: probe.name)
def test_a_product_that_is_rounded_once_is_within_the_bound(monkeypatch, probe):
    monkeypatch.setattr(products, "product_of", lambda implementation: exact_but(lambda sums: sums))
    found = probe.judge("triton", CPU, small=True)
    assert found["wrong"] == {} and found["share_of_bound"] < 0.05


def test_products_of_fewer_bits_are_found(monkeypatch):
    """bfloat16 in the accumulator: what no proof here allows."""
    monkeypatch.setattr(products, "product_of", lambda implementation: exact_but(lambda sums: sums.bfloat16()))
    found = [probe.judge("triton", CPU, small=True) for probe in products.PROBES]
    assert all(each["wrong"] for each in found if each["share_of_bound"] > 1) and any(each["wrong"] for each in found)


def test_the_cpu_has_no_tensor_cores_to_ask():
    assert not products.PROBES[0].concerns("pytorch", "cuda") and not products.PROBES[0].concerns("compiled", "cpu")


@pytest.mark.slow
def test_a_whole_rehearsal():
    """Triton in its interpreter among it; the time is that of two cores which do other things too."""
    command = [sys.executable, "-m", "vqops", "check", "--device", "cpu", "--seconds", "1500"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("pytorch", "compiled"):
        of = sum(case.concerns(name, "cpu") for case in CASES.values())
        assert f"{name}: {of} of {of} cases right" in done.stdout
    assert "A rehearsal, which writes no record" in done.stdout
