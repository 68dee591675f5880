"""The lines that a docstring calls equivalent, run beside the op."""

import inspect
import textwrap
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from promises import INDICES
from torch.testing import assert_close

from vqops import ops


def arguments():
    torch.manual_seed(0)
    x, c = torch.randn(50, 6), torch.randn(9, 6)
    indices, weight = torch.randint(9, (50,)), torch.rand(50)
    state = {"cluster_size": torch.rand(1, 9), "embed_avg": torch.randn(1, 9, 6), "embed": torch.randn(1, 9, 6)}
    step = {"counts": torch.rand(1, 9), "sums": torch.randn(1, 9, 6), "decay": 0.9, "eps": 1e-3}
    return {
        "nearest": [{"x": x, "codebook": c}],
        "nearest_topk": [{"x": x, "codebook": c, "k": 3}],
        "quantize": [{"x": x, "codebook": c}],
        "residual_quantize": [{"x": x.double(), "codebooks": torch.stack([c, c.roll(1, 0) / 2, c.roll(2, 0) / 4])}],
        "code_sums": [{"x": x, "indices": indices, "num_codes": 9, "weight": each} for each in (None, weight)],
        "code_cross_entropy": [{"x": x, "codebook": c, "targets": indices}],
        "assignment_entropy": [{"x": x.unflatten(0, (10, 5)), "codebook": c, "inverse_temperature": 2.0}],
        "soft_codes": [{"x": x, "codebook": c, "temperature": 0.5}],
        "ema_update_": [state | step],
    }


MODULES = [import_module(f"vqops.ops.{module.name}") for module in iter_modules(ops.__path__)]
DESCRIBED = {
    name: function
    for module in MODULES
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and "Equivalent to:" in (inspect.getdoc(function) or "")
}
ARGUMENTS = arguments()
PASSING = {"quantize": ("x",), "residual_quantize": ("x",)} | dict.fromkeys(
    ("code_cross_entropy", "assignment_entropy", "soft_codes"), ("x", "codebook")
)  # arguments that get a gradient


def equivalent(op):
    """The lines as a function of the op's arguments by name."""
    lines = inspect.getdoc(DESCRIBED[op]).partition("Equivalent to:\n")[2].partition("\n\n")[0]
    code = f"def equivalent({', '.join(ARGUMENTS[op][0])}):\n{textwrap.indent(textwrap.dedent(lines), '    ')}"
    names = {"torch": torch, "nearest": DESCRIBED["nearest"]}
    exec(code, names)
    return names["equivalent"]


def results(call, given, passing):
    given = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    leaves = [given[name].requires_grad_() for name in passing]
    result = call(**given)
    found = [given[name] for name in ("cluster_size", "embed_avg", "embed") if name in given]
    if result is not None:
        found += [result] if isinstance(result, torch.Tensor) else [t for t in result if isinstance(t, torch.Tensor)]
    sums = [t.square().sum() for t in found if t.requires_grad]
    return found, torch.autograd.grad(sum(sums), leaves) if leaves else ()


def test_all_of_them():
    assert DESCRIBED.keys() == ARGUMENTS.keys()


@pytest.mark.parametrize("op, case", [(op, case) for op in ARGUMENTS for case in range(len(ARGUMENTS[op]))])
def test_the_lines_do_what_the_op_does(op, case):
    given, passing = ARGUMENTS[op][case], PASSING.get(op, ())
    found, gradients = results(DESCRIBED[op], given, passing)
    expected, expected_gradients = results(equivalent(op), given, passing)
    assert_close(gradients, expected_gradients)
    for a, b in zip(found, expected, strict=op != "quantize"):  # without counts and sums, which nobody asked for
        if a.dtype == torch.int64:
            INDICES.same(a, b)
        else:
            assert_close(a, b)
