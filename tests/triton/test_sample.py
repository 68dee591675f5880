"""sample of Triton in the interpreter, against the compiled CPU kernel, which draws as the reference does."""

import math

import pytest
import torch
from promises import INDICES, ORDER

pytest.importorskip("triton")

import triton
import triton.language as tl

import vqops
from vqops.check.inputs import SEARCHES
from vqops.reference import noise
from vqops.triton_kernels import blocks, interpreted

if not interpreted():
    pytest.skip("TRITON_INTERPRET is off", allow_module_level=True)

from vqops.triton_kernels.noise import gumbel, word_of

SEED = (-(2**40) - 3, 2**32 - 9)


def check(x, codebook, temperature, mask=None, metric="euclidean"):
    given = x, codebook, temperature, torch.tensor(SEED), mask, metric
    expected = vqops.sample(*given, implementation="compiled")
    INDICES.same(vqops.sample(*given, implementation="triton"), expected)


@triton.jit
def noise_kernel(seed, found, N: tl.constexpr, K: tl.constexpr):
    n = tl.arange(0, N)[:, None] + tl.zeros((N, K), tl.int64)
    k = tl.arange(0, K)[None, :] + tl.zeros((N, K), tl.int32)
    tl.store(found + n * K + k, gumbel(word_of(seed, n, k, 3)))


def test_the_bits_of_the_noise():
    found = torch.empty(64, 128, dtype=torch.float64)
    noise_kernel[(1,)](torch.tensor(SEED), found, 64, 128, enable_fp_fusion=False)
    word = noise.words(torch.tensor(SEED), 3, torch.arange(64)[:, None], slice(0, 128))
    ORDER.same(found, noise.gumbel(word))


@pytest.mark.parametrize("temperature", [1e-30, 0.3])
@pytest.mark.parametrize("N, K, D", [(1, 1, 1), (60, 300, 12), (20, 40, 300)])
def test_shapes(N, K, D, temperature):
    check(torch.randn(N, D) + 1, torch.randn(K, D) + 1, temperature)
    check(torch.empty(0, D), torch.randn(K, D), temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    check(torch.randn(30, 6).to(dtype), torch.randn(50, 12)[:, ::2], 0.5, metric="cosine")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_heads_masks_repeats_and_no_numbers(metric):
    x, codebook = torch.randn(2, 40, 5), torch.randn(2, 30, 5)
    codebook[0, 10:20] = codebook[0, 3]
    codebook[1, 4:] = math.nan
    x[0, 3], x[0, 4, 0], x[1, 2, 1] = 0, math.nan, math.inf
    check(x, codebook, 2.0, torch.rand(2, 40) > 0.3, metric)
    assert (vqops.sample(x, codebook * math.nan, 1.0, torch.tensor(SEED), implementation="triton") == -1).all()


OPEN = ("near_ties", "collapsed", "identical", "one_code_x_1e15", "denormal", "huge_rows", "zero_rows", "far_codes")


@pytest.mark.parametrize("case", OPEN)
def test_what_the_bounds_leave_open(case, monkeypatch):
    """Places of a tile that hide a third code, rows without a bound, codes too far for float32."""
    small = blocks.INTERPRETED._replace(sample=blocks.INTERPRETED.sample._replace(codes=16))
    monkeypatch.setattr(blocks, "INTERPRETED", small)
    x, codebook = SEARCHES[case]()
    check(x[:, :40], codebook, 1e-3)
    check(x[:, :40], codebook, math.inf, metric="cosine")


@pytest.mark.slow
def test_heads_more_than_2_31_elements_apart():
    memory = torch.empty(2**31 + 16, dtype=torch.float16)  # 4 GB of addresses, of which three pages are touched
    x = memory.as_strided((3, 2, 8), (2**30, 8, 1))
    x.copy_(torch.randn(3, 2, 8))
    check(x, torch.randn(3, 20, 8), torch.tensor(0.5))
