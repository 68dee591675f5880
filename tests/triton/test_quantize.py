"""quantize and its gradient, code_sums and ema_update_ of Triton in the interpreter, against the reference."""

import math

import pytest
import torch
from promises import COPIES, INDICES, ORDER, UNCHANGED, WHOLE

pytest.importorskip("triton")

import vqops
from vqops.triton_kernels import interpreted

if not interpreted():
    pytest.skip("TRITON_INTERPRET is off", allow_module_level=True)

from triton.runtime import interpreter

from vqops.triton_kernels import blocks
from vqops.triton_kernels import code_sums as kernels
from vqops.triton_kernels import quantize as quantizing

METRICS = ("euclidean", "cosine")
WAYS = (("euclidean", True), ("cosine", True), ("cosine", False))  # the metric, and normalize


def both(op, *arguments, **named):
    return (op(*arguments, implementation=each, **named) for each in ("triton", "reference"))


def awkward(H, N, K, D):
    x, codebook = torch.randn(H, N, D), torch.randn(H, K, D)
    x[0, 1, 0], x[0, 2], codebook[0, 1, 0] = math.nan, 0, math.inf
    return x, codebook


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("H, N, K, D", [(1, 900, 3, 5), (2, 200, 40, 70), (1, 300, 1, 300), (1, 1, 7, 1)])
def test_sums_in_order(H, N, K, D, weighted):
    x, indices = torch.randn(N, H, D).transpose(0, 1), torch.randint(-1, K, (H, N))
    x[:, 0] = math.nan  # not read, since
    indices[:, 0] = -1
    weight = torch.rand(H, N) if weighted else None
    ORDER.same(*both(vqops.code_sums, x, indices, K, weight, heads=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_of_other_dtypes(dtype):
    x, indices = torch.randn(300, 12).to(dtype), torch.randint(0, 9, (300,))
    ORDER.same(*both(vqops.code_sums, x, indices, 9))


@pytest.mark.parametrize("K", [1, 30])
def test_atomic_sums(K):
    x, indices, weight = torch.randn(2, 700, 20), torch.randint(-1, K, (2, 700)), torch.rand(2, 700)
    one_hot = (indices[..., None] == torch.arange(K)).double()
    counts, sums = kernels.atomic(x, indices, K)
    INDICES.same(counts, one_hot.sum(1).long())
    error = (sums - one_hot.mT @ x.double()).abs()
    assert (error <= counts[..., None] * 2.0**-24 * (one_hot.mT @ x.double().abs())).all()
    weighted = one_hot * weight[..., None].double()
    mass, sums = kernels.atomic(x, indices, K, weight)
    assert ((mass - weighted.sum(1)).abs() <= counts * 2.0**-24 * weighted.sum(1)).all()
    error = (sums - weighted.mT @ x.double()).abs()
    assert (error <= (counts[..., None] + 1) * 2.0**-24 * (weighted.mT @ x.double().abs())).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("D", [1, 20, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["one code", "zipf", "uniform"])
def test_atomic_sums_of_hot_codes(monkeypatch, kind, D, weighted):
    """Whole numbers, which add up to the last bit in any order; and a program adds a code that fills its block once."""
    H, N, K = 2, 130, 12
    chances = {"one code": torch.eye(K)[7], "zipf": 1 / torch.arange(1, K + 1), "uniform": torch.ones(K)}[kind]
    indices = torch.multinomial(chances, H * N, replacement=True).view(H, N)
    indices[0, ::9] = -1
    x, weight = torch.randint(-9, 9, (H, N, D)).float(), torch.randint(0, 5, (H, N)).float()
    x[0, ::9] = math.nan  # not read
    added = []
    atomic_add = interpreter.InterpreterBuilder.create_atomic_rmw

    def noting(self, operation, pointer, value, mask, *rest):
        added.append(int(mask.data.sum()))
        return atomic_add(self, operation, pointer, value, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_atomic_rmw", noting)
    monkeypatch.setattr(kernels, "tile", lambda D, device: (32, 16))
    counts, sums = kernels.atomic(x, indices, K, weight if weighted else None)
    expected = vqops.code_sums(x, indices, K, weight if weighted else None, heads=True, implementation="reference")
    WHOLE.same((counts, sums), expected)
    if kind == "one code":  # 9 blocks, one with two rows of the first head beside those of the second
        assert sum(added) == 11 * (D + 1)
    if kind == "zipf":
        assert sum(added) < 0.8 * (indices >= 0).sum() * (D + 1)


def test_atomic_sums_without_a_code():
    x, indices = torch.ones(1, 40, 3), torch.full((1, 40), -1)
    counts, sums = kernels.atomic(x, indices, 5)
    assert not counts.any() and not sums.any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("weight", [None, torch.rand(2, 50), torch.tensor([[False], [True]]).expand(2, 50)])
def test_ema_update(metric, weight):
    H, K, D = 2, 50, 70
    state = [torch.rand(H, K) * 5, torch.randn(H, K, D), torch.randn(H, K, D)]
    counts, sums = torch.randint(0, 9, (H, K)), torch.randn(H, K, D)
    sums[0, 0, 3], sums[1, 4, 0] = math.inf, math.nan
    state[0][0, 7], state[1][0, 7] = 0, 0
    results = []
    for each in ("triton", "reference"):
        buffers = [t.clone() for t in state]
        vqops.ema_update_(*buffers, counts, sums, 0.9, weight=weight, metric=metric, implementation=each)
        vqops.ema_update_(*buffers[:2], None, counts, sums, torch.tensor(0.3), implementation=each)
        results.append(buffers)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)
    UNCHANGED.same(results[0][1][0, 0], state[1][0, 0])


@pytest.mark.parametrize("metric, normalize", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_quantize(dtype, metric, normalize):
    x, codebook = awkward(2, 80, 30, 20)
    x, mask, weight = x.to(dtype), torch.rand(2, 80) > 0.2, torch.rand(2, 80)
    for arguments in ((None, None), (mask, None), (mask, weight)):
        found, expected = both(vqops.quantize, x, codebook, *arguments, metric, code_sums=True, normalize=normalize)
        for name in found._fields:
            a, b = getattr(found, name), getattr(expected, name)
            if name in ("indices", "quantized", "counts"):
                INDICES.same(a, b, equal_nan=True)
            else:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("metric, normalize", WAYS)
@pytest.mark.parametrize("N, D, dtype", [(80, 20, torch.float32), (150, 3, torch.bfloat16), (12, 300, torch.float64)])
def test_quantize_adds_rows_as_it_gathers(monkeypatch, N, D, dtype, metric, normalize):
    """As on a GPU, where no order is asked for; a third of the rows has one code."""
    monkeypatch.setattr(quantizing, "in_order", lambda x: False)
    monkeypatch.setattr(blocks, "INTERPRETED", blocks.INTERPRETED._replace(gather=(1024, 32)))
    monkeypatch.setattr(quantizing, "sum_codes", None)
    x, codebook = awkward(2, N, 30, D)
    x[:, N // 3 : 2 * N // 3] = codebook[:, 2:3] * 0.9
    x, mask, weight = x.to(dtype), torch.rand(2, N) > 0.2, torch.rand(N, 2).T
    for arguments in ((None, None), (mask, weight)):
        found, expected = both(vqops.quantize, x, codebook, *arguments, metric, code_sums=True, normalize=normalize)
        for name in found._fields:
            a, b = getattr(found, name), getattr(expected, name)
            if name in ("indices", "quantized") or (name == "counts" and arguments[1] is None):
                INDICES.same(a, b, equal_nan=True)
            else:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_quantize_without_rows():
    found = vqops.quantize(torch.empty(0, 4), torch.randn(3, 4), code_sums=True, implementation="triton")
    assert found.quantized.shape == (0, 4) and found.counts.tolist() == [0, 0, 0] and not found.sums.any()


@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
@pytest.mark.parametrize("metric, normalize", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients(dtype, metric, normalize, gradient):
    H, N, K, D = 2, 60, 20, 9
    start, codes = awkward(H, N, K, D)
    start, codes, mask = start.to(dtype), codes.to(dtype), torch.rand(H, N) > 0.2
    g, e = torch.randn(H, N, D, dtype=dtype), torch.randn(H, N, dtype=dtype)
    results = []
    for each in ("triton", "reference"):
        x, codebook = start.clone().requires_grad_(), codes.clone().requires_grad_()
        out = vqops.quantize(x, codebook, mask, None, metric, gradient, False, 0.75, normalize, implementation=each)
        keep = out.quantized.isfinite().all(-1)
        loss = (out.quantized * g)[keep].sum() + (out.error * e)[keep].sum()
        codes_before = codebook.detach().clone()
        with torch.no_grad():
            codebook.add_(1)  # an update between forward and backward
        results.append(torch.autograd.grad(loss, (x, codebook)))
        assert codes_before.shape == codes.shape
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True, **close)
    assert results[0][1].any()


def test_gradient_of_one_output():
    x, codebook = torch.randn(30, 5, requires_grad=True), torch.randn(8, 5)
    out = vqops.quantize(x, codebook, implementation="triton")
    g = torch.randn(5).expand(30, 5)
    (found,) = torch.autograd.grad(out.quantized, x, g, retain_graph=True)
    COPIES.same(found, g)
    (found,) = torch.autograd.grad(out.error, x, torch.ones(()).expand(30))
    torch.testing.assert_close(found, 2 * (x - out.quantized).detach())


def test_gradient_op():
    arguments = torch.randn(1, 9, 3), torch.randn(1, 9), torch.randn(1, 9, 3), torch.randn(1, 4, 3)
    indices = torch.randint(-1, 4, (1, 9))
    for needed in ((True, True), (False, True), (True, False), (False, False)):
        found, expected = (
            op(*arguments, indices, None, "euclidean", "rotation", 0.5, True, *needed)
            for op in (torch.ops.vqops.quantize_backward_triton, torch.ops.vqops.quantize_backward_reference)
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)
