"""nearest, nearest_topk, prepare and search_statistics: every implementation against the float64 reference."""

import math

import numpy as np
import pytest
import torch
from memory import LargestTemporaries
from promises import INDICES, ORDER
from torch.testing import assert_close

import vqops
from vqops import reference
from vqops.check.inputs import INF, NAN, SEARCHES
from vqops.reference.distance import root

METRICS = ("euclidean", "cosine")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

TABLE = [
    {"x": [[0, 0], [2, 0], [4, 0]], "c": [[1, 0], [4, 0]], "indices": [0, 0, 1]},
    {"x": [[1, 0], [0, 1]], "c": [[1, 0], [1, 0], [0, 1]], "indices": [0, 2]},  # equal codes: the first
    {"x": [[3, 3]], "c": [[0, 0], [6, 6], [6, 0]], "indices": [0]},  # equal distances: the first
    {"x": [[NAN, 0], [INF, 0], [1, 1]], "c": [[0, 0]], "indices": [-1, -1, 0]},
    {"x": [[5, 5], [0, 0]], "c": [[NAN, 5], [0, INF], [9, 9], [1, 1]], "indices": [2, 3]},
    {"x": [[1, 1]], "c": [[NAN, 0], [INF, 0]], "indices": [-1]},
    {"x": [[1, 0], [-2, 0]], "c": [[9, 0], [0, 1], [-1, -1]], "indices": [0, 2], "metric": "cosine"},
    {"x": [[1, 0], [-1, -1]], "c": [[-1, 0], [0, 0]], "indices": [1, 0], "metric": "cosine"},  # a zero code scores 0
    {"x": [[0, 0]], "c": [[5, 0], [0, 5]], "indices": [0], "metric": "cosine"},  # x = 0 scores 0 with all
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: str(row["indices"]))
def test_by_hand(implementation, row):
    x, c = torch.tensor(row["x"], dtype=torch.float32), torch.tensor(row["c"], dtype=torch.float32)
    assert implementation.nearest(x, c, metric=row.get("metric", "euclidean")).tolist() == row["indices"]


def float64_cost(x, c, metric):
    """[H, N, K] in the plainest float64, with NaN for a code that can't be chosen."""
    x, c = x.double(), c.double()
    if metric == "euclidean":
        cost = (x.unsqueeze(2) - c.unsqueeze(1)).square().sum(-1)
    else:
        norm = c.square().sum(-1).sqrt()
        cost = torch.where(norm.unsqueeze(1) > 0, -(x.unsqueeze(2) * c.unsqueeze(1)).sum(-1) / norm.unsqueeze(1), 0.0)
    return cost.masked_fill(~c.isfinite().all(-1).unsqueeze(1), NAN)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", SEARCHES)
def test_nearest(implementation, case, metric):
    x, c = SEARCHES[case]()
    found = implementation.nearest(x, c, metric=metric).cpu()
    INDICES.same(found, reference.nearest(x, c, metric=metric))
    check_against_float64(x, c, found, metric)


