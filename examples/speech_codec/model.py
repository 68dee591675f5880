"""The codec: a convolutional encoder, residual vector quantization in the middle, a decoder that mirrors the encoder.

After SEANet (arXiv 2009.02095), SoundStream (2107.03312) and DAC (2306.06546), small enough for a CPU.
"""

from itertools import pairwise
from math import log2, prod

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.parametrizations import weight_norm

from vqops import ResidualVQ

STRIDES = (4, 5, 4)  # 80 samples a frame: 100 frames a second at 8 kHz


class Codec(nn.Module):
    """Audio [B, samples] to audio of the same shape through `levels` indices a frame."""

    def __init__(self, channels: int = 16, latent: int = 32, levels: int = 8, codes: int = 256):
        super().__init__()
        widths = [channels * 2**stage for stage in range(len(STRIDES) + 1)]
        down, up = [], []
        for (width, wider), stride in zip(pairwise(widths), STRIDES, strict=True):
            units = [ResidualUnit(wider, dilation) for dilation in (1, 3, 1, 3)]
            down += [nn.ELU(), downsample(width, wider, stride), *units[:2]]
            up = [*units[2:], nn.ELU(), upsample(wider, width, stride), *up]
        scale = nn.BatchNorm1d(latent, affine=False)  # without it latents and codes can shrink to nothing together
        self.encoder = nn.Sequential(conv(1, widths[0], 7), *down, nn.ELU(), conv(widths[-1], latent, 3), scale)
        self.decoder = nn.Sequential(conv(latent, widths[-1], 3), *up, nn.ELU(), conv(widths[0], 1, 7))
        self.quantizer = ResidualVQ(
            dim=latent,
            num_quantizers=levels,
            codebook_size=codes,
            kmeans_init=True,  # of the B * frames vectors of a first batch; best if more than codes
            threshold_ema_dead_code=1,
            decay=0.95,
            rotation_trick=False,
            gradient_per_level=False,
            quantize_dropout=True,  # so that the first levels alone can be decoded
            channel_last=False,
        )

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:  # [B, samples]; the same, commitment loss []
        latents = self.encoder(whole_frames(audio).unsqueeze(1))
        quantized, _, losses = self.quantizer(latents)
        return self.decoder(quantized).squeeze(1)[:, : audio.shape[-1]], losses.sum()


def encode(model: Codec, audio: Tensor) -> Tensor:  # [B, samples] -> int64 [B, frames, Q]
    """Indices of the frames; the last frame is filled up with silence."""
    if model.training:
        raise RuntimeError("encode: a model in training would learn from the audio; call model.eval() first")
    with torch.no_grad():
        return model.quantizer(model.encoder(whole_frames(audio).unsqueeze(1)))[1]


def decode(model: Codec, indices: Tensor) -> Tensor:  # [B, frames, q] -> [B, samples]
    """Audio of the first q levels, q from 1 to Q; a level of -1 adds nothing."""
    with torch.no_grad():
        return model.decoder(model.quantizer.get_output_from_indices(indices)).squeeze(1)


def bitrate(levels: int, codes: int, rate: int) -> float:
    """Bits per second of `levels` indices a frame, without entropy coding: levels * log2(codes) * rate / hop."""
    return levels * log2(codes) * rate / hop()


def hop() -> int:
    """Samples a frame."""
    return prod(STRIDES)


def whole_frames(audio: Tensor) -> Tensor:
    return pad(audio, (0, -audio.shape[-1] % hop()))


class ResidualUnit(nn.Sequential):
    """x + f(x) on [B, width, time]."""

    def __init__(self, width: int, dilation: int):
        super().__init__(nn.ELU(), conv(width, width, 7, dilation), nn.ELU(), conv(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def conv(width: int, out: int, kernel: int, dilation: int = 1) -> nn.Module:
    return weight_norm(nn.Conv1d(width, out, kernel, dilation=dilation, padding=dilation * (kernel // 2)))


def downsample(width: int, out: int, stride: int) -> nn.Module:
    return weight_norm(nn.Conv1d(width, out, 2 * stride, stride, padding=(stride + 1) // 2))


def upsample(width: int, out: int, stride: int) -> nn.Module:
    odd = stride % 2
    return weight_norm(nn.ConvTranspose1d(width, out, 2 * stride, stride, (stride + 1) // 2, output_padding=odd))
