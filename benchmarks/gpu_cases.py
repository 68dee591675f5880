"""What is timed on a GPU: every op, each with our implementations, plain PyTorch and the peers that are installed.

A case yields its row's facts, its methods, the bytes or operations that it needs at least, and a check of a result.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import vqops
from benchmarks.gpu_timing import tensor_float_32

SHAPES = [  # N, D, K
    (1 << 20, 64, 512),
    (1 << 20, 64, 1024),
    (1 << 20, 128, 1024),
    (1 << 18, 256, 8192),
    (1 << 17, 8, 16384),
    (1 << 16, 256, 262144),
    (1 << 15, 512, 1024),
]
STEPS = [(1 << 20, 64, 512), (1 << 20, 128, 1024)]
SEVERAL = 8  # codes a row, of nearest_topk
DTYPES = [torch.float32, torch.bfloat16]
CHECKED = 256  # rows that are compared with the reference
SCORES = 1 << 28  # of plain PyTorch at a time: 1 GB
SLOW = 1 << 37  # N D K above which the reference, float64 throughout, is left out


@dataclass
class Case:
    op: str
    facts: dict
    methods: dict[str, Callable[[], object]]
    bytes: int = 0
    operations: int = 0
    wrong: Callable[[object], int] | None = None  # how many of CHECKED results differ from the exact ones
    notes: dict = field(default_factory=dict)


def cases(device: torch.device, shapes=SHAPES, steps=STEPS, dtypes=DTYPES) -> Iterator[Callable[[], Case]]:
    """Each builds its tensors when it is called, so that one case is in memory at a time."""
    for dtype in dtypes:
        yield from (partial(search, device, shape, dtype) for shape in shapes)
    for shape in steps:
        for indices in ("uniform", "zipf", "one code"):
            yield partial(code_sums, device, shape, indices)
        yield partial(several, device, shape)
        yield partial(ema_update, device, shape)
        for gradient in ("straight_through", "rotation"):
            yield partial(backward, device, shape, gradient)
        yield partial(step, device, shape)


def ours(op: str, device: torch.device, call: Callable[..., object], reference: bool = True) -> dict:
    """call(implementation=...) of every implementation that the device has, by name."""
    names = vqops.implementations()[op][device.type]
    return {f"vqops {name}": partial(call, implementation=name) for name in names if reference or name != "reference"}


def in_both_orders(methods: dict) -> dict:
    """Sums by code also in the order of torch.use_deterministic_algorithms; the reference has no other."""
    kernels = {name: call for name, call in methods.items() if name != "vqops reference"}
    return methods | {f"{name}, deterministic": partial(deterministic, call) for name, call in kernels.items()}


def deterministic(call: Callable[[], object]) -> object:
    """The mode without what it writes into fresh memory, which is no part of the ops."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def facts_of(shape, dtype) -> dict:
    return {**dict(zip("NDK", shape, strict=True)), "dtype": str(dtype).removeprefix("torch.")}


def search(device, shape, dtype) -> Case:
    N, D, K = shape
    x, codebook = torch.randn(N, D, device=device, dtype=dtype), torch.randn(K, D, device=device)
    methods = ours("nearest", device, partial(vqops.nearest, x, codebook), reference=N * D * K <= SLOW)
    if dtype == torch.float32:
        methods["addmm + argmin"] = partial(plain_search, x, codebook, False)
        methods["addmm + argmin, TF32"] = partial(plain_search, x, codebook, True)
        methods["cdist + argmin"] = partial(cdist_search, x, codebook)
    methods |= peers_of_search(x, codebook)
    rows = torch.randint(N, (CHECKED,), device=device)
    exact = vqops.nearest(x[rows], codebook, implementation="reference")
    operations, moved = 2 * N * D * K, N * (D * x.element_size() + 8) + 4 * K * D
    tiers = {
        name: vqops.search_statistics(x, codebook, implementation=name).tolist()
        for name in vqops.implementations()["search_statistics"][device.type]
        if name != "reference"
    }
    wrong = partial(different, rows, exact)
    return Case("nearest", facts_of(shape, dtype), methods, moved, operations, wrong, {"tiers": tiers})


