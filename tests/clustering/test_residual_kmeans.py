"""Residual k-means against the algorithm written out, and the calls that it must survive or refuse."""

import re
import warnings

import numpy as np
import pytest
import torch
from memory import LargestTemporaries
from promises import COPIES, INDICES, REPEATS
from sklearn.cluster import KMeans
from torch.testing import assert_close

from vqops import residual_kmeans
from vqops.clustering.lloyd import lloyd, mini_batches
from vqops.clustering.start import first_codes

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(N, D, clumps, spread=1.0):
    centres = 4 * torch.randn(clumps, D)
    return centres[torch.randint(clumps, (N,))] + spread * torch.randn(N, D)


def plain_lloyd(x, codes, iters):
    """In float64, with an N x K matrix; every cluster is supposed to have rows."""
    x, codes = x.double(), codes.double()
    indices = (x[:, None] - codes).square().sum(-1).argmin(1)
    for _ in range(iters):
        codes = torch.stack([x[indices == k].mean(0) for k in range(len(codes))])
        before, indices = indices, (x[:, None] - codes).square().sum(-1).argmin(1)
        if (indices == before).all():
            break
    return codes, indices


@pytest.mark.parametrize("iters", [0, 1, 4, 100])
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_a_level_is_lloyds_algorithm(iters, shift):
    x = mixture(600, 3, 12) + shift
    start = first_codes(x, 9, generator())
    codes, took = lloyd(x, start, iters, generator())
    expected, indices = plain_lloyd(x, start, iters)
    assert_close(codes.double(), expected, rtol=1e-6, atol=1e-6)
    INDICES.same((x[:, None].double() - codes.double()).square().sum(-1).argmin(1), indices)
    assert took <= iters and (iters < 100 or took < 100)


def test_levels_one_after_the_other():
    """The second level is what the first is, of x - its codes."""
    x = mixture(500, 4, 10)
    both = residual_kmeans(x, [8, 5])
    first, (c1, c2) = residual_kmeans(x, [8]), both.codebooks
    REPEATS.same(c1, first.codebooks[0])
    REPEATS.same(both.indices[:, :1], first.indices)
    rest = x - c1[both.indices[:, 0]]
    INDICES.same(both.indices[:, 1], (rest[:, None].double() - c2.double()).square().sum(-1).argmin(1))
    means = torch.stack([rest[both.indices[:, 1] == k].mean(0) for k in range(5)])
    assert_close(c2, means)  # at the end of Lloyd's algorithm


def test_how_good_by_hand():
    x = torch.tensor([[0.0], [0.0], [1.0], [10.0], [11.0], [12.0]])
    found = residual_kmeans(x, [2, 2])
    a, b = x[:3].mean(), x[3:].mean()
    assert sorted(found.codebooks[0].flatten().tolist()) == pytest.approx(sorted([a.item(), b.item()]))
    error = (x[:3] - a).square().mean() / 2 + (x[3:] - b).square().mean() / 2
    assert found.error[0].item() == pytest.approx(error.item())
    assert found.variance_explained[0].item() == pytest.approx(1 - error.item() / x.var(unbiased=False).item())
    # Residuals -1/3 -1/3 2/3 -1 0 1: the second level parts them at about 0, and the first two rows are equal.
    assert found.num_unique[0] == 2 and found.collision_rate[0] == 1
    groups = [(found.indices == row).all(1).sum() for row in found.indices]
    assert found.collision_rate[1].item() == pytest.approx(sum(g > 1 for g in groups).item() / 6)
    assert found.usage.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"batch_size": 64}], ids=str)
def test_dtypes(dtype, options):
    x = mixture(300, 5, 8).to(dtype)
    found = residual_kmeans(x, [7, 3], iters=20, **options)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    assert {codes.dtype for codes in found.codebooks} == {real}
    assert found.indices.shape == (300, 2) and (found.indices >= 0).all()
    rest = x.to(real)
    for codes, indices, error in zip(found.codebooks, found.indices.unbind(1), found.error, strict=True):
        rest = rest - codes[indices]
        assert_close(error, rest.double().square().sum(1).mean(), rtol=1e-6, atol=0)
    if not options.get("balanced"):
        INDICES.same(found.encode(x), found.indices)


def test_float64_is_kept():
    x = 1 + 1e-10 * mixture(200, 3, 4).double()
    found = residual_kmeans(x, [4])
    assert found.variance_explained[0] > 0.5


@pytest.mark.parametrize("options", [{}, {"batch_size": 50}], ids=str)
def test_new_rows_are_encoded_as_the_fitted_ones(options):
    x = mixture(400, 6, 20)
    found = residual_kmeans(x, [16, 9, 5], **options)
    INDICES.same(found.encode(x), found.indices)
    INDICES.same(found.encode(x, batch_size=7), found.indices)
    INDICES.same(found.encode(x[13:14]), found.indices[13:14])
    INDICES.same(found.encode(x.T.contiguous().T), found.indices)
    assert found.encode(x[:0]).shape == (0, 3)
    mask = torch.rand(400) < 0.5
    INDICES.same(found.encode(x, mask, 33), found.indices.where(mask[:, None], -1))


