"""The search in plain PyTorch: its bounds, and the precision of the product that they hold for."""

import contextlib
import threading

import numpy as np
import pytest
import torch
from promises import INDICES

from vqops import pytorch, reference
from vqops.check.inputs import SEARCHES
from vqops.pytorch import bound, precision, screen, search
from vqops.pytorch import codebook as codebooks

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
