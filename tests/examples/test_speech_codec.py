"""The speech codec: its measures by hand, the audio it takes and refuses, encoding and decoding, whole runs."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from promises import COPIES, INDICES, REPEATS
from torch.testing import assert_close

pytest.importorskip("soundfile")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

import soundfile

from examples.speech_codec import data
from examples.speech_codec.__main__ import Measured, by_levels, main, table
from examples.speech_codec.data import LOUDNESS, Clip, DataError, load, middles, split, synthetic
from examples.speech_codec.measures import FLOOR, magnitudes, si_snr, stft_distance
from examples.speech_codec.model import Codec, bitrate, decode, encode, hop

ROOT = Path(__file__).parents[2]
TINY = ["--steps=2", "--batch-size=4", "--segment=0.2", "--channels=4", "--levels=3", "--codes=8"]


@pytest.fixture(autouse=True)
def plain_memory(seeded_and_poisoned):
    """As users run: no filling of fresh memory."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def few_clips(monkeypatch):
    monkeypatch.setattr(data, "SYNTHETIC_CLIPS", 20)


def tone(samples: int = 4000, rate: int = 8000, hertz: float = 440.0) -> np.ndarray:  # loudness 0.2
    return (0.2 * math.sqrt(2) * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)).astype(np.float32)


def with_codes(levels: int = 3) -> Codec:
    """In eval, the codes of all levels set by a batch."""
    model = Codec(channels=4, latent=8, levels=levels, codes=16).eval()
    model(torch.randn(4, 1600))
    return model


# Measures


def test_si_snr_by_hand():
    audio, noise = torch.tensor([[1.0, -1, 1, -1]]), torch.tensor([[1.0, 1, -1, -1]])
    assert_close(si_snr(audio + 0.1 * noise, audio), torch.tensor([20.0]))
    assert_close(si_snr(-3 * (audio + 0.1 * noise) + 7, audio), torch.tensor([20.0]))  # any scale and mean
    assert_close(si_snr(torch.cat([audio + noise] * 2), torch.cat([audio, noise])), torch.zeros(2))


def test_stft_distance():
    noise = 0.3 * torch.randn(2, 16000)
    assert stft_distance(noise, noise) == 0
    assert stft_distance(noise, noise.roll(40, -1)) > 0.1
    assert_close(magnitudes(noise, 256).square().mean().sqrt(), torch.tensor(0.3), rtol=0.02, atol=0)
    linear = torch.stack([magnitudes(noise, window).mean() for window in (64, 128, 256, 512)]).mean()
    assert_close(stft_distance(2 * noise, noise), linear + math.log(2), rtol=1e-3, atol=0)
    assert stft_distance(torch.zeros(1, 800), torch.full((1, 800), FLOOR / 100)) < FLOOR  # silence is silence


def test_stft_distance_of_silence_has_a_gradient():
    silence = torch.zeros(1, 800, requires_grad=True)
    stft_distance(silence, torch.randn(1, 800)).backward()
    assert silence.grad.isfinite().all()


def test_bitrate_by_hand():
    assert hop() == 80
    assert bitrate(8, 256, 8000) == 8 * 8 * 100
    assert bitrate(1, 1024, 16000) == 10 * 200


# Encoding and decoding


@pytest.mark.parametrize("samples", [1600, 1601, 79, 1])
def test_decoding_is_what_the_model_makes_of_audio(samples):
    model, audio = with_codes(), torch.randn(2, samples)
    indices = encode(model, audio)
    assert indices.shape == (2, math.ceil(samples / hop()), 3)
    found, loss = model(audio)
    assert found.shape == audio.shape
    assert loss == 0
    assert_close(decode(model, indices)[:, :samples], found.detach())


def test_decoding_of_fewer_levels():
    model, audio = with_codes(), torch.randn(1, 1600)
    codes = model.quantizer(model.encoder(audio.unsqueeze(1)), return_all_codes=True)[3]  # [Q, 1, frames, latent]
    indices = encode(model, audio)
    every = by_levels(model, indices)
    for levels in (1, 2, 3):
        expected = model.decoder(codes[:levels].sum(0).mT).squeeze(1).detach()
        assert_close(decode(model, indices[..., :levels]), expected)
        assert_close(every[levels - 1 : levels], expected)


def test_a_model_in_training_does_not_encode():
    with pytest.raises(RuntimeError, match="eval"):
        encode(Codec(channels=4), torch.randn(1, 800))


# Data


@pytest.mark.parametrize(
    "subtype, tolerance",
    [
        ("PCM_U8", 2e-2),
        ("PCM_16", 1e-4),
        ("PCM_24", 1e-6),
        ("PCM_32", 1e-6),
        ("FLOAT", 1e-6),
        ("DOUBLE", 1e-6),
        ("ULAW", 1e-2),
    ],
)
def test_wav_formats(tmp_path, subtype, tolerance):
    soundfile.write(tmp_path / "a.wav", tone(), 8000, subtype)
    (clip,) = load(tmp_path, 8000)
    assert clip[::2] == ("a.wav", "")
    assert clip.audio.dtype == np.float32
    assert_close(clip.audio, tone() * LOUDNESS / 0.2, rtol=0, atol=tolerance)


