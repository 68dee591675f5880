"""The mean of the codes under the softmax of their distances, and its gradients, against plain PyTorch in float64."""

import pytest
import torch
from memory import LargestTemporaries
from soft_assignments import HARD, assert_no_worse_than_plain, hard_inputs, logits, with_gradients
from torch.testing import assert_close

import vqops
from vqops.ops.cross_entropy import code_cross_entropy
from vqops.reference import soft

METRICS = ("euclidean", "cosine")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def plain(x, codebook, temperature, mask=None, metric="euclidean"):
    y = (logits(x, codebook, metric) / temperature).softmax(-1) @ codebook
    return y if mask is None else y.masked_fill(~mask.unsqueeze(-1), 0)


def test_by_hand():
    x, c = torch.tensor([[0.0]], requires_grad=True), torch.tensor([[1.0], [-2.0]], requires_grad=True)
    y = vqops.soft_codes(x, c, 2.0)
    p = 1 / (1 + torch.tensor(-0.5).exp())  # distances 1 and 2
    assert_close(y, (p - 2 * (1 - p)).view(1, 1))
    y.backward()
    pull = 3 * p * (1 - p) / 2
    assert_close(x.grad, (2 * pull).view(1, 1))
    assert_close(c.grad, torch.stack([p - pull, 1 - p - pull]).unsqueeze(1))


