"""The CUDA kernels as only a GPU can show them: the tensor cores' error, capture, streams, no synchronisation.

The common suites run them as `compiled-cuda` and `triton-cuda`.
"""

import pytest
import torch
from implementations import available
from promises import INDICES, ORDER, REPEATS, WHOLE
from torch.testing import assert_close

import vqops
from vqops import reference
from vqops.check.inputs import SEARCHES

ops = torch.ops.vqops


@pytest.fixture(autouse=True)
def device():
    available("compiled", "cuda")
    return torch.device("cuda")


def same_indices(implementation, x, codebook, metric="euclidean"):
    found = vqops.nearest(x.cuda(), codebook.cuda(), metric=metric, implementation=implementation)
    INDICES.same(found.cpu(), reference.nearest(x, codebook, None, metric))


@pytest.fixture(params=["compiled", "triton"])
def implementation(request):
    available(request.param, "cuda")
    return request.param


@pytest.mark.parametrize("case", ["heads", "duplicates", "not_finite_rows", "one_code_x_1e15"])
def test_the_reference_is_the_same_there(case):
    x, c = SEARCHES[case]()
    found = vqops.quantize(x.cuda(), c.cuda(), code_sums=True, implementation="reference")
    expected = vqops.quantize(x, c, code_sums=True, implementation="reference")
    for a, b in zip(found, expected, strict=True):
        ORDER.same(a.cpu(), b, equal_nan=True)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("N", [1, 300, 20_000])  # blocks share the codes of the first two
