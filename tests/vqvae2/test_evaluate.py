"""`vqops evaluate` and `vqops compare`: the figures against other ways to the same number, and the files."""

import io
import json
import math
import os
import shutil
import tarfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("safetensors")

from vqops.vqvae2 import (
    VQVAE2,
    CompareOptions,
    EvaluateOptions,
    ExtractOptions,
    InputError,
    TrainOptions,
    TrainPriorOptions,
    VQVAE2Config,
    compare,
    evaluate,
    extract,
    load_model,
    load_prior,
    train,
    train_prior,
)
from vqops.vqvae2.data.batches import hold_out, validation_batches
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.evaluation.compare import training_options
from vqops.vqvae2.evaluation.reconstruction_metrics import measure
from vqops.vqvae2.pictures.latents import plane, save_index_maps

SIZES = {"image_size": 16, "channels": 8, "codebook_size": 8, "code_dim": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Dark and light images, a model, its codes and priors."""
    folder = tmp_path_factory.mktemp("evaluate")
    labels = np.arange(60) % 2
    noise = np.random.default_rng(0).integers(-30, 30, (60, 16, 16, 3))
    images = (np.where(labels, 200, 60)[:, None, None, None] + noise).astype(np.uint8)
    np.savez(folder / "images.npz", x=images[:40], y=labels[:40], x_val=images[40:], y_val=labels[40:])
    data = {"data": str(folder / "images.npz"), "data_key": "x"}
    train(TrainOptions(**data, **SIZES, steps=100, batch_size=16, lr=3e-3, out=folder / "run"))
    extract(ExtractOptions(run=folder / "run", out=folder / "codes", label_key="y", **data, device="cpu"))
    for level in ("top", "bottom"):
        options = TrainPriorOptions(folder / "codes", level, folder / level, steps=40, width=16, layers=1, heads=2)
        train_prior(replace(options, lr=1e-2, warmup=5, eval_every=20, device="cpu"))
    return folder


def options_of(folder: Path, out: Path, **changes) -> EvaluateOptions:
    options = EvaluateOptions(
        folder / "run", str(folder / "images.npz"), out, data_key="x_val", label_key="y_val", batch_size=8, device="cpu"
    )
    return replace(options, **changes)


def test_figures(folder, tmp_path, capsys):
    both = (folder / "bottom", folder / "top")
    classifier = {"classifier_data": str(folder / "images.npz"), "classifier_key": "x", "classifier_label_key": "y"}
    options = options_of(folder, tmp_path / "out", prior=both, **classifier, classifier_steps=40, classifier_images=40)
    out = evaluate(options)
    rows = json.loads((out / "evaluation.json").read_text())
    assert all(set(row) == {"name", "value", "scale", "split"} and row["scale"] and row["split"] for row in rows)
    values = {row["name"]: row["value"] for row in rows}

    model = load_model(folder / "run")
    pixels = torch.from_numpy(np.load(folder / "images.npz")["x_val"]).permute(0, 3, 1, 2)
    batches = (pixels / 255).split(8)  # those of evaluate: in others a vector between two codes may fall to either
    with torch.no_grad():
        reconstructions = torch.cat([model(batch).reconstruction.clamp(0, 1) for batch in batches])
        codes = [torch.cat(level) for level in zip(*map(model.encode, batches), strict=True)]
    mse = (reconstructions - pixels / 255).square().mean().item()
    assert values["mse"] == pytest.approx(mse, rel=1e-4)
    assert values["psnr"] == pytest.approx(-10 * math.log10(mse), rel=1e-4)
    assert values["bits_per_dim"] == pytest.approx((16 + 4) * 3 / (3 * 16 * 16))
    assert values["codes_used_bottom"] == codes[0].unique().numel()
    share = torch.bincount(codes[1].flatten()) / codes[1].numel()
    assert values["perplexity_top"] == pytest.approx(math.exp(-torch.xlogy(share, share).sum()), rel=1e-4)

    nats, bits = {}, 0.0
    for level, name in enumerate(("bottom", "top")):
        prior, _ = load_prior(folder / name)
        with torch.no_grad():
            logits = prior(codes[level], codes[level + 1 :], torch.arange(20) % 2)
        chosen = logits.log_softmax(-1).gather(-1, codes[level].flatten(1).unsqueeze(-1))
        nats[name] = -chosen.mean().item()
        bits -= chosen.sum().item() / 20 / math.log(2) / (3 * 16 * 16)
        assert values[f"nats_per_code_{name}"] == pytest.approx(nats[name], rel=1e-3)
    assert values["prior_bits_per_dim"] == pytest.approx(bits, rel=1e-3)

    assert values["accuracy_real"] == 1.0
    assert values["accuracy_reconstructions"] > 0.9
    assert 0 <= values["accuracy_samples"] <= 1
    splits = {row["name"]: row["split"] for row in rows}
    drawing = "samples (temperature 1, top-p 1, guidance 1)"
    assert splits["accuracy_samples"].endswith(f"images.npz[x_val]; trained on 40 {drawing}, 40 steps")
    assert splits["frechet_samples"].startswith(f"20 {drawing}, against 20 images of ")
    for of in ("real", "reconstructions", "samples"):
        assert values[f"frechet_{of}"] >= 0
        assert all(0 <= values[f"{name}_{of}"] <= 1 for name in ("precision", "recall"))
    assert values["precision_reconstructions"] > 0.5
    assert 0 <= values["near_samples"] <= 1
    training = torch.from_numpy(np.load(folder / "images.npz")["x"]).permute(0, 3, 1, 2)
    nearest = torch.cdist(reconstructions.flatten(1), training.flatten(1) / 255).amin(1) / (3 * 16 * 16) ** 0.5
    assert values["distance_held_out"] == pytest.approx(nearest.median().item(), rel=1e-2)  # of rounded pixels
    pictures = ["codes.png", "copies.png", "index_maps.png", "latents.png", "samples.png"]
    assert sorted(os.listdir(out)) == sorted([*pictures, "evaluation.json", "evaluation.md"])
    for name in pictures:
        with Image.open(out / name) as picture:
            picture.load()
    said = capsys.readouterr().out
    assert "next: vqops sample" in said
    assert said.splitlines()[-1] == f"samples, a column a class: {out / 'samples.png'}"


def test_what_too_few_images_cannot_tell_is_said(folder, tmp_path, capsys):
    data = str(folder / "images.npz")
    classifier = {"classifier_data": data, "classifier_key": "x", "classifier_label_key": "y", "classifier_steps": 2}
    out = evaluate(options_of(folder, tmp_path / "out", classifier_images=1, **classifier))
    names = {row["name"] for row in json.loads((out / "evaluation.json").read_text())}
    said = capsys.readouterr().out.splitlines()
    for name in ("frechet", "precision", "recall"):
        assert f"{name}_reconstructions" not in names
        assert f"{name}_reconstructions: left out, too few images (1)" in said
    assert "accuracy_reconstructions" in names


def test_ssim_is_one_for_what_comes_back_unchanged():
    class Unchanged(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config, self.quantizers = model, model.config, model.quantizers

        def forward(self, images):
            return self.model(images)._replace(reconstruction=images)

    model = VQVAE2(VQVAE2Config(channels=8, codebook_size=8, code_dim=4))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    batches = validation_batches(Images.of_array(pixels, "x"), (16, 16), 2, num_workers=0)
    unchanged, changed = measure(Unchanged(model), batches), measure(model, batches)
    assert (unchanged["mse"], unchanged["ssim"]) == (0.0, pytest.approx(1.0))
    assert changed["mse"] > 0.01
    assert changed["ssim"] < 0.5


def test_plane_holds_the_largest_variance():
    points = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 5.0, 1.0]) + 7
    mean, axes = plane(points)
    torch.testing.assert_close(mean, points.mean(0))
    torch.testing.assert_close(axes.abs(), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), rtol=0, atol=0.1)


@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (1, 1)])
def test_plane_of_what_spans_less(shape):
    vectors = torch.arange(float(math.prod(shape))).reshape(shape)
    mean, axes = plane(vectors)
    assert axes.shape == (shape[1], 2)
    torch.testing.assert_close((vectors - mean) @ axes @ axes.T + mean, vectors)


def test_refusals(folder, tmp_path):
    def refused(message, **changes):
        with pytest.raises(InputError, match=message):
            evaluate(options_of(folder, tmp_path / "out", **changes))

    refused("no such file", run=tmp_path)
    refused("names none of level top", prior=(folder / "bottom",))
    refused("the priors learned the codes of images of 16 x 16, these are 12 x 12",
            prior=(folder / "bottom", folder / "top"), image_size=12)  # fmt: skip
    refused("needs labels of", classifier_data=str(folder / "images.npz"), classifier_key="x", label_key=None)
    refused("its classes are none, not 0, 1", classifier_data=str(folder / "images.npz"), classifier_key="x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strides", [(4, 2), (2, 8)])
def test_index_maps_cover_images_that_had_to_be_padded(tmp_path, strides):
    model = VQVAE2(VQVAE2Config(channels=8, codebook_size=8, code_dim=4, strides=strides))
    save_index_maps(tmp_path / "maps.png", model, torch.zeros(2, 3, 14, 30, dtype=torch.uint8))
    with Image.open(tmp_path / "maps.png") as image:
        named = 2 * (30 * 10 + 4), 4 * (14 * 10 + 4)  # images, reconstructions, top and bottom codes
        assert (image.width > named[0], image.height) == (True, named[1])


def test_comparison_passes_the_strides_on():
    options = CompareOptions(Path("out"), levels=2, strides=(8, 4))
    assert training_options(options).strides == (8, 4)
    with pytest.raises(InputError, match=r"^strides must be 1 number, .* got 8 4"):
        CompareOptions(Path("out"), strides=(8, 4))


def test_comparison(folder, tmp_path, capsys):
    options = CompareOptions(tmp_path / "out", data=str(folder / "images.npz"), data_key="x", val_key="x_val", levels=2)
    out = compare(replace(options, label_key="y_val", steps=30, batch_size=8, lr=3e-3, **SIZES))
    lines = (out / "comparison.md").read_text().splitlines()
    names = ["autoencoder", "VAE", "discrete VAE (Gumbel)", "VQ-VAE"]
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:6]] == names
    cells = [line.strip("| ").split(" | ") for line in (lines[0], *lines[2:6])]
    assert len({len(row) for row in cells}) == 1
    columns = {name: [row[number] for row in cells[1:]] for number, name in enumerate(cells[0])}
    assert columns["codes used, top"][:2] == ["-", "-"]
    assert columns["bits/dim"][0] == "-"
    assert columns["bits/dim"][3] == f"{(16 + 4) * 3 / (3 * 16 * 16):.4f}"
    model = load_model(out / "none")
    pixels = torch.from_numpy(np.load(folder / "images.npz")["x_val"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        mse = (model(pixels / 255).reconstruction.clamp(0, 1) - pixels / 255).square().mean().item()
    assert float(columns["MSE"][0]) == pytest.approx(mse, abs=1e-5)
    pictures = [f"latents_{name}.png" for name in ("none", "gaussian", "gumbel", "vq")]
    pictures += ["codes.png", "index_maps.png", "reconstructions.png"]
    others = ["comparison.md", "config.toml", "seconds.json", ".lock", ".writer", "gaussian", "gumbel", "none", "vq"]
    assert sorted(os.listdir(out)) == sorted([*pictures, *others])
    following = f"next: vqops extract {out / 'vq'} --data {folder / 'images.npz'} --data-key x --out CODES"
    picture = f"held-out images through each: {out / 'reconstructions.png'}"
    assert capsys.readouterr().out.splitlines()[-2:] == [following, picture]


def test_comparison_takes_the_labels_of_any_source(tmp_path, monkeypatch):
    """Of held-out images: those of a folder are known by name, those of an archive by what it says."""
    drawn = []
    module = import_module("vqops.vqvae2.evaluation.compare")
    monkeypatch.setattr(module, "save_latents", lambda path, seen, labels, classes: drawn.append((labels, classes)))
    folder = tmp_path / "data"
    folder.mkdir()
    numbers = range(40)
    for number in numbers:
        Image.new("L", (8, 8), number).save(folder / f"{number:02}.png")
    rows = "".join(f"{number:02}.png,{'odd' if number % 2 else 'even'}\n" for number in numbers)
    (tmp_path / "labels.csv").write_text("file_name,kind\n" + rows)
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for number in numbers:
            archive.add(folder / f"{number:02}.png", f"{number:02}.png")
            text = b"odd" if number % 2 else b"even"
            member = tarfile.TarInfo(f"{number:02}.cls")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    shutil.copy(tmp_path / "labels.csv", folder)
    options = CompareOptions(tmp_path / "out", steps=1, batch_size=4, image_size=8, bottleneck=("none",), device="cpu")
    held_out = hold_out(40, seed=0)[1]
    for number, source in enumerate(
        [
            {"data": str(folder), "label_key": "kind"},
            {"data": str(folder), "labels": tmp_path / "labels.csv"},
            {"data": str(tmp_path / "data.tar"), "label_key": "cls"},
        ]
    ):
        compare(replace(options, out=tmp_path / str(number), **source))
        labels, classes = drawn.pop()
        assert [classes[label] for label in labels] == ["odd" if number % 2 else "even" for number in held_out]
    with pytest.raises(InputError, match=r"^label_key and labels need data$"):
        compare(replace(options, label_key="kind"))
    assert not (tmp_path / "out").exists()
