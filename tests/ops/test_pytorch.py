"""The search in plain PyTorch: its bounds, the precision of its product, what it waits for and what it keeps."""

import contextlib
import importlib
import threading

import numpy as np
import pytest
import torch
from cases import SEARCHES
from memory import LargestTemporaries
from promises import INDICES, ORDER, REPEATS
from torch.utils._python_dispatch import TorchDispatchMode

import vqops
from vqops import pytorch, reference
from vqops.pytorch import bound, host, precision, screen, search
from vqops.pytorch import codebook as codebooks
from vqops.reference import distance

METRICS = ("euclidean", "cosine")


# Bounds


def cut(values, bits):
    """Rounded towards zero to so many bits of mantissa."""
    mantissa, exponent = values.double().frexp()
    return torch.ldexp(torch.trunc(mantissa * 2.0**bits), exponent - bits)


def cutting_product(rows, codes, out):
    """A float32 product that cuts after every operation, from the first term to the last."""
    total = torch.zeros(out.shape, dtype=torch.float64)
    for i in range(rows.shape[-1]):
        total = cut(total + cut(rows[..., i, None].double() * codes[..., i, None, :].double(), 24), 24)
    return out.copy_(total)


def true_scores(x, c, codes, metric):
    """t of every pair in extended precision, and the error that the decision may have besides."""
    D, (wide_x, wide_c) = x.shape[-1], (t.double().numpy().astype(np.longdouble) for t in (x, c))
    if metric == "euclidean":
        scale, centre = (t.double().numpy().astype(np.longdouble) for t in (codes.scale, codes.centre))
        X, C = (scale * (t - centre) for t in (wide_x, wide_c))
        h = (C**2).sum(-1) / 2
        d = 2.0**-53 * (D / 8 + 8) * ((X**2).sum(-1)[..., None] + 2 * h[:, None])
    else:
        wide = torch.promote_types(x.dtype, codes.matrix.dtype)
        largest = x.abs().amax(-1, keepdim=True).to(wide).clamp_min(1 / bound.FIT[wide])
        X = wide_x / codebooks.power_of_two(largest).double().numpy()
        norm = np.sqrt((wide_c**2).sum(-1, keepdims=True))
        C, h = np.where(norm > 0, wide_c / np.where(norm > 0, norm, 1), 0), np.zeros(c.shape[:2])
        d = 2.0**-53 * 4 * (D + 16) * np.sqrt((X**2).sum(-1))[..., None] * np.ones_like(h)[:, None]
    return h[:, None] - np.einsum("hnd,hkd->hnk", X, C), d


NOTHING_FITS = {("huge_rows", "euclidean"), ("no_finite_code", "euclidean"), ("no_finite_code", "cosine")}


