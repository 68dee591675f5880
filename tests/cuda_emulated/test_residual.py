"""Residual quantization: the kernels' bodies on the CPU, as in test_kernels.py, with the searches of the reference."""

import math

import pytest
import torch
from cuda_blocks import DTYPES, Kernels
from promises import COPIES, INDICES, ORDER
from short_rows import short_rows
from torch.testing import assert_close

from vqops import reference

WAYS = [("euclidean", True), ("cosine", True), ("cosine", False)]  # the metric, and normalize
PASSING = ["none", "straight_through", "rotation"]


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def kernels(request, emulated):
    return Kernels(emulated, request.param)


@pytest.fixture
def atomic(emulated):
    return Kernels(emulated, False, sorted=False)


def data(H=2, N=300, D=13, sizes=(9, 5, 17), dtype=torch.float32, codes=None):
    x = torch.randn(H, N, D).to(dtype)
    return x, [(torch.randn(H, K, D) / 2**level).to(codes or dtype) for level, K in enumerate(sizes)]


class TestForward:
    def check(self, kernels, x, codebooks, mask=None, levels=None, metric="euclidean", normalize=True):
        how = {"mask": mask, "levels": levels, "metric": metric, "with_sums": True, "normalize": normalize}
        *expected, _ = reference.residual_quantize(x, codebooks, snapshot=False, **how)
        *found, rest = kernels.residual_quantize(x, codebooks, **how)
        COPIES.same(found[0], expected[0], equal_nan=True)
        INDICES.same(found[1], expected[1])
        ORDER.same(found[2], expected[2], equal_nan=True)
        INDICES.same(found[3], expected[3])
        if kernels.sorted:
            ORDER.same(found[4], expected[4], equal_nan=True)
        else:
            assert_close(found[4], expected[4])
        return expected, rest

    @pytest.mark.parametrize("metric, normalize", WAYS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, kernels, dtype, metric, normalize):
        mask = torch.rand(2, 300) > 0.2
        self.check(kernels, *data(dtype=dtype), mask, None, metric, normalize)
        self.check(kernels, *data(dtype=dtype, codes=torch.float64), mask, torch.tensor(2), metric, normalize)
        self.check(kernels, *data(dtype=dtype, codes=torch.bfloat16), None, None, metric, normalize)

    @pytest.mark.parametrize("metric, normalize", WAYS)
    def test_atomic_sums(self, atomic, metric, normalize):
        self.check(atomic, *data(), torch.rand(2, 300) > 0.2, torch.tensor(2), metric, normalize)

    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    @pytest.mark.parametrize("levels", [0, 1, 2, 3, 9, -1])
    def test_levels_that_do_not_run(self, kernels, metric, levels):
        """A row without a number is lost where levels run, and nothing where none does."""
        x, codebooks = data(D=5, dtype=torch.float16)
        x[0, 3] = math.nan
        (quantized, _, error, *_), _ = self.check(kernels, x, codebooks, None, torch.tensor(levels), metric)
        assert quantized[0, 3].isnan().all() == error[0, 0].isnan() == (levels > 0)

    @pytest.mark.parametrize("D", [1, 7, 8, 31, 32, 33, 64, 130])
    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    def test_dimensions(self, kernels, metric, D):
        self.check(kernels, *data(N=70, D=D), metric=metric)

    @pytest.mark.parametrize("N", [0, 1, 255, 256, 257, 1025])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_rows(self, kernels, dtype, N):
        self.check(kernels, *data(N=N, D=3, dtype=dtype))

    @pytest.mark.parametrize("sizes", [(1,), (6,), (1, 1, 1), (2,) * 64], ids=len)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_numbers_of_levels(self, kernels, dtype, sizes):
        self.check(kernels, *data(N=40, D=9, sizes=sizes, dtype=dtype))

    def test_runs_of_errors_in_order(self, kernels):
        """Of such different sizes that any other order shows."""
        x, codebooks = data(H=1, N=70000, D=1, sizes=(2, 3))
        self.check(kernels, x * torch.logspace(-20, 15, 70000)[torch.randperm(70000)][None, :, None], codebooks)

    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    def test_strides(self, kernels, metric):
        x, codebooks = torch.randn(8, 2, 300).permute(1, 2, 0), [torch.randn(8, 2, 6).permute(1, 2, 0) for _ in "ab"]
        self.check(kernels, x, codebooks, (torch.rand(300, 2) > 0.2).mT, torch.tensor(2), metric)
        self.check(kernels, x[:1].expand(2, 300, 8), codebooks, metric=metric)

    @pytest.mark.parametrize("metric, normalize", WAYS)
    def test_rows_that_are_lost(self, kernels, metric, normalize):
        """As given, by an overflow at a level, or for want of a finite code; masked ones are not."""
        x, codebooks = data(H=1, N=60, D=6)
        x[0, 3], x[0, 9, 2], x[0, 11], x[0, 12] = math.nan, -math.inf, torch.finfo(torch.float32).max, 0
        codebooks[0][0, 0], codebooks[0][0, 1] = -torch.finfo(torch.float32).max, math.nan
        codebooks[2][:] = math.inf
        mask = torch.arange(60)[None] != 5
        x[0, 5] = math.nan
        (quantized, indices, *_), _ = self.check(kernels, x, codebooks, mask, None, metric, normalize)
        assert (indices[0, :, 2] == -1).all() and not quantized[0, 5].any()

    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    def test_short_and_long_rows(self, kernels, metric):
        lengths = torch.tensor([0, 1e-45, 1e-39, 1e-30, 1e-7, 0.8e-6, 1.3e-6, 1, 1e20, 3e38])
        x, codebooks = data(H=1, N=10, D=6)
        self.check(kernels, x.sign() * lengths[:, None], codebooks, metric=metric)

    def test_the_first_code_of_zeros_is_not_negative(self, kernels):
        x, codebooks = torch.zeros(1, 3, 4), [torch.full((1, 2, 4), -0.0)] * 2
        (quantized, *_), _ = self.check(kernels, x, codebooks)
        assert not kernels.residual_quantize(x, codebooks)[0].signbit().any() and not quantized.signbit().any()


