"""Codes drawn at random: the noise to the last bit, the distribution, every implementation against the reference."""

import importlib
import math

import numpy as np
import pytest
import torch
from memory import LargestTemporaries
from promises import INDICES, ORDER

import vqops
from vqops import reference
from vqops.check.inputs import SEARCHES
from vqops.pytorch.codebook import prepare_codes, with_repeats
from vqops.pytorch.screen import prepare_rows
from vqops.reference import noise
from vqops.reference.distance import cost, dot, root, squared_distance
from vqops.reference.sample import logits

in_pytorch = importlib.import_module("vqops.pytorch.sample")  # the package has a function of this name

METRICS = ["euclidean", "cosine"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TEMPERATURES = [0.0, 1e-30, 1e-3, 0.5, 1e4, math.inf]
IMPLEMENTATIONS = [name for name in vqops.implementations()["sample"]["cpu"] if name != "triton"]


@pytest.fixture(params=IMPLEMENTATIONS)
def drawn(request):
    def draw(x, codebook, temperature, seed=(0, 0), mask=None, metric="euclidean"):
        return vqops.sample(x, codebook, temperature, seed_of(*seed), mask, metric, implementation=request.param)

    return draw


@pytest.fixture(params=[name for name in IMPLEMENTATIONS if name != "reference"])
def kernel(request):
    return request.param


def seed_of(key, offset=0):
    return torch.tensor([key, offset])


# The noise


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_known_answers_of_philox(counter, key, expected):
    """Those that Random123 is published with."""
    given = [tuple(torch.tensor(int(word, 16)) for word in part.split()) for part in (counter, key)]
    assert " ".join(f"{int(word):08x}" for word in noise.philox(*given)) == expected


def test_where_the_words_come_from():
    seed = seed_of(-(2**63) + 5, 2**33 + 7)
    found = noise.words(seed, 3, torch.tensor([[0], [-1]]), slice(4, 10))
    key = (5, 2**31)
    for place, row in enumerate(((7, 2), (6, 2))):
        for code in range(4, 10):
            counter = (*row, code // 4, 3)
            four = noise.philox(*(tuple(torch.tensor(word) for word in part) for part in (counter, key)))
            assert found[place, code - 4] == four[code % 4]


def test_the_logarithm():
    values = torch.rand(100_000, dtype=torch.float64) * torch.exp(100 * torch.randn(100_000, dtype=torch.float64))
    values = torch.cat([values, 1 - torch.logspace(-16, -1, 1000, dtype=torch.float64), torch.tensor([0.5, 2, 1e308])])
    exact = np.log(values.numpy().astype(np.longdouble))
    assert (np.abs(noise.log(values).numpy() - exact) <= 1e-15 * np.abs(exact)).all()
    assert noise.log(torch.ones(1, dtype=torch.float64)) == 0


def test_the_bits_of_the_noise():
    """By hand: each operation of the logarithm in Python's floats."""

    def log(t):
        m, e = math.frexp(t)
        if m < math.sqrt(0.5):
            m, e = 2 * m, e - 1
        s = (m - 1) / (m + 1)
        series = 0.0
        for n in range(10, 0, -1):
            series = series * (s * s) + 2 / (2 * n + 1)
        return e * math.log(2) + (s * 2 + s * (s * s) * series)

    word = torch.cat([torch.randint(2**32, (500,)), torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])])
    expected = [-log(-log((r + 0.5) / 2**32)) for r in word.tolist()]
    ORDER.same(noise.gumbel(word), torch.tensor(expected, dtype=torch.float64))
    assert min(expected) > -3.2 and max(expected) < 22.9


# Which code


def test_by_hand(drawn):
    """Two codes at distances 1 and 2 on a line: the second is drawn where its noise has 1 / T more."""
    x, c = torch.zeros(200, 1), torch.tensor([[1.0], [-2.0]])
    g = noise.gumbel(noise.words(seed_of(9), 0, torch.arange(200)[:, None], slice(0, 2)))
    found = drawn(x, c, 2.0, (9, 0))
    INDICES.same(found, (-2 + 2 * g[:, 1] > -1 + 2 * g[:, 0]).long())
    assert 0 < found.sum() < 100


@pytest.mark.parametrize("metric", METRICS)
def test_the_reference_is_the_largest_key(metric):
    x, c = torch.randn(2, 40, 5), torch.randn(2, 23, 5)
    rows = torch.arange(40)[:, None]
    g = torch.stack([noise.gumbel(noise.words(seed_of(4, 6), h, rows, slice(0, 23))) for h in (0, 1)])
    if metric == "euclidean":
        scores = -root(squared_distance(x[:, :, None], c[:, None]))
    else:
        scores = torch.cosine_similarity(x[:, :, None].double(), c[:, None].double(), dim=-1)
    keys = scores + 0.5 * g
    arguments = (x, c, torch.tensor(0.5), seed_of(4, 6))
    INDICES.same(reference.sample(*arguments, metric=metric), keys.argmax(-1))
    INDICES.same(reference.sample_topk(*arguments, 6, metric=metric), keys.topk(6).indices)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 20.0])
