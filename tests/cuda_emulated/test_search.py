"""The bodies of the CUDA search on the CPU, with a model of the tensor cores that errs as much as they may.

Every index must be the reference's: a bound too narrow shows as a wrong one, a bound too wide as rows in slow tiers.
"""

import ctypes

import pytest
import torch
from cuda_blocks import DTYPES, Kernels
from promises import INDICES, ORDER

from vqops import reference
from vqops.check.inputs import SEARCHES

LOADER = "sm_90a, loader"


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def kernels(request, emulated):
    return Kernels(emulated, request.param)


def check(kernels, x, codebook, mask=None, metric="euclidean", **options):
    indices, _, tiers = kernels.search(x, codebook, 1, mask, metric, **options)
    INDICES.same(indices[..., 0], reference.nearest(x, codebook, mask, metric))
    assert tiers.sum() == indices.numel() and (tiers >= 0).all()
    assert tiers[3] == (indices < 0).sum()
    return tiers


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("name", SEARCHES)
def test_every_index_is_the_reference_s(kernels, name, metric):
    x, c = SEARCHES[name]()
    check(kernels, x, c, metric=metric, adder=4)
    if 32 < x.shape[2] <= 512:
        check(kernels, x, c, metric=metric, adder=4, on=LOADER)
    if kernels.descending:
        check(kernels, x, c, torch.rand(x.shape[:2]) > 0.2, metric, on="sm_120")
    else:
        check(kernels, x, c, metric=metric, on="sm_80", adder=4)
        check(kernels, x, c, metric=metric, on="float64")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(kernels, dtype, metric):
    x, c = torch.randn(2, 150, 24).to(dtype), torch.randn(2, 70, 24)
    for codebook in (c, c.to(dtype), c.double()):
        check(kernels, x, codebook, metric=metric)


@pytest.mark.parametrize("D", [1, 16, 17, 32, 33, 64, 65, 128, 200, 300, 512, 1100])
def test_dimensions(kernels, D):
    for architecture in ("sm_80", "sm_90a", LOADER, "sm_120"):
        check(kernels, torch.randn(1, 140, D), torch.randn(1, 130, D), adder=4, on=architecture)


@pytest.mark.parametrize("on", ["sm_80", "sm_90a", LOADER])
def test_blocks_without_a_row_to_search(kernels, on):
    x, c, mask = torch.randn(2, 600, 40), torch.randn(2, 200, 40), torch.zeros(2, 600, dtype=torch.bool)
    check(kernels, x, c, mask, on=on)
    mask[1, 300], x[0, :256, 3] = True, torch.nan
    check(kernels, x, c, mask, on=on)
    check(kernels, x, c, on=on)


def test_strides(kernels):
    x, c = torch.randn(20, 2, 130).permute(1, 2, 0), torch.randn(20, 2, 65).permute(1, 2, 0)
    check(kernels, x, c, (torch.rand(130, 2) > 0.2).mT)


# Of [H, N, D]: by words of 16 bytes where rows hold whole ones at multiples of 16 bytes, else by elements.
LAYOUTS = {
    "contiguous": lambda x: x,
    "rows_a_word_apart": lambda x: torch.cat([x, x[..., :1].expand(*x.shape[:2], 8)], 2)[..., :-8],
    "rows_an_element_apart": lambda x: torch.cat([x, x[..., :1]], 2)[..., :-1],
    "from_the_second_element": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "every_second_element": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "columns": lambda x: x.mT.contiguous().mT,
    "one_row": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [4, 5, 8, 12, 16, 20, 64, 68, 72, 260, 264])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(emulated, dtype, D, layout):
    x, c = torch.randn(2, 37, D).to(dtype), torch.randn(2, 66, D)
    big = torch.finfo(dtype).max / 2
    x[0, 1, -1], x[0, 2, 0], x[0, 3], x[0, 4], x[1, 5], x[1, 6] = torch.nan, -torch.inf, 0, big, 1 / big, 1e-3
    x, mask = LAYOUTS[layout](x), torch.rand(2, 37) > 0.2
    check(Kernels(emulated, True), x, c, mask, on="sm_90a")
    check_several(Kernels(emulated, False), x, c, 3, mask, "cosine", on="sm_80")


