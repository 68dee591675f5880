"""No cluster above its capacity, whatever the rows."""

import pytest
import torch
from promises import INDICES
from scipy.optimize import linear_sum_assignment
from torch.testing import assert_close

from vqops import nearest, residual_kmeans
from vqops.clustering.balanced import auction, balanced_kmeans, fill
from vqops.clustering.start import first_codes


def clumps():
    g = torch.Generator().manual_seed(0)
    far = torch.randn(200, 3, generator=g)
    far[0] = 1e6
    yield "gaussian", torch.randn(257, 5, generator=g), 16
    yield "all equal", torch.ones(130, 3), 40  # more clusters than the lists are long
    yield "all equal to zero", torch.zeros(70, 2), 7
    yield "two clumps", torch.cat([torch.zeros(190, 2), 1e4 + torch.randn(10, 2, generator=g)]), 10
    yield "one far row", far, 9
    yield "a few distinct rows", torch.randint(3, (300, 2), generator=g).float(), 50
    yield "one dimension", torch.randn(101, 1, generator=g), 10
    yield "one cluster", torch.randn(20, 3, generator=g), 1
    yield "a row a cluster", torch.randn(33, 3, generator=g), 33
    yield "fewer rows than clusters", torch.randn(5, 3, generator=g), 33
    yield "near the largest float", torch.randn(50, 2, generator=g).sign() * 3e38, 7
    yield "overflowing squares", torch.randn(50, 2, generator=g).double() * 1e200, 7
    yield "denormal", torch.randn(60, 2, generator=g) * 1e-40, 7


@pytest.mark.filterwarnings("ignore:residual_kmeans")
@pytest.mark.parametrize("x, K", [pytest.param(x, K, id=name) for name, x, K in clumps()])
def test_capacity(x, K):
    found = residual_kmeans(x, [K, K], balanced=True)
    for level in found.indices.unbind(1):
        level = level[level >= 0]  # a residual may overflow
        assert torch.bincount(level, minlength=K).max() <= -(-len(x) // K)
    assert (found.indices[:, 0] >= 0).all()
    assert all(codes.isfinite().all() for codes in found.codebooks)


@pytest.mark.parametrize("K", [1, 3, 40])
def test_fill_by_rounds(K):
    """Rows that all want one code, over several lists."""
    codes = torch.arange(float(K))[:, None]
    indices = fill(torch.zeros(10 * K, 1), codes, 10)
    INDICES.same(indices, torch.arange(K).repeat_interleave(10))


def test_who_loses_most_stays():
    """By hand: three rows prefer code 0, which has room for two; the one that code 1 suits best goes there."""
    x, codes = torch.tensor([[0.0], [4.0], [1.0], [9.0]]), torch.tensor([[0.0], [10.0]])
    INDICES.same(fill(x, codes, 2), torch.tensor([0, 1, 0, 1]))


def test_a_price_by_hand():
    """Rows 0, 1, 4 prefer the first code, which holds two: squares 0, 1, 16, to the other 100, 81, 36. The last loses
    least, 20."""
    x, codes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [4.0, 0.0], [9.0, 0.0]]), torch.tensor([[0.0], [10.0]])
    prices = auction(x, codes, torch.zeros(2, dtype=torch.float64), 2)
    assert_close(prices, torch.tensor([20.0, 0.0], dtype=torch.float64))
    # Now the third is as near to both and the lowest index keeps it: nothing to bid, and the other has room at 0.
    assert_close(auction(x, codes, prices, 2), prices)
    prices = auction(x, codes, torch.tensor([40.0, 10.0], dtype=torch.float64), 2)  # two each: both stay
    assert_close(prices, torch.tensor([30.0, 0.0], dtype=torch.float64))


def test_a_balanced_mixture_is_found():
    """Clumps of equal size are their own best clusters."""
    centres = 20 * torch.eye(8)
    x = (centres[:, None] + torch.randn(30, 8)).flatten(0, 1)
    codes, indices, _ = balanced_kmeans(x, first_codes(x, 8, torch.Generator().manual_seed(0)), 50)
    assert len(indices.view(8, 30).unique(dim=1).T) == 1
    assert_close(codes[indices.view(8, 30)[:, 0]], x.view(8, 30, 8).mean(1))


def test_near_the_best_assignment():
    """For its codes, against the Hungarian algorithm; by the order in rounds alone it is off by 4 %."""
    excess = 0
    for seed in range(4):
        x, K, capacity = torch.randn(800, 3, generator=torch.Generator().manual_seed(seed)), 16, 50
        codes, indices, _ = balanced_kmeans(x, first_codes(x, K, torch.Generator().manual_seed(0)), 50)
        cost = torch.cdist(x.double(), codes.double()).square()
        rows, places = linear_sum_assignment(cost.repeat_interleave(capacity, 1).numpy())
        best = cost[rows, places // capacity].sum()
        excess += (cost[torch.arange(800), indices].sum() / best).item() - 1
    assert 0 <= excess / 4 < 0.025


def test_what_balance_costs():
    """Little where the rows have no clusters; and unlike nearest codes, it holds."""
    x = torch.randn(4000, 8)
    plain, balanced = (residual_kmeans(x, [64], balanced=b) for b in (False, True))
    assert balanced.error < 1.03 * plain.error
    assert torch.bincount(plain.indices[:, 0]).max() > 63 >= torch.bincount(balanced.indices[:, 0]).max()


def test_codes_are_the_means_of_their_rows():
    x = torch.randn(500, 4)
    found = residual_kmeans(x, [10], balanced=True)
    means = torch.stack([x[found.indices[:, 0] == k].mean(0) for k in range(10)])
    assert_close(found.codebooks[0], means)
    assert (found.indices[:, 0] != nearest(x, found.codebooks[0])).any()


def test_without_iterations_the_start_is_filled():
    found = residual_kmeans(torch.randn(100, 4), [10], iters=0, balanced=True)
    assert torch.bincount(found.indices[:, 0]).tolist() == [10] * 10
