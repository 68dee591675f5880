"""Sums by code by atomic additions: the kernels' bodies on the CPU, as in test_kernels.py.

The order of addition is open: whole numbers must be exact, others within the bound that holds for the blocks' order.
"""

import math

import pytest
import torch
from cuda_blocks import DTYPES, GatherCases, Kernels
from promises import INDICES, ORDER, WHOLE

from vqops import reference
from vqops.reference.distance import unit
from vqops.reference.quantize import gather

BLOCK = 256  # rows


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def kernels(request, emulated):
    return Kernels(emulated, request.param, sorted=False)


def zipf(H, N, K):
    cumulative = (1 / torch.arange(1, K + 1, dtype=torch.float64)).cumsum(0)
    return torch.randperm(K)[torch.searchsorted(cumulative, torch.rand(H, N, dtype=torch.float64) * cumulative[-1])]


# Indices [H, N] and K: rows that fill blocks, end within one, and heads that meet within one.
CASES = {
    "uniform": lambda: (torch.randint(-1, 40, (1, 1000)), 40),
    "zipf": lambda: (zipf(2, 700, 300), 300),
    "one code": lambda: (torch.full((1, 1300), 3), 7),
    "K=1": lambda: (torch.zeros(3, 90, dtype=torch.int64), 1),
    "more codes than rows": lambda: (torch.randint(-1, 5000, (2, 257)), 5000),
    "in groups": lambda: (torch.arange(768).div(48, rounding_mode="floor")[None], 16),
    "descending": lambda: (torch.arange(511, -1, -1)[None], 512),
    "none": lambda: (torch.full((2, 300), -1), 5),
    "one row": lambda: (torch.zeros(1, 1, dtype=torch.int64), 2),
    "no rows": lambda: (torch.zeros(2, 0, dtype=torch.int64), 3),
}
indices_and_K = pytest.mark.parametrize("name", CASES)


