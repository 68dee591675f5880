"""`vqops sample` and `vqops complete`, on a whole chain of tiny models: what they write and what they refuse."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from promises import REPEATS

pytest.importorskip("safetensors")

from vqops.vqvae2 import (
    VQVAE2,
    CompleteOptions,
    EvaluateOptions,
    ExtractOptions,
    InputError,
    SampleOptions,
    TrainOptions,
    TrainPriorOptions,
    VQVAE2Config,
    complete,
    evaluate,
    extract,
    load_model,
    load_prior,
    sample,
    train,
    train_prior,
)
from vqops.vqvae2.prior.sample import upper_codes

DARK, LIGHT = 40, 220


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """Dark and light images of 14 x 16 pixels, told apart by their label, through every step up to the priors."""
    folder = tmp_path_factory.mktemp("chain")
    labels = np.arange(80) % 2
    noise = np.random.default_rng(0).integers(-30, 30, (80, 14, 16))
    images = (np.where(labels, LIGHT, DARK)[:, None, None] + noise).clip(0, 255).astype(np.uint8)
    np.savez(folder / "images.npz", x=images, y=np.where(labels, "light", "dark"))
    for number in (0, 1):
        Image.fromarray(images[number]).save(folder / f"{number}.png")
    data = {"data": str(folder / "images.npz"), "data_key": "x", "device": "cpu"}
    sizes = {"image_size": 16, "channels": 8, "codebook_size": 8, "code_dim": 4}
    train(TrainOptions(**data, **sizes, steps=150, batch_size=16, lr=3e-3, out=folder / "run"))
    extract(ExtractOptions(run=folder / "run", out=folder / "codes", label_key="y", **data))
    for level in ("top", "bottom"):
        options = TrainPriorOptions(folder / "codes", level, folder / level, steps=60, width=16, layers=1, heads=2)
        train_prior(replace(options, lr=1e-2, warmup=5, eval_every=30, device="cpu"))
    return folder


def options_of(kind: type, chain: Path, out: Path, **changes):
    return kind(run=chain / "run", prior=(chain / "bottom", chain / "top"), out=out, device="cpu", **changes)


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_samples_are_of_their_class(chain, tmp_path, capsys):
    sample(options_of(SampleOptions, chain, tmp_path / "out", classes=("dark", "light"), count=14, batch_size=4))
    names = [f"{n:05}-{('dark', 'light')[n % 2]}.png" for n in range(14)]
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*names, "grid.png"])
    pictures = [picture(tmp_path / "out" / name) for name in names]
    assert {image.shape for image in pictures} == {(14, 16)}
    brightness = [image.mean() for image in pictures]
    dark, light = brightness[0::2], brightness[1::2]  # most of them: a prior this small is not sure of each
    assert np.median(dark) < (DARK + LIGHT) / 2 < np.median(light)
    said = capsys.readouterr().out
    assert "codes/s" in said
    assert "next: vqops complete" in said
    assert said.splitlines()[-1] == f"a column a class: {tmp_path / 'out' / 'grid.png'}"


def test_seed_decides_the_images(chain, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sample(options_of(SampleOptions, chain, tmp_path / name, count=5, seed=seed))
    once, again, other = ([picture(tmp_path / name / f"{n:05}.png") for n in range(5)] for name in "abc")
    REPEATS.same(once, again)
    assert any((a != b).any() for a, b in zip(once, other, strict=True))


def test_guidance_and_temperature_run_to_the_end(chain, tmp_path):
    likely = {"guidance": 2.0, "top_k": 4, "top_p": 0.9}
    sample(options_of(SampleOptions, chain, tmp_path / "a", count=3, classes=("dark",), **likely))
    sample(options_of(SampleOptions, chain, tmp_path / "b", count=3, temperature=0.0))
    first, second = (picture(tmp_path / "b" / f"{n:05}.png").astype(int) for n in (0, 1))
    assert abs(first - second).max() <= 1  # places in a batch may round differently


def test_completions_keep_the_upper_half(chain, tmp_path, capsys):
    out = tmp_path / "out"
    complete(options_of(CompleteOptions, chain, out, images=(chain / "0.png", chain / "1.png"), count=2))
    assert sorted(os.listdir(out)) == ["0-0.png", "0-1.png", "1-0.png", "1-1.png", "grid.png"]
    dark, light = ([picture(out / f"{number}-{n}.png")[:6].mean() for n in (0, 1)] for number in (0, 1))
    assert max(dark) < (DARK + LIGHT) / 2 < min(light)
    assert picture(out / "grid.png").shape[1] == 4 * (16 * 10 + 4)  # image, what is kept, two completions
    said = capsys.readouterr().out
    assert "next: " in said
    assert said.splitlines()[-1].endswith(str(out / "grid.png"))


def test_codes_of_the_upper_half_do_not_depend_on_the_lower(chain):
    model = load_model(chain / "run")
    pixels = torch.randint(0, 256, (2, 1, 14, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    changed = pixels.clone()
    changed[:, :, 8:] = 255 - changed[:, :, 8:]
    for here, there, rows in zip(upper_codes(model, pixels), upper_codes(model, changed), (2, 1), strict=True):
        assert here.shape[1] == rows
        REPEATS.same(here, there)


def test_other_strides_go_all_the_way(chain, tmp_path):
    """16 bottom codes a top code, on images that no level divides; every command at work."""
    data = {"data": str(chain / "images.npz"), "data_key": "x", "device": "cpu"}
    sizes = {"image_size": 16, "channels": 8, "codebook_size": 8, "code_dim": 4, "strides": (2, 4)}
    run = train(TrainOptions(**data, **sizes, steps=2, batch_size=16, out=tmp_path / "run"))
    assert "strides = [2, 4]" in (run / "config.toml").read_text()
    assert load_model(run).config.level_strides == (2, 4)
    extract(ExtractOptions(run=run, out=tmp_path / "codes", label_key="y", **data))
    priors = tuple(tmp_path / level for level in ("bottom", "top"))
    for prior in priors:
        options = TrainPriorOptions(tmp_path / "codes", prior.name, prior, steps=2, width=16, layers=1, heads=2)
        train_prior(replace(options, device="cpu"))
        assert load_prior(prior)[0].config.sizes == ((8, 8), (2, 2))
    made = {"run": run, "prior": priors, "device": "cpu"}
    sample(SampleOptions(**made, count=3, out=tmp_path / "samples"))
    complete(CompleteOptions(**made, images=(chain / "0.png",), out=tmp_path / "completions"))
    assert picture(tmp_path / "samples" / "00002.png").shape == picture(tmp_path / "completions" / "0-0.png").shape
    pixels = torch.zeros(1, 1, 14, 16, dtype=torch.uint8)
    assert [tuple(codes.shape[1:]) for codes in upper_codes(load_model(run), pixels)] == [(4, 8), (1, 2)]
    evaluate(EvaluateOptions(run, data["data"], tmp_path / "measured", data_key="x", prior=priors, device="cpu"))
    named = {row["name"] for row in json.loads((tmp_path / "measured" / "evaluation.json").read_text())}
    assert {"nats_per_code_bottom", "nats_per_code_top", "prior_bits_per_dim"} <= named


# Refused


def test_one_row_of_top_codes_has_no_half():
    model = VQVAE2(VQVAE2Config(image_channels=1, channels=8, codebook_size=8, code_dim=4, strides=(4, 4)))
    with pytest.raises(InputError, match="one row of codes, each over 16 rows of pixels, for images of 14 x 16"):
        upper_codes(model, torch.zeros(1, 1, 14, 16, dtype=torch.uint8))


def test_refusals(chain, tmp_path):
    def refused(message, action, **changes):
        kind = {sample: SampleOptions, complete: CompleteOptions}[action]
        extra = {"images": (chain / "0.png",)} if action is complete else {}
        with pytest.raises(InputError, match=message):
            action(replace(options_of(kind, chain, tmp_path / "out", **extra), **changes))

    refused("classes red: the priors do not know it, only dark, light", sample, classes=("red",))
    refused("names none of level top", sample, prior=(chain / "bottom",))
    refused("names two priors of level top", sample, prior=(chain / "top", chain / "top"))
    refused("no prior is there", sample, prior=(chain, chain / "top"))
    refused("no such file", sample, run=tmp_path)
    refused("is not empty", sample, out=chain)
    refused("classes names 2 classes", complete, classes=("dark", "light"))
    refused("two files of one name", complete, images=(chain / "0.png", chain / "0.png"))
    Image.new("L", (4, 4)).save(tmp_path / "small.png")
    refused("small.png is 4 x 4, at least 16 x 14 is needed", complete, images=(tmp_path / "small.png",))
    assert not (tmp_path / "out").exists()


def test_priors_of_another_model_are_refused(chain, tmp_path):
    data = {"data": str(chain / "images.npz"), "data_key": "x", "device": "cpu"}
    sizes = {"image_size": 16, "channels": 8, "codebook_size": 8, "code_dim": 4}
    run = train(TrainOptions(**data, **sizes, steps=1, batch_size=16, out=tmp_path / "run"))
    with pytest.raises(InputError, match="learned the codes of another model"):
        sample(replace(options_of(SampleOptions, chain, tmp_path / "out"), run=run))


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("temperature", -1, "at least 0"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0, "above 0"),
        ("count", 0, "at least 1"),
    ],
)
def test_values_out_of_range(name, value, allowed):
    options = {"run": Path("run"), "prior": (Path("a"),), "out": Path("b"), name: value}
    with pytest.raises(InputError, match=f"^{name} must be {allowed}"):
        SampleOptions(**options)
    with pytest.raises(InputError, match=r"^prior names no folder"):
        SampleOptions(Path("run"), (), Path("out"))
