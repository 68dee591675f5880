"""Speech from a folder, an .npz file or a synthesis: clips of one rate and loudness, some of them held out."""

import zipfile
import zlib
from collections import defaultdict
from itertools import pairwise
from math import gcd
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from scipy.signal import resample_poly

SUFFIXES = ".wav", ".flac", ".ogg"
LOUDNESS = 0.1  # root mean square of every clip
NPZ_RATE = 8000  # Hz; the layout has no field for it
SYNTHETIC_CLIPS = 400
HELD_OUT_INDEX = 5  # of the npz layout: repetitions 0 to 4 of each digit and speaker


class DataError(ValueError):
    """What is wrong with the data, for whoever gave it."""


class Clip(NamedTuple):
    name: str
    audio: np.ndarray  # float32 [samples], of loudness LOUDNESS
    speaker: str  # "" if nothing says so
    index: int | None  # number of the repetition, in the npz layout


def load(path: Path | None, rate: int) -> list[Clip]:
    """The clips of a folder or an .npz file at `rate` Hz, without a path synthetic ones; prints what became of them."""
    if path is None:
        print("no --data: synthetic tones with moving pitch and formants, and bursts of noise")
        return synthetic(rate)
    if path.is_dir():
        return from_folder(path, rate)
    if path.suffix == ".npz":
        return from_npz(path, rate)
    raise DataError(f"--data {path}: neither a folder nor an .npz file")


