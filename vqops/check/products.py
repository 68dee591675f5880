"""What the proof assumes of tensor cores, measured: how far their sums of products are off.

The products are those of the search itself, by the same instructions (`tl.dot`, wgmma, mma.sync) in the same kernels'
words; docs/exactness.md, "The tensor core", has the bound.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vqops import triton_kernels
from vqops.dispatch.library import is_compiled

# Of C++, on a GPU: the products alone, [N, K] float32 of x [N, D] and codes [K, D], both float16.
library = torch.library.Library("vqops", "FRAGMENT")
library.define("tensor_core_products_compiled(Tensor x, Tensor codes) -> Tensor")

ROWS, CODES = 512, 256
DEPTHS = (16, 64, 256, 512, 1024)


def bound(depth: int) -> float:
    """Of the error, relative to the sum of the products' sizes."""
    return 1.5 * (depth + 16) * 2.0**-23


@dataclass(frozen=True)
class Probe:
    name: str
    draw: Callable[..., tuple[Tensor, Tensor]]  # draw(rows, codes): both as float32
    op: str = "nearest"

    def concerns(self, implementation: str, kind: str) -> bool:
        if implementation == "triton":
            return triton_kernels.installed()
        return implementation == "compiled" and kind == "cuda" and is_compiled("nearest", "cuda")

    def judge(self, implementation: str, device: torch.device, small: bool) -> dict:
        x, codes = (values.half() for values in self.draw(*((32, 64) if small else (ROWS, CODES))))
        found = product_of(implementation)(x.to(device), codes.to(device)).cpu().double()
        exact, size = x.double() @ codes.double().mT, x.double().abs() @ codes.double().abs().mT
        share = ((found - exact).abs() / size.clamp_min(2.0**-149)).amax() / bound(x.shape[1])
        wrong = {} if share <= 1 else {"the sum of products": {"is off by": float(share), "of what is proved for": 1}}
        return {"share_of_bound": float(f"{float(share):.3g}"), "wrong": wrong}


def product_of(implementation: str) -> Callable[[Tensor, Tensor], Tensor]:
    if implementation == "compiled":
        return torch.ops.vqops.tensor_core_products_compiled
    from vqops.triton_kernels.products import products

    return products


def normal(depth: int, rows: int, codes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, depth), torch.randn(codes, depth)


def of_one_sign(depth: int, rows: int, codes: int) -> tuple[Tensor, Tensor]:
    """Every cut goes the same way."""
    return 1 + torch.rand(rows, depth), 1 + torch.rand(codes, depth)


def one_large_first(depth: int, rows: int, codes: int) -> tuple[Tensor, Tensor]:
    """What follows is small enough to be cut, and there is much of it."""
    x, c = 2.0**-6 * (1 + torch.rand(rows, depth)), 2.0**-6 * (1 + torch.rand(codes, depth))
    x[:, 0], c[:, 0] = 2.0**4, 2.0**4
    return x, c


def that_cancel(depth: int, rows: int, codes: int) -> tuple[Tensor, Tensor]:
    """Large terms leave a small sum."""
    x, c = torch.randn(rows, depth), torch.randn(codes, depth)
    x[:, 1::2], c[:, 1::2] = -x[:, ::2], c[:, ::2] * (1 + 2.0**-10)
    return x, c


def denormal(depth: int, rows: int, codes: int) -> tuple[Tensor, Tensor]:
    """Below 2^-14, the least normal float16."""
    return 2.0**-16 * torch.rand(rows, depth), 2.0**-16 * torch.rand(codes, depth)


KINDS = (normal, of_one_sign, one_large_first, that_cancel, denormal)
PROBES = [
    Probe(f"products {kind.__name__.replace('_', ' ')}, D={depth}", partial(kind, depth))
    for depth in DEPTHS
    for kind in KINDS
]
