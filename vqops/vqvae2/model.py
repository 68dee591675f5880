"""The VQ-VAE-2 network: a hierarchy of quantized feature maps and the convolutions between them.

Sources: Razavi et al. 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2" (arXiv:1906.00446); with one level
van den Oord et al. 2017 (arXiv:1711.00937). Layer sizes and activations are those of DeepMind's Sonnet example.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqops import VectorQuantize
from vqops.vqvae2.bottlenecks import Gaussian, Gumbel, Plain, in_channels

LEVEL_NAMES = {1: ("bottom",), 2: ("bottom", "top"), 3: ("bottom", "middle", "top")}
BOTTOM_STRIDE, UPPER_STRIDE = 4, 2


@dataclass(frozen=True)
class VQVAE2Config:
    """What defines the network; it is saved with the weights.

    Levels are listed from bottom (finest) to top everywhere in this package.
    """

    image_channels: int = 3
    levels: int = 2
    channels: int = 128
    codebook_size: int = 512  # K
    code_dim: int = 64  # D
    codebook: str = "ema"  # or "gradient"
    decay: float = 0.99
    commitment: float = 0.25
    restart_below: tuple[float, ...] = ()  # per level: a code with a smaller EMA count is replaced; () for none
    bottleneck: str = "vq"  # or "none", "gaussian", "gumbel"
    image_values: int = 0  # C x H x W of the training images, which the KL of "gaussian" and "gumbel" is shared by

    @property
    def level_names(self) -> tuple[str, ...]:
        return LEVEL_NAMES[self.levels]

    @property
    def discrete(self) -> bool:
        """Whether there are codes with indices."""
        return self.bottleneck in ("vq", "gumbel")

    @property
    def strides(self) -> tuple[int, ...]:
        """Image pixels per code along one axis, for each level."""
        return tuple(BOTTOM_STRIDE * UPPER_STRIDE**level for level in range(self.levels))

    def code_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Height and width of each level's codes for an image of this size, once padded to the top level's stride."""
        top = self.strides[-1]
        return tuple((-(-height // top) * top // stride, -(-width // top) * top // stride) for stride in self.strides)


class VQVAE2Output(NamedTuple):
    reconstruction: Tensor  # [B, C, H, W], not clamped
    indices: tuple[Tensor, ...]  # per level [B, *config.code_sizes(H, W)[level]] int64; () without a codebook
    codebook_loss: Tensor  # [] summed over the levels, commitment weight included


class VQVAE2(nn.Module):
    """Images to codes and back, in 1 to 3 levels.

    Level l + 1 reads the features of level l at half the resolution. Quantization goes from the top down: the codes
    chosen so far are decoded to the next level's resolution and stand beside its features when its own codes are
    chosen, so a level encodes what the levels above it left out. The image decoder sees the codes of all levels.
    """

    def __init__(self, config: VQVAE2Config):
        super().__init__()
        self.config = config
        C, D, L = config.channels, config.code_dim, config.levels
        self.encoders = nn.ModuleList(
            encoder(C if level else config.image_channels, C, UPPER_STRIDE if level else BOTTOM_STRIDE)
            for level in range(L)
        )
        out = in_channels(config.bottleneck, D, config.codebook_size)
        self.to_codes = nn.ModuleList(nn.Conv2d(C if level == L - 1 else C + D, out, 1) for level in range(L))
        self.quantizers = nn.ModuleList(quantizer(config, level) for level in range(L))
        # decoders[0] makes the image; decoders[l] what level l - 1 is conditioned on
        self.decoders = nn.ModuleList(
            decoder((L - level) * D, C, D if level else config.image_channels, UPPER_STRIDE if level else BOTTOM_STRIDE)
            for level in range(L)
        )

    def forward(self, images: Tensor) -> VQVAE2Output:  # [B, C, H, W] in [0, 1], any H and W
        """Reconstruct the images through their codes; in training also update the codebooks."""
        height, width = images.shape[-2:]
        codes, indices, codebook_loss = self.quantize(images)
        return VQVAE2Output(self.decoders[0](codes)[..., :height, :width] + 0.5, indices, codebook_loss)

    def quantize(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Choose the codes of each level: codes [B, levels * D, h, w] at the bottom's resolution, indices, loss."""
        features = [pad_to_multiple(images, self.config.strides[-1]) - 0.5]
        for encode in self.encoders:
            features.append(encode(features[-1]))
        codes, indices, codebook_loss = None, [], 0.0
        for level in reversed(range(self.config.levels)):
            x = features[level + 1]
            if codes is not None:
                x = torch.cat([x, self.decoders[level + 1](codes)], dim=1)
            # What is quantized stays float32 under autocast: in bfloat16 vectors and codes fall onto few values.
            with torch.autocast(x.device.type, enabled=False):
                quantized, index, loss = self.quantizers[level](self.to_codes[level](x.float()))
            codes = quantized if codes is None else torch.cat([quantized, upsample(codes)], dim=1)
            if index is not None:
                indices.insert(0, index)
            codebook_loss = codebook_loss + loss.sum()
        return codes, tuple(indices), codebook_loss

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """The code indices of each level: per level [B, *config.code_sizes(H, W)[level]] int64."""
        return self.quantize(images)[1]

    def decode(self, indices: tuple[Tensor, ...]) -> Tensor:  # per level [B, h, w]
        """The images [B, C, 4 h, 4 w] (h, w of the bottom level) that these codes stand for, padding included."""
        codes = None
        for quantize, index in reversed(list(zip(self.quantizers, indices, strict=True))):
            quantized = quantize.get_codes_from_indices(index)
            codes = quantized if codes is None else torch.cat([quantized, upsample(codes)], dim=1)
        return self.decoders[0](codes) + 0.5

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Tensor:  # uint8 [B, C, H, W], of any device; the same
        """What comes back of the pixels through the codes."""
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
        return Gumbel(config.code_dim, config.codebook_size, config.image_values)
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
    """[B, in_channels, H, W] to [B, channels, H / stride, W / stride], stride 2 or 4."""
    half = nn.Conv2d(in_channels, channels // 2, kernel_size=4, stride=2, padding=1)
    if stride == 2:
        return nn.Sequential(
            half, nn.ReLU(), nn.Conv2d(channels // 2, channels, 3, padding=1), *residual_stack(channels)
        )
    quarter = nn.Conv2d(channels // 2, channels, kernel_size=4, stride=2, padding=1)
    return nn.Sequential(
        half, nn.ReLU(), quarter, nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), *residual_stack(channels)
    )


def decoder(in_channels: int, channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """[B, in_channels, H, W] to [B, out_channels, H * stride, W * stride], stride 2 or 4."""
    head = [nn.Conv2d(in_channels, channels, kernel_size=3, padding=1), *residual_stack(channels)]
    if stride == 2:
        return nn.Sequential(*head, nn.ConvTranspose2d(channels, out_channels, kernel_size=4, stride=2, padding=1))
    return nn.Sequential(
        *head,
        nn.ConvTranspose2d(channels, channels // 2, kernel_size=4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(channels // 2, out_channels, kernel_size=4, stride=2, padding=1),
    )


def upsample(codes: Tensor) -> Tensor:  # [B, C, H, W] to [B, C, 2 H, 2 W]
    return F.interpolate(codes, scale_factor=UPPER_STRIDE, mode="nearest")


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
