"""code_sums and ema_update_: every implementation, by hand and against float64."""

import pytest
import torch
from promises import ORDER, REPEATS, UNCHANGED
from torch.testing import assert_close

import vqops
from vqops import reference
from vqops.check.inputs import INF, NAN

TABLE = [
    {
        "x": [[1, 2], [3, 4], [5, 6]],
        "indices": [1, 0, 1],
        "K": 3,
        "counts": [1, 2, 0],
        "sums": [[3, 4], [6, 8], [0, 0]],
    },
    {"x": [[1, 2], [NAN, 4]], "indices": [0, -1], "K": 2, "counts": [1, 0], "sums": [[1, 2], [0, 0]]},
    {"x": [[1, 2], [3, 4]], "indices": [0, 0], "K": 1, "weight": [2, 0.5], "counts": [2.5], "sums": [[3.5, 6]]},
    {"x": [[1], [INF]], "indices": [1, 0], "K": 2, "counts": [1, 1], "sums": [[INF], [1]]},
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: str(row["counts"]))
def test_sums_by_hand(implementation, row):
    weight = torch.tensor(row["weight"]) if "weight" in row else None
    x = torch.tensor(row["x"], dtype=torch.float32)
    counts, sums = implementation.code_sums(x, torch.tensor(row["indices"]), row["K"], weight)
    assert counts.tolist() == row["counts"] and sums.tolist() == row["sums"]
    assert counts.dtype == (torch.int64 if weight is None else torch.float32) and sums.dtype == torch.float32


def float64_sums(x, indices, K, weight):
    one_hot = (indices[..., None] == torch.arange(K)).double()
    one_hot = one_hot if weight is None else one_hot * weight[..., None].double()
    return one_hot.sum(1), one_hot.mT @ x.double().masked_fill((indices < 0)[..., None], 0)