@pytest.mark.parametrize("adder", [4, 8, 16])
def test_products_of_one_sign_are_cut_the_most(emulated, adder):
    """All products positive: every truncation of the sum goes the same way. Codes in pairs, a few bits apart."""
    x, c = 1 + torch.rand(1, 64, 256), 1 + torch.rand(1, 32, 256)
    c = torch.cat([c, c * (1 + 2.0**-22 * torch.randint(-4, 5, (1, 32, 1)))], 1)
    check(Kernels(emulated, False), x - 3, c, adder=adder)
    check(Kernels(emulated, False), x, c, metric="cosine", adder=adder, on="sm_80")


@pytest.mark.parametrize("place", [0, 300, 511])
@pytest.mark.parametrize("size", [30, 1e3, 1e9, 1e25])
def test_one_code_far_out_leaves_the_others_to_the_fast_pass(kernels, size, place):
    for multiprocessors in (1, 4):
        x, c = torch.randn(1, 128, 64), torch.randn(1, 512, 64)
        c[0, place] *= size
        assert check(kernels, x, c, multiprocessors=multiprocessors)[2] == 0


@pytest.mark.parametrize("on", ["sm_80", "sm_90a", LOADER])
def test_many_codes_far_out(kernels, on):
    """They are left out where a row has a nearer one by a factor; rows near them are compared with all."""
    x, c = torch.randn(1, 128, 40), torch.randn(1, 512, 40)
    c[0, ::9] *= 1e7
    assert check(kernels, x, c, on=on)[2] == 0
    x[0, :30] = c[0, :270:9] * 1.001
    assert check(kernels, x, c, on=on)[2] == 30
    check_several(kernels, x, c, 3)
    check_several(kernels, x, c[:, 80:84], 4)  # one of them far
    check(kernels, x, c[:, ::9])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("most", [10, 19])
def test_codes_of_many_sizes_share_a_power_of_two(kernels, most, metric):
    """Beside a large code of its tile a small one loses bits, and the other codes' bounds must not feel it."""
    x, c = torch.randn(1, 150, 70), torch.randn(1, 300, 70)
    c *= 2.0 ** torch.randint(-30, 1, (1, 300, 1))
    c[0, ::50] *= 2.0**most
    x[0, ::2] *= 2.0**-12
    check(kernels, x, c, metric=metric, adder=4)
    check_several(kernels, x[:, :70], c, 3, metric=metric)


@pytest.mark.parametrize("copies", [2, 5, 20])
@pytest.mark.parametrize("apart", [1, 2, 8, 16, 32, 64, 128])
def test_codes_that_the_bounds_cannot_tell_apart(kernels, apart, copies):
    """In one thread and slot, in several of a product, in several products; each is better than the ones before."""
    x, c = torch.randn(1, 70, 64), torch.randn(1, 2600, 64)
    for i in range(copies):
        c[0, 3 + i * apart] = c[0, 3] * (1 - 1e-6 * i)
    x[0, :60] = 1.1 * c[0, 3] + 1e-3 * torch.randn(60, 64)
    for on in ("sm_80", "sm_90a", LOADER):
        tiers = check(kernels, x, c, on=on, multiprocessors=1)
        assert tiers[1 if copies < 16 else 2] >= 60


def test_zero_rows_have_the_first_finite_code_at_once(kernels):
    x, c = torch.randn(1, 200, 40), torch.randn(1, 90, 40)
    x[0, ::2], c[0, :3, 5] = 0, torch.nan
    assert check(kernels, x, c, metric="cosine")[2] == 0
    check(kernels, x, c * torch.nan, metric="cosine")
    check_several(kernels, x[:, :40], c, 3, metric="cosine")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_float64_at_the_end_of_its_range(kernels, metric):
    """Where products of the decision overflow or vanish, the lowest index wins: the fast pass must not know better."""
    x, c = torch.randn(1, 64, 24, dtype=torch.float64), torch.randn(1, 70, 24, dtype=torch.float64)
    for a, b in ((200, 120), (300, 20), (160, 150), (-164, -160), (-170, -155), (-300, -30), (0, -150), (-130, 30)):
        check(kernels, x * 10.0**a, c * 10.0**b, metric=metric)


def test_fast_pass_certifies_most_rows(kernels):
    tiers = check(kernels, torch.randn(1, 512, 64), torch.randn(1, 256, 64))
    assert tiers[0] > 0.9 * 512 and tiers[2] == 0


