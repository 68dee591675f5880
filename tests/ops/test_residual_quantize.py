"""residual_quantize: by hand, against the loop over quantize, and its gradients by hand."""

import pytest
import torch
from implementations import Implementation
from levels import DTYPES, WAYS, is_interpreted, on_cpu, rows, rows_and_codes
from memory import LargestTemporaries
from promises import COPIES, INDICES, ORDER, REPEATS
from torch.testing import assert_close

import vqops
from vqops import pytorch, reference
from vqops.check.inputs import INF, NAN, SEARCHES


def test_by_hand(implementation):
    x = torch.tensor([[5.0, 0], [0, 1], [-3, 0], [NAN, 0]])
    codebooks = [torch.tensor([[4.0, 0], [-4, 0]]), torch.tensor([[0.0, 0], [1, 0], [0, 1]])]
    mask = torch.tensor([True, False, True, True])
    found = implementation.residual_quantize(x, codebooks, mask, code_sums=True)
    assert found.indices.tolist() == [[0, 1], [-1, -1], [1, 1], [-1, -1]]
    assert found.quantized[:3].tolist() == [[5, 0], [0, 0], [-3, 0]] and found.quantized[3].isnan().all()
    assert found.error.isnan().all()
    assert [t.tolist() for t in found.counts] == [[1, 1], [0, 2, 0]]
    assert [t.tolist() for t in found.sums] == [[[5, 0], [-3, 0]], [[0, 0], [2, 0], [0, 0]]]
    finite = implementation.residual_quantize(x[:3], codebooks, mask[:3])
    assert finite.error.tolist() == [2, 0] and finite.counts == finite.sums == []


def test_levels_by_hand(implementation):
    x, codebooks = torch.tensor([[5.0], [-6]]), torch.tensor([[[4.0], [-4]], [[1.0], [-2]]])
    for given in (1, torch.tensor(1)):
        found = implementation.residual_quantize(x, codebooks, levels=given, code_sums=True)
        assert found.indices.tolist() == [[0, -1], [1, -1]] and found.quantized.tolist() == [[4], [-4]]
        assert found.error.tolist() == [1 + 4, 0]
        assert [t.tolist() for t in found.counts] == [[1, 1], [0, 0]] and not found.sums[1].any()


def test_gradients_by_hand(implementation):
    x = torch.tensor([[5.0], [-6]], requires_grad=True)
    codebooks = [torch.tensor([[4.0], [-4]], requires_grad=True), torch.tensor([[0.0], [-1]], requires_grad=True)]
    found = implementation.residual_quantize(x, codebooks, codebook_error_scale=0.5)
    assert found.quantized.tolist() == [[4], [-5]]
    g, e = torch.tensor([[10.0], [20]]), torch.tensor([1.0, 100])
    torch.autograd.backward([found.quantized, found.error], [implementation.put(g), implementation.put(e)])
    # r_0 - c_0 = 1, -2;  r_1 - c_1 = 1, -1
    assert x.grad.tolist() == [[20 + 2 + 200], [40 - 4 - 200]]
    assert [c.grad.tolist() for c in codebooks] == [[[-1], [2]], [[-100], [100]]]


def test_a_residual_that_overflows(implementation):
    """The code of a level stands; from the next on the row has none."""
    largest = torch.finfo(torch.float32).max
    x, codebooks = torch.tensor([[largest], [1.0], [INF]]), torch.tensor([[[-largest / 2], [NAN]], [[1.0], [2.0]]])
    found = implementation.residual_quantize(x, codebooks, code_sums=True)
    assert found.indices.tolist() == [[0, -1], [0, 0], [-1, -1]]
    assert found.quantized[0].isnan() and found.quantized[2].isnan() and found.error.isnan().all()
    assert [t.tolist() for t in found.counts] == [[2, 0], [1, 0]]


