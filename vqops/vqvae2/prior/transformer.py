"""The prior of one level's codes: a decoder-only transformer over their grid, row by row.

The levels above and the class condition it. Sources: Razavi et al. 2019 (arXiv:1906.00446) for a prior a level, with a
transformer in place of PixelSNAIL; Ho and Salimans 2022 (arXiv:2207.12598) for the hidden classes of training; Zhang
and Sennrich 2019 (arXiv:1910.07467) for the norm.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.options import Check, Count, Options, Share

ROTARY_BASE = 100.0  # the slowest pair turns by about 1 / 100 a row or column: grids have tens of them
Layers = Annotated[int, Check("at least 1 and at most 1000", lambda layers: 1 <= layers <= 1000)]


@dataclass(frozen=True, kw_only=True)
class TransformerOptions(Options):
    """The choices that the network leaves open."""

    width: Count = 192
    """Width of the transformer, a multiple of four times --heads."""
    layers: Layers = 4
    """Layers of the transformer."""
    heads: Count = 4
    """Attention heads of a layer."""
    dropout: Share = 0.1
    """Share of activations set to 0 in training, in the input and at the end of each attention and MLP."""

    def __post_init__(self):
        super().__post_init__()
        if self.width % (4 * self.heads):
            allowed = " must be a multiple of four times ", Field("heads"), f" {self.heads}"
            raise InputError(Field("width"), *allowed, f", got {self.width}")


@dataclass(frozen=True)
class PriorConfig(TransformerOptions):
    """The definition of the network; it is saved with the weights. Levels are listed from bottom to top."""

    level: str  # the level that it draws
    level_names: tuple[str, ...]
    sizes: tuple[tuple[Count, Count], ...]  # h, w of the codes of each level
    codebook_size: Count  # K
    classes: tuple[str, ...] = ()
    version: Literal[2] = 2
    """Of the network: the first had no rotary positions."""

    def __post_init__(self):
        super().__post_init__()
        if self.level not in self.level_names or len(self.sizes) != len(self.level_names):
            raise InputError(f"level {self.level} and {len(self.sizes)} sizes of the levels {self.level_names}")

    @property
    def position(self) -> int:
        return self.level_names.index(self.level)

    @property
    def size(self) -> tuple[int, int]:
        return self.sizes[self.position]

    @property
    def length(self) -> int:  # T
        return math.prod(self.size)

    @property
    def levels_above(self) -> int:
        return len(self.level_names) - 1 - self.position


class Cache:
    """Keys and values of one layer at the positions so far, with room for all: [B, heads, T, width / heads]."""

    def __init__(self, config: PriorConfig, like: Tensor):  # the first input [B, 1, C]
        shape = len(like), config.heads, config.length, config.width // config.heads
        self.keys, self.values, self.length = like.new_empty(shape), like.new_empty(shape), 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in those of the next position, [B, heads, 1, width / heads]; all up to it."""
        self.length += 1
        here, so_far = slice(self.length - 1, self.length), slice(self.length)
        self.keys[:, :, here], self.values[:, :, here] = keys, values
        return self.keys[:, :, so_far], self.values[:, :, so_far]