def check_against_float64(x, c, found, metric):
    """No code is nearer than the one found, as far as float64 without a fixed order of addition can tell."""
    cost = float64_cost(x, c, metric)
    usable = x.isfinite().all(-1) & ~cost.isnan().all(-1)
    INDICES.same(found >= 0, usable)
    if not usable.any():
        return
    least = cost.nan_to_num(nan=INF, posinf=INF).amin(-1)
    chosen = cost.gather(-1, found.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    scale = least.abs() if metric == "euclidean" else x.double().square().sum(-1).sqrt()
    doubt = 4 * x.shape[-1] * 2.0**-52 * scale
    worse = usable & (chosen > least + doubt) & least.isfinite()
    assert not worse.any(), (chosen[worse], least[worse])


@pytest.mark.parametrize("codebook_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_dtypes_are_not_cast(kernel, metric, dtype, codebook_dtype):
    x, c = torch.randn(1, 130, 13).to(dtype), torch.randn(1, 90, 13).to(codebook_dtype)
    INDICES.same(kernel.nearest(x, c, metric=metric).cpu(), reference.nearest(x, c, metric=metric))


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_float64_differences_below_float32(implementation, offset):
    c = offset + torch.arange(60, dtype=torch.float64)[:, None] * 1e-6 + torch.zeros(3, dtype=torch.float64)
    x = c[torch.randint(60, (120,))] + 4e-7 * (torch.rand(120, 3, dtype=torch.float64) - 0.5)
    expected = (x[:, None] - c).square().sum(-1).argmin(-1)
    INDICES.same(implementation.nearest(x, c).cpu(), expected)


def test_float64_beyond_float32(implementation):
    x, c = torch.randn(110, 5, dtype=torch.float64) * 1e200, torch.randn(40, 5, dtype=torch.float64) * 1e200
    INDICES.same(implementation.nearest(x, c).cpu(), reference.nearest(x[None], c[None])[0])
    assert implementation.nearest(x, c).cpu().unique().tolist() == [0]  # all distances overflow: the lowest index


@pytest.mark.parametrize("rows", [3, 140])
@pytest.mark.parametrize("of_rows, of_codes", [(200, 120), (160, 150), (-164, -160), (-300, -30), (0, -155)])
@pytest.mark.parametrize("metric", METRICS)
def test_float64_at_the_end_of_its_range(kernel, metric, of_rows, of_codes, rows):
    """Where products overflow or vanish the lowest index wins: a pass that scales its rows must not know better."""
    x, c = torch.randn(1, rows, 24, dtype=torch.float64), torch.randn(1, 70, 24, dtype=torch.float64)
    x, c = x * 10.0**of_rows, c * 10.0**of_codes
    INDICES.same(kernel.nearest(x, c, metric=metric).cpu(), reference.nearest(x, c, metric=metric))


@pytest.mark.parametrize("rows", [3, 140])  # below and above where searches without preparation end
def test_any_strides(kernel, rows):
    c = torch.randn(16, 3, 50).permute(1, 2, 0)[..., ::2]
    x = torch.randn(8, 2 * rows, 3)[:, ::2].permute(2, 1, 0)
    INDICES.same(kernel.nearest(x, c).cpu(), reference.nearest(x.contiguous(), c.contiguous()))
    expanded = torch.randn(1, 1, 8).expand(3, rows, 8)
    INDICES.same(kernel.nearest(expanded, c).cpu(), reference.nearest(expanded.contiguous(), c.contiguous()))


@pytest.mark.parametrize("rows", [5, 120])
def test_masked_rows_have_no_code(kernel, rows):
    x, c, mask = torch.randn(2, rows, 6), torch.randn(2, 30, 6), torch.rand(2, rows) > 0.4
    found = kernel.nearest(x, c, mask).cpu()
    INDICES.same(found, reference.nearest(x, c).where(mask, torch.tensor(-1)))
    every_other = mask.repeat_interleave(2, dim=1)[:, ::2]
    INDICES.same(kernel.nearest(x, c, every_other).cpu(), found)


def test_leading_axes_are_rows(implementation):
    x, c = torch.randn(2, 3, 4, 5), torch.randn(9, 5)
    found = implementation.nearest(x, c)
    assert found.shape == (2, 3, 4) and found.dtype == torch.int64
    INDICES.same(found.flatten(), implementation.nearest(x.view(-1, 5), c))
    assert implementation.nearest(x[0, 0, 0], c).shape == ()


@pytest.mark.parametrize("N, K, D", [(1, 7, 3), (97, 300, 8), (200, 1000, 33)])
def test_batch_size_does_not_matter(kernel, N, K, D):
    x, c = torch.randn(N, D), torch.randn(K, D)
    whole = kernel.nearest(x, c)
    parts = torch.cat([kernel.nearest(x[:40], c), kernel.nearest(x[40:], c)])
    INDICES.same(whole, parts)


# Several codes


@pytest.mark.parametrize("k", [1, 3, 32])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", SEARCHES)
def test_topk(kernel, case, metric, k):
    x, c = SEARCHES[case]()
    if k > c.shape[1]:
        k = c.shape[1]
    indices, distances = kernel.nearest_topk(x, c, k, metric=metric)
    expected_indices, expected_distances = reference.nearest_topk(x, c, k, metric=metric)
    INDICES.same(indices.cpu(), expected_indices)
    ORDER.same(distances.cpu(), expected_distances, equal_nan=True)


def test_topk_by_hand(implementation):
    x, c = torch.tensor([[0.0, 0], [INF, 0]]), torch.tensor([[3.0, 4], [NAN, 0], [1, 0], [0, -1]])
    indices, distances = implementation.nearest_topk(x, c, 4)
    assert indices.tolist() == [[2, 3, 0, -1], [-1] * 4]
    assert distances[0].tolist() == [1, 1, 25, INF] and distances[1].isnan().all()
    masked = implementation.nearest_topk(x, c, 2, torch.tensor([True, False]))
    assert masked[0].tolist() == [[2, 3], [-1, -1]] and masked[1].tolist() == [[1, 1], [INF, INF]]
    cosine = implementation.nearest_topk(
        torch.tensor([[2.0, 0]]), torch.tensor([[0.0, 3], [5, 0], [-1, 0]]), 3, metric="cosine"
    )
    assert cosine[0].tolist() == [[1, 0, 2]] and cosine[1].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distances_are_at_least_float32(implementation, dtype):
    _, distances = implementation.nearest_topk(torch.randn(100, 4).to(dtype), torch.randn(9, 4), 2)
    assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# Preparation


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", ["normal", "heads", "one_code", "duplicates", "not_finite_codes", "one_code_x_1e15"])
def test_a_prepared_codebook_finds_the_same(kernel, case, metric):
    x, c = SEARCHES[case]()
    prepared = kernel.prepare(c, metric=metric)
    INDICES.same(kernel.nearest(x, prepared, metric=metric).cpu(), reference.nearest(x, c, metric=metric))
    few = x[:, :3]
    INDICES.same(kernel.nearest(few, prepared, metric=metric).cpu(), reference.nearest(few, c, metric=metric))
    k = min(3, c.shape[1])
    indices, _ = kernel.nearest_topk(x, prepared, k, metric=metric)
    INDICES.same(indices.cpu(), reference.nearest_topk(x, c, k, metric=metric)[0])
    found = kernel.quantize(x, prepared, metric=metric)
    INDICES.same(found.indices.cpu(), reference.nearest(x, c, metric=metric))


def awkward_codes(H, N, K, D):
    x, c = torch.randn(H, N, D), torch.randn(H, K, D)
    c[:, 1], c[:, 2, 5], c[:, 3], c[:, 4], c[:, 5] = c[:, 9], math.nan, 1e15 * c[:, 3], 0, 1e-30 * c[:, 5]
    return x, c


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6])
def test_few_rows_of_a_prepared_codebook(kernel, rows, metric, dtype):
    """Of many dimensions, whose codes the CPU compares directly."""
    x, c = awkward_codes(2, rows, 70, 231)
    x = x.to(dtype)
    mask = torch.ones(2, rows, dtype=torch.bool)
    mask[1, 0], x[0, -1] = False, c[0, 1].to(dtype)
    prepared = kernel.prepare(c, metric=metric)
    for given in (x, x.index_fill(2, torch.tensor(7), math.inf), torch.zeros_like(x)):
        expected = reference.nearest_topk(given, c, 4, mask, metric)
        found = kernel.nearest_topk(given, prepared, 4, mask, metric)
        INDICES.same(found[0].cpu(), expected[0])
        assert_close(found[1].cpu(), expected[1], rtol=1e-6, atol=1e-6, equal_nan=True)
        INDICES.same(kernel.nearest(given, prepared, mask, metric).cpu(), expected[0][..., 0])
        found = kernel.quantize(given, prepared, mask, metric=metric, code_sums=True)
        expected = kernel.quantize(given, c, mask, metric=metric, code_sums=True)
        ORDER.same(list(found), list(expected), equal_nan=True)


