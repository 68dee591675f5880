"""residual_quantize and its gradient of Triton in the interpreter, against the reference; the common tests are in
tests/ops."""

import math

import pytest
import torch
from promises import INDICES, ORDER

pytest.importorskip("triton")

import vqops
from vqops.triton_kernels import interpreted

if not interpreted():
    pytest.skip("TRITON_INTERPRET is off", allow_module_level=True)

from torch.testing import assert_close

from vqops.triton_kernels import blocks, residual, residual_backward

WAYS = (("euclidean", True), ("cosine", True), ("cosine", False))  # the metric, and normalize


def both(op, *arguments):
    """Of an op of vqops, or of the ops of this name."""
    return (getattr(torch.ops.vqops, f"{op}_{each}")(*arguments) for each in ("triton", "reference"))


def awkward(dtype=torch.float32, N=30, D=12, sizes=(9, 1, 12)):
    x, codebooks = torch.randn(2, N, D), [torch.randn(2, K, D) / 2**level for level, K in enumerate(sizes)]
    x[0, 1, 0], x[0, 2], codebooks[0][0, 1, 0] = math.nan, 0, math.inf
    return x.to(dtype), codebooks, torch.rand(2, N) > 0.2


@pytest.mark.parametrize("metric, normalize", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_to_the_last_bit(dtype, metric, normalize):
    x, codebooks, mask = awkward(dtype)
    for kept, levels in ((None, None), (mask, torch.tensor(2))):
        options = metric, "none", True, True, 0.0, normalize
        ORDER.same(*both("residual_quantize", x, codebooks, kept, levels, *options), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("levels", range(4))
def test_levels_that_do_not_run_leave_the_sum(dtype, levels):
    """Where the result is the sum itself, and where it is converted at the last level."""
    x, codebooks, mask = awkward(dtype, 20, 5, (4, 4, 4))
    for kept in (None, mask):
        given = x, codebooks, kept, torch.tensor(levels)
        found, expected = both("residual_quantize", *given)
        ORDER.same(found, expected, equal_nan=True)


@pytest.mark.parametrize("H, Q, N", [(1, 1, 1), (2, 3, 255), (1, 2, 257), (3, 1, 700)])
def test_runs_of_errors(H, Q, N):
    """Values of such sizes that any other order gives other bits."""
    errors = (30 * torch.randn(H, Q, N, dtype=torch.float64)).exp()
    expected = []
    for values in errors.view(-1, N).tolist():
        runs = [sum(values[start : start + 256], 0.0) for start in range(0, N, 256)]
        expected.append(sum(runs, 0.0))
    ORDER.same(residual.sum_in_runs(errors, torch.float64), torch.tensor(expected, dtype=torch.float64).view(H, Q))


@pytest.mark.parametrize("per_level", [True, False])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
@pytest.mark.parametrize("metric, normalize", WAYS)
def test_gradients(metric, normalize, gradient, per_level):
    sizes = [9, 1, 12]
    x, codebooks, mask = awkward(torch.float64)
    old, g, e = torch.cat(codebooks, 1).double(), torch.randn(x.shape).double(), torch.randn(2, 3).double()
    for gradients, levels in (((g, e), None), ((g, None), torch.tensor(2)), ((None, e), torch.tensor(9))):
        indices = torch.ops.vqops.residual_quantize_reference(x, codebooks, mask, levels, metric)[1]
        given = *gradients, x, old, sizes, indices, mask, levels
        options = metric, gradient, per_level, 0.75, normalize, True, True
        for found, expected in zip(*both("residual_quantize_backward", *given, *options), strict=True):
            assert_close(found, expected, rtol=1e-11, atol=1e-11, equal_nan=True)


def test_gradients_are_made_where_they_are_needed():
    x, codebooks, _ = awkward(sizes=(4, 4))
    indices = torch.ops.vqops.residual_quantize_reference(x, codebooks)[1]
    given = x, torch.randn(2, 2), x, torch.cat(codebooks, 1), [4, 4], indices, None, None
    for needed in ((True, True), (False, True), (True, False), (False, False)):
        options = "euclidean", "straight_through", True, 0.5, True, *needed
        for found, expected in zip(*both("residual_quantize_backward", *given, *options), strict=True):
            assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("sizes", [[7], [3, 3, 3], [3, 1, 5]])
def test_where_levels_start(sizes):
    starts = [sum(sizes[:level]) for level in range(len(sizes))]
    INDICES.same(residual_backward.starts_of(sizes, torch.device("cpu")), torch.tensor(starts))


@pytest.mark.parametrize("rows", [1, 4])
def test_blocks_of_any_size(monkeypatch, rows):
    """Heads that share a block, a last block that is not full."""
    x, codebooks, mask = awkward(N=7, D=9, sizes=(3, 2))
    monkeypatch.setattr(residual, "sizes", lambda device: blocks.INTERPRETED._replace(lanes=rows))
    monkeypatch.setattr(residual_backward, "walked_rows", lambda D, wide, device: (rows, 16))
    found, expected = both("residual_quantize", x, codebooks, mask, None, "cosine", "none", True, True)
    ORDER.same(found, expected, equal_nan=True)
    given = x, torch.randn(2, 2), x, found[5], [3, 2], found[1], mask, None, "cosine", "rotation", False, 0.5
    for one, other in zip(*both("residual_quantize_backward", *given, True, True, True), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_without_rows():
    found = vqops.residual_quantize(torch.empty(0, 4), torch.randn(2, 3, 4), code_sums=True, implementation="triton")
    assert found.quantized.shape == (0, 4) and found.indices.shape == (0, 2) and found.error.tolist() == [0, 0]
    assert not any(t.any() for t in (*found.counts, *found.sums))
