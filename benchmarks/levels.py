"""Cases of residual quantization: all levels as one op beside the same levels one by one, and their searches alone;
steps and evaluations of ResidualVQ."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import vqops
from benchmarks import baselines, correctness
from benchmarks.baselines import Call, leaf
from benchmarks.cases import DECAY, Case, by_name, gradient_in
from benchmarks.shapes import Shape

ROWS_A_CODE = 4  # at least, of which codes are made
SHRINKS = 0.7  # a code, made of what is left of a row: a level leaves less than the one before


def residual_quantize(shape: Shape, device: str, levels: int, code_sums: bool = False, every: bool = False) -> Case:
    """The peer `searches alone` is what no residual quantizer can do without."""
    N, D, K = shape.N(device), shape.D, shape.K

    def build():
        x, codebooks, rests = data(shape, device, levels)
        count = max(1, len(x[correctness.checked_rows(x, codebooks[0])]) // levels)  # the first
        exact = vqops.residual_quantize(x[:count], codebooks, implementation="reference").indices

        def check(found: Tensor) -> dict:
            return {"wrong": int((found[:count] != exact).any(1).sum()), "checked": count}

        def call(implementation=None) -> Call:
            op = partial(vqops.residual_quantize, x, codebooks, code_sums=code_sums, implementation=implementation)
            return lambda: op().indices

        def one_by_one() -> Tensor:
            rest, total, indices = x, torch.zeros_like(x), []
            for codebook in codebooks:
                found = vqops.quantize(rest, codebook, code_sums=code_sums)
                rest, total = rest - found.quantized, total + found.quantized
                indices.append(found.indices)
            return torch.stack(indices, -1)

        work = 2.0 * N * D * K * levels
        methods = {"vqops": call} | (by_name(("residual_quantize",), device, call, work) if every else {})
        methods["vqops.quantize a level"] = lambda: one_by_one
        return methods | {"searches alone": lambda: partial(searches, rests, codebooks)}, check

    work = {"gemm": 2.0 * N * D * K * levels, "copy": 2 * 4 * N * D + 4 * levels * K * D + 8 * levels * N}
    facts = {"levels": levels, "sums": code_sums}
    return Case("residual_quantize", shape, device, build, work, facts=facts)


def searches(rests: list[Tensor], codebooks: list[Tensor]) -> Tensor:
    return torch.stack([vqops.nearest(*each) for each in zip(rests, codebooks, strict=True)], -1)


def of_codes(make: Callable[..., torch.nn.Module], shape: Shape, codebooks: list[Tensor], **options):
    """A ResidualVQ of either package with these codes."""
    sizes = {"dim": shape.D, "codebook_size": shape.K, "num_quantizers": len(codebooks)}
    quantizer = make(**sizes, **options).to(codebooks[0].device)
    for layer, codebook in zip(quantizer.layers, codebooks, strict=True):
        baselines.load_codes(layer, codebook)
    return quantizer


def packages() -> dict[str, Callable[..., torch.nn.Module]]:
    def incumbent(**options):
        return baselines.imported("vector_quantize_pytorch", "vector-quantize-pytorch").ResidualVQ(**options)

    return {"vqops": vqops.ResidualVQ, "vector-quantize-pytorch": incumbent}


def training_step(shape: Shape, device: str, levels: int) -> Case:
    """ResidualVQ with rotations, the default: forward, EMA updates and backward, output and losses."""
    N, D, K = shape.N(device), shape.D, shape.K

    def build():
        x, codebooks, rests = data(shape, device, levels)
        count = max(1, len(x[correctness.checked_rows(x, codebooks[0])]) // levels)
        exact = vqops.residual_quantize(x[:count], codebooks, implementation="reference").indices

        def check(indices: Tensor) -> dict:  # of the first step: the codes have moved by the later ones
            return {"wrong": int((indices[:count] != exact).any(1).sum()), "checked": count}

        def module(make) -> Call:
            quantizer, given, grad = of_codes(make, shape, codebooks, decay=DECAY), leaf(x[None]), gradient_in(x[None])

            def step():
                given.grad = None
                quantized, indices, losses = quantizer(given)
                torch.autograd.backward([quantized, losses.sum()], [grad, None])
                return indices[0]

            return step

        methods = {name: partial(module, make) for name, make in packages().items()}
        return methods | {"searches alone": lambda: partial(searches, rests, codebooks)}, check

    work = {"gemm": 2.0 * N * D * K * levels, "copy": 2 * 4 * N * D + 8 * levels * N}
    return Case("residual training step", shape, device, build, work, direction="both", facts={"levels": levels})


def evaluation(shape: Shape, device: str, levels: int) -> Case:
    """ResidualVQ in eval. By hand: the fewest operations that find, look up and subtract codes."""

    def build():
        x, codebooks, _ = data(shape, device, levels)
        exact = vqops.residual_quantize(x, codebooks, implementation="reference").indices

        def check(found: Tensor) -> dict:
            return {"wrong": int((found != exact).any(1).sum()), "checked": len(x)}

        def module(make) -> Call:
            quantizer = of_codes(make, shape, codebooks).eval()

            @torch.no_grad()
            def call():
                return quantizer(x[None])[1][0]

            return call

        def by_hand() -> Call:
            halves = [baselines.half_squares(codebook) for codebook in codebooks]

            def call():
                rest, total, indices = x, torch.zeros_like(x), []
                for codebook, half in zip(codebooks, halves, strict=True):
                    indices.append(baselines.addmm_argmin(rest, codebook, half))
                    code = codebook[indices[-1]]
                    rest, total = rest - code, total + code
                return torch.stack(indices, -1)

            return call

        ours, theirs = (partial(module, make) for make in packages().values())
        return {"vqops": ours, "addmm + argmin + lookup": by_hand, "vector-quantize-pytorch": theirs}, check

    work = {"gemm": 2.0 * shape.N(device) * shape.D * shape.K * levels, "copy": 4 * levels * shape.K * shape.D}
    return Case("residual evaluation", shape, device, build, work, facts={"levels": levels})


def data(shape: Shape, device: str, levels: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Rows, a codebook a level of what is left there, and what is left. Codes are of other rows where those are few, or
    all codes would be copies of them."""
    N = shape.N(device)
    drawn, _ = Shape.of(max(N, ROWS_A_CODE * shape.K), shape.D, shape.K).data(device)
    generator, codebooks, rests = torch.Generator(device).manual_seed(2), [], [drawn]
    for _ in range(levels):
        some = torch.randperm(len(drawn), generator=generator, device=device)[: shape.K]
        codebooks.append(SHRINKS * rests[-1][some])
        rests.append(rests[-1] - codebooks[-1][vqops.nearest(rests[-1], codebooks[-1])])
    return drawn[:N], codebooks, [rest[:N].clone() for rest in rests[:-1]]