def test_a_changed_codebook_must_be_prepared_again(implementation):
    c = torch.randn(20, 4, device=implementation.device)
    prepared = implementation.prepare(c)
    c[3] += 1
    with pytest.raises(RuntimeError, match="nearest: the codebook was changed in place after it was prepared"):
        implementation.nearest(torch.randn(5, 4), prepared)


def test_a_preparation_belongs_to_its_metric(implementation):
    prepared = implementation.prepare(torch.randn(20, 4))
    with pytest.raises(ValueError, match="metric is 'cosine', but the codebook was prepared with 'euclidean'"):
        implementation.nearest(torch.randn(5, 4), prepared, metric="cosine")


# Statistics


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", SEARCHES)
def test_statistics_count_every_row(kernel, case, metric):
    x, c = SEARCHES[case]()
    tiers = kernel.search_statistics(x, c, metric=metric).cpu()
    found = reference.nearest(x, c, metric=metric)
    assert tiers.shape == (4,) and tiers.dtype == torch.int64 and (tiers >= 0).all()
    assert tiers.sum() == found.numel() and tiers[3] == (found < 0).sum()


def test_easy_rows_are_certified(kernel):
    """Not a time, but what decides it: the fast pass settles nearly all rows of ordinary data."""
    if kernel.name == "reference":
        pytest.skip("the reference compares everything in float64")
    codes = 10 * torch.randn(120, 16)
    tiers = kernel.search_statistics(codes[torch.randint(120, (400,))] + 0.1 * torch.randn(400, 16), codes)
    assert tiers[0] >= 0.95 * 400 and tiers[2] == 0
    for case in ("one_code_x_1e15", "duplicates", "identical", "offset_10000", "zero_codebook", "denormal"):
        x, c = SEARCHES[case]()
        assert kernel.search_statistics(x, c)[2] == 0, case


