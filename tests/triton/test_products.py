"""The products that the search is screened by, within what the proof allows them to err."""

import pytest
import torch

pytest.importorskip("triton")

from vqops.triton_kernels import bound, interpreted

if not interpreted():
    pytest.skip("TRITON_INTERPRET is off", allow_module_level=True)

from vqops.triton_kernels.products import products


def test_by_hand():
    x, codes = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([[3.0, 4.0], [8.0, 2.0], [0.0, 1.0]])
    assert products(x.half(), codes.half()).tolist() == [[11, 12, 2], [-2.5, 2, -1]]


@pytest.mark.parametrize("N, K", [(1, 1), (131, 201)])
@pytest.mark.parametrize("D", [1, 8, 16, 63, 64, 128, 256, 300, 512])
def test_products_are_within_the_bound(D, N, K):
    for shift in (0, 4):  # products of both signs, then of one
        x, codes = (torch.randn(N, D) + shift).half(), (torch.randn(K, D) + shift).half()
        found = products(x, codes)
        assert found.shape == (N, K) and found.dtype == torch.float32
        x, codes = x.double(), codes.double()
        allowed = (bound.accumulation(D) - bound.PRODUCT) * x.norm(dim=1)[:, None] * codes.norm(dim=1)
        assert ((found.double() - x @ codes.T).abs() <= allowed).all()
