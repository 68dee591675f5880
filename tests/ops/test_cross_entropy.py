"""The cross entropy of codes and its gradients, against plain PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from soft_assignments import HARD, assert_no_worse_than_plain, hard_inputs, logits
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from vqops.ops.cross_entropy import code_cross_entropy
from vqops.reference import cross_entropy, soft


def plain(x, codebook, targets, metric):
    return F.cross_entropy(logits(x, codebook, metric).mT, targets, ignore_index=-1, reduction="none")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_entropy_in_blocks(metric, dtype, monkeypatch):
    monkeypatch.setattr(soft, "BLOCK", 20)
    monkeypatch.setattr(soft, "CODES", 5)
    x, codebook = torch.randn(2, 11, 3, dtype=dtype), torch.randn(2, 13, 3, dtype=dtype)
    x[0, 0] = codebook[0, 4]
    targets = torch.randint(-1, 13, (2, 11))
    targets[0, 0] = 4
    weight = torch.randn(2, 11, dtype=torch.float64)
    results = []
    for function, kind in ((code_cross_entropy, dtype), (plain, torch.float64)):
        leaves = [t.to(kind, copy=True).requires_grad_() for t in (x, codebook)]
        entropy = function(*leaves, targets, metric)
        (entropy * weight).sum().backward()
        results.append([entropy, *(leaf.grad for leaf in leaves)])
    assert results[0][0].dtype == torch.promote_types(dtype, torch.float32)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for got, expected in zip(*results, strict=True):
        assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale, offset, huge", [(1, 1000, 0), (1e-4, 0, 0), (1, 0, 1e15), (1e-3, 10, 1e15)])
def test_cross_entropy_of_awkward_values(scale, offset, huge):
    x, codebook = (torch.randn(1, n, 4) * scale + offset for n in (50, 20))
    codebook[0, 7] += huge
    targets = torch.randint(20, (1, 50))
    given = x.clone().requires_grad_()
    entropy = code_cross_entropy(given, codebook, targets, "euclidean")
    entropy.sum().backward()
    exact = x.double().requires_grad_()
    expected = plain(exact, codebook.double(), targets, "euclidean")
    expected.sum().backward()
    assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)
    assert_close(given.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4, 1e5])
def test_cross_entropy_of_rows_far_from_the_codes(offset):
    """The pulls of a row add up to 0 however far it is, so that its gradient is that of small differences."""
    x, codebook = torch.randn(50, 4) + offset, torch.randn(20, 4)
    targets = torch.randint(20, (50,))
    assert_no_worse_than_plain(
        lambda x, c: code_cross_entropy(x, c, targets),
        lambda x, c: plain(x.unsqueeze(0), c.unsqueeze(0), targets.unsqueeze(0), "euclidean").squeeze(0),
        x,
        codebook,
    )


@pytest.mark.parametrize("case", HARD)
def test_cross_entropy_of_hard_inputs(case):
    x, codebook = hard_inputs(case)
    targets = torch.randint(len(codebook), (len(x),))
    targets[: len(x) // 2] = logits(x, codebook, "euclidean").argmax(1)[: len(x) // 2]
    assert_no_worse_than_plain(
        lambda x, c: code_cross_entropy(x, c, targets),
        lambda x, c: plain(x.unsqueeze(0), c.unsqueeze(0), targets.unsqueeze(0), "euclidean").squeeze(0),
        x,
        codebook,
    )


def test_cross_entropy_of_rows_that_are_no_numbers_and_have_no_target():
    x = torch.full((3, 2), torch.nan, requires_grad=True)
    entropy = code_cross_entropy(x, torch.randn(4, 2), torch.tensor([-1, 0, -1]))
    entropy.sum().backward()
    assert entropy.isnan().tolist() == x.grad.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_cross_entropy_without_the_values_that_are_no_numbers(metric):
    x, codebook = torch.randn(1, 9, 4), torch.randn(1, 6, 4)
    codebook[0, 2] = torch.inf
    codebook[0, 4, 1] = torch.nan
    targets = torch.tensor([[0, 1, 3, 5, 0, 1, 3, 2, 0]])
    x[0, 8, 1] = torch.nan
    leaves = [t.clone().requires_grad_() for t in (x, codebook)]
    entropy = code_cross_entropy(*leaves, targets, metric)
    entropy.sum().backward()
    rest = codebook[:, [0, 1, 3, 5]]
    expected = plain(x, rest, torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 0]]), metric)
    assert_close(entropy[0, :7], expected[0, :7])
    assert entropy[0, 7] == torch.inf and entropy[0, 8].isnan()
    assert leaves[0].grad[0, :8].isfinite().all() and leaves[0].grad[0, 8].isnan().all()
    assert leaves[1].grad.isfinite().all()


class LargestTensor(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_cross_entropy_makes_nothing_of_size_n_times_k():
    x, codebook = torch.randn(1, 5000, 2), torch.randn(1, 7000, 2)
    targets = torch.randint(7000, (1, 5000))
    with LargestTensor() as mode:
        _, total, old = cross_entropy.code_cross_entropy(x, codebook, targets, "euclidean")
        grad = torch.randn(1, 5000)
        cross_entropy.code_cross_entropy_backward(grad, x, old, targets, total, "euclidean", True, True)
    assert 0.9 * soft.BLOCK < mode.largest <= soft.BLOCK < x.shape[1] * codebook.shape[1]


def test_opcheck_of_the_cross_entropy():
    x, codebook = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 7, 3, requires_grad=True)
    targets = torch.randint(-1, 7, (2, 5))
    torch.library.opcheck(torch.ops.vqops.code_cross_entropy, (x, codebook, targets, "euclidean"))
    with pytest.raises(NotImplementedError):
        entropy = code_cross_entropy(x, codebook, targets, "euclidean")
        (grad,) = torch.autograd.grad(entropy.sum(), x, create_graph=True)
        grad.sum().backward()
