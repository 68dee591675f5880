"""What exporters put in the place of an op: the same values in PyTorch's own operators."""

import math

import pytest
import torch
from promises import INDICES, ORDER
from torch.testing import assert_close

import vqops
from vqops import reference
from vqops.pytorch import decomposition

ops = torch.ops.vqops


def vectors(dtype: torch.dtype, K: int, D: int, N: int = 90):
    """Rows and codes of two heads with equal codes, rows on a code, and values that are no numbers or overflow."""
    x, c = torch.randn(2, N, D, dtype=torch.float64), torch.randn(2, K, D, dtype=torch.float64)
    c[:, K // 2] = c[:, 0]
    x[:, : N // 3] = c[:, torch.arange(N // 3) % K]
    x, c = x.to(dtype), c.to(dtype)
    if N:
        x[0, 1, 0], x[1, 2, -1], x[0, 3, 0] = math.nan, math.inf, -math.inf
        x[:, 4], x[:, 5] = 0, torch.finfo(dtype).max
        x[:, 6], c[1, -1] = torch.finfo(dtype).tiny, 0
    if K > 3:
        c[0, 1, 0], c[0, 2, -1], c[0, 3] = math.nan, -math.inf, torch.finfo(dtype).max
    return x, c


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("K, D", [(1, 1), (5, 3), (64, 8), (65, 17), (200, 9)])
def test_decides_as_the_reference(K, D, dtype, metric):
    for N in (0, 90):
        x, c = vectors(dtype, K, D, N)
        mask = torch.rand(2, N) > 0.2
        for kept in (None, mask):
            found = decomposition.quantize(x, c, kept, None, metric)
            expected = reference.quantize(x, c, kept, None, metric)
            INDICES.same(found[1], expected[1])
            ORDER.same(found, expected, equal_nan=True)
            k = min(K, 3)
            topk, distances = decomposition.nearest_topk(x, c, k, kept, metric)
            right, far = reference.nearest_topk(x, c, k, kept, metric)
            INDICES.same(topk, right)
            ORDER.same(distances, far, equal_nan=True)


@pytest.mark.parametrize("metric, normalize", [("euclidean", True), ("cosine", True), ("cosine", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_levels_are_those_of_the_reference(dtype, metric, normalize):
    """But for the order in which errors add up."""
    for N in (0, 90):
        x, c = vectors(dtype, 65, 9, N)
        codebooks = [c, c[:, :5] / 2, c[:, 4:12]]
        for levels in (None, torch.tensor(2)):
            options = torch.rand(2, N) > 0.2, levels, metric, "none", True, True, 0.0, normalize
            found = decomposition.residual_quantize(x, codebooks, *options)
            expected = reference.residual_quantize(x, codebooks, *options)
            ORDER.same([*found[:2], *found[3:]], [*expected[:2], *expected[3:]], equal_nan=True)
            assert_close(found[2], expected[2], equal_nan=True)


def test_no_code_that_is_finite():
    x, c = torch.randn(1, 4, 2), torch.full((1, 70, 2), math.nan)
    INDICES.same(decomposition.nearest(x, c), torch.full((1, 4), -1))
    indices, distances = decomposition.nearest_topk(x, c, 2)
    INDICES.same(indices, torch.full((1, 4, 2), -1))
    assert distances.isposinf().all()


def test_a_code_whose_distance_overflows_is_one():
    x = torch.full((1, 1, 1), -1e300, dtype=torch.float64)
    c = torch.tensor([math.nan, 1e300, 1e300, math.inf], dtype=torch.float64).view(1, 4, 1)
    INDICES.same(decomposition.nearest(x, c), reference.nearest(x, c))
    INDICES.same(decomposition.nearest_topk(x, c, 3)[0], torch.tensor([[[1, 2, -1]]]))


@pytest.mark.parametrize("name", ["nearest", "nearest_topk", "quantize", "residual_quantize"])
def test_only_an_export_to_onnx_gets_it(name, monkeypatch):
    calls = {
        "nearest": lambda x: vqops.nearest(x, c),
        "nearest_topk": lambda x: vqops.nearest_topk(x, c, 2),
        "quantize": lambda x: tuple(vqops.quantize(x, c)),
        "residual_quantize": lambda x: tuple(vqops.residual_quantize(x, [c, c / 2])[:3]),
    }
    c = torch.randn(9, 4)
    module = torch.nn.Module()
    module.forward = calls[name]
    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(module, (torch.randn(30, 4),), dynamic_shapes=({0: rows},))

    def has_the_op(program):
        return getattr(ops, name).default in {node.target for node in program.graph.nodes}

    assert has_the_op(program)
    assert has_the_op(program.run_decompositions())
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert not has_the_op(program.run_decompositions())