@pytest.mark.parametrize("block", [5, 13])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_in_blocks(metric, dtype, block, monkeypatch):
    monkeypatch.setattr(soft, "BLOCK", 4 * block)
    monkeypatch.setattr(soft, "CODES", block)
    x, codebook = torch.randn(2, 11, 3).to(dtype), torch.randn(2, 13, 3).to(dtype)
    mask = torch.rand(2, 11) > 0.3
    found = with_gradients(lambda x, c: vqops.soft_codes(x, c, 0.3, mask, metric), x, codebook, dtype)
    expected = with_gradients(lambda x, c: plain(x, c, 0.3, mask, metric), x, codebook, torch.float64)
    assert found[0].dtype == dtype
    for got, right in zip(found, expected, strict=True):
        assert_close(got.double(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("case", HARD)
def test_error_of_hard_inputs(case, temperature):
    def ours(x, c):
        return vqops.soft_codes(x, c, temperature)

    assert_no_worse_than_plain(ours, lambda x, c: plain(x, c, temperature), *hard_inputs(case))


OPS = {
    "soft_codes": lambda x, c: vqops.soft_codes(x, c, 1.0),
    "assignment_entropy": lambda x, c: vqops.assignment_entropy(x.unsqueeze(0), c, 1.0),
    "code_cross_entropy": lambda x, c: code_cross_entropy(x, c, torch.zeros(len(x), dtype=torch.int64)),
}


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-40, 1e-30, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("name", OPS)
def test_gradients_where_all_codes_are_one_and_a_row_is_on_it(name, size):
    x = (torch.randn(30, 3) * size).clamp(-3e38, 3e38)
    x[3] = 0
    x.requires_grad_()
    codebook = torch.zeros(4, 3, requires_grad=True)
    OPS[name](x, codebook).sum().backward()
    assert x.grad.isfinite().all() and codebook.grad.isfinite().all()
    assert x.grad[3].abs().max() == 0


@pytest.mark.parametrize("case", ["on the codes", "on repeated codes", "near the codes"])
def test_hard_inputs_in_float64(case):
    x, c = (t.double() for t in hard_inputs(case))
    found = with_gradients(lambda x, c: vqops.soft_codes(x, c, 0.5), x, c, torch.float64)
    expected = with_gradients(lambda x, c: plain(x, c, 0.5), x, c, torch.float64)
    for got, right in zip(found, expected, strict=True):
        assert_close(got, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-10, 1e10, 1e30])
def test_temperatures_without_measure(temperature, metric):
    x, c = 10 * torch.randn(40, 4), 10 * torch.randn(9, 4)
    absent = torch.full((2, 4), torch.nan)
    y, *grads = with_gradients(
        lambda x, c: vqops.soft_codes(x, torch.cat([c, absent]), temperature, None, metric), x, c, torch.float32
    )
    if temperature < 1:
        assert_close(y, c[logits(x, c, metric).argmax(1)])
        assert_close(grads[0], torch.zeros_like(x))
    else:
        assert_close(y, c.mean(0).expand(40, 4))
        assert_close(grads[0], torch.zeros_like(x), atol=1e-6, rtol=0)
    assert grads[1].isfinite().all()


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e15, 1e25])
def test_sizes_whose_squares_float32_does_not_hold(scale):
    x, c = torch.randn(50, 4, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    expected = with_gradients(lambda x, c: plain(x, c, 1.0), x, c, torch.float64)
    temperature = torch.tensor(scale, dtype=torch.float64)
    found = with_gradients(lambda x, c: vqops.soft_codes(x, c, temperature), x * scale, c * scale, torch.float32)
    tolerance = 1e-3 if scale == 1e-40 else 1e-5  # digits of denormal numbers
    assert_close(found[0].double() / scale, expected[0], rtol=tolerance, atol=tolerance)
    for got, right in zip(found[1:], expected[1:], strict=True):
        assert_close(got.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("metric", METRICS)
def test_values_that_are_no_numbers(metric, monkeypatch):
    monkeypatch.setattr(soft, "CODES", 2)
    x, codebook = torch.randn(1, 9, 4), torch.randn(1, 7, 4)
    codebook[0, 2:4] = torch.inf  # all of a block
    codebook[0, 6, 1] = torch.nan
    x[0, 7, 1], x[0, 8, 2] = torch.nan, torch.inf
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 8] = False
    y, *grads = with_gradients(lambda x, c: vqops.soft_codes(x, c, 0.5, mask, metric), x, codebook, torch.float32)
    kept = [0, 1, 4, 5]
    assert_close(y[:, :7], plain(x[:, :7], codebook[:, kept], 0.5, None, metric))
    assert y[0, 7].isnan().all() and (y[0, 8] == 0).all()
    assert grads[0][0, :7].isfinite().all() and grads[0][0, 7].isnan().all() and (grads[0][0, 8] == 0).all()
    assert grads[1].isfinite().all() and (grads[1][0, [2, 3, 6]] == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_without_a_code(metric):
    x, nothing = torch.randn(5, 3), torch.full((4, 3), torch.nan)
    y, *grads = with_gradients(lambda x, c: vqops.soft_codes(x, c, 1.0, None, metric), x, nothing, torch.float32)
    assert y.isnan().all() and not grads[1].isinf().any()


def test_of_one_code_and_of_no_row():
    c = torch.randn(1, 3)
    y, *grads = with_gradients(lambda x, c: vqops.soft_codes(x, c, 1.0), torch.randn(5, 3), c, torch.float32)
    assert_close(y, c.expand(5, 3))
    assert_close(grads[0], torch.zeros(5, 3))
    y, *grads = with_gradients(lambda x, c: vqops.soft_codes(x, c, 1.0), torch.randn(2, 0, 3), c, torch.float32)
    assert y.shape == (2, 0, 3) and (grads[1] == 0).all()


def test_dtypes_of_its_own_for_each():
    x, c = torch.randn(2, 6, 4, dtype=torch.bfloat16), torch.randn(4, 9).mT
    y, *grads = with_gradients(lambda x, c: vqops.soft_codes(x.bfloat16(), c, 1.0), x, c, torch.float32)
    assert y.shape == (2, 6, 4) and y.dtype == torch.bfloat16 and grads[1].dtype == torch.float32
    expected = plain(x.double(), c.double(), 1.0)
    assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


def test_memory(monkeypatch):
    monkeypatch.setattr(soft, "BLOCK", 1 << 14)
    monkeypatch.setattr(soft, "CODES", 256)
    x, c = torch.randn(4000, 2, requires_grad=True), torch.randn(3000, 2, requires_grad=True)
    with LargestTemporaries() as memory:
        vqops.soft_codes(x, c, 1.0).sum().backward()
    assert memory.most < 4000 * 3000 * 4 / 20


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_another_temperature_does_not_compile_again(backend):
    torch._dynamo.reset()
    compiled = torch.compile(vqops.soft_codes, fullgraph=True, backend=backend)
    x, c = torch.randn(12, 3, requires_grad=True), torch.randn(5, 3)
    for temperature in (1.0, 0.5, 0.1):
        with torch._dynamo.config.patch(error_on_recompile=temperature < 1):
            y = compiled(x, c, torch.tensor(temperature))
        expected = plain(x, c, temperature)
        assert_close(y, expected)
        gradients = [torch.autograd.grad(each.square().sum(), x)[0] for each in (y, expected)]
        assert_close(*gradients)


def test_the_codebook_of_the_call():
    """An update between forward and backward does not change the gradient."""
    x, c = torch.randn(12, 3, requires_grad=True), torch.randn(5, 3)
    (expected,) = torch.autograd.grad(vqops.soft_codes(x, c, 1.0).square().sum(), x)
    loss = vqops.soft_codes(x, c, 1.0).square().sum()
    c.zero_()
    assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_straight_through():
    x, c = torch.randn(12, 3, requires_grad=True), torch.randn(5, 3)
    y = vqops.soft_codes(x, c, 1.0)
    hard = c[vqops.nearest(x, c)]
    (hard + y - y.detach()).square().sum().backward()
    assert_close(x.grad, torch.autograd.grad((plain(x, c, 1.0) * 2 * hard).sum(), x)[0])
    with pytest.raises(NotImplementedError, match="soft_codes_backward"):
        torch.autograd.grad(vqops.soft_codes(x, c, 1.0).sum(), x, create_graph=True)[0].sum().backward()