def loop(implementation, x, codebooks, mask=None, metric="euclidean", normalize=True):
    """The levels one by one: quantized, indices [..., Q], error [Q] in float64, counts and sums by level."""
    real = torch.promote_types(x.dtype, torch.float32)
    rest, total, results = x.to(real), torch.zeros(x.shape, dtype=real, device=implementation.device), []
    rest = implementation.put(rest)
    for codebook in codebooks:
        found = implementation.quantize(rest, codebook, mask, None, metric, code_sums=True, normalize=normalize)
        total = total + found.quantized
        rest = rest - found.quantized
        results.append((found.indices, found.error.double().sum(-1), found.counts, found.sums))
    indices, errors, counts, sums = zip(*results, strict=True)
    return total.to(x.dtype), torch.stack(indices, -1), torch.stack(errors, -1), [*counts], [*sums]


@pytest.mark.parametrize("metric, normalize", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_levels_one_by_one(implementation, dtype, metric, normalize):
    for heads, sizes in (((), (9, 5, 17)), ((2,), (3, 1, 40))):
        x = torch.randn(*heads, rows(implementation, 600), 6).to(dtype)
        codebooks = [torch.randn(*heads, K, 6) / 2**level for level, K in enumerate(sizes)]
        mask = torch.rand(x.shape[:-1]) > 0.3
        for kept in (None, mask):
            how = {"metric": metric, "normalize": normalize}
            found = implementation.residual_quantize(x, codebooks, kept, code_sums=True, **how)
            quantized, indices, error, counts, sums = loop(implementation, x, codebooks, kept, **how)
            INDICES.same(found.indices, indices)
            INDICES.same(found.counts, counts)
            COPIES.same(found.quantized, quantized)
            assert_close(found.error, error.to(found.error.dtype))
            ORDER.same(found.sums, sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("N", [1, 40, 300])
def test_preparations_take_the_place_of_the_codebooks(implementation, N, dtype):
    x, codebooks = torch.randn(N, 64, dtype=dtype), [torch.randn(K, 64) for K in (9, 5)]
    prepared = [implementation.prepare(codebook) for codebook in codebooks]
    found = implementation.residual_quantize(x, prepared)
    ORDER.same(found, implementation.residual_quantize(x, codebooks))
    with pytest.raises(TypeError, match="residual_quantize: all codebooks must be prepared or none, got 1 of 2"):
        vqops.residual_quantize(x, [prepared[0], codebooks[1]], implementation=implementation.name)


def test_levels_that_share_a_codebook(implementation):
    """Whichever of them are one tensor: as if each had its own."""
    x, c, d = torch.randn(rows(implementation, 300), 20), torch.randn(9, 20), torch.randn(9, 20)
    shared = implementation.residual_quantize(x, [c, c, d, c, c[:4]], code_sums=True)
    ORDER.same(shared, implementation.residual_quantize(x, [c, c.clone(), d, c.clone(), c[:4].clone()], code_sums=True))


@pytest.mark.parametrize("metric, normalize", WAYS)
@pytest.mark.parametrize("case", SEARCHES)
def test_forward(kernel, case, metric, normalize):
    """To the last bit, also of the errors' sums."""
    x, c = rows_and_codes(kernel, case)
    codebooks = [c, c.flip(1) / 2, c[:, : max(1, c.shape[1] // 3)] / 4, torch.zeros_like(c)]
    mask = torch.rand(x.shape[:2]) > 0.1
    for kept, levels in ((None, None), (mask, 3))[is_interpreted(kernel) :]:
        how = {"metric": metric, "normalize": normalize, "levels": levels, "code_sums": True}
        found = kernel.residual_quantize(x, codebooks, kept, **how)
        expected = vqops.residual_quantize(x, codebooks, kept, **how, implementation="reference")
        ORDER.same(on_cpu(found), on_cpu(expected), equal_nan=True)


@pytest.mark.parametrize("N", [0, 1, 96, 97, 255, 256, 257, 1500, 3000])
def test_errors_add_up_in_runs(kernel, N):
    """However rows are cut into blocks: the order is one."""
    x, codebooks = torch.randn(2, N, 3), [torch.randn(2, K, 3) for K in (20, 5)]
    found = kernel.residual_quantize(x, codebooks, code_sums=True)
    expected = vqops.residual_quantize(x, codebooks, code_sums=True, implementation="reference")
    ORDER.same(on_cpu(found), on_cpu(expected))


def test_the_sum_of_an_error_is_in_float64(implementation):
    """One far row, then many whose errors a float32 sum would lose."""
    x = torch.full((3000, 1), 1.0)
    x[0] = 2.0**14
    found = implementation.residual_quantize(x, [torch.zeros(1, 1)])
    assert found.error.item() == torch.tensor(2.0**28 + 2999).item()


@pytest.mark.parametrize("codebook_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_types(kernel, dtype, codebook_dtype):
    x, codebooks = torch.randn(2, 300, 6).to(dtype), [torch.randn(2, K, 6).to(codebook_dtype) for K in (9, 4)]
    found = kernel.residual_quantize(x, codebooks, code_sums=True)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    types = [dtype, torch.int64, real, torch.int64, torch.int64, torch.float32, torch.float32]
    assert [t.dtype for t in on_cpu(found)] == types
    expected = vqops.residual_quantize(x, codebooks, code_sums=True, implementation="reference")
    ORDER.same(on_cpu(found), on_cpu(expected))


def test_residuals_are_float32_whatever_x_is(implementation):
    """In bfloat16, 1.0078125 - 1.0 - 0.0078125 would not be 0 after a second code of 7 bits less."""
    x = torch.tensor([[1.0 + 2.0**-7]], dtype=torch.bfloat16)
    codebooks = [torch.tensor([[1.0 + 2.0**-20]]), torch.tensor([[2.0**-7], [2.0**-7 - 2.0**-20]])]
    found = implementation.residual_quantize(x, codebooks)
    assert found.indices.tolist() == [[0, 1]] and found.error[1] == 0
    assert_close(found.error[0].item(), (2.0**-7 - 2.0**-20) ** 2)


def test_codes_of_float64_are_taken_off_in_float64(implementation):
    x = torch.tensor([[1.0]])
    codebooks = [torch.tensor([[1.0 - 2.0**-40]], dtype=torch.float64)]
    codebooks.append(torch.tensor([[0.0], [2.0**-40]], dtype=torch.float64))
    assert implementation.residual_quantize(x, codebooks).indices.tolist() == [[0, 1]]


@pytest.mark.parametrize("N", [20, 700])
def test_rows_and_codes_of_any_strides(implementation, N):
    N = rows(implementation, N)
    x = torch.randn(3, 6, 2 * N)[..., ::2].mT
    codebooks = [torch.randn(6, 3, 10).permute(1, 2, 0), torch.randn(3, 8, 12)[:, ::2, ::2]]
    mask = (torch.rand(N, 3) > 0.3).mT
    found = implementation.residual_quantize(x, codebooks, mask, code_sums=True)
    plain = [t.contiguous() for t in (x, *codebooks, mask)]
    expected = implementation.residual_quantize(plain[0], plain[1:3], plain[3], code_sums=True)
    ORDER.same(on_cpu(found), on_cpu(expected))


@pytest.mark.parametrize("N", [30, 300])
def test_rows_in_any_axes(implementation, N):
    x, codebooks = torch.randn(2, N, 3, 5), torch.randn(4, 7, 5)
    mask = torch.rand(2, N, 3) > 0.5
    found = implementation.residual_quantize(x, codebooks, mask)
    assert found.quantized.shape == x.shape and found.indices.shape == (2, N, 3, 4) and found.error.shape == (4,)
    flat = implementation.residual_quantize(x.view(-1, 5), list(codebooks), mask.view(-1))
    ORDER.same([found.quantized.view(-1, 5), found.indices.view(-1, 4), found.error], list(flat[:3]))


@pytest.mark.parametrize("N", [50, 600])
@pytest.mark.parametrize("levels", range(5))
def test_levels_that_run(implementation, N, levels):
    """The first ones alone give the same codes, and nothing of the others is there. A tensor may name more."""
    x, codebooks = torch.randn(N, 4), [torch.randn(6, 4) / 2**level for level in range(4)]
    given = torch.tensor(levels if levels < 4 else 9, device=implementation.device)
    found = implementation.residual_quantize(x, codebooks, levels=given, code_sums=True)
    INDICES.same(found.indices[:, levels:], torch.full_like(found.indices[:, levels:], -1))
    assert not found.error[levels:].any()
    assert not any(t.any() for t in [*found.counts[levels:], *found.sums[levels:]])
    if levels == 0:
        assert not found.quantized.any()
    else:
        first = implementation.residual_quantize(x, codebooks[:levels], code_sums=True)
        COPIES.same(found.quantized, first.quantized)
        INDICES.same(found.indices[:, :levels], first.indices)
        ORDER.same([found.error[:levels], *found.sums[:levels]], [first.error, *first.sums])


def test_many_levels(implementation):
    x = torch.randn(rows(implementation, 400), 3)
    codebooks = torch.randn(64, 4, 3) / 2 ** torch.arange(64.0)[:, None, None].clamp_max(20)
    found = implementation.residual_quantize(x, codebooks)
    INDICES.same(found.indices.cpu(), loop(Implementation("reference", "cpu"), x, codebooks)[1])
    with pytest.raises(ValueError, match="codebooks must have from 1 to 64 levels, got 65"):
        implementation.residual_quantize(x, torch.zeros(65, 4, 3))


@pytest.mark.parametrize("N", [60, 400])
def test_a_row_that_is_lost_at_a_level(implementation, N):
    """At the second level no code is finite: rows stay in the statistics of the first."""
    x, codebooks = torch.randn(N, 3), [torch.randn(5, 3), torch.full((2, 3), NAN), torch.randn(5, 3)]
    mask = torch.arange(N) != 1
    found = implementation.residual_quantize(x, codebooks, mask, code_sums=True)
    assert (found.indices[mask, 0] >= 0).all() and (found.indices[:, 1:] == -1).all()
    assert found.quantized[mask].isnan().all() and not found.quantized[~mask].any()
    assert found.error[0].isfinite() and found.error[1:].isnan().all()
    assert [int(t.sum()) for t in found.counts] == [N - 1, 0, 0]


@pytest.mark.parametrize("N", [40, 300, 5000])
def test_the_same_from_any_number_of_threads(N):
    x, codebooks = torch.randn(2, N, 7), [torch.randn(2, K, 7) for K in (40, 9, 40)]
    leaves, threads, results = [x, *codebooks], torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            given = [t.clone().requires_grad_() for t in leaves]
            found = vqops.residual_quantize(given[0], given[1:], gradient="rotation", codebook_error_scale=1.0)
            gradients = torch.autograd.grad(found.quantized.square().sum() + found.error.sum(), given)
            results.append([*on_cpu(found), *gradients])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        ORDER.same(result, results[0])


def test_without_gradients_nothing_is_kept():
    """No copy of the codebooks, and the same results."""
    x, codebooks = torch.randn(1, 300, 4), [torch.randn(1, 9, 4), torch.randn(1, 5, 4)]
    options = None, None, "euclidean", "none", True, False, 0.0, True, False
    found = torch.ops.vqops.residual_quantize(x, codebooks, *options)
    assert found[5].shape == (0,)
    REPEATS.same(found[:3], torch.ops.vqops.residual_quantize(x, codebooks)[:3])
    with pytest.raises(RuntimeError, match="residual_quantize: a gradient is needed, so call it with snapshot=True"):
        torch.ops.vqops.residual_quantize(x.requires_grad_(), codebooks, *options)


@pytest.mark.parametrize("module", [reference, pytorch], ids=["reference", "pytorch"])
def test_memory_does_not_grow_with_levels(module):
    """But for the indices, and an error a level."""
    N, D, K = 4000, 16, 500
    x, codebooks = torch.randn(1, N, D), torch.randn(8, 1, K, D)
    most = []
    for levels in (2, 8):
        with LargestTemporaries() as memory:
            module.residual_quantize(x, list(codebooks[:levels]), snapshot=False)
        most.append(memory.most)
    assert N * D * 4 < most[0] <= 64 * 2**20
    assert most[1] - most[0] <= 6 * (8 * N + 4)