@pytest.mark.parametrize("metric", METRICS)
def test_frequencies_are_those_of_the_softmax(drawn, metric, temperature):
    """Chi-square of 20,000 draws of one row, at most five standard deviations above its mean, the degrees of freedom.
    Codes that hardly ever come count as one."""
    N, K = 20_000, 9
    x, c = torch.randn(1, 3), torch.randn(K, 3)
    scores = -torch.cdist(x, c)[0] if metric == "euclidean" else torch.cosine_similarity(x, c)
    expected = N * (scores.double() / temperature).softmax(0)
    found = drawn(x.expand(N, 3), c, temperature, (77, 0), metric=metric).bincount(minlength=K)
    often = expected > 5
    found, expected = (torch.cat([t[often], t[~often].sum(0, keepdim=True)]) for t in (found, expected))
    chi_square = ((found - expected).square() / expected.clamp_min(1)).sum()
    degrees = int(often.sum())
    assert degrees >= 2 and chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_rows_heads_and_codes_have_noise_of_their_own():
    x, c = torch.zeros(2, 300, 2), torch.ones(2, 64, 2)
    found = vqops.sample(x, c, 1.0, seed_of(3))
    other = vqops.sample(x, c, 1.0, seed_of(4))
    for a, b in ((found[0], found[1]), (found[0, 1:], found[0, :-1]), (found[0], other[0])):
        assert (a == b).float().mean() < 0.1  # 1 / 64 by chance
    for code in (0, 31, 63):
        assert (found == code).any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", SEARCHES)
def test_the_coldest_draw_is_the_nearest_code(drawn, case, metric):
    x, c = SEARCHES[case]()
    for temperature in (0, torch.tensor(-1.0), torch.tensor(math.nan), torch.tensor(0, dtype=torch.float64)):
        INDICES.same(drawn(x, c, temperature, metric=metric), vqops.nearest(x, c, metric=metric))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", SEARCHES)
def test_all_draw_the_same(kernel, case, metric, temperature):
    x, c = SEARCHES[case]()
    mask, seed = torch.rand(x.shape[:2]) > 0.1, seed_of(2**40 + 1, 2**32 - 30)
    expected = vqops.sample(x, c, temperature, seed, mask, metric, implementation="reference")
    INDICES.same(vqops.sample(x, c, temperature, seed, mask, metric, implementation=kernel), expected)
    assert (expected[~mask] == -1).all()


@pytest.mark.parametrize("codes", DTYPES, ids=str)
@pytest.mark.parametrize("rows", DTYPES, ids=str)
def test_dtypes_and_strides(kernel, rows, codes):
    x, c = torch.randn(2, 60, 11).to(rows), torch.randn(2, 37, 11).to(codes)
    for metric in METRICS:
        expected = reference.sample(x, c, torch.tensor(0.3), seed_of(8), metric=metric)
        for given in ((x, c), (x.mT.contiguous().mT, c.repeat(1, 1, 2)[..., :11])):
            INDICES.same(vqops.sample(*given, 0.3, seed_of(8), metric=metric, implementation=kernel), expected)


@pytest.mark.parametrize("N, K, D", [(1000, 70, 3), (5, 3000, 7), (130, 1025, 33), (3, 2, 1), (0, 5, 2), (70, 1, 4)])
@pytest.mark.parametrize("temperature", [1e-6, 0.05, 3.0])
def test_sizes(kernel, N, K, D, temperature):
    x, c = torch.randn(1, N, D), torch.randn(1, K, D)
    expected = reference.sample(x, c, torch.tensor(temperature), seed_of(8))
    INDICES.same(vqops.sample(x, c, temperature, seed_of(8), implementation=kernel), expected)


def test_what_float32_cannot_tell_apart(kernel):
    """Codes on a sphere around the rows, and noise far below the rounding of distances, which decides all the same."""
    c = torch.cat([torch.eye(24), -torch.eye(24)])
    x = torch.zeros(1, 200, 24)
    expected = reference.sample(x, c[None], torch.tensor(1e-12), seed_of(5))
    assert len(expected.unique()) > 40
    INDICES.same(vqops.sample(x, c[None], 1e-12, seed_of(5), implementation=kernel), expected)


