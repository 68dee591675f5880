"""Training: segments of the clips, the loss, the steps."""

import time

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from examples.speech_codec.data import LOUDNESS, Clip, DataError
from examples.speech_codec.measures import stft_distance
from examples.speech_codec.model import Codec

WAVEFORM_WEIGHT = 10.0
COMMITMENT_WEIGHT = 0.25
LEARNING_RATE = 3e-3
CLIP_NORM = 1.0


def train(model: Codec, clips: list[Clip], steps: int, batch_size: int, segment: int, seed: int) -> None:
    """AdamW with a warm-up and a cosine to 0 on batches of segments, in samples; the model ends in eval."""
    stream = torch.from_numpy(np.concatenate([clip.audio for clip in clips]))
    if len(stream) < segment:
        raise DataError(f"{len(stream)} samples to train on, fewer than a segment of {segment}")
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.8, 0.99), weight_decay=1e-2)
    warm_up = max(1, min(50, steps // 10))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm_up, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm_up)),
        ],
        [warm_up],
    )
    random, start = torch.Generator().manual_seed(seed), time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        audio = segments(stream, batch_size, segment, random)
        found, commitment = model(audio)
        spectral, waveform = stft_distance(found, audio), l1_loss(found, audio) / LOUDNESS
        loss = spectral + WAVEFORM_WEIGHT * waveform + COMMITMENT_WEIGHT * commitment
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            terms = f"STFT {spectral:.3f}  waveform {waveform:.3f}  commitment {commitment:.4f}"
            print(f"step {step}/{steps}  {terms}  {time.monotonic() - start:.0f} s", flush=True)
    model.eval()


def segments(stream: Tensor, batch_size: int, segment: int, random: torch.Generator) -> Tensor:  # [batch_size, segment]
    """From anywhere in the clips, which stand in one row."""
    starts = torch.randint(len(stream) - segment + 1, (batch_size, 1), generator=random)
    return stream[starts + torch.arange(segment)]
