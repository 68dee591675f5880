"""Cases of residual quantization: all levels as one op beside the same levels one by one, and their searches alone."""

from functools import partial

import torch
from torch import Tensor

import vqops
from benchmarks import correctness
from benchmarks.baselines import Call
from benchmarks.cases import Case, by_name
from benchmarks.shapes import Shape

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

        def searches() -> Tensor:
            return torch.stack([vqops.nearest(*each) for each in zip(rests, codebooks, strict=True)], -1)

        work = 2.0 * N * D * K * levels
        methods = {"vqops": call} | (by_name(("residual_quantize",), device, call, work) if every else {})
        return methods | {"vqops.quantize a level": lambda: one_by_one, "searches alone": lambda: searches}, check

    work = {"gemm": 2.0 * N * D * K * levels, "copy": 2 * 4 * N * D + 4 * levels * K * D + 8 * levels * N}
    facts = {"levels": levels, "sums": code_sums}
    return Case("residual_quantize", shape, device, build, work, facts=facts)


def data(shape: Shape, device: str, levels: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Rows, a codebook a level of what is left there, and what is left."""
    x, _ = shape.data(device)
    generator, codebooks, rests = torch.Generator(device).manual_seed(2), [], [x]
    for _ in range(levels):
        some = torch.randint(len(x), (shape.K,), generator=generator, device=device)
        codebooks.append(SHRINKS * rests[-1][some])
        rests.append(rests[-1] - codebooks[-1][vqops.nearest(rests[-1], codebooks[-1])])
    return x, codebooks, rests[:-1]
