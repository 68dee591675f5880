"""What is measured: an op or a whole step, at a shape, in a dtype and direction, by vqops and by every peer.

A case prepares its data once, and each method as late as possible. The same cases serve `python -m benchmarks` and
`pytest benchmarks`.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

import vqops
from benchmarks import baselines, correctness
from benchmarks.baselines import Call, Unavailable, leaf
from benchmarks.shapes import SHAPES, Shape

DECAY = 0.99
ALL = tuple(SHAPES)
STATISTICS = ("VQ-VAE-2 bottom", "VQGAN f16", "VQGAN f16 16384", "LlamaGen")
STEPS = ("VQ-VAE-2 bottom", "VQGAN f16", "LlamaGen", "EnCodec", "DAC", "Mimi", "RQ-VAE")
HALVES = {torch.float16, torch.bfloat16}


@dataclass
class Case:
    """`methods` make the call to be timed. `check` looks at its result: counts of wrong indices, or WrongResult."""

    op: str
    shape: Shape
    device: str
    methods: dict[str, Callable[[], Call]]
    check: Callable[[object], dict]
    ceiling: str  # "gemm" or "copy": what bounds it
    work: float  # floating-point operations, or bytes that have to be read and written
    dtype: torch.dtype = torch.float32
    direction: str = "forward"
    sizes: dict = field(default_factory=dict)

    def __post_init__(self):
        self.sizes = self.sizes or {"N": self.shape.N(self.device), "D": self.shape.D, "K": self.shape.K}

    def describe(self) -> dict:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"op": self.op, "shape": self.shape.name, **self.sizes, "dtype": dtype, "direction": self.direction}


def ours(op: str, device: str, make: Callable[..., Call], every: bool) -> dict[str, Callable[[], Call]]:
    """vqops as it selects by itself, and with `every` each implementation by name."""
    methods = {"vqops": make}
    if every:
        names = vqops.implementations()[op][device]
        methods |= {f"vqops {name}": partial(make, implementation=name) for name in names}
    return methods


@cache
def exact_indices(shape: Shape, device: str, dtype: torch.dtype, offset: float, spread: float) -> Tensor:
    """Of the first rows, as many as the check affords."""
    x, codebook = shape.data(device, dtype, offset, spread)
    return correctness.exact_indices(x[correctness.checked_rows(x, codebook)], codebook)


def nearest(
    shape: Shape, device: str, dtype=torch.float32, offset: float = 0.0, spread: float = 1.0, every: bool = False
) -> Case:
    x, codebook = shape.data(device, dtype, offset, spread)
    rounding_only = offset == 0 and dtype not in HALVES  # else plain PyTorch may be far off, which is what is counted

    def check(found: Tensor) -> dict:
        exact = exact_indices(shape, device, dtype, offset, spread)
        rows = slice(0, len(exact))
        wrong, excess = correctness.wrong_indices(found[rows].to(x.device), exact, x[rows], codebook)
        if excess > correctness.GROSS and rounding_only:
            raise correctness.WrongResult(f"{wrong} of {len(exact)} codes are not near the nearest")
        return {"wrong": wrong, "checked": len(exact), "excess": float(f"{excess:.2g}")}

    def call(implementation=None):
        return partial(vqops.nearest, x, codebook, implementation=implementation)

    methods = ours("nearest", device, call, every)
    methods["vqops, prepared"] = lambda: partial(vqops.nearest, x, vqops.prepare(codebook))
    methods |= {name: partial(prepare, x, codebook) for name, prepare in baselines.SEARCH.items()}
    return Case("nearest", shape, device, methods, check, "gemm", 2.0 * x.shape[0] * codebook.numel(), dtype)


def code_sums(shape: Shape, device: str, dtype=torch.float32, every: bool = False) -> Case:
    x, _ = shape.data(device, dtype)
    indices = torch.randint(shape.K, (len(x),), device=device, generator=torch.Generator(device).manual_seed(0))
    sums = torch.zeros(shape.K, shape.D, device=device, dtype=torch.float64).index_add_(0, indices, x.double())
    counts = torch.bincount(indices, minlength=shape.K)

    def check(found: tuple[Tensor, Tensor]) -> dict:
        correctness.same_statistics(found, counts, sums)
        return {}

    def call(implementation=None):
        return partial(vqops.code_sums, x, indices, shape.K, implementation=implementation)

    methods = ours("code_sums", device, call, every)
    methods |= {name: partial(prepare, x, indices, shape.K) for name, prepare in baselines.SUMS.items()}
    moved = x.numel() * x.element_size() + 8 * len(x) + 4 * sums.numel()
    return Case("code_sums", shape, device, methods, check, "copy", moved, dtype)


def ema_update(shape: Shape, device: str, every: bool = False) -> Case:
    _, codebook = shape.data(device)
    counts = torch.randint(1, 5, (shape.K,), device=device, generator=torch.Generator(device).manual_seed(0))
    expected = codebook.double()
    baselines.ema_update(torch.ones_like(expected[:, 0]), expected.clone(), expected, counts, expected.clone(), DECAY)

    def check(found: Tensor) -> dict:  # the codes after the first step
        correctness.close("codes", found, expected.view_as(found), 1e-5 * float(expected.abs().max()))
        return {}

    def call(implementation=None):
        state = [torch.ones(1, shape.K, device=device), codebook[None].clone(), codebook[None].clone()]

        def update():
            vqops.ema_update_(*state, counts[None], codebook[None], DECAY, implementation=implementation)
            return state[2]

        return update

    def plain():
        state = [torch.ones(shape.K, device=device), codebook.clone(), codebook.clone()]

        def update():
            baselines.ema_update(*state, counts, codebook, DECAY)
            return state[2]

        return update

    methods = ours("ema_update_", device, call, every) | {"PyTorch": plain}
    moved = 4 * 4 * codebook.numel()  # sums read, averages read and written, codes written
    return Case("ema_update_", shape, device, methods, check, "copy", moved)


def quantize_forward(shape: Shape, device: str, dtype=torch.float32, every: bool = False) -> Case:
    """Search, values and error; the peer is plain PyTorch with the same outputs."""
    x, codebook = shape.data(device, dtype)
    search = nearest(shape, device, dtype)
    half = baselines.half_squares(codebook)

    def check(found) -> dict:
        quantized, indices, error = found[:3]
        correctness.close("quantized", quantized, codebook[indices], 0.0)
        expected = (x.double() - codebook[indices].double()).square().sum(1)
        correctness.close("error", error, expected, 1e-5 * float(expected.max()))
        return search.check(indices)

    def call(implementation=None):
        return partial(vqops.quantize, x, codebook, implementation=implementation)

    def plain():
        indices = baselines.addmm_argmin(x, codebook, half)
        chosen = codebook[indices]
        return chosen, indices, (x - chosen).square().sum(1)

    methods = ours("quantize", device, call, every) | {"PyTorch, addmm + argmin": lambda: plain}
    return Case("quantize", shape, device, methods, check, "gemm", search.work, dtype)


def quantize_backward(shape: Shape, device: str, gradient: str = "straight_through", every: bool = False) -> Case:
    """From the gradients of values and loss to that of x."""
    x, codebook = shape.data(device)
    grad = torch.randn(x.shape, device=device, generator=torch.Generator(device).manual_seed(1))
    indices = vqops.nearest(x, codebook)
    expected = gradient_of(turned(leaf(x), codebook[indices], gradient), grad)()

    def check(found: Tensor) -> dict:
        correctness.close("gradients", found, expected, 1e-4 * float(expected.abs().max()))
        return {}

    def call(implementation=None):
        input = leaf(x)
        found = vqops.quantize(input, codebook, gradient=gradient, implementation=implementation)
        return gradient_of((input, found.quantized, found.error.mean() / shape.D), grad)

    def plain():
        return gradient_of(turned(leaf(x), codebook[indices], gradient), grad)

    methods = ours("quantize", device, call, every) | {"PyTorch": plain}
    moved = 4 * 4 * x.numel()  # both x and its gradient, the gradient coming in, the code chosen
    op = f"quantize, {gradient.replace('_', '-')}"
    return Case(op, shape, device, methods, check, "copy", moved, direction="backward")


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


def training_step(shape: Shape, device: str) -> Case:
    """VectorQuantize: forward, EMA update and backward, straight-through."""
    x, codebook = shape.data(device)
    grad = torch.randn(x.shape, device=device, generator=torch.Generator(device).manual_seed(1))
    search = nearest(shape, device)

    def module() -> Call:
        quantizer = vqops.VectorQuantize(shape.D, shape.K, decay=DECAY, rotation_trick=False).to(device)
        baselines.load_codes(quantizer, codebook)
        return partial(baselines.module_step, quantizer, leaf(x), grad)

    methods = {"vqops": module, **baselines.training_steps(x, codebook, grad, DECAY)}
    return Case("training step", shape, device, methods, step_check(search), "gemm", search.work, direction="both")


def step_check(search: Case) -> Callable[[object], dict]:
    """Looks at the first step: the codebook has moved by the later ones."""

    def check(found) -> dict:
        quantized, indices, loss = found
        if not bool(torch.isfinite(quantized).all()) or not bool(torch.isfinite(loss)):
            raise correctness.WrongResult("values or loss are not finite")
        return search.check(indices)

    return check


def evaluation(shape: Shape, device: str) -> Case:
    """VectorQuantize in eval: tokens of a trained model."""
    x, codebook = shape.data(device)
    search = nearest(shape, device)

    def module(make: Callable) -> Call:
        quantizer = make()
        baselines.load_codes(quantizer, codebook)
        quantizer.eval()

        @torch.no_grad()
        def call():
            return quantizer(x[None])[1][0]

        return call

    methods = {
        "vqops": partial(module, lambda: vqops.VectorQuantize(shape.D, shape.K).to(device)),
        "vector-quantize-pytorch": partial(module, partial(baselines.incumbent, codebook)),
    }
    return Case("evaluation", shape, device, methods, search.check, "gemm", search.work)


def system_step(device: str, size: int = 256, batch: int = 1, quick: bool = False) -> Case:
    """A training step of the VQ-VAE-2 network of this package, with its quantizers, the incumbent's, and none."""
    try:
        from vqops.vqvae2 import VQVAE2, VQVAE2Config
    except ImportError as error:
        raise Unavailable(f"vqops[train] is not installed ({error.name})") from None
    config = VQVAE2Config(channels=32 if quick else 128)
    generator = torch.Generator(device).manual_seed(0)
    images = torch.rand(batch, config.image_channels, size, size, generator=generator, device=device)
    torch.manual_seed(0)
    first = VQVAE2(config).to(device)
    with torch.no_grad():
        first(images)  # k-means gives the first codes
        state = deepcopy(first.state_dict())
        expected = first(images).indices

    def incumbent() -> torch.nn.Module:
        options = {"accept_image_fmap": True, "decay": config.decay, "commitment_weight": config.commitment}
        code = torch.empty(config.codebook_size, config.code_dim, device=device)
        return baselines.incumbent(code, rotation_trick=False, **options)

    def make(quantizer: Callable[[], torch.nn.Module] | None) -> Call:
        model = VQVAE2(config).to(device)
        model.load_state_dict(state)
        if quantizer is not None:
            for level, ours in enumerate(model.quantizers):
                model.quantizers[level] = quantizer()
                if list(model.quantizers[level].state_dict()):
                    model.quantizers[level].load_state_dict(ours.state_dict())
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

        def step():
            output = model(images)
            loss = torch.nn.functional.mse_loss(output.reconstruction, images) + output.codebook_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return output.indices

        return step

    def check(found) -> dict:  # the convolutions are the same, and the search of vqops is exact
        wrong = sum(int((a != b).sum()) for a, b in zip(found, expected, strict=True) if a.dim() == b.dim())
        checked = sum(b.numel() for a, b in zip(found, expected, strict=True) if a.dim() == b.dim())
        return {"wrong": wrong, "checked": checked} if checked else {}

    methods = {"vqops": partial(make, None), "vector-quantize-pytorch": partial(make, incumbent)}
    methods["no quantizer"] = partial(make, Unquantized)
    N = sum(batch * height * width for height, width in config.code_sizes(size, size))
    shape = Shape(f"VQ-VAE-2, {size} px", "", N, config.code_dim, config.codebook_size, 1, 1)
    work = 2.0 * N * config.code_dim * config.codebook_size
    return Case("VQ-VAE-2 training step", shape, device, methods, check, "", work, direction="both")


class Unquantized(torch.nn.Module):
    """In place of a quantizer, to see what the convolutions alone take."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, torch.zeros((), dtype=torch.int64, device=x.device), x.new_zeros(())