def test_equal_codes_are_drawn_alike(drawn):
    """As often, though the nearest is always the first."""
    x, c = torch.randn(1, 4).expand(3000, 4), torch.randn(1, 4).expand(3, 4)
    assert drawn(x, c, 0.1).bincount().min() > 900


def test_a_batch_in_parts(drawn):
    x, c = torch.randn(2, 50, 6), torch.randn(2, 20, 6)
    whole = drawn(x, c, 1.0, (5, 10))
    parts = [drawn(x[:, :17], c, 1.0, (5, 10)), drawn(x[:, 17:], c, 1.0, (5, 27))]
    INDICES.same(torch.cat(parts, 1), whole)
    INDICES.same(drawn(x[0].view(2, 25, 6), c[0], 1.0, (5, 10)).flatten(), whole[0])
    INDICES.same(drawn(x[0, 3], c[0], 1.0, (5, 13)), whole[0, 3])


def test_rows_and_codes_that_are_no_numbers(drawn):
    x, c = torch.randn(6, 3), torch.randn(4, 3)
    x[1, 0], x[2, 2], c[1, 1], c[3, 0] = math.nan, math.inf, math.nan, -math.inf
    mask = torch.tensor([True, True, True, False, True, True])
    found = drawn(x.repeat(100, 1), c, 5.0, mask=mask.repeat(100)).view(100, 6)
    assert (found[:, 1:4] == -1).all() and set(found[:, [0, 4, 5]].flatten().tolist()) == {0, 2}
    assert (drawn(x, torch.full((4, 3), math.nan), 1.0) == -1).all()


# Several codes


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", SEARCHES)
def test_several_codes(case, metric):
    x, c = SEARCHES[case]()
    k, seed = min(5, c.shape[1]), seed_of(1)
    found = {
        name: vqops.sample_topk(x, c, 0.5, seed, k, metric=metric, implementation=name)
        for name in ("reference", "pytorch")
    }
    INDICES.same(found["pytorch"], found["reference"])
    INDICES.same(found["pytorch"][..., 0], vqops.sample(x, c, 0.5, seed, metric=metric))
    several = found["pytorch"].sort(-1).values
    assert ((several[..., 1:] > several[..., :-1]) | (several[..., :-1] == -1)).all()


def test_more_than_there_are():
    c = torch.randn(4, 3)
    c[1] = math.nan
    found = vqops.sample_topk(torch.randn(50, 3), c, 1.0, seed_of(0), 4)
    assert (found[:, 3] == -1).all() and set(found[:, :3].flatten().tolist()) == {0, 2, 3}
    assert vqops.sample_topk(torch.randn(3), c, 1.0, seed_of(0), 2).shape == (2,)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", SEARCHES)
def test_no_key_is_above_its_bound(case, metric):
    """In PyTorch, of rows whose bounds are said to hold; at most what float32 rounds there."""
    x, c = SEARCHES[case]()
    H, N, D = x.shape
    K, seed = c.shape[1], seed_of(6)
    x = x.nan_to_num(0, 0, 0)
    codes = with_repeats(prepare_codes(c, metric, torch.float32))
    rows = prepare_rows(x, codes, 1, metric)
    lower = torch.bmm(rows.matrix, codes.matrix[:, :K].mT)
    head, number = torch.arange(H)[:, None, None], torch.arange(N)[:, None]
    word = noise.words(seed, head, number, slice(0, K))
    norm = root(dot(x, x)).unsqueeze(-1) if metric == "cosine" else None
    exact = logits(cost(x.unsqueeze(2), c.unsqueeze(1), metric), norm)
    for temperature in (0.0, 0.3, 100.0):
        scaled = temperature * codes.scale.double()
        above = in_pytorch.upper_logits(lower.clone(), *in_pytorch.logit_terms(rows, D, metric), metric)
        above = above.add_(in_pytorch.noise_above(word, scaled)).double()
        above += 2.0**-20 * (above.abs() + 256 * scaled)
        key = (exact + temperature * noise.gumbel(word)) * codes.scale.double()
        beyond = above.isnan()  # float32's range: comes first, and decides nothing
        assert ((key <= above) | beyond | ~rows.fits.unsqueeze(-1) | key.isnan()).all()
        assert not beyond.any() or case == "denormal"


def test_no_noise_is_above_its_bound():
    """Over all magnitudes of the word; closer than a tenth where the noise is large."""
    word = torch.cat([2**32 - 1 - torch.logspace(0, 9.63, 50_000).long(), torch.randint(2**32, (50_000,))])
    word = torch.cat([word, torch.arange(200), 2**32 - 1 - torch.arange(200)]).view(1, 1, -1)
    for temperature in (1.0, 1e-3, 1e20):
        g = noise.gumbel(word)
        above = in_pytorch.noise_above(word, torch.full((1, 1, 1), temperature, dtype=torch.float64)).double()
        assert (above >= temperature * g).all()
        likely = (g > 3) & (word < 2**32 - 32)
        assert (above <= temperature * (g + 0.1))[likely].all() and likely.sum() > 1000


