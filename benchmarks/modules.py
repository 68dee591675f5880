"""Cases of whole modules: a training step and an evaluation of VectorQuantize, and a step of the VQ-VAE-2."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor

import vqops
from benchmarks import baselines, correctness
from benchmarks.baselines import Call, leaf
from benchmarks.cases import (
    DECAY,
    Case,
    by_name,
    check_of_indices,
    ema_state,
    exact_indices,
    gradient_in,
    in_both_orders,
    search_work,
)
from benchmarks.shapes import Shape
from vqops.vqvae2 import VQVAE2, VQVAE2Config

STEPS = ("VQ-VAE-2 bottom", "VQGAN f16", "LlamaGen", "EnCodec", "DAC", "Mimi", "RQ-VAE")


def training_step(shape: Shape, device: str, every: bool = False) -> Case:
    """VectorQuantize: forward, EMA update and backward, straight-through. By name: the three ops of it."""
    work = search_work(shape, device, torch.float32, 12 * shape.D + 8)

    def build():
        x, codebook = shape.data(device)
        grad = gradient_in(x)
        check_indices = check_of_indices(x, codebook, partial(exact_indices, shape, device))

        def check(found) -> dict:  # of the first step: the codebook has moved by the later ones
            quantized, indices, loss = found
            if not bool(torch.isfinite(quantized).all()) or not bool(torch.isfinite(loss)):
                raise correctness.WrongResult("values or loss are not finite")
            return check_indices(indices)

        def module() -> Call:
            quantizer = vqops.VectorQuantize(shape.D, shape.K, decay=DECAY, rotation_trick=False).to(device)
            baselines.load_codes(quantizer, codebook)
            return partial(baselines.module_step, quantizer, leaf(x), grad)

        methods = {"vqops": module}
        if every:
            methods |= in_both_orders(by_name(FUSED, device, partial(fused_step, x, grad, codebook), work["gemm"]))
        return methods | baselines.training_steps(x, codebook, grad, DECAY), check

    return Case("training step", shape, device, build, work, direction="both")


FUSED = ("quantize", "quantize_backward", "ema_update_")


def fused_step(x: Tensor, grad: Tensor, codebook: Tensor, implementation: str) -> Call:
    quantize, backward, update = (getattr(torch.ops.vqops, f"{op}_{implementation}") for op in FUSED)
    state, decay = [t[None] for t in ema_state(codebook)], torch.tensor(DECAY, device=x.device)
    of_error = torch.full((1, len(x)), 1 / x.numel(), device=x.device)

    def step():
        given = (x[None], state[2], None, None, "euclidean", "straight_through", True)
        quantized, indices, error, counts, sums, old = quantize(*given)
        backward(grad[None], of_error, x[None], old, indices)
        update(*state, counts, sums, decay)
        return quantized[0], indices[0], error.mean() / x.shape[1]

    return step


def evaluation(shape: Shape, device: str) -> Case:
    """VectorQuantize in eval: tokens of a trained model. By hand: the fewest operations that find and look up codes."""

    def build():
        x, codebook = shape.data(device)

        def module(make: Callable) -> Call:
            quantizer = make()
            baselines.load_codes(quantizer, codebook)
            quantizer.eval()

            @torch.no_grad()
            def call():
                return quantizer(x[None])[1][0]

            return call

        def by_hand() -> Call:
            half = baselines.half_squares(codebook)

            def call():
                indices = baselines.addmm_argmin(x, codebook, half)
                codebook[indices]
                return indices

            return call

        methods = {
            "vqops": partial(module, lambda: vqops.VectorQuantize(shape.D, shape.K).to(device)),
            "addmm + argmin + lookup": by_hand,
            "vector-quantize-pytorch": partial(module, partial(baselines.incumbent, codebook)),
        }
        return methods, check_of_indices(x, codebook, partial(exact_indices, shape, device))

    return Case("evaluation", shape, device, build, search_work(shape, device, torch.float32, 8))


def system_step(device: str, size: int = 256, batch: int = 1, quick: bool = False) -> Case:
    """A training step of the VQ-VAE-2 network of this package, with its quantizers, the incumbent's, and none."""
    config = VQVAE2Config(channels=32 if quick else 128)

    def build():
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
        return methods | {"no quantizer": partial(make, Unquantized)}, check

    N = sum(batch * height * width for height, width in config.code_sizes(size, size))
    shape = Shape(f"VQ-VAE-2, {size} px", "", N, config.code_dim, config.codebook_size)
    return Case("VQ-VAE-2 training step", shape, device, build, {}, direction="both")


class Unquantized(torch.nn.Module):
    """In place of a quantizer, to see what the convolutions alone take."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, torch.zeros((), dtype=torch.int64, device=x.device), x.new_zeros(())
