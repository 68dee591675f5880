"""The search in plain PyTorch: what it waits for, devices without float64, what it keeps in memory, and its sums."""

import importlib

import pytest
import torch
from memory import LargestTemporaries
from promises import INDICES, ORDER, REPEATS
from torch.utils._python_dispatch import TorchDispatchMode

import vqops
from vqops import pytorch, reference
from vqops.check.inputs import SEARCHES
from vqops.pytorch import codebook as codebooks
from vqops.pytorch import host, search
from vqops.reference import distance, soft

METRICS = ("euclidean", "cosine")


# What it waits for


# To read a value or a size; and a number that `where` takes to the device as a tensor of the CPU.
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::scalar_tensor")


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for its GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        self.count += name in WAITS
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What decides whether to ask is that of a GPU."""
    for module in (codebooks, search, soft):
        monkeypatch.setattr(module, "asking_is_free", lambda _device: False)


@pytest.fixture
def must_not_wait(monkeypatch, on_a_gpu):
    monkeypatch.setattr(search, "may_wait", lambda _device: False)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", SEARCHES)
def test_without_waiting_it_finds_the_same(must_not_wait, case, metric):
    x, c = SEARCHES[case]()
    with Waits() as waits:
        found = pytorch.nearest(x, c, None, metric)
        several = pytorch.nearest_topk(x, c, min(3, c.shape[1]), None, metric)
    assert waits.count == 0
    INDICES.same(found, reference.nearest(x, c, metric=metric))
    ORDER.same(several, reference.nearest_topk(x, c, min(3, c.shape[1]), metric=metric), equal_nan=True)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_a_step_does_not_wait(must_not_wait, metric, deterministic):
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    x, c, decay = torch.randn(2, 300, 6), torch.randn(2, 20, 6), torch.full((), 0.9)
    mask, weight, grad = torch.rand(2, 300) > 0.1, torch.rand(2, 300), torch.randn(2, 300, 6)
    state = torch.ones(2, 20), c.clone(), c.clone()
    with Waits() as waits:
        found = pytorch.quantize(x, c, mask, weight, metric, "rotation", True)
        pytorch.quantize_backward(grad, grad[..., 0], x, c, found[1], mask, metric, "rotation", 0.5, True, True, True)
        pytorch.ema_update_(*state, found[3], found[4], decay, 1e-5, None, metric)
        entropy = pytorch.code_cross_entropy(x, c, found[1], metric)
        pytorch.code_cross_entropy_backward(grad[..., 0], x, c, found[1], entropy[1], metric, True, True)
        pytorch.soft_codes(x, c, decay, mask, metric)
        pytorch.soft_codes_backward(grad, x, c, decay, mask, metric, True, True)
        groups = x.unflatten(1, (100, 3)), c, decay, mask.unflatten(1, (100, 3))
        entropy = pytorch.assignment_entropy(*groups, metric)
        pytorch.assignment_entropy_backward(entropy[0], *groups, *entropy[1:3], metric, True, True)
        pytorch.search_statistics(x, c, metric)
    assert waits.count == 0


def test_ordinary_data_waits_once(on_a_gpu):
    x, c = torch.randn(1, 4096, 256), torch.randn(1, 1024, 256)
    assert pytorch.search_statistics(x, c)[1] > 5
    with Waits() as waits:
        found = pytorch.nearest(x, c)
    assert waits.count == 1
    INDICES.same(found, vqops.nearest(x, c))
    x, c = torch.randn(1, 2000, 16), torch.randn(1, 300, 16)
    with Waits() as waits:  # more open rows than are compared at once, with more near codes than a list holds
        found = pytorch.nearest(1e12 + 0 * x.double(), c.repeat(1, 20, 1) + 1e-3 * torch.randn(1, 6000, 16))
    assert waits.count == 3


@pytest.mark.parametrize("metric", METRICS)
def test_without_waiting_rows_that_are_certain_need_no_room(must_not_wait, monkeypatch, metric):
    monkeypatch.setattr(search, "SCANNED_UNASKED", 1)
    x, nothing = torch.randn(1, 500, 16), torch.full((1, 100, 16), torch.nan)
    assert (pytorch.nearest(x, nothing, None, metric) == -1).all()
    assert (pytorch.nearest_topk(x, nothing, 3, None, metric)[0] == -1).all()
    c = torch.nn.functional.normalize(torch.randn(1, 100, 16), dim=-1)
    c[0, 0] = torch.inf
    x[:, 10:] = 0
    INDICES.same(pytorch.nearest(x, c, None, metric), reference.nearest(x, c, metric=metric))
    ORDER.same(pytorch.nearest_topk(x, c, 3, None, metric), reference.nearest_topk(x, c, 3, metric=metric))


def test_without_waiting_too_many_rows_fail(must_not_wait, monkeypatch):
    monkeypatch.setattr(search, "SCANNED_UNASKED", 1)
    x, c = torch.zeros(1, 50, 16), 2.0 * torch.randint(2, (1, 100, 16)) - 1
    x[..., -1] = 0.5  # from which all codes are as far
    c[..., -1] = 1
    with pytest.raises(RuntimeError, match="no room for so many rows that float32 cannot decide"):
        pytorch.nearest(x, c)


# Devices without float64


class NoFloat64(TorchDispatchMode):
    """Refuses float64 but in what runs on the CPU."""

    def __init__(self):
        super().__init__()
        self.at_home = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            wide = isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64
            assert not wide or self.at_home, f"{func} in float64"
        return result


@pytest.fixture
def without_float64(monkeypatch):
    mode = NoFloat64()

    def at_home(function):
        def run(*arguments, **options):
            mode.at_home += 1
            try:
                return function(*arguments, **options)
            finally:
                mode.at_home -= 1

        return run

    for module in (search, codebooks, distance, host, importlib.import_module("vqops.pytorch.quantize")):
        monkeypatch.setattr(module, "has_float64", lambda _device: mode.at_home > 0)
    for name in ("prepare_codes", "decide", "scan"):
        monkeypatch.setattr(search, name, at_home(getattr(search, name)))
    monkeypatch.setattr(torch.Tensor, "cpu", at_home(torch.Tensor.cpu))
    return mode


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", ["normal", "heads", "heavy_tails", "near_ties", "one_code_x_1e15", "not_finite_rows"])
def test_a_search_without_float64(request, case, metric):
    x, c = SEARCHES[case]()
    expected = reference.nearest(x, c, metric=metric)
    with request.getfixturevalue("without_float64"):
        found = pytorch.nearest(x, c, None, metric)
        again = pytorch.nearest(x, c, None, metric, pytorch.prepare(c, metric))
    INDICES.same(found, expected)
    INDICES.same(again, expected)


@pytest.mark.parametrize("metric", METRICS)
def test_what_needs_float64_is_computed_on_the_cpu(request, monkeypatch, metric):
    """`on_host` of all the others: with stand-ins for the move, since here both are the CPU."""
    x, c = SEARCHES["heads"]()
    expected = reference.quantize(x, c, metric=metric, with_sums=True)
    several = reference.nearest_topk(x, c, 3, metric=metric)
    averages = [torch.rand(3, 40), torch.randn(3, 40, 11), c.clone()]
    updated = [t.clone() for t in averages]
    reference.ema_update_(*updated, expected[3], expected[4], torch.tensor(0.9), metric=metric)
    mode = request.getfixturevalue("without_float64")
    moved = []

    def arrive(tensor):
        moved.append(tensor)
        mode.at_home = 1
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "cpu", arrive)
    found = pytorch.quantize(x, c, None, None, metric, "none", True)
    mode.at_home = 0
    ORDER.same(found, expected)
    ORDER.same(pytorch.nearest_topk(x, c, 3, None, metric), several)
    mode.at_home = 0
    with torch.inference_mode():
        pytorch.ema_update_(*averages, expected[3], expected[4], torch.tensor(0.9), 1e-5, None, metric)
    ORDER.same(averages, updated)
    assert moved


# Memory, and sums


def test_nothing_is_as_large_as_rows_times_codes():
    x, c = torch.randn(1, 20000, 4), torch.randn(1, 8000, 4)
    with LargestTemporaries() as memory:
        pytorch.nearest(x, c)
    assert 20000 * 4 < memory.most < 20000 * 8000 * 4 / 20


def test_sums_follow_the_deterministic_flag():
    x, indices, weight = torch.randn(2, 3000, 5), torch.randint(-1, 4, (2, 3000)), torch.rand(2, 3000)
    for given in (None, weight):
        expected = reference.code_sums(x, indices, 4, given)
        torch.use_deterministic_algorithms(True)
        ORDER.same(pytorch.code_sums(x, indices, 4, given), expected)
        torch.use_deterministic_algorithms(False)
        found = pytorch.code_sums(x, indices, 4, given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert given is not None or (found[0] == expected[0]).all()


def test_repeats():
    c = torch.tensor([[[1.0, 2], [0.0, 3], [1.0, 2], [-0.0, 3], [1.0, 2], [3.0, 0]]])
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert codebooks.repeats(c.to(dtype)).tolist() == [[False, False, True, True, True, False]]
    many = torch.randn(3, 500, 7)
    many[:, 250:] = many[:, :250].flip(1)
    assert codebooks.repeats(many).tolist() == [[False] * 250 + [True] * 250] * 3


def test_a_preparation_is_as_large_as_it_says():
    for shape in ((1, 1, 1), (2, 300, 20), (3, 33, 17)):
        packed = pytorch.prepare(torch.randn(shape))
        assert packed.shape == (codebooks.packed_bytes(*shape),) and packed.dtype == torch.uint8
        codes = codebooks.unpack(packed, torch.Size(shape))
        REPEATS.same(codebooks.pack(codes), packed)


def test_rows_that_are_no_numbers_cost_no_scan():
    x = torch.randn(1, 300, 8)
    x[0, ::2] = torch.nan
    assert pytorch.search_statistics(x, torch.randn(1, 50, 8)).tolist()[2:] == [0, 150]
    assert vqops.nearest(x, torch.randn(1, 50, 8), implementation="pytorch").eq(-1).sum() == 150
