"""The Triton search in Triton's interpreter: the same indices, bit for bit, as the compiled CPU kernels."""

import math

import numpy as np
import pytest
import torch
from promises import INDICES

pytest.importorskip("triton")

import vqops
from vqops.triton_kernels import blocks, interpreted, layout

if not interpreted():
    pytest.skip("TRITON_INTERPRET is off", allow_module_level=True)

import triton
import triton.language as tl  # noqa: F401 (the interpreter looks for it beside a kernel)
from triton.runtime import interpreter

from vqops.triton_kernels import bound, finish, scan, screen

METRICS = ("euclidean", "cosine")
COSINE_SLOW = ("euclidean", pytest.param("cosine", marks=pytest.mark.slow))
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check(x, codebook, mask=None, metric="euclidean"):
    """Same indices as the compiled kernels."""
    expected = vqops.nearest(x, codebook, mask, metric, implementation="compiled")
    found = vqops.nearest(x, codebook, mask, metric, implementation="triton")
    assert found.dtype == torch.int64
    INDICES.same(found, expected)


def check_tiers(x, codebook, metric="euclidean"):
    """The same; returns the rows a tier."""
    check(x, codebook, None, metric)
    tiers = vqops.search_statistics(x, codebook, metric, implementation="triton")
    assert tiers.sum() == len(x)
    return tiers.tolist()


def test_by_hand():
    codebook = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    x = torch.tensor([[1.0, 5.0], [3.0, -5.0], [2.0, 1.0]])  # the last is as far from both
    assert vqops.nearest(x, codebook, implementation="triton").tolist() == [0, 1, 0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "N, K, D",
    [
        (1, 1, 1),
        (100, 2, 1),
        (130, 100, 20),
        (64, 1500, 8),
        (16, 5000, 16),
        (40, 129, 64),
        (33, 65, 130),
        (20, 70, 300),
    ],
)
def test_shapes(N, K, D, metric):
    check(torch.randn(N, D) + 3, torch.randn(K, D) + 3, metric=metric)


@pytest.mark.parametrize("codes", FLOATS)
@pytest.mark.parametrize("rows", FLOATS)
def test_dtypes(rows, codes):
    check(torch.randn(40, 12).to(rows), torch.randn(90, 12).to(codes))


def test_no_rows():
    assert vqops.nearest(torch.randn(0, 4), torch.randn(3, 4), implementation="triton").shape == (0,)


def test_more_heads_than_a_grid_has():
    x = torch.zeros(65536, 1, 1)
    with pytest.raises(ValueError, match="nearest: implementation 'triton' takes H <= 65535, x has H=65536"):
        vqops.nearest(x, x, implementation="triton")
    with pytest.raises(ValueError, match="prepare: implementation 'triton' takes H <= 65535, codebook has H=65536"):
        vqops.prepare(x, implementation="triton")


@pytest.mark.parametrize("metric", METRICS)
def test_heads_masks_and_strides(metric):
    x = torch.randn(20, 3, 60).permute(1, 2, 0)  # [3, 60, 20], D is not the last in memory
    codebook = torch.randn(40, 3, 20).transpose(0, 1)
    mask = torch.rand(60, 3).T > 0.3
    check(x, codebook, metric=metric)
    check(x, codebook, mask, metric)
    check(x.double(), codebook, mask, metric)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("metric", METRICS)
def test_values_that_are_no_numbers(metric, dtype):
    x, codebook = torch.randn(2, 30, 5).to(dtype), torch.randn(2, 20, 5).to(dtype)
    x[0, 3, 2], x[1, 7, 0], x[1, 8, 4] = math.nan, math.inf, -math.inf
    codebook[0, 0, 1], codebook[0, 5, 0] = math.nan, math.inf
    codebook[1] = math.nan
    check(x, codebook, metric=metric)


@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_lowest_index(metric):
    codebook = torch.randn(60, 8)
    codebook = torch.cat([codebook, codebook.flip(0), codebook])
    x = (codebook[:30] + codebook[30:60]) / 2
    certified, *_ = check_tiers(torch.cat([x, codebook]), codebook, metric=metric)
    assert certified > 180  # a repeat costs nothing


def test_a_tie_between_different_codes():
    codebook = torch.randint(-4, 5, (64, 6)).float()
    _, decided, *_ = check_tiers(torch.randint(-4, 5, (100, 6)).float() / 2, codebook)
    assert decided > 5


@pytest.mark.parametrize("metric", METRICS)
def test_identical_codes(metric):
    x, codebook = torch.randn(50, 7), torch.ones(100, 7)
    assert check_tiers(x, codebook, metric=metric) == [50, 0, 0, 0]