def test_repeated_codes_are_left_out(kernels):
    tiers = check(kernels, torch.randn(1, 256, 12), torch.randn(1, 20, 12).repeat(1, 30, 1))
    assert tiers[2] < 20


def check_several(kernels, x, c, k, mask=None, metric="euclidean", **options):
    indices, distances = reference.nearest_topk(x, c, k, mask, metric)
    found = kernels.search(x, c, k, mask, metric, distances=True, **options)
    INDICES.same(found[0], indices)
    ORDER.same(found[1], distances, equal_nan=True)
    return found[2]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("name", SEARCHES)
def test_several_nearest(kernels, name, metric):
    x, c = SEARCHES[name]()
    x, mask, k = x[:, :70], torch.rand(x.shape[:2])[:, :70] > 0.2, min(5, c.shape[1])
    check_several(kernels, x, c, k, mask, metric, on="sm_80", adder=4)


@pytest.mark.parametrize("D, on", [(3, "sm_80"), (20, "sm_80"), (64, "sm_80"), (200, "sm_120"), (64, "float64")])
@pytest.mark.parametrize("k", [1, 31, pytest.param(32, marks=pytest.mark.slow)])
def test_lists_that_fill_many_times(kernels, k, D, on):
    x, c = torch.randn(2, 70, D), torch.randn(2, 500, D)
    tiers = check_several(kernels, x, c, k, on=on)
    assert tiers[1 if on != "float64" else 2] == 140  # no list overflows
    # Each tile has codes nearer than all before: every list is full of them.
    c = c[:, c.norm(dim=2).argsort(dim=1, descending=True)[0]]
    check_several(kernels, x * 1e-3, c, k, on=on)


@pytest.mark.parametrize("k", [1, 3])
def test_several_nearest_of_rows_beyond_the_fast_pass(kernels, k):
    x, c = torch.randn(1, 40, 6), torch.randn(1, 700, 6)
    x[0, :5] *= 1e20
    x[0, 7], x[0, 8, 2] = torch.inf, torch.nan
    check_several(kernels, x, c, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_nearest_of_any_dtype(kernels, dtype):
    x, c = torch.randn(1, 70, 24).to(dtype), torch.randn(1, 200, 24)
    for codebook in (c, c.to(dtype)):
        check_several(kernels, x, codebook, 7)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    "D, on",
    [
        *[(D, "sm_90a") for D in (5, 20, 64)],
        *[(70, "sm_80"), (300, "sm_120"), (64, LOADER), (300, LOADER)],
    ],
)
def test_blocks_share_the_codes_of_all_rows(kernels, D, on, metric):
    x, c = torch.randn(2, 20, D), torch.randn(2, 1500, D)
    c[:, 1490:] = c[:, :10]  # ties between shares
    x[0, :10], x[0, 10, 0] = c[0, :10], torch.nan
    c[1, 700] = 1e30
    tiers = check(kernels, x, c, torch.rand(2, 20) > 0.2, metric, on=on, multiprocessors=6)
    assert tiers[2] == 0 and tiers[:2].sum() > 20
    x[1], c[1] = 0, 1e-6 * c[1] + 1  # more candidates than a list holds
    check(kernels, x, c, metric=metric, on=on, multiprocessors=11)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("left", [1, 2, 9, 130, 400])
def test_blocks_share_the_codes_of_a_few_rows(kernels, left, metric):
    """Rows beyond what the fast pass takes, among 2000 codes: from four shares to none."""
    x, c = torch.randn(2, 400, 6), torch.randn(2, 2000, 6)
    c[:, 1500:1600] = c[:, 300:400]  # ties between shares
    x[:, torch.randperm(400)[:left]] *= 1e20
    x[1, 17] = torch.inf
    tiers = check(kernels, x, c, metric=metric)
    assert metric == "cosine" or tiers[2] >= 2 * left - 1


def test_few_rows_without_a_fast_pass_share_their_codes(kernels):
    x, c = torch.randn(2, 20, 6), torch.randn(2, 2000, 6)
    c[:, 1500:1600] = c[:, 300:400]
    x[0, 3, 1] = torch.nan
    mask = torch.rand(2, 20) > 0.2
    for multiprocessors in (1, 3, 40):
        check(kernels, x, c, mask, on="float64", multiprocessors=multiprocessors)


