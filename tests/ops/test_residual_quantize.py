"""residual_quantize and its backward: by hand, against the loop over quantize, and against autograd in float64."""

import pytest
import torch
from promises import COPIES, INDICES, ORDER
from torch.testing import assert_close

import vqops
from vqops.check.inputs import INF, NAN
from vqops.dispatch import library


@pytest.fixture
def implementation(implementation):
    if not library.has("residual_quantize", implementation.name):
        pytest.skip(f"no kernel of {implementation.name}")
    return implementation


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


@pytest.mark.parametrize("metric, normalize", [("euclidean", True), ("cosine", True), ("cosine", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_levels_one_by_one(implementation, dtype, metric, normalize):
    for heads, sizes in (((), (9, 5, 17)), ((2,), (3, 1, 40))):
        x = torch.randn(*heads, 600, 6).to(dtype)
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


def test_preparations_take_the_place_of_the_codebooks(implementation):
    x, codebooks = torch.randn(300, 6), [torch.randn(K, 6) for K in (9, 5)]
    prepared = [implementation.prepare(codebook) for codebook in codebooks]
    found = implementation.residual_quantize(x, prepared)
    ORDER.same(found, implementation.residual_quantize(x, codebooks))
    with pytest.raises(TypeError, match="residual_quantize: all codebooks must be prepared or none, got 1 of 2"):
        vqops.residual_quantize(x, [prepared[0], codebooks[1]], implementation=implementation.name)