@pytest.mark.parametrize("product", ["torch.bmm", "cutting", "float64"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", SEARCHES)
def test_the_true_score_is_between_the_bounds(monkeypatch, case, metric, product):
    if product == "cutting":
        monkeypatch.setattr(torch, "bmm", cutting_product)
    x, c = SEARCHES[case]()
    K, D = c.shape[1:]
    codes = codebooks.prepare_codes(c, metric, torch.float64 if product == "float64" else torch.float32)
    rows = screen.prepare_rows(x, codes, 1, metric)
    if metric == "cosine":
        rows = rows._replace(fits=rows.fits & (x != 0).any(-1))
    for some, lower in screen.Products(codes.matrix[:, :K]).of(rows.matrix):
        part = screen.Rows(*(t[:, some] for t in rows))
        every = torch.arange(K).expand(lower.shape)
        upper = screen.upper_bounds(lower, every, part, codes, D).double().numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            t, d = true_scores(x[:, some], c, codes, metric)
        there = codes.matrix[:, None, :K, D + 1] < 2.0**90
        held = (part.fits.unsqueeze(-1) & there).numpy()
        assert held.any() or product == "float64" or (case, metric) in NOTHING_FITS or x.shape[1] == 0
        # What is common to a row is left out of the lower bound, and twice in the upper one.
        common = part.rest.double().unsqueeze(-1).numpy() / 2
        with np.errstate(invalid="ignore"):
            assert ((lower.double().numpy() <= t - d + common) | ~held).all()
            assert ((upper >= t + d) | ~held).all()


# The precision of the product


TF32, BF16 = 11, 8  # bits of a mantissa, with the hidden one


def product_of_a_device(rows, codes, out, bmm=torch.bmm):
    """A float32 product that follows PyTorch's settings as CUDA does, or a processor with bfloat16 products."""
    settings = {torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision}
    bits = BF16 if "bf16" in settings else TF32 if "tf32" in settings else None
    if rows.dtype == torch.float32 and bits:
        rows, codes = cut(rows, bits).float(), cut(codes, bits).float()
    return bmm(rows, codes, out=out)


def medium():
    torch.set_float32_matmul_precision("medium")


def high():
    torch.set_float32_matmul_precision("high")


def of_cuda():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def of_everything():
    torch.backends.fp32_precision = "tf32"


def settings():
    found = [
        torch.backends.fp32_precision,
        *(each.fp32_precision for each in (torch.backends.cudnn, torch.backends.mkldnn)),
        *(each.fp32_precision for each in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)),
    ]
    try:
        return [*found, torch.get_float32_matmul_precision()]
    except RuntimeError:  # of a mixture of old and new settings
        return [*found, "mixed"]


@pytest.fixture
def as_before():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.parametrize("allow", [medium, high, of_cuda, of_everything])
def test_the_product_is_in_float32_whatever_the_caller_allows(monkeypatch, as_before, allow):
    monkeypatch.setattr(torch, "bmm", product_of_a_device)
    x, c = torch.randn(1, 400, 24), torch.randn(1, 300, 24)
    expected = reference.nearest(x, c)
    allow()
    before = settings()
    INDICES.same(pytorch.nearest(x, c), expected)
    assert settings() == before
    torch.backends.fp32_precision = "ieee"  # what was inherited is so still
    if allow is of_everything:
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize("allow", [medium, high])
def test_the_model_of_a_coarser_product_is_wrong(monkeypatch, as_before, allow):
    """Or the test above would not see it."""
    monkeypatch.setattr(torch, "bmm", product_of_a_device)
    monkeypatch.setattr(search, "full_precision", lambda _device: contextlib.nullcontext())
    x, c = torch.randn(1, 4000, 24), torch.randn(1, 1000, 24)
    allow()
    assert (pytorch.nearest(x, c) != reference.nearest(x, c)).any()


def test_threads_share_the_setting(as_before):
    medium()
    before, inside, leave, seen = settings(), threading.Barrier(2), threading.Event(), []

    def first():
        with precision.full_precision(torch.device("cpu")):
            inside.wait()
            leave.wait()

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with precision.full_precision(torch.device("cpu")):
        leave.set()
        thread.join()
        seen.append(torch.backends.cuda.matmul.fp32_precision)
    assert seen == ["ieee"] and settings() == before


def test_whoever_enters_sees_to_it(as_before):
    """Also where another thread is inside already, and the caller has changed the settings since."""
    with precision.full_precision(torch.device("cpu")):
        high()
        changed = settings()
        with precision.full_precision(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert settings() == changed


def test_autocast_changes_nothing():
    x, c = torch.randn(1, 300, 24), torch.randn(1, 300, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pytorch.nearest(x, c)
    INDICES.same(found, reference.nearest(x, c))


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
    for module in (codebooks, search):
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
        pytorch.quantize_backward(grad, grad[..., 0], x, c, found[1], mask, metric, "rotation", 0.5, True, True)
        pytorch.ema_update_(*state, found[3], found[4], decay, 1e-5, None, metric)
        entropy = pytorch.code_cross_entropy(x, c, found[1], metric)
        pytorch.code_cross_entropy_backward(grad[..., 0], x, c, found[1], entropy[1], metric, True, True)
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