SIZES = {
    "plain": (1, 200, 7, 5),
    "heads": (3, 90, 11, 8),
    "no_rows": (2, 0, 4, 3),
    "one_code": (1, 1000, 1, 3),  # four runs of 256
    "one_dimension": (1, 300, 5, 1),
    "more_codes_than_rows": (1, 10, 500, 6),
    "long_runs": (1, 2100, 3, 17),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sums(kernel, size, dtype, weighted):
    H, N, K, D = SIZES[size]
    x, indices = torch.randn(H, N, D).to(dtype), torch.randint(-1, K, (H, N))
    weight = torch.rand(H, N) if weighted else None
    counts, sums = kernel.code_sums(x, indices, K, weight, heads=True)
    expected = reference.code_sums(x, indices, K, weight)
    ORDER.same((counts.cpu(), sums.cpu()), expected)
    exact_counts, exact_sums = float64_sums(x, indices, K, weight)
    assert_close(counts.cpu().double(), exact_counts, rtol=1e-6, atol=1e-6)
    magnitude = float64_sums(x.abs(), indices, K, weight)[1]
    assert ((sums.cpu().double() - exact_sums).abs() <= 300 * 2.0**-24 * magnitude).all()


def test_a_hot_code_among_many(kernel):
    x, indices = torch.randn(5000, 9), torch.zeros(5000, dtype=torch.int64)
    indices[::7] = torch.randint(300, indices[::7].shape)
    counts, sums = kernel.code_sums(x, indices, 300)
    expected_counts, expected_sums = reference.code_sums(x[None], indices[None], 300, None)
    ORDER.same((counts.cpu(), sums.cpu()), (expected_counts[0], expected_sums[0]))


def test_sums_take_any_strides(kernel):
    x, indices = torch.randn(6, 400).mT[::2], torch.randint(-1, 20, (400,))[::2]
    counts, sums = kernel.code_sums(x, indices, 20)
    same = kernel.code_sums(x.contiguous(), indices.contiguous(), 20)
    ORDER.same((counts, sums), same)


def test_sums_do_not_depend_on_threads():
    x, indices = torch.randn(3000, 10), torch.randint(100, (3000,))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            results.append(vqops.code_sums(x, indices, 100)[1])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        ORDER.same(other, results[0])


# EMA


def state(H, K, D):
    return torch.rand(H, K) * 5, torch.randn(H, K, D), torch.randn(H, K, D)


def on(kernel, *tensors):
    return [t.to(kernel.device, copy=True) for t in tensors]


def test_ema_by_hand(implementation):
    size, average, embed = on(
        implementation, torch.tensor([[1.0, 1]]), torch.tensor([[[0.0], [4]]]), torch.zeros(1, 2, 1)
    )
    implementation.ema_update_(size, average, embed, torch.tensor([[2, 1]]), torch.tensor([[[1.0], [3]]]), 0.5, 0.25)
    assert size.tolist() == [[1.5, 1.0]] and average.tolist() == [[[0.5], [3.5]]]
    smoothed = [(1.5 + 0.25) / (2.5 + 0.5) * 2.5, (1 + 0.25) / (2.5 + 0.5) * 2.5]
    assert_close(embed.cpu(), torch.tensor([[[0.5 / smoothed[0]], [3.5 / smoothed[1]]]]))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("options", [{}, {"weight": True}, {"embed": False}, {"decay": 1.0}, {"decay": 0.0}], ids=str)
@pytest.mark.parametrize("H, K, D", [(1, 7, 5), (3, 33, 8), (1, 1, 1), (2, 300, 3)])
def test_ema(implementation, H, K, D, options, metric):
    size, average, embed = state(H, K, D)
    counts, sums = torch.randint(0, 9, (H, K)), torch.randn(H, K, D)
    weight = torch.rand(H, K) if options.get("weight") else None
    decay = options.get("decay", 0.8)
    new_size, new_average, new_embed = on(implementation, size, average, embed)
    given = new_embed if options.get("embed", True) else None
    implementation.ema_update_(new_size, new_average, given, counts, sums, decay, 1e-5, weight, metric)

    step = (1 - decay) * (torch.ones(H, K) if weight is None else weight).double()
    exact_size = size.double() + step * (counts - size.double())
    exact_average = average.double() + step[..., None] * (sums.double() - average.double())
    assert_close(new_size.cpu(), exact_size.float(), rtol=1e-6, atol=1e-7)
    assert_close(new_average.cpu(), exact_average.float(), rtol=1e-5, atol=1e-6)
    if given is None:
        UNCHANGED.same(new_embed.cpu(), embed)
        return
    total = exact_size.sum(-1, keepdim=True)
    codes = exact_average / ((exact_size + 1e-5) / (total + K * 1e-5) * total)[..., None]
    codes = torch.nn.functional.normalize(codes, dim=-1, eps=1e-6) if metric == "cosine" else codes
    filled = (exact_size > 1e-3)[..., None].expand_as(codes)  # decay=0 and no row: a ratio of roundings
    assert_close(new_embed.cpu()[filled], codes.float()[filled], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_ema_of_buffers_of_any_strides(implementation, metric):
    """Such as [D, K], and columns of a wider array; what lies between them stays."""
    size, average, embed = on(implementation, *state(2, 6, 4))
    counts, sums = torch.rand(2, 6), torch.randn(2, 6, 4)
    wide = torch.full((2, 6, 10), 7.0, device=implementation.device)
    strided = (
        size.t().contiguous().t(),
        average.transpose(1, 2).contiguous().transpose(1, 2),
        wide[..., 1:9:2].copy_(embed),
    )
    assert not any(t.is_contiguous() for t in strided)
    implementation.ema_update_(*strided, counts, sums, 0.9, metric=metric)
    implementation.ema_update_(size, average, embed, counts, sums, 0.9, metric=metric)
    REPEATS.same(strided, (size, average, embed))
    assert (wide[..., ::2] == 7).all() and (wide[..., 9] == 7).all()


def test_a_weight_may_be_bool_and_one_per_head(implementation):
    """As quantizers give it, so that heads without a row stay."""
    size, average, embed = on(implementation, *state(2, 6, 4))
    counts, sums, moves = torch.rand(2, 6), torch.randn(2, 6, 4), torch.tensor([[True], [False]])
    results = []
    for weight in (moves.expand(2, 6), moves.expand(2, 6).float()):
        buffers = [t.clone() for t in (size, average, embed)]
        implementation.ema_update_(*buffers, counts, sums, 0.9, weight=weight)
        results.append(buffers)
    REPEATS.same(*results)
    UNCHANGED.same(results[0][0][1], size[1])
    assert not torch.isclose(results[0][0][0], size[0]).any()


def test_weighted_counts_and_a_decay_on_the_device(implementation):
    size, average, embed = on(implementation, *state(1, 6, 4))
    counts, sums = torch.rand(1, 6), torch.randn(1, 6, 4)
    same = [t.clone() for t in (size, average, embed)]
    implementation.ema_update_(size, average, embed, counts, sums, torch.tensor(0.9))
    implementation.ema_update_(*same, counts, sums, 0.9)
    REPEATS.same((size, average, embed), same)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_nothing_poisons_the_codebook(implementation, bad, metric):
    before = state(1, 6, 4)
    size, average, embed = on(implementation, *before)
    counts, sums = torch.ones(1, 6), torch.randn(1, 6, 4)
    sums[0, 1, 2], counts[0, 3] = bad, bad
    implementation.ema_update_(size, average, embed, counts, sums, 0.5, metric=metric)
    for new, old in zip((size, average), before, strict=False):
        assert new.isfinite().all()
        UNCHANGED.same(new[0, [1, 3]].cpu(), old[0, [1, 3]])
        assert (new[0, 0].cpu() != old[0, 0]).any()
    assert embed.isfinite().all()


def test_what_is_not_taken_is_not_in_the_total(implementation):
    """Codes are those of the sizes that stand in the end. Here none, so that all of them stay."""
    size, average, embed = on(implementation, torch.zeros(1, 4), torch.zeros(1, 4, 9), torch.randn(1, 4, 9))
    before = embed.clone()
    counts, sums = torch.tensor([[0.0, 5, 0, 0]]), torch.randn(1, 4, 9)
    sums[0, 1, 7] = NAN
    implementation.ema_update_(size, average, embed, counts, sums, 0.5, 0.0)
    assert (size == 0).all()
    UNCHANGED.same(average[0, 1].cpu(), torch.zeros(9))
    UNCHANGED.same(embed, before)


def test_an_empty_codebook_keeps_its_codes(implementation):
    """All sizes 0 and nothing counted: 0 / 0 for every code."""
    embed = torch.randn(1, 3, 2, device=implementation.device)
    before = embed.clone()
    size, average = on(implementation, torch.zeros(1, 3), torch.zeros(1, 3, 2))
    implementation.ema_update_(size, average, embed, torch.zeros(1, 3), torch.zeros(1, 3, 2), 0.9, 0.0)
    UNCHANGED.same(embed, before)
