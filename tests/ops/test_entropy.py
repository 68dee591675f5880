"""The entropy of mean assignments and its gradients, against plain PyTorch in float64 and vector-quantize-pytorch."""

import math

import pytest
import torch
from memory import LargestTemporaries
from soft_assignments import HARD, assert_no_worse_than_plain, hard_inputs, logits, with_gradients
from torch.testing import assert_close

import vqops
from vqops.reference import soft

METRICS = ("euclidean", "cosine")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-5, torch.bfloat16: 3e-2, torch.float16: 3e-2}


def plain(x, codebook, beta, mask=None, metric="euclidean"):  # [H, G, M, D], [H, K, D]
    p = (logits(x, codebook.unsqueeze(1), metric) * beta).softmax(-1)
    if mask is not None:
        p = p * mask.unsqueeze(-1)
    q = p.sum((0, 2)) / (x.shape[0] * x.shape[2] if mask is None else mask.sum((0, 2)).clamp_min(1).unsqueeze(-1))
    return -(q * q.clamp_min(1e-5).log()).sum(-1)


def test_by_hand():
    x, c = torch.tensor([[[1.0], [3.0]]], requires_grad=True), torch.tensor([[1.0], [3.0]], requires_grad=True)
    entropy = vqops.assignment_entropy(x, c, 100.0)
    assert_close(entropy, torch.tensor([math.log(2)]))
    assert_close(vqops.assignment_entropy(x, c, 100.0, torch.tensor([[True, False]])), torch.zeros(1))
    assert_close(vqops.assignment_entropy(torch.tensor([[[2.0]]]), c, 100.0), torch.tensor([math.log(2)]))
    rare = vqops.assignment_entropy(torch.tensor([[[1.0]]]), c, 6.0)  # exp(-12) is below 1e-5
    p = 1 / (1 + math.exp(12))
    assert_close(rare, torch.tensor([-(1 - p) * math.log(1 - p) - p * math.log(1e-5)]))


@pytest.mark.parametrize("H, G, M", [(1, 9, 1), (2, 7, 3), (2, 2, 11), (1, 1, 13), (1, 1, 40)])
@pytest.mark.parametrize("block", [5, 13])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_in_blocks(metric, dtype, block, H, G, M, monkeypatch):
    monkeypatch.setattr(soft, "BLOCK", 4 * block)
    monkeypatch.setattr(soft, "CODES", block)
    x, codebook = torch.randn(H, G, M, 3).to(dtype), torch.randn(H, 13, 3).to(dtype)
    for mask in (None, torch.rand(H, G, M) > 0.3):
        found = with_gradients(lambda x, c: vqops.assignment_entropy(x, c, 3.0, mask, metric), x, codebook, dtype)  # noqa: B023
        expected = with_gradients(lambda x, c: plain(x, c, 3.0, mask, metric), x, codebook, torch.float64)  # noqa: B023
        assert found[0].dtype == torch.promote_types(dtype, torch.float32)
        for got, right in zip(found, expected, strict=True):
            assert_close(got.double(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("beta", [1.0, 5.0, 10.0])
@pytest.mark.parametrize("case", HARD)
def test_error_of_hard_inputs(case, beta):
    def ours(x, c):
        return vqops.assignment_entropy(x.unflatten(0, (-1, 4)), c, beta)

    def theirs(x, c):
        return plain(x.unflatten(0, (-1, 4)).unsqueeze(0), c.unsqueeze(0), beta)

    assert_no_worse_than_plain(ours, theirs, *hard_inputs(case))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("beta", [1e-30, 1e-10, 1e10, 1e30, 1e38])
def test_temperatures_without_measure(beta, metric):
    x, c = 10 * torch.randn(10, 4, 3), 10 * torch.randn(9, 3)
    absent = torch.full((2, 3), torch.nan)
    entropy, *grads = with_gradients(
        lambda x, c: vqops.assignment_entropy(x, torch.cat([c, absent]), beta, None, metric), x, c, torch.float32
    )
    if beta < 1:
        assert_close(entropy, torch.full((10,), math.log(9)))
    else:
        hard = torch.nn.functional.one_hot(logits(x, c, metric).argmax(-1), 9).float().mean(1)
        assert_close(entropy, -torch.xlogy(hard, hard).sum(1))
    for grad in grads:
        assert_close(grad, torch.zeros_like(grad), atol=1e-6, rtol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_values_that_are_no_numbers(metric, monkeypatch):
    monkeypatch.setattr(soft, "CODES", 2)
    x, codebook = torch.randn(1, 4, 3, 4), torch.randn(1, 7, 4)
    codebook[0, 2:4] = torch.inf
    codebook[0, 6, 1] = torch.nan
    x[0, 1, 2, 0], x[0, 2, 0, 3], x[0, 3] = torch.nan, torch.inf, -torch.inf
    valid = x.isfinite().all(-1)
    found = with_gradients(lambda x, c: vqops.assignment_entropy(x, c, 2.0, None, metric), x, codebook, torch.float32)
    kept = [0, 1, 4, 5]
    clean = x.nan_to_num(0, 0, 0)
    expected = with_gradients(lambda x, c: plain(x, c, 2.0, valid, metric), clean, codebook[:, kept], torch.float32)
    assert_close(found[0], expected[0])
    assert found[0][3] == 0
    assert_close(found[1], expected[1] * valid.unsqueeze(-1), atol=1e-5, rtol=1e-4)
    assert_close(found[2][:, kept], expected[2], atol=1e-5, rtol=1e-4)
    assert (found[2][:, [2, 3, 6]] == 0).all()


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 1, 4)])
def test_without_groups_rows_or_codes(shape):
    x, nothing = torch.randn(shape), torch.full((2, 5, 4), torch.nan)
    for codebook in (torch.randn(2, 5, 4), nothing):
        entropy, *grads = with_gradients(lambda x, c: vqops.assignment_entropy(x, c, 1.0), x, codebook, torch.float32)
        assert entropy.shape == shape[1:2]
        assert all(grad.isfinite().all() for grad in grads)
        if codebook is nothing or 0 in shape:
            assert (entropy == 0).all() and all((grad == 0).all() for grad in grads)
    assert_close(vqops.assignment_entropy(x, torch.randn(2, 1, 4), 1.0), torch.zeros(shape[1]))


