"""The sizes that are measured, each named after the model whose quantizer has them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """N vectors of D dimensions, K codes. N = vectors an item times the items of one training step on the device."""

    name: str
    model: str
    vectors: int  # of one item: an image, a clip, a record
    D: int
    K: int
    cpu_items: int = 1
    gpu_items: int = 1
    unit_norm: bool = False  # the model normalises vectors and codes, then compares Euclidean distances

    @classmethod
    def of(cls, N: int, D: int, K: int) -> "Shape":
        return cls(f"{N} x {D} x {K}", "", N, D, K)

    def N(self, device: str) -> int:
        return self.vectors * (self.cpu_items if device == "cpu" else self.gpu_items)

    def data(
        self, device: str, dtype: torch.dtype = torch.float32, offset: float = 0.0, spread: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """x [N, D] and a codebook [K, D]: independent normal values, the hard case for a certificate.

        `offset` moves vectors and codes together; `spread` scales the codes alone.
        """
        generator = torch.Generator(device).manual_seed(self.D * self.K)
        draw = [torch.randn(rows, self.D, generator=generator, device=device) for rows in (self.N(device), self.K)]
        if self.unit_norm:
            draw = [torch.nn.functional.normalize(values, dim=-1) for values in draw]
        x, codebook = draw[0] + offset, draw[1] * spread + offset
        return x.to(dtype), codebook.to(dtype)


# Vectors an item: 256 px images at the stride of the level; audio frames a second times the seconds of a training clip.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("VQ-VAE-2 bottom", "VQ-VAE-2, 256 px, bottom level 64 x 64 (arXiv:1906.00446)", 4096, 64, 512, 8, 256),
        Shape("VQ-VAE-2 top", "VQ-VAE-2, 256 px, top level 32 x 32 (arXiv:1906.00446)", 1024, 64, 512, 8, 256),
        Shape("VQGAN f16", "VQGAN, 256 px, stride 16 (arXiv:2012.09841)", 256, 256, 1024, 16, 256),
        Shape("VQGAN f16 16384", "VQGAN, 256 px, stride 16, the larger codebook", 256, 256, 16384, 4, 256),
        Shape("LlamaGen", "LlamaGen VQ-16, unit norm (arXiv:2406.06525)", 256, 8, 16384, 8, 512, True),
        Shape("MAGVIT-2 size", "codes of MAGVIT-v2, D of IBQ (arXiv:2412.02692)", 256, 256, 2**18, 1, 256),
        Shape("EnCodec", "EnCodec 24 kHz, one level: 75 frames/s, 1 s (arXiv:2210.13438)", 75, 128, 1024, 64, 1024),
        Shape("DAC", "DAC 44.1 kHz, one level, unit norm: 0.38 s (arXiv:2306.06546)", 33, 8, 1024, 72, 2048, True),
        Shape("Mimi", "Mimi, one level: 12.5 frames/s, 12 s (arXiv:2410.00037)", 150, 256, 2048, 16, 512),
        Shape("RQ-VAE", "semantic IDs of TIGER, one level (arXiv:2305.05065)", 1, 32, 256, 1024, 65536),
    )
}

# Further sizes of the kernels: N, D, K by device.
SEARCHES = {
    "cpu": [
        *((65536, 64, 1024), (32768, 128, 1024), (4096, 256, 8192), (8192, 8, 16384)),
        *((8192, 128, 1024), (8192, 64, 2048)),
        *((1, 128, 1024), (16, 8, 16384), (32, 256, 65536)),  # a few vectors, without preparation
    ],
    "cuda": [
        *((2**20, 64, 512), (2**20, 64, 1024), (2**20, 128, 1024), (2**18, 256, 8192), (2**17, 8, 16384)),
        *((2**16, 256, 2**18), (2**15, 512, 1024)),
    ],
}
# On which the sets of CPU kernels are compared.
SETS = [(32768, 64, 512), (65536, 64, 1024), (32768, 128, 1024), (4096, 256, 8192), (8192, 8, 16384)]
# Of a model in use: a second of EnCodec, of Mimi, an image of LlamaGen, a single vector.
CALLS = [(75, 128, 1024), (13, 256, 2048), (256, 8, 16384), (1, 256, 2048)]
# A single value: what a call takes whatever it computes.
LEAST = {"cpu": [(1, 1, 1)], "cuda": [(1, 1, 1)]}
STEPS = {"cpu": [(32768, 128, 1024)], "cuda": [(2**20, 64, 512), (2**20, 128, 1024)]}
# Those of plain PyTorch: products that take all the time, and comparisons that do.
PLAIN = [(4096, 256, 1024), (32768, 64, 512), (65536, 64, 1024), (2048, 8, 16384)]
# Levels of residual quantizers: of EnCodec, DAC, Mimi, and semantic IDs.
RESIDUALS = {(32768, 128, 1024): 8, (32768, 8, 1024): 9, (8192, 256, 2048): 32, (4096, 32, 256): 3}
# Of their steps: fewer rows of Mimi, since its peer keeps matrices of all levels. In use: a second, and a single frame.
LEVEL_STEPS = {(32768, 128, 1024): 8, (32768, 8, 1024): 9, (1024, 256, 2048): 32, (4096, 32, 256): 3}
LEVEL_CALLS = {(75, 128, 1024): 8, (87, 8, 1024): 9, (13, 256, 2048): 32, (1, 256, 2048): 32}
