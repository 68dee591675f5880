"""The cases that are measured: an op at a shape, in a dtype and direction, by vqops and by every peer; modules.py has
those of whole modules.

A case prepares its data once, and each method as late as possible. The same cases serve `python -m benchmarks` and
`pytest benchmarks`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

import torch
from torch import Tensor

import vqops
from benchmarks import baselines, correctness
from benchmarks.baselines import Call, leaf
from benchmarks.shapes import SHAPES, Shape

DECAY = 0.99
ALL = tuple(SHAPES)
STATISTICS = ("VQ-VAE-2 bottom", "VQGAN f16", "VQGAN f16 16384", "LlamaGen")
HALVES = {torch.float16, torch.bfloat16}
SEVERAL = 8  # codes a vector, of nearest_topk
SLOW = 2**33  # operations above which the reference, float64 throughout, is the oracle alone

Methods = dict[str, Callable[[], Call]]
Check = Callable[[object], dict]


@dataclass
class Case:
    """A case and its device. Tensors are made when methods or check are first asked for.

    `methods` make the calls to be timed. `check` looks at a result: counts of wrong indices, or WrongResult.
    """

    op: str
    shape: Shape
    device: str
    build: Callable[[], tuple[Methods, Check]]
    work: dict[str, float]  # "gemm": floating-point operations, "copy": bytes to be read and written; first what bounds
    dtype: torch.dtype = torch.float32
    direction: str = "forward"
    facts: dict = field(default_factory=dict)

    @cached_property
    def built(self) -> tuple[Methods, Check]:
        return self.build()

    @property
    def methods(self) -> Methods:
        return self.built[0]

    @property
    def check(self) -> Check:
        return self.built[1]

    def describe(self) -> dict:
        found = {"op": self.op, "shape": self.shape.name}
        found |= {"N": self.shape.N(self.device), "D": self.shape.D, "K": self.shape.K}
        found |= {"dtype": str(self.dtype).removeprefix("torch."), "direction": self.direction}
        return found | self.facts


def by_name(ops: tuple[str, ...], device: str, make: Callable[[str], Call], operations: float = 0.0) -> Methods:
    """make(name) of every implementation that all of the ops have on the device."""
    found = vqops.implementations()
    names = [name for name in found[ops[0]][device] if all(name in found[op][device] for op in ops)]
    return {f"vqops {name}": partial(make, name) for name in names if name != "reference" or operations <= SLOW}


def in_both_orders(methods: Methods) -> Methods:
    """Sums by code also in the order of torch.use_deterministic_algorithms; the reference has no other."""
    kernels = {f"{name}, deterministic": make for name, make in methods.items() if name != "vqops reference"}
    return methods | {name: lambda make=make: partial(deterministic, make()) for name, make in kernels.items()}


def deterministic(call: Call) -> object:
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


def search_work(shape: Shape, device: str, dtype: torch.dtype, written: int) -> dict[str, float]:
    """Products and bytes of a search that writes so many bytes a vector."""
    N, D, K = shape.N(device), shape.D, shape.K
    return {"gemm": 2.0 * N * D * K, "copy": (N + K) * D * dtype.itemsize + N * written}


@cache
def exact_indices(
    shape: Shape, device: str, dtype=torch.float32, offset: float = 0.0, spread: float = 1.0
) -> Tensor:
    """Of as many rows as the check affords."""
    x, codebook = shape.data(device, dtype, offset, spread)
    return correctness.exact_indices(x[correctness.checked_rows(x, codebook)], codebook)


def check_of_indices(x: Tensor, codebook: Tensor, right: Callable[[], Tensor], rounding_only: bool = True) -> Check:
    """`right`: the indices of checked_rows, asked for once the first result is there."""
    rows = correctness.checked_rows(x, codebook)

    def check(found: Tensor) -> dict:
        exact = right()
        wrong, excess = correctness.wrong_indices(found[rows].to(x.device), exact, x[rows], codebook)
        if excess > correctness.GROSS and rounding_only:
            raise correctness.WrongResult(f"{wrong} of {len(exact)} codes are not near the nearest")
        return {"wrong": wrong, "checked": len(exact), "excess": float(f"{excess:.2g}")}

    return check


def nearest(
    shape: Shape, device: str, dtype=torch.float32, offset: float = 0.0, spread: float = 1.0, every: bool = False
) -> Case:
    """`every`, here and below: also each implementation by name."""
    work = search_work(shape, device, dtype, 8)
    facts = {"offset": offset} if offset else {"spread": spread} if spread != 1 else {}

    def build():
        x, codebook = shape.data(device, dtype, offset, spread)

        # As autocast gives them: rows in half precision, codes in float32.
        ours = codebook.float() if every and dtype in HALVES else codebook

        def call(implementation=None):
            return partial(vqops.nearest, x, ours, implementation=implementation)

        methods = {"vqops": call} | (by_name(("nearest",), device, call, work["gemm"]) if every else {})
        methods["vqops, prepared"] = lambda: partial(vqops.nearest, x, vqops.prepare(codebook))
        methods |= {name: partial(prepare, x, codebook) for name, prepare in baselines.SEARCH.items()}
        # Half precision and moved data: plain PyTorch may be far off there, which is what is counted.
        rounding_only = offset == 0 and dtype not in HALVES
        right = partial(exact_indices, shape, device, dtype, offset, spread)
        return methods, check_of_indices(x, codebook, right, rounding_only)

    return Case("nearest", shape, device, build, work, dtype, facts=facts)


def nearest_topk(shape: Shape, device: str, every: bool = False) -> Case:
    work = search_work(shape, device, torch.float32, 12 * SEVERAL)

    def build():
        x, codebook = shape.data(device)
        rows = correctness.checked_rows(x, codebook)
        exact = vqops.nearest_topk(x[rows], codebook, SEVERAL, implementation="reference")[0]

        def check(found) -> dict:
            return {"wrong": int((found[0][rows] != exact).any(1).sum()), "checked": len(exact)}

        def call(implementation=None):
            return partial(vqops.nearest_topk, x, codebook, SEVERAL, implementation=implementation)

        def plain():
            half = baselines.half_squares(codebook)
            return lambda: (baselines.addmm_topk(x, codebook, half, SEVERAL),)

        methods = {"vqops": call} | (by_name(("nearest_topk",), device, call, work["gemm"]) if every else {})
        return methods | {"addmm + topk": plain}, check

    return Case("nearest_topk", shape, device, build, work)


def sample(shape: Shape, device: str, every: bool = False) -> Case:
    """PyTorch has noise of its own: not checked."""
    work = search_work(shape, device, torch.float32, 8)

    def build():
        x, codebook = shape.data(device)
        temperature = torch.tensor(typical_temperature(shape), device=device)
        given = codebook, temperature, torch.tensor([3, 0], device=device)
        count = len(x[correctness.checked_rows(x, codebook)])  # the first, since rows are numbered
        exact = vqops.sample(x[:count], *given, implementation="reference")

        def check(found) -> dict:
            if isinstance(found, tuple):
                return {}
            return {"wrong": int((found[:count] != exact).sum()), "checked": count}

        def call(implementation=None):
            return partial(vqops.sample, x, *given, implementation=implementation)

        methods = {"vqops": call} | (by_name(("sample",), device, call, work["gemm"]) if every else {})
        return methods | {"cdist + Gumbel + argmax": lambda: lambda: (baselines.gumbel_argmax(x, *given[:2]),)}, check

    return Case("sample", shape, device, build, work)


def typical_temperature(shape: Shape) -> float:
    """A hundredth of the typical distance, where some codes compete."""
    return 0.01 * (2 if shape.unit_norm else 2 * shape.D) ** 0.5


def search_statistics(shape: Shape, device: str) -> Case:
    """How many rows each tier of the search decides, by implementation: why it takes what it takes."""
    work = search_work(shape, device, torch.float32, 0)

    def build():
        x, codebook = shape.data(device)

        def check(found: Tensor) -> dict:
            if int(found.sum()) != len(x):
                raise correctness.WrongResult("the tiers do not hold all rows")
            return {"tiers": found.tolist()}

        def call(name):
            return partial(vqops.search_statistics, x, codebook, implementation=name)

        return by_name(("search_statistics",), device, call, work["gemm"]), check

    return Case("search_statistics", shape, device, build, work)


def codes_of_rows(kind: str, N: int, K: int, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    if kind == "one code":
        return torch.full((N,), K // 2, device=device)
    if kind == "uniform":
        return torch.randint(K, (N,), device=device, generator=generator)
    cumulative = (1 / torch.arange(1, K + 1, device=device, dtype=torch.float64)).cumsum(0)  # Zipf's law
    places = torch.rand(N, device=device, dtype=torch.float64, generator=generator) * cumulative[-1]
    ranks = torch.searchsorted(cumulative, places).clamp_max(K - 1)
    return torch.randperm(K, device=device, generator=generator)[ranks]


def code_sums(shape: Shape, device: str, dtype=torch.float32, kind: str = "uniform", every: bool = False) -> Case:
    N, D, K = shape.N(device), shape.D, shape.K

    def build():
        x, _ = shape.data(device, dtype)
        indices = codes_of_rows(kind, N, K, device)
        zeros = torch.zeros(K, D, device=device, dtype=torch.float64)
        sums, sizes = (zeros.index_add(0, indices, values) for values in (x.double(), x.double().abs()))
        counts = torch.bincount(indices, minlength=K)

        def check(found: tuple[Tensor, Tensor]) -> dict:
            correctness.same_statistics(found, counts, sums, sizes)
            return {}

        def call(name):  # past the Python checks, which read the indices once more
            return partial(getattr(torch.ops.vqops, f"code_sums_{name}"), x[None], indices[None], K)

        methods = {"vqops": lambda: partial(vqops.code_sums, x, indices, K)}
        methods |= in_both_orders(by_name(("code_sums",), device, call)) if every else {}
        methods |= {name: partial(prepare, x, indices, K) for name, prepare in baselines.SUMS.items()}
        return methods, check

    moved = N * (D * dtype.itemsize + 8) + 4 * K * D
    return Case("code_sums", shape, device, build, {"copy": moved}, dtype, facts={"indices": kind})


def ema_update(shape: Shape, device: str, every: bool = False) -> Case:
    def build():
        _, codebook = shape.data(device)
        counts = torch.randint(1, 5, (shape.K,), device=device, generator=torch.Generator(device).manual_seed(0))
        expected = codebook.double()
        ones = torch.ones_like(expected[:, 0])
        baselines.ema_update(ones, expected.clone(), expected, counts, expected.clone(), DECAY)

        def check(found: Tensor) -> dict:  # the codes after the first step
            correctness.close("codes", found, expected.view_as(found), 1e-5 * float(expected.abs().max()))
            return {}

        def updates(update: Callable[..., None], state: list[Tensor], *statistics) -> Call:
            def call():
                update(*state, *statistics)
                return state[2]

            return call

        def call(implementation=None):
            update = partial(vqops.ema_update_, implementation=implementation)
            decay = torch.tensor(DECAY, device=device) if implementation else DECAY  # by name, a CUDA graph can hold it
            return updates(update, [t[None] for t in ema_state(codebook)], counts[None], codebook[None], decay)

        methods = {"vqops": call} | (by_name(("ema_update_",), device, call) if every else {})
        methods["PyTorch"] = lambda: updates(baselines.ema_update, ema_state(codebook), counts, codebook, DECAY)
        return methods, check

    moved = 4 * 4 * shape.K * shape.D  # sums read, averages read and written, codes written
    return Case("ema_update_", shape, device, build, {"copy": moved})


def ema_state(codebook: Tensor) -> list[Tensor]:
    """Cluster sizes of 1, averages equal to the codes, codes: a copy for each method."""
    return [torch.ones(len(codebook), device=codebook.device), codebook.clone(), codebook.clone()]


def quantize_forward(shape: Shape, device: str, dtype=torch.float32, every: bool = False) -> Case:
    """Search, values and error; the peer is plain PyTorch with the same outputs."""
    work = search_work(shape, device, dtype, shape.D * dtype.itemsize + 12)

    def build():
        x, codebook = shape.data(device, dtype)
        half = baselines.half_squares(codebook)
        check_indices = check_of_indices(
            x, codebook, partial(exact_indices, shape, device, dtype), dtype not in HALVES
        )

        def check(found) -> dict:
            quantized, indices, error = found[:3]
            correctness.close("quantized", quantized, codebook[indices], 0.0)
            expected = (x.double() - codebook[indices].double()).square().sum(1)
            correctness.close("error", error, expected, 1e-5 * float(expected.max()))
            return check_indices(indices)

        def call(implementation=None):
            return partial(vqops.quantize, x, codebook, implementation=implementation)

        def plain():
            indices = baselines.addmm_argmin(x, codebook, half)
            chosen = codebook[indices]
            return chosen, indices, (x - chosen).square().sum(1)

        methods = {"vqops": call} | (by_name(("quantize",), device, call, work["gemm"]) if every else {})
        return methods | {"PyTorch, addmm + argmin": lambda: plain}, check

    return Case("quantize", shape, device, build, work, dtype)


def quantize_backward(shape: Shape, device: str, gradient: str = "straight_through", every: bool = False) -> Case:
    """From the gradients of values and loss to that of x."""
    N, D = shape.N(device), shape.D

    def build():
        x, codebook = shape.data(device)
        grad = gradient_in(x)
        indices = vqops.nearest(x, codebook)
        expected = gradient_of(turned(leaf(x), codebook[indices], gradient), grad)()

        def check(found: Tensor) -> dict:
            correctness.close("gradients", found, expected, 1e-4 * float(expected.abs().max()))
            return {}

        def through_autograd():
            input = leaf(x)
            found = vqops.quantize(input, codebook, gradient=gradient)
            return gradient_of((input, found.quantized, found.error.mean() / D), grad)

        def call(name):
            op = getattr(torch.ops.vqops, f"quantize_backward_{name}")
            of_error = torch.full((1, N), 1 / (N * D), device=device)
            given = (grad[None], of_error, x[None], codebook[None], indices[None], None, "euclidean", gradient)
            return lambda: op(*given)[0][0]

        methods = {"vqops": through_autograd} | (by_name(("quantize_backward",), device, call) if every else {})
        methods["PyTorch"] = lambda: gradient_of(turned(leaf(x), codebook[indices], gradient), grad)
        return methods, check

    moved = 4 * 4 * N * D  # both x and its gradient, the gradient coming in, the code chosen
    facts = {"gradient": gradient}
    return Case("quantize_backward", shape, device, build, {"copy": moved}, direction="backward", facts=facts)


def gradient_in(x: Tensor) -> Tensor:
    return torch.randn(x.shape, device=x.device, generator=torch.Generator(x.device).manual_seed(1))


def turned(x: Tensor, chosen: Tensor, gradient: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, quantized, loss. Rotation as its paper writes it (arXiv 2410.06424, 4.2): lambda (x - 2 r r'x + 2 q' x'x)."""
    if gradient == "straight_through":
        return x, *baselines.straight_through(x, chosen)
    with torch.no_grad():
        length, target = x.norm(dim=1, keepdim=True), chosen.norm(dim=1, keepdim=True)
        a, b, scale = x / length, chosen / target, target / length
        r = torch.nn.functional.normalize(a + b, dim=1)
    along = (x * r).sum(1, keepdim=True), (x * a).sum(1, keepdim=True)
    return x, scale * (x - 2 * along[0] * r + 2 * along[1] * b), (x - chosen).square().mean()


def gradient_of(step: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> Call:
    x, quantized, loss = step
    return lambda: torch.autograd.grad([quantized, loss], [x], [grad, None], retain_graph=True)[0]