def test_a_prepared_codebook_is_equal_to_itself_alone():
    c = torch.randn(5, 3)
    first, second = vqops.prepare(c), vqops.prepare(c)
    assert first == first and first != second and len({first, second}) == 2


# Memory


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("N, K, D", [(3000, 3000, 4), (40, 200, 20000)])
def test_the_reference_keeps_its_temporaries_small(N, K, D, metric):
    x, c = torch.randn(1, N, D), torch.randn(1, K, D)
    with LargestTemporaries() as memory:
        reference.nearest(x, c, metric=metric)
    assert memory.most <= 64 * 2**20
    assert memory.most >= N  # something was seen


def test_roots_are_correctly_rounded():
    """On some processors torch.sqrt is not."""
    values = torch.rand(100_000, dtype=torch.float64) * torch.exp(300 * torch.randn(100_000, dtype=torch.float64))
    values[:4] = torch.tensor([0, INF, 5e-324, 1.7e308], dtype=torch.float64)
    ORDER.same(root(values).numpy(), np.sqrt(values.numpy()))


@pytest.mark.parametrize("metric", METRICS)
def test_the_reference_is_its_three_lines(metric):
    x, c = torch.randn(1, 100, 7, dtype=torch.float64), torch.randn(1, 30, 7, dtype=torch.float64)
    INDICES.same(reference.nearest(x, c, metric=metric), float64_cost(x, c, metric).argmin(-1))
    distance = (x[0, :, None] - c[0]).square().sum(-1)
    values, indices = distance.topk(3, largest=False)
    found = reference.nearest_topk(x, c, 3)
    INDICES.same(found[0][0], indices)
    assert_close(found[1][0], values, rtol=1e-14, atol=0)
    assert math.isclose(float(found[1][0, 0, 0]), float(values[0, 0]), rel_tol=1e-14)
