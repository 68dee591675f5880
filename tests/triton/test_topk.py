"""nearest_topk of Triton in the interpreter, against the compiled CPU kernels."""

import math

import pytest
import torch
from promises import INDICES

pytest.importorskip("triton")

import vqops
from vqops.triton_kernels import blocks, interpreted

if not interpreted():
    pytest.skip("TRITON_INTERPRET is off", allow_module_level=True)

from vqops.triton_kernels import finish

METRICS = ("euclidean", "cosine")


def check(x, codebook, k, mask=None, metric="euclidean"):
    expected = vqops.nearest_topk(x, codebook, k, mask, metric, implementation="compiled")
    found = vqops.nearest_topk(x, codebook, k, mask, metric, implementation="triton")
    INDICES.same(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-12, equal_nan=True)


def test_by_hand():
    codebook = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]])
    indices, distances = vqops.nearest_topk(torch.tensor([[0.0, 1.0]]), codebook, 3, implementation="triton")
    assert indices.tolist() == [[0, 2, 1]] and distances.tolist() == [[1, 4, 17]]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("N, K, D, k", [(1, 1, 1, 1), (60, 300, 12, 5), (20, 40, 70, 32), (9, 700, 300, 3)])
def test_shapes(N, K, D, k, metric):
    check(torch.randn(N, D) + 1, torch.randn(K, D) + 1, k, metric=metric)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    check(torch.randn(30, 6).to(dtype), torch.randn(50, 6).to(dtype), 4)


@pytest.mark.parametrize("metric", METRICS)
def test_heads_masks_repeats_and_no_numbers(metric):
    x, codebook = torch.randn(2, 40, 5), torch.randn(2, 30, 5)
    codebook[0, 10:20] = codebook[0, 3]
    codebook[1, 4:] = math.nan
    x[0, 3], x[0, 4, 0], x[1, 2, 1] = 0, math.nan, math.inf
    check(x, codebook, 12, metric=metric)
    check(x, codebook, 12, torch.rand(2, 40) > 0.3, metric)


def test_a_code_too_far_to_be_screened_is_among_the_nearest():
    x, codebook = torch.randn(9, 4), torch.randn(30, 4)
    codebook[7] *= 1e15
    check(x, codebook, 30)
    check(x, codebook, 29)


def test_more_codes_within_rounding_than_a_list_holds():
    check(torch.randn(20, 8) * 100, torch.randn(1, 8) + 2.0**-20 * torch.randn(150, 8), 3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_programs_share_the_codes_of_a_row(monkeypatch, k, metric):
    monkeypatch.setattr(finish, "queue_programs", lambda device: 21)
    monkeypatch.setattr(blocks, "INTERPRETED", blocks.INTERPRETED._replace(scan=(4, 16)))
    x, codebook = torch.randn(6, 5), torch.randn(45, 5)
    codebook[20:40] = codebook[:20]
    codebook[5], codebook[11, 2], x[2, 1] = math.nan, math.inf, math.nan
    check(x.double(), codebook, k, metric=metric)
    check(x.double(), codebook[:k], k, torch.rand(6) > 0.3, metric)
    check(torch.zeros(3, 5), codebook, k, metric=metric)