@pytest.mark.parametrize("D", [8, 24, 64, 100, 128, 200, 256, 400, 512, 700, 1100, 2000])  # every fast kernel
def test_every_depth(implementation, D, N, metric):
    x, c = torch.randn(N, D), torch.randn(3000, D)
    x[: N // 3] = c[torch.randint(3000, (N // 3,))] + 1e-3 * torch.randn(N // 3, D)
    found = vqops.nearest(x.cuda(), c.cuda(), metric=metric, implementation=implementation)
    INDICES.same(found.cpu(), vqops.nearest(x, c, metric=metric))
    if N <= 300:
        several = vqops.nearest_topk(x.cuda(), c.cuda(), 9, metric=metric, implementation=implementation)[0]
        INDICES.same(several.cpu(), vqops.nearest_topk(x, c, 9, metric=metric)[0])


@pytest.mark.parametrize("D", [8, 64, 256, 512])
def test_most_rows_are_certified(implementation, D):
    """The fast pass works, and not only the float64 that catches what it leaves."""
    x, c = torch.randn(20_000, D).cuda(), torch.randn(3000, D).cuda()
    tiers = vqops.search_statistics(x, c, implementation=implementation)
    scanned = {"compiled": 0.001, "triton": 0.01}[implementation]  # Triton: 3 of 1024 rows at D=512, in its interpreter
    assert tiers[0] > 0.8 * len(x) and tiers[2] < scanned * len(x)


@pytest.mark.parametrize("D", [16, 64, 256, 1024])
def test_products_of_one_sign(implementation, D):
    """Every truncation in the tensor cores goes the same way; codes in pairs, a few bits apart."""
    x, c = 1 + torch.rand(1, 512, D), 1 + torch.rand(1, 256, D)
    c = torch.cat([c, c * (1 + 2.0**-22 * torch.randint(-4, 5, (1, 256, 1)))], 1)
    same_indices(implementation, x - 3, c)
    same_indices(implementation, x, c, "cosine")


@pytest.mark.parametrize("D", [16, 64, 256])
def test_one_large_term_first(implementation, D):
    """Small products are cut below the last bit of the large one."""
    x, c = torch.rand(1, 512, D) * 2.0**-9, torch.rand(1, 256, D) * 2.0**-9
    x[..., 0] = c[..., 0] = 1
    same_indices(implementation, x, c)
    same_indices(implementation, x, c, "cosine")


@pytest.mark.parametrize("D", [16, 64, 256, 1024])
def test_accumulation_is_what_exactness_md_says(D):
    """The float16 product itself, as cuBLAS runs it on the same tensor cores, against float64."""
    for x, c in (torch.rand(2, 512, D), torch.randn(2, 512, D)):
        x, c = x.cuda().half(), c.cuda().half()
        found = torch.mm(x, c.mT, out_dtype=torch.float32).double()
        exact, size = x.double() @ c.double().mT, x.double().norm(dim=1)[:, None] * c.double().norm(dim=1)
        assert ((found - exact).abs() <= 1.5 * (D + 16) * 2.0**-23 * size).all()


@pytest.fixture(params=["compiled", "triton"])
def step(request):
    available(request.param, "cuda")
    quantize, backward, update = (
        getattr(ops, f"{name}_{request.param}") for name in ("quantize", "quantize_backward", "ema_update_")
    )

    def run(x, codebook, g, size, average, decay):
        quantized, indices, error, counts, sums, old = quantize(x, codebook, None, None, "euclidean", "rotation", True)
        gradient, _ = backward(g, error, x, old, indices, None, "euclidean", "rotation")
        update(size, average, codebook, counts, sums, decay)
        return quantized, indices, error, counts, sums, gradient

    return run


def arguments(device, N=5000, D=48, K=300):
    x, g = torch.randn(2, 1, N, D, device=device)
    codebook = torch.randn(1, K, D, device=device)
    return x, codebook, g, torch.ones(1, K, device=device), codebook.clone(), torch.tensor(0.9, device=device)


def test_a_step_does_not_synchronise(device, step):
    given = arguments(device)
    step(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_step_can_be_captured(device, step, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    given = arguments(device)
    step(*(t.clone() for t in given))
    captured = [t.clone() for t in given]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(*captured)
    for target, source in zip(captured, given, strict=True):
        target.copy_(source)
    graph.replay()
    same_step(found, step(*given), deterministic)


def same_step(found, expected, deterministic):
    """To the bit, but for sums whose order of addition is open."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if i == SUMS and not deterministic:
            assert_close(a, b, rtol=1e-4, atol=1e-3)
        else:
            REPEATS.same(a, b)


SUMS = 4


def test_a_step_gives_the_same_bits_again(device, step):
    torch.use_deterministic_algorithms(True)
    given = arguments(device, N=200_000)
    first, second = (step(*(t.clone() for t in given)) for _ in range(2))
    same_step(first, second, deterministic=True)


@pytest.mark.parametrize("codes", ["uniform", "zipf", "one code"])
@pytest.mark.parametrize("weighted", [False, True])
def test_atomic_sums(device, codes, weighted):
    """torch.use_deterministic_algorithms(False): whole numbers to the bit, others within their rounding."""
    N, D, K = 100_000, 67, 300
    torch.use_deterministic_algorithms(False)
    ranks = {"uniform": torch.ones(K), "zipf": 1 / torch.arange(1, K + 1), "one code": torch.eye(K)[7]}[codes]
    indices = torch.multinomial(ranks.to(device), N, replacement=True)[None]
    whole, x = torch.randint(-9, 10, (1, N, D), device=device).float(), torch.randn(1, N, D, device=device)
    weight = torch.randint(0, 4, (1, N), device=device).float() if weighted else None
    factor = torch.ones(N, device=device) if weight is None else weight[0]
    for rows in (whole, x):
        counts, sums = ops.code_sums_compiled(rows, indices, K, weight)
        terms, zero = rows[0].double() * factor[:, None], torch.zeros(K, D, device=device, dtype=torch.float64)
        exact, size = zero.index_add(0, indices[0], terms), zero.index_add(0, indices[0], terms.abs())
        WHOLE.same(counts[0].double(), zero[:, 0].index_add(0, indices[0], factor.double()))
        # At most 256 additions in a block and one a block; each errs by 2^-24 of the sum of sizes.
        bound = 0 if rows is whole else 1.01 * (256 + N / 256) * 2.0**-24 * size
        assert ((sums[0] - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_atomic_and_sorted_sums_agree(device, dtype, metric):
    x, codebook = torch.randn(2, 5000, 48, device=device, dtype=dtype), torch.randn(2, 30, 48, device=device)
    codebook, error = codebook.to(dtype), torch.randn(2, 5000, device=device)
    found = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        _, indices, _, counts, sums, old = ops.quantize_compiled(x, codebook, None, None, metric, "none", True)
        given = (None, error, x, old, indices, None, metric, "none", 1.0, True, False, True)
        _, gradient = ops.quantize_backward_compiled(*given)
        found.append((indices, counts, sums, gradient))
    (indices, counts, sums, gradient), expected = found
    INDICES.same(indices, expected[0])
    INDICES.same(counts, expected[1])
    assert_close(sums, expected[2], rtol=1e-4, atol=1e-3)
    loose = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-3}
    assert_close(gradient, expected[3], **loose)


def test_runs_on_the_current_stream(device):
    x, codebook, *_ = arguments(device)
    expected = ops.nearest_compiled(x, codebook)
    torch.cuda.synchronize()
    stream, given = torch.cuda.Stream(), torch.zeros_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        given.copy_(x)  # on another stream the search would read zeros
        found = ops.nearest_compiled(given, codebook)
    stream.synchronize()
    REPEATS.same(found, expected)


def test_addresses_beyond_2_31_elements(device):
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB")
    x = torch.zeros(1, (1 << 31) // 64 + 1000, 64, device=device, dtype=torch.bfloat16)
    codebook = torch.randn(1, 40, 64, device=device)
    x[0, -1000:] = codebook[0, torch.arange(1000, device=device) % 40]
    found = ops.nearest_compiled(x, codebook)
    INDICES.same(found[0, -1000:], torch.arange(1000, device=device) % 40)


def test_a_prepared_codebook_gives_the_same(device):
    x, codebook, *_ = arguments(device)
    packed = ops.prepare_compiled(codebook)
    INDICES.same(ops.nearest_compiled(x, codebook, None, "euclidean", packed), ops.nearest_compiled(x, codebook))
