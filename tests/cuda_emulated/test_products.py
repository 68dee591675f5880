"""The probe of the tensor cores' products on the CPU: rows, codes and dimensions come out where they belong, and err as
the emulated tensor cores do.
"""

from ctypes import c_int64

import pytest
import torch
from cuda_blocks import SEARCHES_ON, pointer
from promises import WHOLE

SEARCHES = {**SEARCHES_ON, "sm_90a without wgmma": (SEARCHES_ON["sm_90a"][0], 0)}  # as VQOPS_WGMMA=0 has it
WIDTHS = [1, 15, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513, 600]


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def products(request, emulated):
    def run(x, codes, on, adder=16):
        x, codes = x.half(), codes.half()
        (N, D), K = x.shape, len(codes)
        found = torch.full((N + 1, K), torch.nan)
        sizes = map(c_int64, (N, K, D))
        took = emulated.tensor_core_products(
            int(request.param), *SEARCHES[on], adder, *sizes, pointer(x), pointer(codes), pointer(found)
        )
        assert found[N].isnan().all()
        return found[:N] if took else None

    return run


@pytest.mark.parametrize("on", ["sm_80", "sm_90a", "sm_90a without wgmma", "sm_120"])
@pytest.mark.parametrize("D", WIDTHS)
def test_whole_numbers_are_exact(products, D, on):
    for N, K in ((1, 1), (67, 129), (259, 63)):
        x, codes = torch.randint(-9, 10, (N, D)).float(), torch.randint(-9, 10, (K, D)).float()
        WHOLE.same(products(x, codes, on, adder=4), x @ codes.mT)


@pytest.mark.parametrize("on", ["sm_80", "sm_90a", "sm_90a without wgmma", "sm_120"])
@pytest.mark.parametrize("D", [16, 32, 64, 300, 600])
def test_cut_sums_err_within_the_premise(products, D, on):
    """Nothing is rounded, scaled or added on the way: what comes out has the error of the tensor cores alone."""
    for x, codes in ((torch.rand(70, D), torch.rand(131, D)), (torch.randn(70, D), torch.randn(131, D))):
        x, codes = x.half(), codes.half()
        exact, size = x.double() @ codes.double().mT, x.double().abs() @ codes.double().abs().mT
        error = (products(x, codes, on, adder=4) - exact).abs() / size
        assert error.max() <= 1.5 * (D + 16) * 2.0**-23
        assert error.max() > 2.0**-23


def test_values_are_taken_as_they_are(products):
    """The largest and the smallest of float16, beside each other."""
    x, codes = torch.zeros(2, 40), torch.zeros(3, 40)
    x[0, 0], x[1, 39] = 65504, 2.0**-24
    codes[0, 0], codes[0, 39], codes[2, 39] = 65504, 2.0**-24, -(2.0**-24)
    expected = torch.tensor([[65504.0**2, 0, 0], [2.0**-48, 0, -(2.0**-48)]])
    for on in ("sm_80", "sm_90a"):
        WHOLE.same(products(x, codes, on), expected)


def test_no_fast_pass_is_said(products):
    assert products(torch.ones(1, 40), torch.ones(1, 40), "float64") is None
    assert products(torch.ones(1, 4000), torch.ones(1, 4000), "sm_90a") is None


@pytest.mark.parametrize("D", [*WIDTHS, 3264, 3265])
def test_wgmma_is_chosen_where_it_may_be(emulated, D):
    cores = {on: emulated.cores_of(*able, c_int64(D)) for on, able in SEARCHES.items()}
    warps = int(D <= 3264)
    assert cores["sm_90a"] == (2 if 32 < D <= 512 else warps)
    assert cores["sm_90a, loader"] == (3 if 32 < D <= 512 else warps)  # VQOPS_WGMMA=loader
    assert cores["sm_90a without wgmma"] == warps
    assert cores["sm_80"] == int(D <= 2240) and cores["sm_120"] == int(D <= 1216) and cores["float64"] == 0