@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"batch_size": 100}], ids=str)
def test_a_seed_decides(options):
    x = torch.randn(500, 4)
    found = residual_kmeans(x, [16, 8], seed=3, **options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        torch.rand(5)  # of another generator
        again = residual_kmeans(x, [16, 8], seed=3, **options)
    finally:
        torch.set_num_threads(threads)
    for name in ("codebooks", "indices", "collision_rate", "usage", "error"):
        REPEATS.same(getattr(again, name), getattr(found, name))
    other = residual_kmeans(x, [16, 8], seed=4, **options)
    assert (other.codebooks[0] != found.codebooks[0]).any()


@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"batch_size": 64}], ids=str)
def test_rows_that_take_no_part(options):
    x = mixture(200, 3, 6)
    mask = torch.rand(200) < 0.7
    expected = residual_kmeans(x[mask], [6, 4], **options)
    poisoned = x.clone()
    poisoned[~mask] = torch.tensor([torch.nan, torch.inf, 1e30])[torch.randint(3, ((~mask).sum(),))][:, None]
    found = residual_kmeans(poisoned, [6, 4], mask=mask, **options)
    REPEATS.same(found.codebooks, expected.codebooks)
    INDICES.same(found.indices[mask], expected.indices)
    assert (found.indices[~mask] == -1).all()
    for name in ("collision_rate", "usage", "error"):
        REPEATS.same(getattr(found, name), getattr(expected, name))
    poisoned[~mask] = torch.nan
    REPEATS.same(residual_kmeans(poisoned, [6, 4], **options).indices, found.indices)


@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"batch_size": 3}], ids=str)
def test_a_residual_that_overflows(options):
    x = torch.tensor([[3e38], [3e38], [3e38], [3e38], [3e38], [-3e38]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = residual_kmeans(x, [1, 2], **options)  # x - mean = -5e38
    assert (found.indices[:, 0] == 0).all()
    assert found.indices[5, 1] == -1 and (found.indices[:5, 1] >= 0).all()
    assert all(codes.isfinite().all() for codes in found.codebooks)


@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"batch_size": 3}], ids=str)
def test_all_residuals_overflow(options):
    x = torch.full((4, 4), 3e38).fill_diagonal_(-3e38)  # x - mean has a -4.5e38 in each row
    with pytest.warns(UserWarning, match="of the K=2 codes of level 1 only 0 are in use"):
        found = residual_kmeans(x, [1, 2], **options)
    assert found.indices.tolist() == [[0, -1]] * 4 and found.error[1].isnan()
    INDICES.same(found.encode(x), found.indices)


@pytest.mark.parametrize("rows, sizes", [(3, [8]), (1, [4, 4]), (3, [2, 8])])
@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"batch_size": 2}], ids=str)
def test_fewer_rows_than_codes(rows, sizes, options):
    x = torch.randn(rows, 2).repeat(2, 1)
    with pytest.warns(UserWarning, match=r"residual_kmeans: of the K=\d codes of level \d only \d are") as seen:
        found = residual_kmeans(x, sizes, **options)
    assert seen[0].filename == __file__
    assert (found.indices >= 0).all() and (found.usage <= 1).all() and found.usage[-1] < 1
    if not options and sizes[0] >= rows:
        assert_close(found.error[0].item(), 0.0)
        assert found.num_unique[0] == rows


def test_equal_rows():
    x = torch.full((20, 3), 2.5)
    with pytest.warns(UserWarning, match="only 1 are in use, by 20 rows"):
        found = residual_kmeans(x, [4])
    assert found.error.tolist() == [0] and found.variance_explained.tolist() == [1]


def test_clusters_that_lose_their_rows_are_moved():
    """All codes start in one clump; without new places the other would never have more than one."""
    x = torch.cat([torch.randn(50, 2), 100 + torch.randn(50, 2)])
    start = torch.cat([torch.zeros(1, 2), torch.full((7, 2), -1e3)])
    codes, _ = lloyd(x, start, 100, generator())
    indices = torch.cdist(x, codes).argmin(1)
    assert len(indices.unique()) == 8


@pytest.mark.parametrize("clumps", [1, 30])
def test_no_worse_than_scikit_learn(clumps):
    x = mixture(3000, 8, clumps)
    inertia = KMeans(30, n_init=1, random_state=0).fit(x.numpy()).inertia_
    assert residual_kmeans(x, [30]).error[0] < 1.1 * inertia / 3000  # both end in some local optimum


def test_mini_batches_by_hand():
    def passes():
        yield torch.tensor([[1.0], [9.0]])
        yield torch.tensor([[last.pop()]])

    last = [3.0]
    start = torch.tensor([[0.0], [10.0]])
    codes, took = mini_batches(passes, start, 1, generator())
    assert codes.tolist() == [[2.0], [9.0]] and took == 1  # 0 -> 1 -> 1 + (3 - 1) / 2
    last = [5.0, 3.0]
    codes, took = mini_batches(passes, start, 2, generator())
    # A row of the first pass now counts half: 2 -> 2 + (1 - 2) / 2 -> 1.5 + (5 - 1.5) / 3.
    assert_close(codes, torch.tensor([[8 / 3], [9.0]]))
    assert took == 2
    last = [3.0]
    codes, _ = mini_batches(passes, torch.tensor([[0.0], [10.0], [99.0]]), 1, generator())
    assert codes[2].item() == 3.0  # no row: moved to one of the last batch


