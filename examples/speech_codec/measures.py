"""How far audio is from audio."""

import torch
from torch import Tensor

WINDOWS = 64, 128, 256, 512  # samples; 8 to 64 ms at 8 kHz
FLOOR = 1e-3  # magnitudes below count as silence


def stft_distance(found: Tensor, audio: Tensor) -> Tensor:  # [B, samples] each -> []
    """Multi-scale STFT distance: the mean over the windows of

        mean |S(found) - S(audio)| + mean |ln S(found) - ln S(audio)|

    where S are the magnitudes, in units in which white noise has its own amplitude; in the logarithm at least FLOOR.
    """
    total = audio.new_zeros(())
    for window in WINDOWS:
        one, other = magnitudes(found, window), magnitudes(audio, window)
        logarithms = one.clamp_min(FLOOR).log() - other.clamp_min(FLOOR).log()
        total = total + (one - other).abs().mean() + logarithms.abs().mean()
    return total / len(WINDOWS)


def magnitudes(audio: Tensor, window: int) -> Tensor:  # [B, samples] -> [B, window // 2 + 1, frames]
    shape = torch.hann_window(window, dtype=audio.dtype, device=audio.device)
    shape = shape / shape.square().sum().sqrt()
    spectrum = torch.stft(audio, window, window // 4, window=shape, return_complex=True, pad_mode="constant")
    return (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt()  # + : a gradient at 0


def si_snr(found: Tensor, audio: Tensor) -> Tensor:  # [B, samples] each -> [B]
    """Scale-invariant signal-to-noise ratio in dB: 10 log10(|s|^2 / |found - s|^2), s the part of found along audio.

    Both without their means (Luo and Mesgarani, arXiv 1809.07454).
    """
    found, audio = found - found.mean(-1, keepdim=True), audio - audio.mean(-1, keepdim=True)
    scale = (found * audio).sum(-1, keepdim=True) / audio.square().sum(-1, keepdim=True)
    target = scale * audio
    return 10 * (target.square().sum(-1) / (found - target).square().sum(-1)).log10()