def test_channels_are_averaged_and_rates_converted_and_both_are_said(tmp_path, capsys):
    (tmp_path / "ann" / "sub").mkdir(parents=True)
    both = np.stack([tone(8000, 16000), 3 * tone(8000, 16000)], 1)
    soundfile.write(tmp_path / "ann" / "sub" / "b.WAV", both, 16000)
    soundfile.write(tmp_path / "plain.wav", tone(), 8000)
    one, other = load(tmp_path, 8000)
    assert (one.name, one.speaker, other.speaker) == ("ann/sub/b.WAV", "ann", "")
    assert len(one.audio) == 4000
    assert_close(one.audio[200:-200], tone()[200:-200] * LOUDNESS / 0.2, rtol=0, atol=2e-3)
    said = capsys.readouterr().out
    assert "averaged over 2 channels, resampled from 16000 to 8000 Hz: ann/sub/b.WAV\n" in said
    assert "taken as they are: plain.wav\n" in said


def test_what_is_no_speech_is_left_out_by_name(tmp_path, capsys):
    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing else")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "no_samples.wav", np.zeros(0, np.float32), 8000)
    soundfile.write(tmp_path / "silent.wav", np.full(4000, 0.5, np.float32), 8000)
    soundfile.write(tmp_path / "nan.wav", np.full(4000, np.nan, np.float32), 8000, "FLOAT")
    soundfile.write(tmp_path / "good.wav", 1e30 * tone(), 8000, "FLOAT")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "notes.txt").write_text("no sound")
    assert [clip.name for clip in load(tmp_path, 8000)] == ["good.wav"]
    said = capsys.readouterr().out
    for name in ("broken", "empty", "folder"):
        assert f"left out {name}.wav: not readable" in said
    for name, why in {"no_samples": "no samples", "silent": "silent", "nan": "NaN"}.items():
        assert f"left out {name}.wav: {why}" in said
    assert "notes" not in said


def npz(path: Path, **changes) -> Path:
    """Two speakers, ten repetitions of a digit."""
    digit, speaker, index = np.full(20, 7), np.repeat([0, 1], 10), np.tile(np.arange(10), 2)
    audio = np.concatenate([tone(3200, hertz=200 + 40 * k) for k in range(20)])
    fields = {"digit": digit, "speaker": speaker, "index": index, "speakers": np.array(["ann", "bob"])}
    fields |= {"audio": np.int16(audio * 32767), "offsets": 3200 * np.arange(21)} | changes
    np.savez(path, **{name: value for name, value in fields.items() if value is not None})
    return path


def test_npz_holds_out_the_first_repetitions_or_a_speaker(tmp_path):
    clips = load(npz(tmp_path / "x.npz"), 8000)
    assert clips[13].name == "7_bob_3"
    assert_close(clips[13].audio, tone(3200, hertz=720) * LOUDNESS / 0.2, rtol=0, atol=1e-4)
    training, held_out = split(clips, None, 0)
    assert [clip.index for clip in held_out] == [0, 1, 2, 3, 4] * 2
    assert len(training) == 10
    training, held_out = split(clips, "bob", 0)
    assert [{clip.speaker for clip in part} for part in (training, held_out)] == [{"ann"}, {"bob"}]
    with pytest.raises(DataError, match="eve: not among the speakers ann, bob"):
        split(clips, "eve", 0)
    assert len(load(npz(tmp_path / "x.npz"), 16000)[0].audio) == 6400
    assert load(npz(tmp_path / "x.npz", speakers=None), 8000)[13].name == "7_1_3"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"index": None}, "index"),
        ({"audio": np.zeros(64000, np.float32)}, "audio must be int16 in a row, got float32"),
        ({"offsets": 3200.0 * np.arange(21)}, "offsets must be integers in a row, got float64"),
        ({"digit": np.full((20, 1), 7)}, r"digit must be integers in a row, got int64 \[20, 1\]"),
        ({"audio": np.zeros(64000, np.int16)}, "no clip"),
        ({"offsets": 3200 * np.arange(20)}, "one longer"),
        ({"offsets": np.arange(21) * 3201}, "offsets"),
    ],
    ids=["field missing", "dtype", "offsets in floats", "axes", "silent", "lengths", "beyond the end"],
)
def test_other_npz_files_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load(npz(tmp_path / "x.npz", **changes), 8000)


@pytest.mark.parametrize("kept", [0, 40, 1000])
def test_a_cut_npz_is_refused(tmp_path, kept):
    path = npz(tmp_path / "x.npz")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"x\.npz"):
        load(path, 8000)


def test_a_tenth_is_held_out_by_the_seed():
    clips = [Clip(str(k), tone(), "", None) for k in range(40)]
    training, held_out = split(clips, None, 0)
    assert (len(training), len(held_out)) == (36, 4)
    assert {clip.name for clip in training + held_out} == {clip.name for clip in clips}
    assert [clip.name for clip in held_out] != [clip.name for clip in split(clips, None, 1)[1]]
    with pytest.raises(DataError, match="none to train on"):
        split(clips[:1], None, 0)