class TestBackward:
    def check(self, kernels, x, codebooks, mask=None, levels=None, metric="euclidean", passing="rotation", **on):
        """Within two roundings of the result, and what the sums of a row lose."""
        (H, N, D), Q = x.shape, len(codebooks)
        _, indices, *_ = reference.residual_quantize(x, codebooks, mask, levels, metric, snapshot=False)
        real = torch.promote_types(x.dtype, torch.float32)
        g = torch.randn(H, N, D).to(x.dtype) if on.get("quantized", True) else None
        e = torch.randn(H, Q, dtype=real) if on.get("error", True) else None
        arguments = [g, e, x, torch.cat(codebooks, 1), [c.shape[1] for c in codebooks], indices, mask, levels, metric]
        how = passing, on.get("per_level", True), 0.5, on.get("normalize", True), True, e is not None
        found = kernels.residual_quantize_backward(*arguments, *how)
        expected = reference.residual_quantize_backward(*arguments, *how)
        wide = torch.float64 in (x.dtype, codebooks[0].dtype)
        for a, b in zip(found, expected, strict=True):
            if a is None:
                continue
            eps = max(1e-10 if wide else 1e-5, 2 * torch.finfo(a.dtype).eps)
            size = b.double().nan_to_num(0).abs().amax(-1, keepdim=True)
            assert (a.isnan() == b.isnan()).all() and a.dtype == b.dtype
            assert ((a.double() - b.double()).nan_to_num(0).abs() <= eps * size + eps).all()

    @pytest.mark.parametrize("per_level", [True, False])
    @pytest.mark.parametrize("metric, normalize", WAYS)
    @pytest.mark.parametrize("passing", PASSING)
    def test_ways(self, kernels, passing, metric, normalize, per_level):
        on = {"metric": metric, "passing": passing, "normalize": normalize, "per_level": per_level}
        mask, levels = torch.rand(2, 90) > 0.2, torch.tensor(2)
        self.check(kernels, *data(N=90), mask, None, **on)
        self.check(kernels, *data(N=90, D=70, dtype=torch.float64), mask, levels, **on)
        self.check(kernels, *data(N=90, dtype=torch.float64), mask, levels, error=False, **on)
        self.check(kernels, *data(N=90, dtype=torch.float64), mask, quantized=False, **on)
        for none in (0, -1):
            self.check(kernels, *data(N=40, D=3), None, torch.tensor(none), **on)

    @pytest.mark.parametrize("per_level", [True, False])
    @pytest.mark.parametrize("codes", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, kernels, dtype, codes, per_level):
        on = {"per_level": per_level}
        self.check(kernels, *data(N=60, dtype=dtype, codes=codes), torch.rand(2, 60) > 0.2, **on)
        self.check(kernels, *data(N=60, D=40, dtype=dtype, codes=codes), metric="cosine", **on)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_atomic_sums(self, atomic, dtype):
        self.check(atomic, *data(dtype=dtype), torch.rand(2, 300) > 0.2, torch.tensor(2), metric="cosine")

    @pytest.mark.parametrize("D", [1, 8, 9, 32, 33, 1300, 1700])
    def test_dimensions(self, kernels, D):
        """Up to what a block shares, and beyond."""
        for per_level in (True, False):
            self.check(kernels, *data(N=12, D=D), metric="cosine", per_level=per_level)

    @pytest.mark.parametrize("sizes", [(1,), (2,) * 64], ids=len)
    def test_numbers_of_levels(self, kernels, sizes):
        self.check(kernels, *data(N=12, D=5, sizes=sizes, dtype=torch.float64))

    @pytest.mark.parametrize("passing", PASSING)
    @pytest.mark.parametrize("metric, normalize", WAYS)
    def test_rows_that_are_lost(self, kernels, metric, normalize, passing):
        for per_level in (True, False):
            x, codebooks = data(H=1, N=60, D=6, dtype=torch.float64)
            x[0, 3], x[0, 9, 2], x[0, 12] = math.nan, math.inf, 0
            codebooks[1][0, 0], codebooks[2][:] = math.nan, math.inf
            mask = torch.arange(60)[None] % 7 != 5
            for error in (True, False):
                on = {"passing": passing, "normalize": normalize, "per_level": per_level, "error": error}
                self.check(kernels, x, codebooks, mask, None, metric, **on)
                self.check(kernels, x, codebooks, mask, torch.tensor(2), metric, **on)

    @pytest.mark.parametrize("passing", PASSING)
    @pytest.mark.parametrize("metric, normalize", WAYS)
    def test_without_a_code_or_a_direction(self, kernels, metric, normalize, passing):
        x = short_rows()
        for code in (math.nan, 0.0, 1.5):
            codebooks = [torch.full((1, 1, 3), code), torch.tensor([[[0.5, 0.1, 0], [0, 0, 0]]])]
            for number in range(8):
                levels, error, per_level = torch.tensor(number % 2), number & 2 > 0, number & 4 > 0
                on = {"normalize": normalize, "per_level": per_level, "error": error}
                self.check(kernels, x, codebooks, None, levels, metric, passing, **on)

    def test_strides_and_expanded_gradients(self, kernels):
        x, c = torch.randn(8, 1, 90).permute(1, 2, 0), torch.randn(8, 1, 11).permute(1, 2, 0)
        _, indices, *_ = reference.residual_quantize(x, [c[:, :5], c[:, 5:]], snapshot=False)
        g, e = torch.randn(()).expand(x.shape), torch.randn(()).expand(1, 2)
        arguments = g, e, x, c, [5, 6], indices, None, None, "euclidean", "rotation", True, 1.0, True, True, True
        found = kernels.residual_quantize_backward(*arguments)
        for a, b in zip(found, reference.residual_quantize_backward(*arguments), strict=True):
            assert_close(a, b, rtol=1e-5, atol=1e-5)

    def test_no_rows(self, kernels):
        self.check(kernels, *data(N=0))