@pytest.mark.parametrize("sizes", [[16], [32, 16]])
def test_mini_batches_come_near_the_whole(sizes):
    x = mixture(8000, 8, 32)
    whole, batched = (residual_kmeans(x, sizes, batch_size=size) for size in (None, 512))
    assert (batched.error < 1.05 * whole.error).all()


def test_batches_hold_the_memory():
    most = []
    for N in (20000, 60000):
        x = torch.randn(N, 128)
        with LargestTemporaries() as memory:
            residual_kmeans(x, [8], iters=2, batch_size=256)
        most.append(memory.most - x.nbytes)  # views of x are counted as x
    assert most[1] - most[0] < 40000 * 128  # a byte a value; the start takes the same of both
    with LargestTemporaries() as memory:
        residual_kmeans(torch.randn(20000, 4), [512], iters=2, balanced=True)
    assert memory.most < 20000 * 512 * 4 / 2


def test_rows_from_a_file(tmp_path):
    x = torch.randn(300, 4)
    file = np.memmap(tmp_path / "x", np.float32, "w+", shape=(300, 4))
    file[:] = x.numpy()
    found = residual_kmeans(torch.from_numpy(file), [8], batch_size=100)
    REPEATS.same(found.codebooks, residual_kmeans(x, [8], batch_size=100).codebooks)
    assert (found.indices >= 0).all()


def test_one_dimension_one_code_one_row():
    found = residual_kmeans(torch.tensor([[5.0]]), [1, 1])
    assert found.codebooks[0].tolist() == [[5.0]] and found.codebooks[1].tolist() == [[0.0]]
    assert found.indices.tolist() == [[0, 0]] and found.collision_rate.tolist() == [0, 0]


def test_x_stays_as_it_is():
    x = torch.randn(100, 3, requires_grad=True)
    before = x.detach().clone()
    found = residual_kmeans(x, (4, 4), device="cpu")
    COPIES.same(x.detach(), before)
    assert not found.codebooks[0].requires_grad and not found.encode(x).requires_grad


REFUSED = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "x must be float32, float64, float16 or bfloat16, got"),
    ({"x": torch.zeros(0, 2)}, ValueError, "x must be [N, D] with a row and a dimension at least, got [0, 2]"),
    ({"x": torch.zeros(2, 0)}, ValueError, "got [2, 0]"),
    ({"x": torch.zeros(2, 3, 4)}, ValueError, "got [2, 3, 4]"),
    ({"x": torch.full((4, 2), torch.nan)}, ValueError, "x has no row that is finite and not masked, of N=4"),
    ({"mask": torch.zeros(4, dtype=torch.bool)}, ValueError, "x has no row that is finite and not masked"),
    ({"mask": torch.zeros(4)}, TypeError, "mask must be a bool tensor, True for the rows that take part, got torch.fl"),
    ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask must have shape [N] = [4], got [3]"),
    ({"sizes": 4}, TypeError, "sizes must be a sequence of ints, K of each level, got int"),
    ({"sizes": []}, ValueError, "sizes must name from 1 to 64 levels, got 0"),
    ({"sizes": [2, 0]}, ValueError, "sizes[1] must be at least 1, got 0"),
    ({"sizes": [2.0]}, TypeError, "sizes[0] must be an int, got float"),
    ({"iters": -1}, ValueError, "iters must be at least 0, got -1"),
    ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ({"seed": None}, TypeError, "seed must be an int, got NoneType"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ({"balanced": 1}, TypeError, "balanced must be a bool, got int"),
    ({"balanced": True, "batch_size": 2}, ValueError, "batch_size must be None, got 2"),
]


@pytest.mark.parametrize("wrong, error, words", REFUSED, ids=[words for _, _, words in REFUSED])
def test_refused(wrong, error, words):
    with pytest.raises(error, match="^residual_kmeans: .*" + re.escape(words)):
        residual_kmeans(**({"x": torch.zeros(4, 2), "sizes": [2]} | wrong))


def test_rows_that_are_not_encoded():
    found = residual_kmeans(torch.randn(9, 2), [2])
    for x, error, words in [
        (torch.zeros(3, 3), ValueError, "encode: x must be [N, D] with D=2, got [3, 3]"),
        (torch.zeros(2), ValueError, "got [2]"),
        ("x", TypeError, "encode: x must be a tensor, got str"),
    ]:
        with pytest.raises(error, match=re.escape(words)):
            found.encode(x)
    with pytest.raises(ValueError, match="encode: batch_size must be at least 1, got 0"):
        found.encode(torch.zeros(3, 2), batch_size=0)