@pytest.mark.parametrize("K", [1, 2, 3, 20, 32, 33, 700])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_centre_is_the_sample_s_median(kernels, dtype, metric, K):
    c = torch.randn(2, K, 35).to(dtype)
    c[1, ::3] = torch.nan
    c[0, :, 7], c[0, K // 2, 9] = 2, torch.inf
    step = K // 32 if K > 32 else 1
    sample = c[:, : 32 * step : step].double()
    finite = sample.isfinite().all(2, keepdim=True)
    if metric == "cosine":
        sample = torch.where(finite, sample / torch.where(finite, sample, 1).norm(dim=2, keepdim=True), torch.nan)
    found, scale = kernels.survey(c, metric)
    for h in range(2):
        for i in range(35):
            column = sample[h, sample[h, :, i].isfinite(), i].float().sort().values
            expected = column[len(column) // 2] if len(column) else torch.tensor(0.0)
            assert found[h, i] == pytest.approx(expected.item(), rel=1e-6)
    assert (scale.log2() == scale.log2().round()).all()


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e20])
@pytest.mark.parametrize("K", [2, 3, 17, 32, 1024])
def test_the_scale_brings_the_typical_distance_near_one(kernels, K, size):
    c = torch.randn(1, K, 64, dtype=torch.float64) / 8
    for codes in (c, torch.cat([c[:, : K // 2]] * 2, 1) if K > 31 else c, c + 100):
        assert 0.4 < kernels.survey(codes * size)[1].double().item() * size < 2.5
    if K > 2:
        c[0, K // 2] *= 1e100  # of a sample of three codes two distances are of it
        assert K == 3 or 0.4 < kernels.survey(c * size)[1].double().item() * size < 2.5


def test_codes_that_are_equal_or_not_finite_have_scale_one(kernels):
    for codebook in (torch.ones(1, 40, 5), torch.full((1, 9, 5), torch.nan), torch.full((1, 1, 5), 1e9)):
        assert kernels.survey(codebook)[1].item() == 1
    assert kernels.survey(torch.randn(1, 40, 5) * 1e9, "cosine")[1].item() == 1


@pytest.mark.parametrize("N, on, k, prepared, expected", [
    (300, "sm_90a", 1, False, 5),  # Survey, MarkCodes, Pack, Screen, Scan
    (300, "sm_90a", 1, True, 3),  # counters filled, Screen, Scan
    (20, "sm_80", 1, False, 6),  # and MergeLists
    (20, "sm_80", 1, True, 4),
    (300, "sm_80", 3, False, 5),
    (300, "sm_80", 3, True, 3),
    (300, "float64", 1, False, 2),  # counters filled, Scan
])  # fmt: skip
def test_kernels_of_a_search(kernels, N, on, k, prepared, expected):
    x, c = torch.randn(1, N, 6), torch.randn(1, 1500, 6)
    options = {"on": on, "prepared": prepared, "multiprocessors": 1 if N > 20 else 4}
    if k == 1:
        check(kernels, x, c, **options)
    else:
        check_several(kernels, x, c, k, **options)
    assert kernels.calls == expected


@pytest.mark.parametrize("K, D", [(1, 1), (64, 16), (65, 17), (200, 33), (1000, 64), (7, 65), (130, 300)])
def test_packed_size(kernels, K, D):
    codes = (K + 127) // 128 * 128
    width = next((most for most in (16, 32) if most >= D), (D + 63) // 64 * 64)
    pieces = (4, 4, 4, 4, 4, 4 * D, (3 * 4 * 64 + 16) * codes // 64, 2 * codes * width)
    expected = 3 * sum((size + 255) // 256 * 256 for size in pieces)
    assert kernels.library.packed_bytes(*map(ctypes.c_int64, (3, K, D))) == expected


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("D", [33, 64, 200, 600])
@pytest.mark.parametrize("wgmma", [False, True])
def test_bounds_hold_for_every_pair(kernels, D, wgmma, metric):
    """lower <= t <= upper for the products of the model that truncates the most, against float64."""
    x, c = torch.randn(1, 64, D) + 2, torch.randn(1, 64, D) * torch.exp(torch.randn(1, 64, 1)) + 2
    lower, upper, exact = kernels.bounds(x, c, metric, adder=4, wgmma=wgmma)
    assert (lower < exact).all() and (exact < upper).all()
    assert (upper - lower).median() < 0.02 * exact.std()
