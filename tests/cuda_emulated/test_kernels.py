"""The bodies of the CUDA kernels, run on the CPU block by block and thread by thread, against the reference.

What this can't show: that nvcc's code does the same, the sort (here std::stable_sort), and anything about time. Each
test runs the threads of a step ascending and descending: a race between them would show as a difference. Sums by code
are here in the sorted order; test_sums.py has those by atomic additions.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_blocks import DTYPES, GatherCases, Kernels
from promises import ORDER, UNCHANGED
from short_rows import short_rows
from torch.testing import assert_close

from vqops import reference


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def kernels(request, emulated):
    return Kernels(emulated, request.param)


# Number of rows of each code, so that runs of 256 end before, at and behind the last row.
COUNTS = {
    "random": None,
    "one code": [0, 1500, 0],
    "runs": [255, 256, 257, 512, 513, 0, 1],
    "no rows": [0, 0],
    "every row its own": [1] * 70,
}


def grouped(counts, H=1, left_out=5):
    if counts is None:
        return torch.randint(-1, 11, (H, 700)), 11
    codes = torch.cat([torch.full((count,), k) for k, count in enumerate(counts)] + [torch.full((left_out,), -1)])
    return torch.stack([codes[torch.randperm(len(codes))] for _ in range(H)]), len(counts)


class TestCodeSums:
    @pytest.mark.parametrize("name", COUNTS)
    @pytest.mark.parametrize("weighted", [False, True])
    def test_the_order_of_the_reference(self, kernels, name, weighted):
        indices, K = grouped(COUNTS[name], H=2)
        x = torch.randn(*indices.shape, 9)
        weight = torch.rand(indices.shape) if weighted else None
        ORDER.same(kernels.code_sums(x, indices, K, weight), reference.code_sums(x, indices, K, weight), equal_nan=True)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("D", [1, 64, 67, 130])
    def test_dtypes_and_strides(self, kernels, dtype, D):
        x = torch.randn(2, D, 300).mT.to(dtype)
        indices = torch.randint(-1, 3, (300, 2)).mT
        ORDER.same(kernels.code_sums(x, indices, 3), reference.code_sums(x, indices, 3), equal_nan=True)

    def test_rows_left_out_are_not_read(self, kernels):
        x, indices = torch.randn(1, 40, 4), torch.randint(0, 3, (1, 40))
        x[0, 5], indices[0, 5] = torch.nan, -1
        assert kernels.code_sums(x, indices, 3)[1].isfinite().all()

    def test_an_index_that_is_no_code_reads_and_writes_nothing(self, kernels):
        x, indices = torch.randn(1, 40, 4), torch.randint(0, 3, (1, 40))
        known = indices.clone()
        indices[0, 5], known[0, 5] = 3, -1
        ORDER.same(kernels.code_sums(x, indices, 3), reference.code_sums(x, known, 3), equal_nan=True)


class TestGather(GatherCases):
    def check(self, kernels, x, codebook, mask=None, weight=None, metric="euclidean", **on):
        expected = reference.quantize(x, codebook, mask, weight, metric, with_sums=True, snapshot=False, **on)
        quantized, indices, error, counts, sums, _ = expected
        found = kernels.gather(x, codebook, indices, mask, weight, metric, code_sums=True, **on)
        ORDER.same(found, (quantized, error, counts, sums), equal_nan=True)
        found = kernels.gather(x, codebook, indices, mask, metric=metric, **on)
        ORDER.same(found[:2], (quantized, error), equal_nan=True)

    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    def test_one_code_has_all_rows(self, kernels, metric):
        self.check(kernels, torch.randn(1, 1300, 6), torch.randn(1, 1, 6), weight=torch.rand(1, 1300), metric=metric)

    def test_strides(self, kernels):
        x, c = torch.randn(8, 2, 300).permute(1, 2, 0), torch.randn(8, 2, 6).permute(1, 2, 0)
        self.check(kernels, x, c, (torch.rand(300, 2) > 0.2).mT)

    def test_rows_that_are_no_numbers(self, kernels):
        x, c = torch.randn(1, 60, 6), torch.randn(1, 5, 6)
        x[0, 3], x[0, 9, 2] = math.nan, math.inf
        self.check(kernels, x, c, torch.arange(60)[None] > 5)


class TestQuantizeBackward:
    def check(
        self, kernels, dtype, codebook_dtype=None, metric="euclidean", passing="rotation", D=13, spoil=False, **on
    ):
        codebook_dtype = codebook_dtype or dtype
        x, c = torch.randn(2, 90, D).to(dtype), torch.randn(2, 5, D).to(codebook_dtype)
        if spoil:
            x[0, 0], x[0, 1], c[0, 0] = 0, math.nan, 0
        mask = torch.rand(2, 90) > 0.2
        g = torch.randn(2, 90, D).to(dtype) if on.get("quantized", True) else None
        e = torch.randn(2, 90, dtype=torch.promote_types(dtype, torch.float32)) if on.get("error", True) else None
        indices = reference.nearest(x, c, mask, metric)
        arguments = (g, e, x, c, indices, mask, metric, passing, 0.5, on.get("normalize", True))
        expected = reference.quantize_backward(*arguments, True, e is not None)
        found = kernels.quantize_backward(*arguments, True, e is not None)
        loose = {"rtol": 2e-5, "atol": 2e-5} if dtype == codebook_dtype == torch.float32 else {}
        assert_close(found[0], expected[0], equal_nan=True, **loose)
        if e is not None:
            assert_close(found[1], expected[1], equal_nan=True, **loose)

    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    @pytest.mark.parametrize("passing", ["none", "straight_through", "rotation"])
    def test_passing(self, kernels, metric, passing):
        self.check(kernels, torch.float32, metric=metric, passing=passing)
        self.check(kernels, torch.float64, metric=metric, passing=passing, D=70)
        self.check(kernels, torch.float64, metric=metric, passing=passing, error=False)
        self.check(kernels, torch.float64, metric=metric, passing=passing, quantized=False)
        self.check(kernels, torch.float64, metric=metric, passing=passing, spoil=True)
        self.check(kernels, torch.float32, metric=metric, passing=passing, spoil=True, normalize=False)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, kernels, dtype):
        self.check(kernels, dtype)
        self.check(kernels, dtype, torch.float32, "cosine")

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    def test_short_vectors(self, kernels, metric, dtype):
        """Rows and codes without a direction, and scales above the largest; in no float16 an infinity."""
        lengths = torch.tensor([0, 1e-30, 1e-7, 0.8e-6, 1.3e-6, 1e-5, 1e-4, 2e-3, 1, 30])
        way = torch.nn.functional.normalize(torch.randn(2, 10, 40), dim=-1)
        x, c = (way * lengths[:, None]).to(dtype)
        x, c, indices = x.repeat_interleave(10, 0)[None], c[None], torch.arange(10).repeat(10)[None]
        g = ((torch.rand(x.shape) - 0.5) * (1e-6 if metric == "cosine" else 1)).to(dtype)
        arguments = (g, torch.zeros(1, 100), x, c, indices, None, metric, "rotation", 1.0, True, True, True)
        found, expected = kernels.quantize_backward(*arguments)[0], reference.quantize_backward(*arguments)[0]
        assert found.isfinite().all()
        size = expected.double().norm(dim=-1, keepdim=True)
        error = (found.double() - expected.double()).abs()
        assert (error <= (2 * torch.finfo(dtype).eps + 1e-5) * size + 6e-8).all()

    @pytest.mark.parametrize("error", [None, 0.0, 2e38])
    @pytest.mark.parametrize("code", [math.nan, 0.0, 0.1])
    @pytest.mark.parametrize("passing", ["straight_through", "rotation"])
    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    def test_without_a_code_or_a_direction(self, kernels, metric, passing, code, error):
        x = short_rows()
        g, c = torch.arange(15.0).view(1, 5, 3), torch.full((1, 1, 3), code)
        e = None if error is None else torch.full((1, 5), error)
        arguments = (g, e, x, c, reference.nearest(x, c, None, metric), None, metric, passing, 0.5, True, True)
        ways = kernels.quantize_backward, reference.quantize_backward
        for a, b in zip(*(way(*arguments, e is not None) for way in ways), strict=True):
            if a is not None:
                assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-5)

    def test_expanded_gradients_and_strides(self, kernels):
        x, c = torch.randn(8, 1, 90).permute(1, 2, 0), torch.randn(1, 5, 8)
        g, e = torch.randn(()).expand(x.shape), torch.randn(()).expand(1, 90)
        arguments = (g, e, x, c, reference.nearest(x, c), None, "euclidean", "rotation", 1.0, True, True, True)
        assert_close(kernels.quantize_backward(*arguments), reference.quantize_backward(*arguments))

    def test_a_code_of_many_rows(self, kernels):
        x, c, indices = torch.randn(1, 1000, 3), torch.randn(1, 1, 3), torch.zeros(1, 1000, dtype=torch.int64)
        arguments = (None, torch.rand(1, 1000), x, c, indices, None, "euclidean", "none", 1.0, True, True, True)
        ORDER.same(kernels.quantize_backward(*arguments)[1], reference.quantize_backward(*arguments)[1], equal_nan=True)


class TestEmaUpdate:
    def state(self, H=2, K=9, D=70, weighted=False):
        size, average, embed = torch.rand(H, K) * 20, torch.randn(H, K, D), torch.randn(H, K, D)
        counts = torch.rand(H, K) * 9 if weighted else torch.randint(0, 30, (H, K))
        return [size, average, embed, counts, torch.randn(H, K, D)]

    def check(self, kernels, state, *options):
        found, expected = [[None if t is None else t.clone() for t in state] for _ in range(2)]
        kernels.ema_update_(*found, *options)
        reference.ema_update_(*expected, *options)
        for a, b in zip(found[:3], expected[:3], strict=True):
            if a is not None:  # torch.lerp may fuse its multiply-add
                assert_close(a, b, rtol=1e-6, atol=1e-6)
        return found

    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    @pytest.mark.parametrize("decay", [0.0, 0.4, 0.99, 1.0])
    def test_steps(self, kernels, metric, decay):
        self.check(kernels, self.state(), torch.tensor(decay), 1e-5, None, metric)
        self.check(kernels, self.state(weighted=True, D=3), torch.tensor(decay), 1e-5, torch.rand(2, 9), metric)

    def test_without_a_codebook(self, kernels):
        state = self.state()
        state[2] = None
        self.check(kernels, state, torch.tensor(0.9))

    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    def test_nothing_poisons_a_code(self, kernels, metric):
        state = self.state(D=130)
        state[4][0, 1, 129], state[4][1, 2, 0] = math.nan, math.inf
        state[0][1], state[3][1] = 0, 0
        found = self.check(kernels, state, torch.tensor(0.5), 1e-5, None, metric)
        UNCHANGED.same(found[1][0, 1], state[1][0, 1], equal_nan=True)
        assert all(t.isfinite().all() for t in found[:3])


@pytest.mark.slow
def test_under_sanitizers():
    """No access beyond workspace, shared memory and its arrays, nothing undefined: these tests, in another process."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc for its sanitizers")
    names = ("libasan.so", "libubsan.so")
    found = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    # Not optimised: the optimiser takes longer over the checks than it saves.
    flags = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
    environment = {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0", "CXX": "g++", "CXXFLAGS": flags}
    names = ("test_kernels.py", "test_residual.py", "test_sums.py", "test_search.py", "test_products.py")
    files = [str(Path(__file__).with_name(name)) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "ascending", "-p", "no:cacheprovider", *files]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
