"""The VQ-VAE-2 network: a hierarchy of quantized feature maps and the convolutions between them.

Sources: Razavi et al. 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2" (arXiv:1906.00446); with one level
van den Oord et al. 2017 (arXiv:1711.00937). Layer sizes and activations are those of DeepMind's Sonnet example.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqops import VectorQuantize
from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.networks.bottlenecks import Gaussian, Gumbel, Plain, in_channels
from vqops.vqvae2.options import Check, Count, NotNegative, Options, Share

STRIDES = (2, 4, 8, 16)  # of a level; powers of 2, as each convolution halves
LEVEL_NAMES = {1: ("bottom",), 2: ("bottom", "top"), 3: ("bottom", "middle", "top")}
Bottleneck = Literal["vq", "none", "gaussian", "gumbel"]
Channels = Annotated[int, Check("a positive multiple of 4", lambda C: C >= 4 and C % 4 == 0)]


@dataclass(frozen=True, kw_only=True)
class SizeOptions(Options):
    """The sizes of a network, whatever its bottleneck."""

    levels: Literal[1, 2, 3] = 2
    """2 is VQ-VAE-2, 1 is VQ-VAE."""
    strides: tuple[int, ...] = ()
    """What a code covers along an axis, a number a level from the bottom up: pixels at the bottom, codes of the level
    below at each further level. Each is 2, 4, 8 or 16; images are padded to a multiple of their product."""
    codebook_size: Count = 512
    """Codes per level (K)."""
    code_dim: Count = 64
    """Dimensions of a code, or of a latent where there are no codes (D)."""
    channels: Channels = 128
    """Channels of the convolutions, a multiple of 4."""

    def __post_init__(self):
        super().__post_init__()
        level_strides(self.strides, self.levels)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(SizeOptions):
    """The choices that the network leaves open."""

    bottleneck: Bottleneck = "vq"
    """What stands between encoder and decoder at each level: vector quantization; nothing (an autoencoder); a Gaussian
    with a KL loss (a VAE); a Gumbel softmax over --codebook-size codes, cooling down (a discrete VAE)."""
    codebook: Literal["ema", "gradient"] = "ema"
    """How the codes learn: moving averages of the vectors assigned to them, or the gradient of the codebook loss."""
    decay: Share = 0.99
    """Decay of the moving averages of --codebook ema."""
    commitment: NotNegative = 0.25
    """Weight of the loss that keeps the encoder near its codes (beta)."""


@dataclass(frozen=True, kw_only=True)
class VQVAE2Config(NetworkOptions):
    """The definition of the network; it is saved with the weights.

    Levels are listed from bottom (finest) to top everywhere in this package.
    """

    version: Literal[1, 2] = 2
    """Of the network: 2 has `UpsampledConv` in its decoders, and normalised logits in a discrete VAE, where 1 has
    transposed convolutions and logits as they are."""
    image_channels: int = 3
    restart_below: tuple[float, ...] = ()  # per level: a code with a smaller EMA count is replaced; () for none
    image_values: int = 0  # C x H x W of the training images, which the KL of "gaussian" and "gumbel" is shared by

    @property
    def level_names(self) -> tuple[str, ...]:
        return LEVEL_NAMES[self.levels]

    @property
    def discrete(self) -> bool:
        """Whether there are codes with indices."""
        return self.bottleneck in ("vq", "gumbel")

    @property
    def level_strides(self) -> tuple[int, ...]:
        """`strides`; 4 at the bottom and 2 at each further level where they are ()."""
        return level_strides(self.strides, self.levels)

    @property
    def pixels_per_code(self) -> tuple[int, ...]:
        """Image pixels per code along one axis, for each level."""
        return tuple(accumulate(self.level_strides, mul))

    def code_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Height and width of each level's codes for an image of this size, once padded to whole codes of the top."""
        top = self.pixels_per_code[-1]
        height, width = -(-height // top) * top, -(-width // top) * top
        return tuple((height // pixels, width // pixels) for pixels in self.pixels_per_code)


def level_strides(strides: tuple[int, ...], levels: int) -> tuple[int, ...]:
    """The strides as given, or those of () by default: 4 at the bottom, 2 at each further level.

    Raises InputError if they are not one of STRIDES for each level.
    """
    if not strides:
        return (4, *[2] * (levels - 1))
    if len(strides) != levels or not set(strides) <= set(STRIDES):
        *some, last = map(str, STRIDES)
        numbers = "1 number" if levels == 1 else f"{levels} numbers"
        raise InputError(
            Field("strides"),
            f" must be {numbers}, one for each of ",
            Field("levels"),
            f" {levels}, of {', '.join(some)} or {last}, got {' '.join(map(str, strides))}",
        )
    return strides


class VQVAE2Output(NamedTuple):
    reconstruction: Tensor  # [B, C, H, W], not clamped
    indices: tuple[Tensor, ...]  # per level [B, *config.code_sizes(H, W)[level]] int64; () without a codebook
    codebook_loss: Tensor  # [] summed over the levels, commitment weight included


class VQVAE2(nn.Module):
    """Images to codes and back, in 1 to 3 levels.

    Level l + 1 reads the features of level l and divides their resolution by its stride. Quantization goes from the top
    down: the codes chosen so far are decoded to the next level's resolution and stand beside its features when its own
    codes are chosen, so a level encodes what the levels above it left out. The image decoder sees the codes of all
    levels.
    """

    def __init__(self, config: VQVAE2Config):
        super().__init__()
        self.config = config
        C, D, L = config.channels, config.code_dim, config.levels
        self.encoders = nn.ModuleList(
            encoder(C if level else config.image_channels, C, stride)
            for level, stride in enumerate(config.level_strides)
        )
        out = in_channels(config.bottleneck, D, config.codebook_size)
        self.to_codes = nn.ModuleList(nn.Conv2d(C if level == L - 1 else C + D, out, 1) for level in range(L))
        self.quantizers = nn.ModuleList(quantizer(config, level) for level in range(L))
        # decoders[0] makes the image; decoders[l] what level l - 1 is conditioned on
        self.decoders = nn.ModuleList(
            decoder((L - level) * D, C, D if level else config.image_channels, stride, DOUBLED[config.version])
            for level, stride in enumerate(config.level_strides)
        )

    def forward(self, images: Tensor) -> VQVAE2Output:  # [B, C, H, W] in [0, 1], any H and W
        """Reconstruct the images through their codes; in training also update the codebooks."""
        height, width = images.shape[-2:]
        codes, indices, codebook_loss = self.quantize(images)
        return VQVAE2Output(self.decoders[0](codes)[..., :height, :width] + 0.5, indices, codebook_loss)

    def quantize(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Choose the codes of each level: codes [B, levels * D, h, w] at the bottom's resolution, indices, loss."""
        features = [pad_to_multiple(images, self.config.pixels_per_code[-1]) - 0.5]
        for encode in self.encoders:
            features.append(encode(features[-1]))
        codes, indices, codebook_loss = None, [], 0.0
        for level in reversed(range(self.config.levels)):
            x = features[level + 1]
            if codes is not None:
                x = torch.cat([x, self.decoders[level + 1](codes)], dim=1)
            # The quantizer's input stays float32 under autocast: in bfloat16 vectors and codes fall onto few values.
            with torch.autocast(x.device.type, enabled=False):
                quantized, index, loss = self.quantizers[level](self.to_codes[level](x.float()))
            codes = self.beside(quantized, codes, level)
            if index is not None:
                indices.insert(0, index)
            codebook_loss = codebook_loss + loss.sum()
        return codes, tuple(indices), codebook_loss

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """The code indices of each level: per level [B, *config.code_sizes(H, W)[level]] int64."""
        return self.quantize(images)[1]

    def decode(self, indices: tuple[Tensor, ...]) -> Tensor:  # per level [B, h, w]
        """The images [B, C, s h, s w] (h, w, s of the bottom level) that these codes stand for, padding included."""
        codes = None
        for level, (quantize, index) in reversed(list(enumerate(zip(self.quantizers, indices, strict=True)))):
            codes = self.beside(quantize.get_codes_from_indices(index), codes, level)
        return self.decoders[0](codes) + 0.5

    def beside(self, quantized: Tensor, above: Tensor | None, level: int) -> Tensor:
        """The codes [B, D, h, w] of a level, and beside them those of the levels above, repeated to its resolution."""
        if above is None:
            return quantized
        repeated = F.interpolate(above, scale_factor=self.config.level_strides[level + 1], mode="nearest")
        return torch.cat([quantized, repeated], dim=1)

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Tensor:  # uint8 [B, C, H, W], of any device; the same
        """The pixels after their way through the codes."""
        images = as_float(pixels.to(self.encoders[0][0].weight.device))
        return (self(images).reconstruction.clamp(0, 1) * 255).round().to(torch.uint8).to(pixels.device)


def as_float(pixels: Tensor) -> Tensor:  # uint8; float32 in [0, 1]
    return pixels.float() / 255


def quantizer(config: VQVAE2Config, level: int) -> nn.Module:
    """The bottleneck of one level; a codebook starts by k-means on the first batch and moves by EMA or its gradient."""
    if config.bottleneck == "none":
        return Plain()
    if config.bottleneck == "gaussian":
        return Gaussian(config.image_values)
    if config.bottleneck == "gumbel":
        return Gumbel(config.code_dim, config.codebook_size, config.image_values, normalised=config.version > 1)
    learned = config.codebook == "gradient"
    return VectorQuantize(
        config.code_dim,
        config.codebook_size,
        decay=config.decay,
        kmeans_init=True,
        threshold_ema_dead_code=config.restart_below[level] if config.restart_below else 0,
        accept_image_fmap=True,
        commitment_weight=config.commitment,
        rotation_trick=False,  # straight-through, as in both papers
        learnable_codebook=learned,
    )


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), a quarter of the channels in between."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv3x3 = nn.Conv2d(channels, channels // 4, kernel_size=3, padding=1)
        self.conv1x1 = nn.Conv2d(channels // 4, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return x + self.conv1x1(F.relu(self.conv3x3(F.relu(x))))


def residual_stack(channels: int) -> list[nn.Module]:
    return [ResidualBlock(channels), ResidualBlock(channels), nn.ReLU()]


def encoder(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """[B, in_channels, H, W] to [B, channels, H / stride, W / stride], stride a power of 2 from 2 up."""
    widths = [in_channels, channels // 2] + [channels] * (halvings(stride) - 1)
    layers = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], channels, 3, padding=1), *residual_stack(channels))


def decoder(
    in_channels: int, channels: int, out_channels: int, stride: int, doubled: Callable[[int, int], nn.Module]
) -> nn.Sequential:
    """[B, in_channels, H, W] to [B, out_channels, H * stride, W * stride], stride a power of 2 from 2 up.

    `doubled` makes the layer, of these channels in and out, that doubles H and W.
    """
    layers = [nn.Conv2d(in_channels, channels, kernel_size=3, padding=1), *residual_stack(channels)]
    widths = [channels] * halvings(stride) + [out_channels]
    if stride > 2:
        widths[-2] = channels // 2
    for before, after in pairwise(widths):
        layers += [doubled(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class UpsampledConv(nn.Conv2d):
    """[B, C, H, W] to [B, C', 2 H, 2 W]: each value four times, in a square, then a 3 x 3 convolution.

    Computed as the transposed convolution that this is: a value meets the sum of those weights that would meet its
    copies, which takes 4/9 of the multiplications and no enlarged map. Every output sums all weights, so what is flat
    stays flat, where a free transposed convolution makes a checkerboard (Odena et al. 2016,
    https://distill.pub/2016/deconv-checkerboard).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = F.avg_pool2d(self.weight, 2, stride=1, padding=1, divisor_override=1)  # sums: [C', C, 4, 4]
        return F.conv_transpose2d(x, kernel.flip(2, 3).transpose(0, 1), self.bias, stride=2, padding=1)


def transposed_conv(in_channels: int, out_channels: int) -> nn.Module:
    return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1)


DOUBLED = {1: transposed_conv, 2: UpsampledConv}  # by version of the network


def halvings(stride: int) -> int:
    return stride.bit_length() - 1


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Extend [B, C, H, W] at the right and bottom, by reflection, until `multiple` divides H and W."""
    for axis in (-2, -1):
        size = images.shape[axis]
        padded = -(-size // multiple) * multiple
        if padded > size:
            images = images.index_select(axis, reflected(padded, size).to(images.device))
    return images


def reflected(length: int, size: int) -> Tensor:
    """Positions 0, 1, ..., size - 1, size - 2, ..., 1, 0, 1, ... [length]: defined for any length, unlike F.pad."""
    period = max(2 * (size - 1), 1)
    positions = torch.arange(length) % period
    return torch.where(positions < size, positions, period - positions)
