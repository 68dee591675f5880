"""Train a small speech codec with vqops.ResidualVQ, and measure what each level of codes adds.

    python -m examples.speech_codec --data folder_of_wavs --out runs/codec
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure
from torch import Tensor

from examples.speech_codec.data import Clip, DataError, load, middles, split
from examples.speech_codec.measures import magnitudes, si_snr, stft_distance
from examples.speech_codec.model import Codec, bitrate, decode, encode, hop
from examples.speech_codec.training import train

MEASURED_CLIPS = 300  # at most, and of each
MEASURED_SECONDS = 10  # in the middle
SHOWN_SECONDS = 3


class Measured(NamedTuple):
    """Means over the held-out clips, by number of levels [Q]; use of the codes, by level [Q]."""

    si_snr: Tensor  # dB
    stft: Tensor
    used: Tensor  # share of the codes
    perplexity: Tensor  # of the codes


def main(argv: list[str] | None = None) -> Measured:
    parser = argparse.ArgumentParser("speech_codec", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of wav, flac or ogg files, or an .npz; without: synthetic")
    parser.add_argument("--held-out-speaker", help="hold out this one: a subfolder of --data, or a name of the .npz")
    parser.add_argument("--rate", type=positive, default=8000, help="Hz to which everything is resampled (8000)")
    parser.add_argument("--steps", type=positive, default=1000)
    parser.add_argument("--batch-size", type=positive, default=16, help="segments a step (16)")
    parser.add_argument("--segment", type=float, default=0.4, help="seconds (0.4)")
    parser.add_argument("--channels", type=positive, default=16, help="of the first layer, doubled by each stride (16)")
    parser.add_argument("--levels", type=positive, default=8)
    parser.add_argument("--codes", type=positive, default=256, help="of a level (256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/speech_codec"))
    args = parser.parse_args(argv)
    try:
        return run(args)
    except DataError as error:
        parser.error(str(error))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def run(args: argparse.Namespace) -> Measured:
    segment = int(args.segment * args.rate)
    if segment < hop():
        raise DataError(f"--segment {args.segment}: {segment} samples, fewer than the {hop()} of a frame")
    train_clips, held_out = split(load(args.data, args.rate), args.held_out_speaker, args.seed)
    for clips, name in ((train_clips, "to train on"), (held_out, "held out")):
        seconds = sum(len(clip.audio) for clip in clips) / args.rate
        print(f"{len(clips)} clips {name}, {seconds / 60:.1f} minutes")
    pieces = middles(held_out[:: -(-len(held_out) // MEASURED_CLIPS)], MEASURED_SECONDS * args.rate)
    torch.manual_seed(args.seed)
    model = Codec(args.channels, levels=args.levels, codes=args.codes)
    train(model, train_clips, args.steps, args.batch_size, segment, args.seed)
    measured = measure(model, pieces, args.codes)
    print(table(measured, args.codes, args.rate))
    args.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), args.out / "codec.pt")
    show(model, held_out, args.codes, args.rate, args.out)
    print(f"model, sounds and spectrograms: {args.out}")
    return measured


def measure(model: Codec, pieces: list[np.ndarray], codes: int) -> Measured:  # float32 [samples] each
    snrs, distances, counts = [], [], torch.zeros(model.quantizer.num_quantizers, codes)
    for piece in pieces:
        audio = torch.from_numpy(piece)[None]
        indices = encode(model, audio)
        found = by_levels(model, indices)[:, : audio.shape[-1]]
        snrs.append(si_snr(found, audio))
        distances.append(torch.stack([stft_distance(one[None], audio) for one in found]))
        counts += torch.stack([level.bincount(minlength=codes) for level in indices[0].unbind(-1)])
    share = counts / counts.sum(1, keepdim=True)
    perplexity = torch.special.entr(share).sum(1).exp()
    return Measured(torch.stack(snrs).mean(0), torch.stack(distances).mean(0), (counts > 0).float().mean(1), perplexity)


def by_levels(model: Codec, indices: Tensor) -> Tensor:  # [1, frames, Q] -> [Q, samples]
    """Decoded from the first level, the first two, ... all."""
    levels = indices.shape[-1]
    later = torch.ones(levels, levels, dtype=torch.bool).triu(1)[:, None]
    return decode(model, indices.expand(levels, -1, -1).masked_fill(later, -1))


def table(measured: Measured, codes: int, rate: int) -> str:
    lines = ["| levels | kbit/s | SI-SNR, dB | STFT distance | codes of the level used | their perplexity |"]
    lines += ["| ---: | ---: | ---: | ---: | ---: | ---: |"]
    for levels, (snr, stft, used, perplexity) in enumerate(zip(*measured, strict=True), start=1):
        kbits = bitrate(levels, codes, rate) / 1000
        lines.append(f"| {levels} | {kbits:.1f} | {snr:.2f} | {stft:.3f} | {used:.0%} | {perplexity:.0f} |")
    return "\n".join(lines)


def show(model: Codec, clips: list[Clip], codes: int, rate: int, folder: Path) -> None:
    """Write held-out clips and what comes back of them: .wav files, and one picture of their spectrograms."""
    picked = clips[:: max(1, len(clips) // 8)]
    audio = torch.from_numpy(np.concatenate([clip.audio for clip in picked]))[: SHOWN_SECONDS * rate]
    rows = {"original": audio}
    soundfile.write(folder / "original.wav", audio.numpy(), rate)
    for levels, found in enumerate(by_levels(model, encode(model, audio[None]))[:, : len(audio)], start=1):
        if levels.bit_count() == 1:  # 1, 2, 4, 8
            soundfile.write(folder / f"levels_{levels}.wav", found.numpy(), rate)
            rows[f"{levels} level{'s' * (levels > 1)}, {bitrate(levels, codes, rate) / 1000:.1f} kbit/s"] = found
    save_spectrograms(folder / "spectrograms.png", rows, rate)


def save_spectrograms(path: Path, rows: dict[str, Tensor], rate: int) -> None:  # [samples] each
    figure = Figure(figsize=(9, 1.7 * len(rows)), layout="constrained")
    for axes, (name, samples) in zip(figure.subplots(len(rows), sharex=True), rows.items(), strict=True):
        decibels = 20 * magnitudes(samples[None], 256)[0].log10()
        extent = 0, len(samples) / rate, 0, rate / 2000
        image = axes.imshow(decibels.numpy(), "inferno", vmin=-70, vmax=0, origin="lower", aspect="auto", extent=extent)
        axes.set(title=name, ylabel="kHz")
    axes.set_xlabel("s")
    figure.colorbar(image, ax=figure.axes, label="dB", shrink=0.5)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
