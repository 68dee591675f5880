"""Plain PyTorch beside the soft assignments, the inputs that are hard for them, and how far each is from float64."""

import torch
from torch import Tensor


def logits(x: Tensor, codebook: Tensor, metric: str) -> Tensor:  # [..., N, D], [..., K, D]
    return x @ codebook.mT if metric == "cosine" else -(x.unsqueeze(-2) - codebook.unsqueeze(-3)).norm(dim=-1)


def hard_inputs(name: str) -> tuple[Tensor, Tensor]:  # [200, 8], [50, 8]
    x, c = torch.randn(200, 8), torch.randn(50, 8)
    if name == "far from the origin":
        x, c = x + 1e6, c + 1e6
    elif name == "tight clusters":
        c = 100 * torch.randn(5, 8).repeat(10, 1) + 0.01 * c
        x = c[torch.randint(50, (200,))] + 0.01 * x
    elif name == "near the codes":
        x = c[torch.randint(50, (200,))] + 1e-4 * x
    elif name == "on the codes":
        x = c[torch.randint(50, (200,))]
    elif name == "on repeated codes":
        c = c[:10].repeat(5, 1)
        x = c[torch.randint(50, (200,))]
    elif name == "one huge code":
        c[7] = 1e15
    return x, c


HARD = (
    "ordinary",
    "far from the origin",
    "tight clusters",
    "near the codes",
    "on the codes",
    "on repeated codes",
    "one huge code",
)


def with_gradients(function, x: Tensor, codebook: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The value, and the gradients of its sum with fixed weights."""
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, codebook)]
    value = function(*leaves)
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (value * weight).sum().backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def assert_no_worse_than_plain(function, plain, x: Tensor, codebook: Tensor) -> None:
    """A mean error of at most twice that of plain PyTorch against float64, or of a few units in the last place."""
    exact = with_gradients(plain, x, codebook, torch.float64)
    found, other = (with_gradients(each, x, codebook, torch.float32) for each in (function, plain))
    for ours, theirs, right in zip(found, other, exact, strict=True):
        allowed = 2 * root_mean_square((theirs - right).nan_to_num()) + 2**-22 * root_mean_square(right)
        assert root_mean_square(ours - right) <= allowed


def root_mean_square(t: Tensor) -> float:
    return float(t.square().mean().sqrt())