def several(device, shape) -> Case:
    N, D, K = shape
    x, codebook = torch.randn(N, D, device=device), torch.randn(K, D, device=device)
    call, half = partial(vqops.nearest_topk, x, codebook, SEVERAL), codebook.square().sum(1) / 2
    methods = ours("nearest_topk", device, call, reference=N * D * K <= SLOW)

    def plain():
        parts = x.split(max(1, SCORES // K))
        found = [torch.addmm(half, rows, codebook.mT, alpha=-1).topk(SEVERAL, largest=False)[1] for rows in parts]
        return (torch.cat(found),)

    methods["addmm + topk"] = plain
    rows = torch.randint(N, (CHECKED,), device=device)
    exact = vqops.nearest_topk(x[rows], codebook, SEVERAL, implementation="reference")[0]

    def wrong(found):
        return int((found[0][rows] != exact).any(1).sum())

    operations, moved = 2 * N * D * K, N * (4 * D + 12 * SEVERAL) + 4 * K * D
    return Case("nearest_topk", facts_of(shape, x.dtype), methods, moved, operations, wrong)


def different(rows: Tensor, exact: Tensor, found: Tensor) -> int:
    return int((found.flatten()[rows] != exact).sum())


def plain_search(x: Tensor, codebook: Tensor, tf32: bool) -> Tensor:
    half, step = codebook.square().sum(1) / 2, max(1, SCORES // codebook.shape[0])
    with tensor_float_32(tf32):
        return torch.cat([torch.addmm(half, rows, codebook.mT, alpha=-1).argmin(1) for rows in x.split(step)])


def cdist_search(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cat([torch.cdist(rows, codebook).argmin(1) for rows in x.split(max(1, SCORES // codebook.shape[0]))])


def peers_of_search(x: Tensor, codebook: Tensor) -> dict:
    try:
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton
    except ImportError:
        return {}
    # It wants both of one dtype; float32 goes through TF32 there.
    points, centroids = x[None], codebook.to(x.dtype)[None]
    return {"flash-kmeans": lambda: euclid_assign_triton(points, centroids, points.float().square().sum(-1))}


def indices_of(kind: str, N: int, K: int, device) -> Tensor:
    if kind == "one code":
        return torch.full((N,), K // 2, device=device)
    if kind == "uniform":
        return torch.randint(K, (N,), device=device)
    ranks = torch.arange(1, K + 1, device=device, dtype=torch.float64)
    cumulative = (1 / ranks).cumsum(0)
    places = torch.rand(N, device=device, dtype=torch.float64) * cumulative[-1]
    return torch.randperm(K, device=device)[torch.searchsorted(cumulative, places).clamp_max(K - 1)]


def index_add(x: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    counts = torch.zeros(K, device=x.device, dtype=torch.int64).index_add_(0, indices, torch.ones_like(indices))
    return counts, torch.zeros(K, x.shape[1], device=x.device).index_add_(0, indices, x)


def code_sums(device, shape, kind) -> Case:
    N, D, K = shape
    x, indices = torch.randn(N, D, device=device), indices_of(kind, N, K, device)
    # Past the Python checks, which read the indices once more.
    methods = in_both_orders(
        {
            f"vqops {name}": partial(getattr(torch.ops.vqops, f"code_sums_{name}"), x[None], indices[None], K)
            for name in vqops.implementations()["code_sums"][device.type]
        }
    )
    methods["index_add_"] = partial(index_add, x, indices, K)
    exact = torch.zeros(K, D, device=device, dtype=torch.float64).index_add_(0, indices, x.double())
    bound = 1e-5 * torch.zeros_like(exact).index_add_(0, indices, x.double().abs()) + 1e-6

    def wrong(found):
        return int(((found[1].reshape(K, D) - exact).abs() > bound).sum())

    facts = {**facts_of(shape, x.dtype), "indices": kind}
    return Case("code_sums", facts, methods, N * (4 * D + 8) + K * (4 * D + 8), wrong=wrong)


def ema_update(device, shape) -> Case:
    _, D, K = shape
    size, average, embed = torch.rand(1, K, device=device) + 1, *torch.randn(2, 1, K, D, device=device)
    counts, sums = torch.randint(9, (1, K), device=device), torch.randn(1, K, D, device=device)
    decay = torch.tensor(0.99, device=device)
    call = partial(vqops.ema_update_, size, average, embed, counts, sums, decay)

    def plain():
        size.lerp_(counts.float(), 0.01)
        average.lerp_(sums, 0.01)
        total = size.sum()
        embed.copy_(average / ((size + 1e-5) / (total + K * 1e-5) * total)[..., None])

    methods = {**ours("ema_update_", device, call), "lerp_": plain}
    return Case("ema_update_", facts_of(shape, embed.dtype), methods, 20 * K * D)


def backward(device, shape, gradient) -> Case:
    N, D, K = shape
    x, g = torch.randn(2, 1, N, D, device=device)
    codebook = torch.randn(1, K, D, device=device)
    indices, error = torch.randint(K, (1, N), device=device), torch.full((1, N), 1 / N, device=device)
    arguments = (g, error, x, codebook, indices, None, "euclidean", gradient)
    methods = {
        f"vqops {name}": partial(getattr(torch.ops.vqops, f"quantize_backward_{name}"), *arguments)
        for name in vqops.implementations()["quantize_backward"][device.type]
    }
    few = [a[:, :CHECKED] for a in (g, error, x, indices)]
    exact = torch.ops.vqops.quantize_backward_reference(*few[:3], codebook, few[3], None, "euclidean", gradient)[0]

    def wrong(found):
        return int(((found[0][:, :CHECKED] - exact).abs() > 1e-4 * exact.abs().max()).any(-1).sum())

    facts = {**facts_of(shape, x.dtype), "gradient": gradient}
    return Case("quantize_backward", facts, methods, 12 * N * D, wrong=wrong)


def step(device, shape) -> Case:
    """Search, quantize, gradient to x, EMA update."""
    N, D, K = shape
    x, g = torch.randn(1, N, D, device=device), torch.randn(1, N, D, device=device)
    codebook = torch.randn(1, K, D, device=device)
    size, average = torch.ones(1, K, device=device), codebook.clone()
    decay, error = torch.tensor(0.99, device=device), torch.full((1, N), 1 / N, device=device)

    def fused(implementation):
        op = {name: getattr(torch.ops.vqops, f"{name}_{implementation}") for name in FUSED}
        _, indices, _, counts, sums, old = op["quantize"](
            x, codebook, None, None, "euclidean", "straight_through", True
        )
        op["quantize_backward"](g, error, x, old, indices)
        op["ema_update_"](size, average, codebook, counts, sums, decay)

    def plain():
        indices = plain_search(x[0], codebook[0], False)
        chosen = codebook[0][indices]
        difference = x[0] - chosen
        difference.square().sum(1)
        gradient = g[0] + 2 * difference * error[0][:, None]
        counts, sums = index_add(x[0], indices, K)
        size.lerp_(counts.float()[None], 0.01)
        average.lerp_(sums[None], 0.01)
        total = size.sum()
        codebook.copy_(average / ((size + 1e-5) / (total + K * 1e-5) * total)[..., None])
        return gradient

    names = set.intersection(*(set(vqops.implementations()[op][device.type]) for op in FUSED))
    methods = in_both_orders({f"vqops {name}": partial(fused, name) for name in sorted(names)})
    methods["plain PyTorch"] = plain
    if device.type == "cuda":
        methods["plain PyTorch, torch.compile"] = torch.compile(plain)
    methods |= incumbent_step(x, g, K)
    return Case("training step", facts_of(shape, x.dtype), methods, operations=2 * N * D * K)


FUSED = ("quantize", "quantize_backward", "ema_update_")


def incumbent_step(x: Tensor, g: Tensor, K: int) -> dict:
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        return {}
    module = VectorQuantize(x.shape[-1], K, rotation_trick=False).to(x.device)
    input = x.clone().requires_grad_()

    def call():
        input.grad = None
        quantized, _, loss = module(input)
        torch.autograd.backward([quantized, loss.sum()], [g, None])

    return {"vector-quantize-pytorch": call}
