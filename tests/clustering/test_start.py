"""Codes to start from."""

import math

import torch
from promises import COPIES, INDICES

from vqops import nearest
from vqops.clustering.lloyd import better_start, lloyd
from vqops.clustering.means import square_distances
from vqops.clustering.start import far_codes, first_codes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_first_codes_are_distinct_rows():
    x = torch.randn(40, 3).repeat(5, 1)
    codes = first_codes(x, 40, generator())
    assert len(codes.unique(dim=0)) == 40
    assert (codes[:, None] == x).all(-1).any(1).all()


def test_with_fewer_distinct_rows_codes_are_equal():
    codes = first_codes(torch.eye(3).repeat(4, 1), 8, generator())
    assert len(codes.unique(dim=0)) == 3


def test_every_clump_has_a_code():
    centres = 100 * torch.randn(30, 4)
    x = (centres[:, None] + torch.randn(20, 4)).flatten(0, 1)
    for seed in range(5):
        nearest = torch.cdist(centres, first_codes(x, 30, generator(seed))).amin(1)
        assert nearest.max() < 20


def test_the_better_start_is_taken():
    centres = 100 * torch.eye(16)
    x = (centres[:, None] + torch.randn(8, 16)).flatten(0, 1)[torch.randperm(128)]
    INDICES.same(torch.cdist(centres, better_start(x, 16, generator())).argmin(1).sort().values, torch.arange(16))
    taken = set()
    for seed in range(10):
        x = torch.randn(40, 2)  # neither start is always the better
        starts = x[:5], first_codes(x, 5, generator(seed))
        errors = [square_distances(x, c[nearest(x, c)]).sum() for c in (lloyd(x, s, 5, generator())[0] for s in starts)]
        best = int(errors[1] <= errors[0])
        COPIES.same(better_start(x, 5, generator(seed)), starts[best])
        taken.add(best)
    assert taken == {0, 1}


def test_far_codes_are_far_and_distinct():
    x = torch.cat([torch.zeros(1000, 2), torch.full((500, 2), 9.0), torch.tensor([[0.0, 50.0]])])
    codes, apart = far_codes(x, square_distances(x, torch.zeros(2)), 3, generator())
    assert sorted(codes[apart].tolist()) == [[0.0, 50.0], [9.0, 9.0]]
    assert apart.tolist() == [True, True, False]


def test_distances_that_overflow():
    x = torch.tensor([[1e300], [-1e300], [0.0], [1.0]], dtype=torch.float64)
    codes = first_codes(x, 3, generator())
    assert codes.isfinite().all() and len(codes.unique()) == 3
    assert math.isinf(square_distances(x, x[1])[0])