class Rotation(nn.Module):
    """Rotary positions in two dimensions: pairs of a head's dimensions turn by angles that grow with row or column.

    So the product of a query and a key depends on how many rows and columns they are apart. Source: Su et al. 2021
    (arXiv:2104.09864), here with half of the pairs for either axis.
    """

    def __init__(self, size: tuple[int, int], head_dim: int):
        super().__init__()
        pairs = head_dim // 4  # of either axis
        speeds = ROTARY_BASE ** (-torch.arange(pairs) / pairs)
        places = torch.cartesian_prod(*map(torch.arange, size)).view(-1, 2, 1)  # row and column of each position
        angles = (places * speeds).flatten(1)  # [T, 2 * pairs]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:  # [B, heads, T, head_dim], of positions from `first` on
        positions = slice(first, first + x.shape[2])
        cos, sin = self.cos[positions], self.sin[positions]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: PriorConfig):
        super().__init__()
        C = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm, self.mlp_norm = nn.RMSNorm(C), nn.RMSNorm(C)
        self.qkv, self.project = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x: Tensor, rotation: Rotation, cache: Cache | None) -> Tensor:
        """x [B, T, C] of all positions; with a cache [B, 1, C] of the next one."""
        B, T, C = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        first = cache.length if cache is not None else 0
        q, k = rotation(q, first), rotation(k, first)
        if cache is not None:
            k, v = cache.extend(k, v)
        # With a cache T is 1, and the position sees all before it; without one, position t sees 0 to t.
        # No dropout of the weights: with it the CPU's attention holds all T x T of them.
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.dropped(self.project(attended.transpose(1, 2).reshape(B, T, C)))
        return x + self.dropped(self.mlp(self.mlp_norm(x)))

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Prior(nn.Module):
    """p(codes of one level | codes of the levels above, class), as logits of each code given those before it.

    Position t takes in the code at t - 1 (at 0: the class), its own row and column, and what a few convolutions make of
    the levels above at its place. The last class stands for "not said".
    """

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config = config
        C, K = config.width, config.codebook_size
        height, width = config.size
        self.codes = nn.Embedding(K, C)
        self.classes = nn.Embedding(len(config.classes) + 1, C)
        self.rows, self.columns = nn.Embedding(height, C), nn.Embedding(width, C)
        self.rotation = Rotation(config.size, C // config.heads)
        self.above = nn.ModuleList(nn.Embedding(K, C) for _ in range(config.levels_above))
        self.condition = nn.Sequential(
            nn.Conv2d(C, C, 3, padding=1), nn.GELU(), nn.Conv2d(C, C, 3, padding=1), nn.GELU(), nn.Conv2d(C, C, 1)
        ) if config.levels_above else None  # fmt: skip
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm, self.head = nn.RMSNorm(C), nn.Linear(C, K)
        self.apply(initialise)
        for layer in self.layers:  # so that the sum over the layers does not grow with their number
            for last in (layer.project, layer.mlp[-1]):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * config.layers))
        nn.init.zeros_(self.head.weight)  # every code is as likely as any other at first: the loss is ln K

    @property
    def no_class(self) -> int:
        return len(self.config.classes)

    def context(self, above: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, Tensor]:
        """The part without the level's own codes: the first input [B, 1, C] and an addend per position [B, T, C].

        above: codes [B, h, w] of the levels above, nearest first; labels [B], `no_class` for "not said".
        """
        height, width = self.config.size
        places = self.rows.weight[:, None] + self.columns.weight[None]  # [h, w, C]
        addend = places.flatten(0, 1).expand(len(labels), -1, -1)
        if self.condition is not None:
            maps = [embed(codes).permute(0, 3, 1, 2) for embed, codes in zip(self.above, above, strict=True)]
            maps = sum(F.interpolate(one, size=(height, width), mode="nearest") for one in maps)
            addend = addend + (maps + self.condition(maps)).flatten(2).transpose(1, 2)
        return self.classes(labels)[:, None], addend

    def forward(self, codes: Tensor, above: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Logits [B, T, K] of all codes [B, h, w] at once."""
        first, addend = self.context(above, labels)
        before = self.codes(codes.flatten(1)[:, :-1])
        x = F.dropout(torch.cat([first, before], dim=1) + addend, self.config.dropout, self.training)
        return self.transform(x)

    def caches(self, first: Tensor) -> list[Cache]:
        """Those of the layers before the first position, whose input is [B, 1, C]."""
        return [Cache(self.config, first) for _ in self.layers]

    def step(self, before: Tensor, addend: Tensor, caches: list[Cache]) -> Tensor:
        """Logits [B, K] at the next position; `before` is the input that leads to it, [B, 1, C]."""
        position = caches[0].length
        return self.transform(before + addend[:, position : position + 1], caches)[:, 0]

    def transform(self, x: Tensor, caches: list[Cache] | None = None) -> Tensor:
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x = layer(x, self.rotation, cache)
        return self.head(self.norm(x))


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def nats_per_code(prior: Prior, codes: Tensor, above: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Mean negative log-likelihood over images and positions."""
    logits = prior(codes, above, labels)
    return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())