def test_middles_leave_out_silent_ones():
    pause = np.concatenate([tone(100), np.zeros(50, np.float32), tone(100)])
    clips = [Clip("", audio, "", None) for audio in (pause, tone(30), tone(101))]
    short, cut = middles(clips, 40)
    COPIES.same(short, tone(30))
    COPIES.same(cut, tone(101)[30:70])
    with pytest.raises(DataError, match="silent"):
        middles(clips[:1], 40)


def test_synthetic_clips_are_speech_like():
    clips = synthetic(8000)
    assert len({clip.audio.tobytes() for clip in clips}) == 20
    for clip in clips:
        assert len(clip.audio) == 8000
        assert_close(np.square(clip.audio).mean() ** 0.5, np.float32(LOUDNESS))


# Runs


def check_run(folder: Path, measured, said: str) -> None:
    assert all(value.shape == (3,) and value.isfinite().all() for value in measured)
    assert table(measured, 8, 8000) in said
    lengths = {soundfile.info(folder / f"{name}.wav").frames for name in ("original", "levels_1", "levels_2")}
    assert len(lengths) == 1
    assert (folder / "spectrograms.png").read_bytes()[1:4] == b"PNG"


def test_a_run_without_data_repeats(tmp_path, capsys):
    first, second = (main([*TINY, "--out", str(tmp_path / name)]) for name in "ab")
    check_run(tmp_path / "a", first, capsys.readouterr().out)
    REPEATS.same(first, second)
    model = Codec(channels=4, levels=3, codes=8).eval()
    model.load_state_dict(torch.load(tmp_path / "a" / "codec.pt"))
    other = Codec(channels=4, levels=3, codes=8).eval()
    other.load_state_dict(torch.load(tmp_path / "b" / "codec.pt"))
    COPIES.same(model.quantizer.codebooks, other.quantizer.codebooks)
    audio = torch.from_numpy(tone())[None]
    INDICES.same(encode(model, audio), encode(other, audio))


def test_a_run_on_a_folder(tmp_path, capsys):
    (tmp_path / "speech").mkdir()
    for k in range(6):
        soundfile.write(tmp_path / "speech" / f"{k}.wav", tone(hertz=200 + 50 * k), 8000)
    (tmp_path / "speech" / "6.wav").write_bytes(b"broken")
    measured = main([*TINY, "--data", str(tmp_path / "speech"), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    check_run(tmp_path / "run", measured, said)
    assert "0.wav, 1.wav, 2.wav and 3 more" in said
    assert "left out 6.wav" in said


def test_a_run_on_an_npz(tmp_path, capsys):
    data = str(npz(tmp_path / "x.npz"))
    measured = main([*TINY, "--data", data, "--held-out-speaker", "ann", "--out", str(tmp_path / "run")])
    check_run(tmp_path / "run", measured, capsys.readouterr().out)


def test_the_page_about_it(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/speech_codec.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    main(["--steps=1", "--batch-size=4", "--segment=1", "--out", "runs/codec"])
    found = {}
    exec(block, found)
    audio, indices = found["audio"], found["indices"]
    assert indices.shape == (1, math.ceil(audio.shape[1] / hop()), 8)
    assert found["coarse"].shape == (1, indices.shape[1] * hop())


@pytest.mark.parametrize("name", ["spoken_digits", "synthetic"])
def test_the_tables_of_the_page_are_recorded(name):
    lines = (ROOT / f"benchmarks/results/speech_codec/{name}.jsonl").read_text().splitlines()
    about, *levels = map(json.loads, lines)
    assert {"command", "device", "threads", "versions", "commit"} <= about.keys()
    measured = Measured(*(torch.tensor([row[field] for row in levels]) for field in Measured._fields))
    assert table(measured, 256, 8000) in (ROOT / "docs/speech_codec.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere"], "--data nowhere: neither a folder nor an .npz file"),
        (["--data", "."], "no readable file that ends in .wav"),
        (["--held-out-speaker", "ann"], "--held-out-speaker ann: not among the speakers (none"),
        (["--levels", "0"], "argument --levels"),
        (["--segment", "30"], "144000 samples to train on, fewer than a segment of 240000"),
        (["--segment", "0.005"], "--segment 0.005: 40 samples, fewer than the 80 of a frame"),
    ],
)
def test_a_run_says_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*TINY, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_training_makes_levels_count(tmp_path):
    (tmp_path / "tones").mkdir()
    for k in range(30):
        soundfile.write(tmp_path / "tones" / f"{k}.wav", tone(hertz=200 + 10 * k), 8000)
    options = ["--steps=80", "--batch-size=8", "--segment=0.2", "--channels=8", "--levels=3", "--codes=32"]
    measured = main([*options, "--data", str(tmp_path / "tones"), "--out", str(tmp_path / "run")])
    assert measured.si_snr[-1] > measured.si_snr[0] + 1
    assert measured.si_snr[-1] > -15  # without training, or with codes that shrink to nothing: below -25
