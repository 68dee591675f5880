"""Cases of soft assignments, forward and backward: ours without a matrix of distances beside plain PyTorch with one."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import vqops
from benchmarks import correctness
from benchmarks.baselines import Call, leaf
from benchmarks.cases import Case, typical_temperature
from benchmarks.shapes import Shape
from vqops.ops.cross_entropy import code_cross_entropy


class Given(NamedTuple):
    x: Tensor  # [N, D]
    codebook: Tensor  # [K, D]
    temperature: float
    targets: Tensor  # [N] int64
    positions: int  # of a sample, whose vectors lie side by side


def cross_entropy(given: Given) -> Tensor:
    return code_cross_entropy(given.x, given.codebook, given.targets)


def plain_cross_entropy(given: Given) -> Tensor:
    return F.cross_entropy(-torch.cdist(given.x, given.codebook), given.targets, reduction="none")


def entropy(given: Given) -> Tensor:
    groups = given.x.unflatten(0, (-1, given.positions)).transpose(0, 1)
    return vqops.assignment_entropy(groups, given.codebook, 1 / given.temperature)


def plain_entropy(given: Given) -> Tensor:
    p = (-torch.cdist(given.x, given.codebook) / given.temperature).softmax(-1)
    q = p.unflatten(0, (-1, given.positions)).mean(0)
    return -(q * q.clamp(min=1e-5).log()).sum(-1)


def soft(given: Given) -> Tensor:
    return vqops.soft_codes(given.x, given.codebook, given.temperature)


def plain_soft(given: Given) -> Tensor:
    return (-torch.cdist(given.x, given.codebook) / given.temperature).softmax(-1) @ given.codebook


OPS = {
    "code_cross_entropy": (cross_entropy, plain_cross_entropy),
    "assignment_entropy": (entropy, plain_entropy),
    "soft_codes": (soft, plain_soft),
}


def assignments(op: str, shape: Shape, device: str) -> Case:
    """One of OPS, with the gradients to vectors and codes."""
    N, D, K = shape.N(device), shape.D, shape.K

    def build():
        x, codebook = shape.data(device)
        generator = torch.Generator(device).manual_seed(2)
        targets = torch.randint(K, (N,), device=device, generator=generator)
        given = Given(x, codebook, typical_temperature(shape), targets, shape.vectors)
        ours, plain = OPS[op]
        in_float64 = given._replace(x=x.double(), codebook=codebook.double())
        exact = step(plain, in_float64)()

        def check(found: list[Tensor]) -> dict:
            for name, value, expected in zip(("values", "gradients of x", "of the codes"), found, exact, strict=True):
                correctness.close(name, value, expected, 1e-4 * float(expected.abs().max()))
            return {}

        return {"vqops": partial(step, ours, given), "PyTorch, cdist": partial(step, plain, given)}, check

    return Case(op, shape, device, build, {"gemm": 3 * 2.0 * N * D * K}, direction="both")


def step(function: Callable[[Given], Tensor], given: Given) -> Call:
    given = given._replace(x=leaf(given.x), codebook=leaf(given.codebook))

    def call() -> list[Tensor]:
        value = function(given)
        return [value.detach(), *torch.autograd.grad(value.sum(), [given.x, given.codebook])]

    return call
