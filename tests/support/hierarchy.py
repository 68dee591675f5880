"""vqops.HierarchicalVQ: its shapes, and a training step with all that comes of it."""

import torch

DIM, CODES = 6, 20
FIXED = {"dim": DIM, "codebook_size": CODES, "kmeans_init": False, "threshold_ema_dead_code": 0}  # without draws
# positions, options
AXES = {
    "sequence": ((10,), {"scales": (1, 4, 8)}),
    "image": ((5, 7), {"scales": (1, (2, 3), 5), "accept_image_fmap": True}),
    "volume": ((3, 4, 5), {"scales": (1, (1, 2, 2), 4), "accept_3d_fmap": True}),
}


def batch(positions: tuple[int, ...], channel_first: bool = True, b: int = 3) -> torch.Tensor:
    x = torch.randn(b, DIM, *positions)
    return x if channel_first else x.movedim(1, -1)


def step(module, x: torch.Tensor, seed: int = 2, **arguments) -> dict:
    """One forward and, in training, backward: results and gradients by name."""
    given = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(seed)
    output, indices, loss, *cutoff = module(given, **arguments)
    if output.requires_grad:
        torch.manual_seed(1)
        ((output * torch.randn(output.shape)).sum() + 3 * loss).backward()
    grads = {f"grad of {n}": torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
    grads["grad of x"] = torch.zeros_like(x) if given.grad is None else given.grad
    return {"output": output.detach(), "indices": indices, "loss": loss.detach(), "cutoff": cutoff} | grads