def split(clips: list[Clip], speaker: str | None, seed: int) -> tuple[list[Clip], list[Clip]]:
    """Training and held-out clips: held out are those of `speaker`; without one, the repetitions 0 to 4 of an npz; else
    a tenth, drawn by the seed."""
    if speaker is not None:
        speakers = sorted({clip.speaker for clip in clips})
        if speaker not in speakers:
            known = ", ".join(filter(None, speakers)) or "(none: no subfolders)"
            raise DataError(f"--held-out-speaker {speaker}: not among the speakers {known}")
        chosen = [clip.speaker == speaker for clip in clips]
    elif all(clip.index is not None for clip in clips):
        chosen = [clip.index < HELD_OUT_INDEX for clip in clips]
    else:
        last = max(1, len(clips) // 10)
        chosen = np.random.default_rng(seed).permutation(len(clips)) < last
    parts = tuple([clip for clip, held in zip(clips, chosen, strict=True) if held == part] for part in (False, True))
    if not all(parts):
        raise DataError(f"{len(clips)} clips leave none to {'train on' if not parts[0] else 'hold out'}")
    return parts


def middles(clips: list[Clip], samples: int) -> list[np.ndarray]:  # [<= samples] each
    """Of those that are not silent there."""
    cut = [clip.audio[max(0, len(clip.audio) - samples) // 2 :][:samples] for clip in clips]
    heard = [audio for audio in cut if audio.std() > 0.01 * LOUDNESS]
    if not heard:
        raise DataError(f"all of the held-out clips are silent in their middle, {samples} samples long")
    return heard


def from_folder(folder: Path, rate: int) -> list[Clip]:
    """Every audio file in the folder and below; a file's speaker is the first folder on the way to it."""
    clips, became = [], defaultdict(list)
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        name = path.relative_to(folder)
        try:
            audio, what = read(path, rate)
            clips.append(Clip(str(name), audio, name.parts[0] if len(name.parts) > 1 else "", None))
            became[what].append(str(name))
        except DataError as error:
            print(f"left out {name}: {error}")
    for what, names in became.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print(f"{what}: {', '.join(names[:3])}{more}")
    if not clips:
        raise DataError(f"--data {folder}: no readable file that ends in {', '.join(SUFFIXES)}")
    return clips


def read(path: Path, rate: int) -> tuple[np.ndarray, str]:
    """The samples of a file and how they came to be."""
    try:
        audio, given = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise DataError(f"not readable as audio ({error})") from error
    what = "taken as they are" if audio.shape[1] == 1 else f"averaged over {audio.shape[1]} channels"
    if given != rate:
        what += f", resampled from {given} to {rate} Hz"
    return normalized(resampled(audio.mean(1), given, rate)), what


def from_npz(path: Path, rate: int) -> list[Clip]:
    """`audio`: int16, all clips in a row, at 8 kHz; `offsets` [clips + 1]: where each starts; `digit`, `speaker` and
    `index` [clips]: its label, its speaker as a position in `speakers`, and the number of the repetition."""
    try:
        with np.load(path) as file:
            fields = {name: file[name] for name in ("audio", "offsets", "digit", "speaker", "index")}
            names = file.get("speakers", [])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"--data {path}: {error}") from error
    for name, field in fields.items():
        kinds = "int16" if name == "audio" else "integers"
        if field.ndim != 1 or field.dtype.kind not in "iu" or (name == "audio" and field.dtype != np.int16):
            raise DataError(f"--data {path}: {name} must be {kinds} in a row, got {field.dtype} {list(field.shape)}")
    audio, offsets = fields["audio"], fields["offsets"]
    if len({len(offsets) - 1, *(len(fields[name]) for name in ("digit", "speaker", "index"))}) > 1:
        raise DataError(f"--data {path}: offsets must be one longer than digit, speaker and index")
    if offsets[0] < 0 or offsets[-1] > len(audio) or (np.diff(offsets) < 0).any():
        raise DataError(f"--data {path}: offsets must rise from 0 to at most the {len(audio)} samples of audio")
    if rate != NPZ_RATE:
        print(f"{path.name}: resampled from {NPZ_RATE} to {rate} Hz")
    clips = []
    for k, (start, end) in enumerate(pairwise(offsets)):
        number, index = int(fields["speaker"][k]), int(fields["index"][k])
        speaker = str(names[number]) if 0 <= number < len(names) else str(number)
        name = f"{fields['digit'][k]}_{speaker}_{index}"
        try:
            samples = resampled(audio[start:end].astype(np.float32) / 32768, NPZ_RATE, rate)
            clips.append(Clip(name, normalized(samples), speaker, index))
        except DataError as error:
            print(f"left out {name}: {error}")
    if not clips:
        raise DataError(f"--data {path}: no clip that is not silent")
    return clips


def resampled(audio: np.ndarray, given: int, rate: int) -> np.ndarray:
    if given == rate or not len(audio):
        return audio
    common = gcd(given, rate)
    return resample_poly(audio, rate // common, given // common)


def normalized(audio: np.ndarray) -> np.ndarray:
    """Without its mean, at LOUDNESS."""
    if not len(audio):
        raise DataError("no samples")
    if not np.isfinite(audio).all():
        raise DataError("NaN or Inf among the samples")
    audio = audio.astype(np.float64)
    audio -= audio.mean()
    loudness = np.sqrt(np.square(audio).mean())
    if loudness < 1e-5:
        raise DataError("silent")
    return (audio * (LOUDNESS / loudness)).astype(np.float32)


def synthetic(rate: int) -> list[Clip]:
    """Clips of a second: two voiced stretches with a burst of noise before each."""
    random = np.random.default_rng(0)
    clips = []
    for number in range(SYNTHETIC_CLIPS):
        parts = []
        for _ in range(2):
            parts += [burst(random, int(0.12 * rate)), voiced(random, int(0.38 * rate), rate)]
        clips.append(Clip(f"synthetic_{number}", normalized(np.concatenate(parts)), "", None))
    return clips


def voiced(random: np.random.Generator, samples: int, rate: int) -> np.ndarray:
    """Harmonics of a pitch that glides, as loud as three gliding formants (resonances) make them."""
    pitch = np.linspace(*random.uniform(90, 250, 2), samples)  # Hz
    number = np.arange(1, int(rate / 2 / 90), dtype=np.float32)[:, None]
    harmonic = number * pitch.astype(np.float32)  # [harmonics, samples]
    gain = np.zeros_like(harmonic)
    for k, span in enumerate(((300, 900), (900, 2300), (2300, 3200))):
        formant = np.linspace(*random.uniform(*span, 2), samples, dtype=np.float32)
        gain += 0.5**k / (1 + ((harmonic - formant) / (60 + 40 * k)) ** 2)
    turns = (np.cumsum(pitch) / rate % 1).astype(np.float32)
    tones = np.where(harmonic < rate / 2, gain, 0) * np.sin(2 * np.pi * number * turns)
    return tones.sum(0) * np.hanning(samples) ** 0.5


def burst(random: np.random.Generator, samples: int) -> np.ndarray:
    """Noise, louder towards high frequencies, that starts at once and dies away; one of four is a pause."""
    fading = np.exp(-np.arange(samples) / (samples * random.uniform(0.1, 0.5)))
    return np.diff(random.standard_normal(samples + 1)) * fading * random.choice([0, 0.1, 0.2, 0.4])