@pytest.mark.parametrize("shape", [(1, 4000, 1), (1, 1, 4000), (2, 40, 50)])
@pytest.mark.parametrize("K", [200, 3000])
def test_memory(shape, K, monkeypatch):
    monkeypatch.setattr(soft, "BLOCK", 1 << 14)
    monkeypatch.setattr(soft, "CODES", 256)
    x, c = torch.randn(*shape, 2, requires_grad=True), torch.randn(shape[0], K, 2, requires_grad=True)
    with LargestTemporaries() as memory:
        vqops.assignment_entropy(x, c, 1.0).sum().backward()
    assert memory.most < 4000 * 3000 * 4 / 20


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_another_temperature_does_not_compile_again(backend):
    torch._dynamo.reset()
    compiled = torch.compile(vqops.assignment_entropy, fullgraph=True, backend=backend)
    x, c = torch.randn(6, 4, 3, requires_grad=True), torch.randn(5, 3)
    for beta in (1.0, 2.0, 10.0):
        with torch._dynamo.config.patch(error_on_recompile=beta > 1):
            entropy = compiled(x, c, torch.tensor(beta))
        expected = plain(x.unsqueeze(0), c.unsqueeze(0), beta)
        assert_close(entropy, expected)
        assert_close(*(torch.autograd.grad(each.sum(), x)[0] for each in (entropy, expected)), atol=1e-5, rtol=1e-4)


def test_the_codebook_of_the_call():
    """An update between forward and backward does not change the gradient."""
    x, c = torch.randn(6, 4, 3, requires_grad=True), torch.randn(5, 3)
    (expected,) = torch.autograd.grad(vqops.assignment_entropy(x, c, 1.0).sum(), x)
    loss = vqops.assignment_entropy(x, c, 1.0).sum()
    c.zero_()
    assert_close(torch.autograd.grad(loss, x)[0], expected)
    with pytest.raises(NotImplementedError, match="assignment_entropy_backward"):
        torch.autograd.grad(vqops.assignment_entropy(x, c, 1.0).sum(), x, create_graph=True)[0].sum().backward()