def test_zero_rows_and_codes():
    x, codebook = torch.randn(40, 6), torch.randn(50, 6)
    x[::3], codebook[::7] = 0, -0.0
    codebook[0] = math.nan
    check(x, codebook, metric="cosine")
    check(x, codebook)
    check(x, torch.zeros(50, 6), metric="cosine")


@pytest.mark.parametrize("metric", METRICS)
def test_a_collapsed_codebook_far_from_the_origin(metric):
    mean = 10 * torch.randn(16)
    x, codebook = mean + 1e-3 * torch.randn(100, 16), mean + 1e-3 * torch.randn(80, 16)
    scanned = check_tiers(x, codebook, metric=metric)[2]
    assert metric == "cosine" or scanned == 0


def test_more_codes_within_rounding_than_a_list_holds():
    codebook = torch.randn(1, 8) + 2.0**-20 * torch.randn(100, 8)
    x = torch.randn(40, 8) * 100
    assert check_tiers(x, codebook)[2] > 10


@pytest.mark.parametrize("size", [1e15, 1e-15, 1e38])
def test_one_huge_code(size):
    x, codebook = torch.randn(80, 10), torch.randn(60, 10)
    codebook[17] *= size
    x[:5] *= size
    x[5] = codebook[17]
    certified, *_ = check_tiers(x, codebook)
    assert certified > 60


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e20, 1e37])
def test_scales(scale):
    x, codebook = torch.randn(50, 9) * scale, torch.randn(70, 9) * scale
    check(x, codebook)
    check(x, torch.randn(70, 9))
    check(x, codebook, metric="cosine")


def test_heavy_tails():
    x, codebook = torch.randn(100, 12).pow(5), torch.randn(200, 12).pow(5)
    certified, *_ = check_tiers(x, codebook)
    assert certified > 50


def test_rows_beyond_what_fp16_can_hold_next_to_their_codes():
    x = torch.randn(60, 4) * 10.0 ** torch.arange(60)[:, None].sub(30).float()
    check(x, torch.randn(90, 4))
    check(x, torch.randn(90, 4), metric="cosine")


def test_most_rows_are_certified():
    certified, _, scanned, _ = check_tiers(torch.randn(128, 64), torch.randn(1024, 64))
    assert certified > 110 and scanned == 0


@pytest.fixture
def shared_scan(monkeypatch):
    """More programs than blocks of rows to scan, so that they share the codes of a row."""
    monkeypatch.setattr(finish, "queue_programs", lambda device: 21)
    monkeypatch.setattr(blocks, "INTERPRETED", blocks.INTERPRETED._replace(scan=(4, 16)))