def test_few_rows_are_compared_with_all_codes(monkeypatch):
    """Not a time, but what decides it."""
    x, c, opened = torch.randn(1, 2000, 16), torch.randn(1, 700, 16), []
    compare_all = in_pytorch.compare_all
    monkeypatch.setattr(in_pytorch, "compare_all", lambda *a: opened.append(int(a[5].sum())) or compare_all(*a))
    for temperature in (0.0, 0.01, 0.3, 10.0):
        vqops.sample(x, c, temperature, seed_of(1), implementation="pytorch")
    assert len(opened) == 4 and max(opened) <= 2


def test_rows_beyond_the_candidates():
    """Flat logits and one temperature for which the bounds leave most codes: all keys are compared."""
    x, c = torch.randn(1, 40, 6), torch.randn(1, 50, 6)
    for temperature in (1e37, 3e38):
        given = (x, c, torch.tensor(temperature), seed_of(2), 32)
        INDICES.same(torch.ops.vqops.sample_topk_pytorch(*given), reference.sample_topk(*given))


# As torch sees it


def test_one_graph_for_every_seed_and_temperature():
    torch._dynamo.reset()
    x, c = torch.randn(30, 4), torch.randn(9, 4)
    step = torch.compile(lambda t, s: vqops.sample(x, c, t, s), fullgraph=True, backend="aot_eager")
    for number in range(4):
        given = torch.tensor(0.1 + number), seed_of(number, 30 * number)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            INDICES.same(step(*given), vqops.sample(x, c, *given))


def test_no_gradient():
    x, c = torch.randn(20, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    temperature = torch.ones((), requires_grad=True)
    assert not vqops.sample(x, c, temperature, seed_of(0)).requires_grad
    assert not vqops.sample_topk(x, c, temperature, seed_of(0), 2).requires_grad


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_nothing_of_size_n_times_k(name, metric):
    x, c = torch.randn(1, 4000, 3), torch.randn(1, 4000, 3)  # a matrix of float32 has 64 MB
    with LargestTemporaries() as memory:
        vqops.sample(x, c, 1.0, seed_of(0), metric=metric, implementation=name)
    assert 8 * 4000 <= memory.most <= 48 * 2**20


REFUSED = {
    "a list for the seed": ({"seed": [0, 0]}, TypeError, "seed must be an int64 tensor .*got list"),
    "a seed of int32": ({"seed": torch.zeros(2, dtype=torch.int32)}, TypeError, "seed must be an .*got torch.int32"),
    "a seed alone": ({"seed": torch.tensor(3)}, ValueError, r"seed must have shape \[key, offset\] = \[2\], got \[\]"),
    "the seed's device": ({"seed": seed_of(0).to("meta")}, ValueError, "seed is on meta, x is on cpu"),
    "a temperature below 0": ({"temperature": -1e-9}, ValueError, "temperature must be at least 0, got -1e-09"),
    "no temperature": ({"temperature": math.nan}, ValueError, "temperature must be at least 0, got nan"),
    "a temperature of integers": ({"temperature": torch.tensor(1)}, TypeError, "temperature must be .*got torch.int64"),
    "temperatures": ({"temperature": torch.ones(2)}, ValueError, r"temperature must have shape of a 0-d .*got \[2\]"),
    "D": ({"codebook": torch.zeros(3, 5)}, ValueError, "codebook has D=5, x has D=4"),
    "metric": ({"metric": "manhattan"}, ValueError, "metric must be one of"),
    "mask": ({"mask": torch.ones(5)}, TypeError, "mask must be bool"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_calls_that_are_refused(case):
    changed, error, message = REFUSED[case]
    given = {"x": torch.zeros(5, 4), "codebook": torch.zeros(3, 4), "temperature": 1.0, "seed": seed_of(0)} | changed
    with pytest.raises(error, match=f"sample: {message}"):
        vqops.sample(**given)
    with pytest.raises(error, match=f"sample_topk: {message}"):
        vqops.sample_topk(**given, k=1)


@pytest.mark.parametrize("k", [0, 4, 33])
def test_a_number_of_codes_that_is_refused(k):
    with pytest.raises(ValueError, match=rf"sample_topk: k must be from 1 to min\(K=3, 32\), got {k}"):
        vqops.sample_topk(torch.zeros(5, 4), torch.zeros(3, 4), 1.0, seed_of(0), k)