def within_rounding(found, terms, indices, K, roundings=1):
    """A code's rows are at most 255 additions in a block and one a block; a term has `roundings` of its own before.

    Each errs by 2^-24 of what there is at most, or by 2^-126 where float32 loses its last bits (2 of these, for what is
    added and for the sum). Higham 2002, section 4.2.
    """
    H, N, D = terms.shape
    slots = (torch.where(indices >= 0, indices, K) + (K + 1) * torch.arange(H)[:, None]).flatten()
    exact, size = (
        torch.zeros(H * (K + 1), D, dtype=torch.float64).index_add_(0, slots, values.flatten(0, 1))
        for values in (terms, terms.abs())
    )
    counts, blocks = slots.bincount(minlength=H * (K + 1)), -(-H * N // BLOCK)
    additions = counts.clamp_max(BLOCK - 1 + blocks)[:, None] + roundings
    u = 2.0**-24
    bound = additions * u / (1 - additions * u) * size + 2 * additions * 2.0**-126
    bound, exact = (t.view(H, K + 1, D)[:, :K] for t in (bound, exact))
    assert ((found.double() - exact).abs() <= bound).all()


class TestCodeSums:
    @indices_and_K
    @pytest.mark.parametrize("weighted", [False, True])
    def test_whole_numbers_are_exact(self, kernels, name, weighted):
        indices, K = CASES[name]()
        x = torch.randint(-9, 10, (*indices.shape, 9)).float()
        weight = torch.randint(0, 4, indices.shape).float() if weighted else None
        WHOLE.same(kernels.code_sums(x, indices, K, weight), reference.code_sums(x, indices, K, weight))

    @indices_and_K
    @pytest.mark.parametrize("size", [1.0, 1e30, 2.0**-128])
    def test_rounding(self, kernels, name, size):
        indices, K = CASES[name]()
        x, weight = torch.randn(*indices.shape, 3) * size, torch.rand(indices.shape)
        counts, sums = kernels.code_sums(x, indices, K)
        within_rounding(sums, x.double(), indices, K, roundings=0)
        INDICES.same(counts, reference.code_sums(x, indices, K)[0])
        counts, sums = kernels.code_sums(x, indices, K, weight)
        within_rounding(sums, x.double() * weight.double()[..., None], indices, K)
        within_rounding(counts[..., None], weight.double()[..., None], indices, K, roundings=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("D", [1, 64, 67, 130])
    def test_dtypes_and_strides(self, kernels, dtype, D):
        x = torch.randint(-4, 5, (2, D, 300)).mT.to(dtype)
        indices = torch.randint(-1, 3, (300, 2)).mT
        weight = torch.randint(0, 3, (300, 2)).mT.to(dtype)
        WHOLE.same(kernels.code_sums(x, indices, 3), reference.code_sums(x, indices, 3))
        WHOLE.same(kernels.code_sums(x, indices, 3, weight), reference.code_sums(x, indices, 3, weight))
        x = torch.randn(2, D, 300).mT.to(dtype)
        within_rounding(kernels.code_sums(x, indices, 3)[1], x.double(), indices, 3)

    @indices_and_K
    def test_a_code_is_added_to_once_a_block(self, kernels, name):
        indices, K = CASES[name]()
        H, N = indices.shape
        slots = torch.where(indices >= 0, indices + K * torch.arange(H)[:, None], -1).flatten()
        expected = sum(len(block[block >= 0].unique()) for block in slots.split(BLOCK)) if N else 0
        kernels.code_sums(torch.randn(H, N, 5), indices, K, torch.rand(H, N))
        assert kernels.additions == expected * 6  # the columns and the weight
        kernels.code_sums(torch.randn(H, N, 5), indices, K)
        assert expected * 6 <= kernels.additions <= expected * 7

    def test_codes_of_more_than_24_bits(self, kernels):
        """Those that are equal in the lower ones mix within a block."""
        high = 1 << 24
        codes = torch.tensor([5, high + 5, 7, high + 7, high, 0, high + 9])
        indices, x = codes[torch.randint(0, 7, (1, 600))], torch.randint(-9, 10, (1, 600, 1)).float()
        counts, sums = kernels.code_sums(x, indices, high + 10)
        for code in codes:
            mine = indices == code
            assert counts[0, code] == mine.sum() and sums[0, code, 0] == x[mine].sum()
        assert counts.sum() == 600

    def test_rows_left_out_add_nothing(self, kernels):
        x, indices = torch.randn(1, 40, 4), torch.randint(0, 3, (1, 40))
        x[0, 5], indices[0, 5] = torch.nan, -1
        x[0, 9], indices[0, 9] = torch.inf, 3  # no code
        counts, sums = kernels.code_sums(x, indices, 3)
        assert sums.isfinite().all() and counts.sum() == 38


class TestGather(GatherCases):
    def check(self, kernels, x, codebook, mask=None, weight=None, metric="euclidean", normalize=True):
        K, on = codebook.shape[1], {"normalize": normalize}
        expected = reference.quantize(x, codebook, mask, weight, metric, with_sums=True, snapshot=False, **on)
        quantized, indices, error, counts, sums, _ = expected
        found = kernels.gather(x, codebook, indices, mask, weight, metric, code_sums=True, **on)
        ORDER.same(found[:2], (quantized, error), equal_nan=True)
        terms = unit(x).float().double() if metric == "cosine" and normalize else x.double()
        terms = terms.where(indices[..., None] >= 0, 0)
        if weight is None:
            INDICES.same(found[2], counts)
        else:
            terms = terms * weight.double()[..., None]
            within_rounding(found[2][..., None], weight.double()[..., None], indices, K, roundings=0)
        within_rounding(found[3], terms, indices, K, roundings=2)  # to float32, and times the weight
        if (terms == terms.round()).all():
            WHOLE.same(found[2:], (counts, sums))

    @pytest.mark.parametrize("K", [1, 3, 500])
    def test_whole_numbers_are_exact(self, kernels, K):
        x, c = torch.randint(-9, 10, (2, 700, 70)).float(), torch.randn(2, K, 70)
        self.check(kernels, x, c, torch.rand(2, 700) > 0.2, torch.randint(0, 4, (2, 700)).float())
        self.check(kernels, x, c)

    def test_one_code_has_all_rows(self, kernels):
        c = torch.cat([torch.zeros(1, 1, 6), torch.full((1, 4, 6), 99.0)], 1)
        self.check(kernels, torch.randn(1, 1300, 6), c, weight=torch.rand(1, 1300))

    def test_strides(self, kernels):
        x, c = torch.randn(8, 2, 300).permute(1, 2, 0), torch.randn(8, 2, 6).permute(1, 2, 0)
        self.check(kernels, x, c, (torch.rand(300, 2) > 0.2).mT)

    def test_rows_that_are_no_numbers(self, kernels):
        x, c = torch.randn(1, 300, 6), torch.randn(1, 5, 6)
        x[0, 3], x[0, 290, 2] = math.nan, math.inf
        self.check(kernels, x, c, torch.arange(300)[None] > 5)


class TestQuantizeBackward:
    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.bfloat16])
    def test_of_the_codebook(self, kernels, dtype, codebook_dtype, metric):
        """Its terms are those of the sorted order bit for bit; only the sums may differ."""
        x, c = torch.randn(2, 400, 13).to(dtype), torch.randn(2, 5, 13).to(codebook_dtype)
        mask, error = torch.rand(2, 400) > 0.2, torch.randn(2, 400)
        x[0, 0], x[0, 1], c[0, 0] = 0, math.nan, 0
        indices = reference.nearest(x, c, mask, metric)
        arguments = (None, error, x, c, indices, mask, metric, "none", 0.5, True, True, True)
        sorted = Kernels(kernels.library, kernels.descending)
        found, expected = kernels.quantize_backward(*arguments), sorted.quantize_backward(*arguments)
        ORDER.same(found[0], expected[0], equal_nan=True)
        start = x.double() if metric == "euclidean" else unit(x)
        terms = (start - gather(c, indices).double()) * error.double()[..., None]
        terms = terms.where(indices[..., None] >= 0, 0)
        size = torch.zeros(2, 5, 13, dtype=torch.float64)
        size.scatter_add_(1, indices.clamp_min(0)[..., None].expand_as(terms), terms.abs())
        # Two sums of up to 400 terms, a little larger for their own roundings, both rounded to the codebook's dtype.
        u = 2.0**-53 if dtype == torch.float64 else 2.0**-24
        bound = 2 * 400 * u * 1.001 * size + torch.finfo(codebook_dtype).eps * expected[1].double().abs()
        assert ((found[1].double() - expected[1].double()).abs() <= bound).all()

    def test_whole_numbers_are_exact(self, kernels):
        x, c = torch.randint(-4, 5, (1, 1000, 70)).float(), torch.randint(-4, 5, (1, 3, 70)).float()
        indices, error = torch.randint(-1, 3, (1, 1000)), torch.randint(-2, 3, (1, 1000)).float()
        arguments = (None, error, x, c, indices, None, "euclidean", "none", 1.0, True, True, True)
        WHOLE.same(kernels.quantize_backward(*arguments)[1], reference.quantize_backward(*arguments)[1])
        arguments = (None, error, x.double(), c.double(), *arguments[4:])
        WHOLE.same(kernels.quantize_backward(*arguments)[1], reference.quantize_backward(*arguments)[1])
