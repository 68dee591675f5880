"""Cases of the codecs in `transformers`, with random weights: their quantizers as they are, and with our search."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

import vqops
from benchmarks import baselines
from benchmarks.baselines import Call
from benchmarks.cases import Case
from benchmarks.shapes import Shape
from vqops.dispatch.choice import Implementation
from vqops.ops.checks import Metric

# Levels, and frames of a second of audio x features of a code x codes.
CODECS = {"EnCodec": (8, (75, 128, 1024)), "DAC": (9, (87, 8, 1024)), "Mimi": (32, (13, 256, 2048))}
BANDWIDTH = 6.0  # kbit/s of EnCodec: 8 levels


def codec(name: str, device: str) -> Case:
    """The codes of a second of audio."""
    levels, size = CODECS[name]
    shape = Shape.of(*size)

    def build():
        package = baselines.imported("transformers", "transformers")
        torch.manual_seed(0)
        quantizer, features = quantizer_of(package, name)
        quantizer = quantizer.to(device).eval()
        x = torch.randn(1, features, size[0], device=device)
        exact = encode(name, with_our_search(quantizer, name, "reference"), x)

        def check(codes: Tensor) -> dict:
            return {"wrong": int((codes != exact).any(0).sum()), "checked": exact[0].numel()}

        def ours() -> Call:
            return partial(encode, name, with_our_search(quantizer, name), x)

        return {"vqops": ours, "transformers": lambda: partial(encode, name, quantizer, x)}, check

    N, D, K = size
    work = {"gemm": 2.0 * N * D * K * levels, "copy": 4 * levels * K * D}
    return Case("codec", shape, device, build, work, facts={"model": name, "levels": levels})


def quantizer_of(package, name: str) -> tuple[nn.Module, int]:
    """Of a model that is not trained, and the features of its input. Codes get smaller from level to level."""
    if name == "EnCodec":
        quantizer = package.EncodecModel(package.EncodecConfig()).quantizer
        books, features = [layer.codebook.embed for layer in quantizer.layers], 128
    elif name == "Mimi":
        quantizer = package.MimiModel(package.MimiConfig()).quantizer
        books = [codebook.embed_sum for codebook in mimi_codebooks(quantizer)]
        features = 512
    else:
        quantizer = package.DacModel(package.DacConfig()).quantizer
        books, features = [layer.codebook.weight.detach() for layer in quantizer.quantizers], 1024
    for level, codes in enumerate(books):
        codes.copy_(torch.randn_like(codes) * 0.9 ** (level % 8))
    return quantizer, features


def mimi_codebooks(quantizer: nn.Module) -> list[nn.Module]:
    parts = quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer
    return [layer.codebook for part in parts for layer in part.layers]


@torch.no_grad()
def encode(name: str, quantizer: nn.Module, x: Tensor) -> Tensor:  # [Q, frames]
    if name == "EnCodec":
        return quantizer.encode(x, BANDWIDTH)[:, 0]
    return quantizer.encode(x)[:, 0] if name == "Mimi" else quantizer(x)[1][0]


def with_our_search(quantizer: nn.Module, name: str, implementation: Implementation | None = None) -> nn.Module:
    """A copy whose codebooks are prepared once and searched by `vqops.nearest`."""
    quantizer = deepcopy(quantizer)
    if name == "DAC":
        for layer in quantizer.quantizers:
            find = search_of(layer.codebook.weight.detach(), "cosine", implementation)
            layer.decode_latents = partial(decode_latents, layer.codebook, find)
        return quantizer
    codebooks = mimi_codebooks(quantizer) if name == "Mimi" else [layer.codebook for layer in quantizer.layers]
    for codebook in codebooks:
        codebook.quantize = search_of(codebook.embed, "euclidean", implementation)
    return quantizer


def search_of(codes: Tensor, metric: Metric, implementation: Implementation | None) -> Callable[[Tensor], Tensor]:
    prepared = vqops.prepare(codes, metric, implementation=implementation)
    return partial(vqops.nearest, codebook=prepared, metric=metric, implementation=implementation)


def decode_latents(codebook: nn.Embedding, find: Callable[[Tensor], Tensor], latents: Tensor) -> tuple[Tensor, Tensor]:
    indices = find(latents.mT)  # [1, D, frames]
    return codebook(indices).mT, indices