@pytest.mark.parametrize("metric", COSINE_SLOW)
@pytest.mark.parametrize("N, K, D", [(1, 1, 1), (3, 60, 5), (13, 61, 9), (37, 90, 3), (90, 9, 4)])
def test_programs_share_the_codes_of_a_row(shared_scan, N, K, D, metric):
    x, codebook = torch.randn(N, D).double(), torch.randn(K, D)
    codebook[K // 2 :] = codebook[: K - K // 2].clone()  # ties between parts
    if K > 8:
        codebook[3], x[N // 2, 0] = math.nan, math.inf
    check_tiers(x, codebook, metric)


@pytest.mark.parametrize("metric", COSINE_SLOW)
def test_programs_share_the_codes_of_masked_rows_of_heads(shared_scan, metric):
    x, codebook, mask = torch.randn(2, 3, 6).double(), torch.randn(2, 50, 6), torch.rand(2, 3) > 0.4
    check(x, codebook, mask, metric)
    found = vqops.nearest_topk(x, codebook, 20, mask, metric, implementation="triton")
    expected = vqops.nearest_topk(x, codebook, 20, mask, metric, implementation="compiled")
    INDICES.same(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)


@triton.jit
def nothing(*_):
    pass


@pytest.mark.parametrize("heads", [1, 2])
def test_programs_share_the_codes_of_queued_rows(shared_scan, heads, monkeypatch):
    codebook = torch.randn(heads, 1, 8) + 2.0**-20 * torch.randn(heads, 100, 8)
    x = torch.cat([torch.randn(heads, 30, 8) + 5e3 * torch.randn(8), codebook[:, :40] + 2], 1)
    check(x[:, :4], codebook)
    check(x, codebook)
    monkeypatch.setattr(scan, "merge_parts", nothing)
    with pytest.raises(AssertionError):  # it is what writes them
        check(x[:, :4], codebook)


@pytest.fixture
def screened_in_parts(monkeypatch):
    """A few tiles of the codes a part; the last parts are empty."""

    def parts(blocks, tiles, device):
        assert blocks <= finish.queue_programs(device)  # each has a counter
        return min(tiles + 1, 7)

    monkeypatch.setattr(screen, "screen_parts", parts)


@pytest.mark.parametrize("metric", COSINE_SLOW)
@pytest.mark.parametrize("N, K, D", [(1, 1, 1), (130, 200, 5), (20, 700, 12), (33, 200, 300)])
def test_parts_of_the_codes(screened_in_parts, N, K, D, metric):
    check_tiers(torch.randn(N, D) + 3, torch.randn(K, D) + 3, metric)
    check_tiers(torch.randn(N, D).pow(5), torch.randn(K, D).pow(5), metric)


@pytest.mark.parametrize("metric", COSINE_SLOW)
def test_parts_with_heads_masks_ties_and_no_numbers(screened_in_parts, metric):
    x, codebook, mask = torch.randn(2, 60, 7), torch.randn(2, 300, 7), torch.rand(2, 60) > 0.3
    codebook[0, 150:] = codebook[0, :150].flip(0)
    codebook[1, 64:256] = math.nan
    codebook[1, 290] *= 1e15
    x[0, 3], x[0, 4, 0], x[1, 2, 1] = 0, math.nan, math.inf
    check(x, codebook, mask, metric)
    check(x, codebook, metric=metric)
    check(x, torch.full_like(codebook, math.nan), metric=metric)


@pytest.mark.slow
def test_parts_leave_no_more_open(screened_in_parts):
    x, codebook = torch.randn(128, 64), torch.randn(1024, 64)
    certified, _, scanned, _ = check_tiers(x, codebook)
    assert certified > 110 and scanned == 0
    lattice = torch.cartesian_prod(*[torch.arange(3.0)] * 5)  # 2 to 32 codes are as near, in several parts
    half = torch.randint(0, 4, (100, 5)) / 2
    _, decided, scanned, _ = check_tiers(half, lattice)
    assert decided > 60 and scanned > 0
    near = torch.randn(1, 8) + 2.0**-20 * torch.randn(300, 8)
    assert check_tiers(torch.randn(40, 8) * 100, near)[2] > 10


@pytest.mark.parametrize("blocks_of_rows, tiles, parts", [(1, 100, 3), (2, 100, 1), (1, 11, 2), (1, 3, 1), (9, 100, 1)])
def test_few_rows_are_screened_in_parts(blocks_of_rows, tiles, parts):
    assert blocks.screen_parts(blocks_of_rows, tiles, torch.device("cpu")) == parts  # as for three processors


def test_long_rows():
    check(torch.randn(4, 2048) + 1, torch.randn(60, 2048) + 1)


@pytest.mark.slow
def test_rows_more_than_2_31_elements_apart():
    distance = 2**31 + 64
    memory = torch.empty(distance + 64, dtype=torch.float16)  # 4 GB of addresses, of which two pages are touched
    x = memory.as_strided((2, 64), (distance, 1))
    x.copy_(torch.randn(2, 64))
    check(x, torch.randn(40, 64))


def test_prepared_codebook():
    codebook, x = torch.randn(3, 50, 20), torch.randn(3, 70, 20)
    for metric in METRICS:
        prepared = vqops.prepare(codebook, metric, implementation="triton")
        assert prepared.packed.numel() == layout.packed_bytes(3, 50, 20)
        found = vqops.nearest(x, prepared, metric=metric, implementation="triton")
        INDICES.same(found, vqops.nearest(x, codebook, metric=metric))
    codebook.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        vqops.nearest(x, prepared, metric="cosine", implementation="triton")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("D", [5, 300])
def test_bounds_of_a_prepared_codebook(D, metric):
    codebook = torch.randn(1, 60, D) * torch.logspace(-6, 6, 60)[:, None] + 2
    codebook[0, 9], codebook[0, 20] = codebook[0, 4], math.nan
    memory = vqops.prepare(codebook, metric, implementation="triton").packed
    width, padded = layout.padded_dimensions(D), layout.padded_codes(60)
    words = layout.HEADER + max(width, layout.HEADER)
    header, centre = memory.view(torch.int32)[: layout.HEADER], memory.view(torch.float32)[layout.HEADER : words][:D]
    bounds = memory.view(torch.float32)[words:][: 4 * padded].view(-1, 4, layout.TILE).transpose(0, 1).reshape(4, -1)
    start, radius, unit, start_topk = bounds[:, :60]
    codes = memory.view(torch.float16)[2 * (words + 4 * padded) :].view(padded, width)[:60, :D]
    exact = codebook[0].double()
    if metric == "cosine":
        exact = exact / exact.norm(dim=-1, keepdim=True)
    exact = (exact - centre.double()) * 2.0 ** header[1].item()
    stored = codes.double() * -unit[:, None].double()
    radius, worst = radius.double(), header[2].view(torch.float32).double()
    there = exact.isfinite().all(-1) & (torch.arange(60) != 9)
    INDICES.same(start == 2.0**70, ~there)  # the repeat, too
    assert start_topk[9] == start_topk[4] and start_topk[20] == 2.0**70
    assert (exact.norm(dim=-1) <= radius)[there].all() and (stored.norm(dim=-1) <= radius)[there].all()
    assert ((exact - stored).norm(dim=-1) <= worst * radius)[there].all()
    assert 2.0**-14 < worst < 2.0**-11
    half = exact.square().sum(-1) / 2 if metric == "euclidean" else torch.zeros(60)
    assert (start <= half)[there].all()
    assert header[0] == 0 and header[3].view(torch.float32) == radius[there].min()


def scale_of(codebook):
    packed = vqops.prepare(codebook, implementation="triton").packed
    return packed.view(torch.int32)[1].item()


@pytest.mark.parametrize("K", [2, 3, 20, 500])
def test_the_scale_is_of_what_codes_are_typically_apart(K):
    codebook = torch.randn(K, 64) + 100
    assert scale_of(codebook) in (-2, -3, -4)  # 8 from their centre
    assert scale_of(codebook * 2.0**-20) == scale_of(codebook) + 20
    if K > 3:
        huge = codebook.clone()
        huge[0], huge[K // 2, 3] = huge[0] * 1e30, math.nan
        assert abs(scale_of(huge) - scale_of(codebook)) <= 1
    assert scale_of(codebook[:1]) == scale_of(torch.ones(K, 64)) == 0


def test_blocks_without_a_row_to_screen_compute_no_products(monkeypatch):
    x, codebook = torch.randn(300, 5), torch.randn(90, 5)
    mask = torch.arange(300) >= 256
    x[256:] = math.nan
    check(x, codebook, mask)
    monkeypatch.setattr(screen, "tile_bounds", nothing)
    check(x, codebook, mask)
    with pytest.raises(interpreter.InterpreterError):
        check(x, codebook)


def truncated_dot(group):
    """A matrix product as a pessimistic tensor core adds: in groups, each term cut 24 bits below the largest."""

    def cut(values, exponent):
        unit = np.ldexp(1.0, exponent - 24)
        return np.trunc(values / unit) * unit

    def dot(a, b, accumulator):
        total = accumulator.astype(np.float64)
        for start in range(0, a.shape[1], group):
            terms = a[:, None, start : start + group].astype(np.float64) * b[start : start + group].T[None].astype(
                np.float64
            )
            terms = np.concatenate([terms, total[..., None]], -1)
            exponent = np.frexp(np.abs(terms).max(-1))[1]
            total = cut(terms, exponent[..., None]).sum(-1)
            total = cut(total, np.frexp(np.abs(total))[1])
        return total

    return dot


@pytest.mark.parametrize("group", [4, 8, 16])
def test_bound_of_a_truncating_sum(group):
    D = 2048
    a = 1 + np.random.default_rng(0).random((4, D)) * 2.0**-3  # same sign: every cut goes the same way
    b = (1 + np.random.default_rng(1).random((D, 8)) * 2.0**-3).astype(np.float16)
    a = a.astype(np.float16)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = np.abs(truncated_dot(group)(a, b, np.zeros((4, 8))) - exact)
    norms = np.linalg.norm(a.astype(np.float64), axis=1)[:, None] * np.linalg.norm(b.astype(np.float64), axis=0)
    accumulation = bound.accumulation(D) - bound.PRODUCT
    assert (error <= accumulation * norms).all()
    assert (error > 20 * 2.0**-24 * norms).all()  # far more than rounding to nearest would lose


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("D", [64, 320])
def test_search_on_a_truncating_tensor_core(D, parts, monkeypatch):
    monkeypatch.setattr(screen, "screen_parts", lambda blocks, tiles, device: parts)
    model = truncated_dot(4)

    def create_dot(self, a, b, d, *_):
        return interpreter.TensorHandle(model(a.data, b.data, d.data).astype(np.float32), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    mean = 20 * torch.rand(D)
    x, codebook = torch.rand(16, D), torch.rand(40, D)
    check(x + mean, codebook + mean)
    check(x, codebook, metric="cosine")
