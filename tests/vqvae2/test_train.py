"""`vqops train` and `vqops reconstruct` as functions: what a run leaves behind, repeats, and refuses."""

import json
import os
import signal
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from promises import COPIES, REPEATS

pytest.importorskip("safetensors")

from safetensors.torch import load_file

from vqops import VectorQuantize
from vqops.vqvae2 import InputError, ReconstructOptions, TrainOptions, load_model, metrics, reconstruct, train
from vqops.vqvae2.training import optimization
from vqops.vqvae2.training.meters import Meter

FILES = [
    ".lock", ".writer",
    "config.toml", "curves.png", "metrics.jsonl", "model.safetensors", "reconstructions.png", "train_state.pt",
]  # fmt: skip
TINY = TrainOptions(
    steps=12, batch_size=4, image_size=16, channels=8, codebook_size=16, code_dim=4, eval_every=6, device="cpu"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Gradients with a random square in them, grey: as small as images that train can be."""
    random = np.random.default_rng(0)
    images = np.broadcast_to(np.arange(0, 160, 10, dtype=np.uint8), (40, 16, 16)).copy()
    for image, (top, left) in zip(images, random.integers(0, 12, (40, 2)), strict=True):
        image[top : top + 4, left : left + 4] = 255
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, x_train=images[:30], x_val=images[30:])
    return str(path)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "first"
    return train(replace(TINY, data=data, data_key="x_train", val_key="x_val", out=out))


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def files_of(run: Path) -> list[str]:
    return sorted(set(os.listdir(run)) - {"tensorboard"})  # there where TensorBoard is installed


def test_run_folder_holds_its_files_and_no_temporary_one(run):
    assert files_of(run) == FILES


def test_metrics(run):
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [6, 10, 12]
    always = {"step", "loss", "mse", "images_per_second"}
    always |= {"perplexity_bottom", "perplexity_top", "used_bottom", "used_top"}
    validation = {"val_mse", "val_perplexity_bottom", "val_perplexity_top", "val_used_bottom", "val_used_top"}
    assert [set(row) for row in rows] == [always | validation, always, always | validation]
    for row in rows:
        assert all(np.isfinite(list(row.values())))
        assert 0 < row["used_bottom"] <= 1
        assert 1 <= row["perplexity_bottom"] <= 16


def test_model_file_tells_how_it_was_made(run, data):
    from safetensors import safe_open

    with safe_open(run / "model.safetensors", "pt") as file:
        description = json.loads(file.metadata()["vqops"])
    assert description["step"] == 12
    assert description["training"]["data"] == data
    assert description["model"]["image_channels"] == 1


def test_pictures(run):
    with Image.open(run / "reconstructions.png") as picture:
        assert picture.height == 2 * 132  # 16 pixels enlarged to 128, in a frame of 2
        assert picture.width > 4 * 132  # a batch of 4, and at their left what they are
    with Image.open(run / "curves.png") as picture:
        picture.load()


@pytest.mark.parametrize("levels, names", [(1, ["bottom"]), (3, ["bottom", "middle", "top"])])
def test_levels_name_the_metrics(data, tmp_path, levels, names):
    run = train(replace(TINY, data=data, data_key="x_train", levels=levels, steps=2, out=tmp_path / "run"))
    assert [key for key in rows_of(run)[-1] if key.startswith("used_")] == [f"used_{name}" for name in names]


def test_same_seed_same_weights(data, tmp_path):
    options = replace(TINY, data=data, data_key="x_train", steps=6)
    once, again, workers, other = (
        weights_of(train(replace(options, out=tmp_path / name, **changes)))
        for name, changes in [("a", {}), ("b", {}), ("c", {"num_workers": 2}), ("d", {"seed": 1})]
    )
    REPEATS.same(again, once)
    REPEATS.same(workers, once)
    assert any((weight != other[name]).any() for name, weight in once.items())


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_training_reduces_the_error(data, tmp_path, codebook):
    """To less than half of what the best even grey would leave."""
    options = replace(TINY, data=data, data_key="x_train", codebook=codebook, lr=3e-3, steps=120, eval_every=60)
    rows = rows_of(train(replace(options, out=tmp_path / "run")))
    variance = (np.load(data)["x_train"] / 255).var()
    assert rows[-1]["mse"] < variance / 2
    assert rows[-1]["val_mse"] < variance / 2


@pytest.mark.parametrize(
    "step, warmup, expected", [(10, 0, 0.0), (1, 4, 0.25), (4, 4, 1.0), (5, 4, None), (7, 4, 0.5), (10, 4, 0.0)]
)
def test_learning_rate(step, warmup, expected):
    rate = optimization.learning_rate(2.0, "cosine", step, 10, warmup)
    if expected is not None:
        assert rate == pytest.approx(2 * expected, abs=1e-12)
    assert 0 <= rate <= 2
    constant = optimization.learning_rate(2.0, "constant", step, 10, warmup)
    assert constant == pytest.approx(2 * min(1, step / (warmup or 1)))


def test_weight_average():
    layer = torch.nn.Linear(1, 1, bias=False)
    values = (1.0, 2.0, 5.0)
    torch.nn.init.constant_(layer.weight, 0.0)
    average, expected = optimization.WeightAverage(layer, 0.3), 0.0
    for step, value in enumerate(values, start=1):
        torch.nn.init.constant_(layer.weight, value)
        average.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    with average.in_place():
        assert layer.weight.item() == pytest.approx(expected)
    assert layer.weight.item() == values[-1]


def test_average_is_what_is_saved_and_validated(data, tmp_path):
    runs = [
        train(replace(TINY, data=data, data_key="x_train", weight_ema=decay, out=tmp_path / str(decay)))
        for decay in (0.0, 0.9)
    ]
    plain, averaged = (weights_of(run) for run in runs)
    state = torch.load(runs[1] / "train_state.pt", weights_only=True)
    REPEATS.same(state["module"], {name: plain[name] for name in state["module"]})  # the training is the same
    name = "encoders.0.0.weight"
    COPIES.same(averaged[name], state["average"][0])
    assert (averaged[name] != plain[name]).any()
    REPEATS.same(rows_of(runs[0])[-1]["mse"], rows_of(runs[1])[-1]["mse"])
    assert rows_of(runs[0])[-1]["val_mse"] != rows_of(runs[1])[-1]["val_mse"]


def test_gradient_is_clipped(data, tmp_path):
    """Adam's first step does not see the gradient's length, but its state does."""
    norms = []
    for clip in (0.0, 1e-3):
        out = tmp_path / str(clip)
        train(replace(TINY, data=data, data_key="x_train", grad_clip=clip, steps=1, out=out))
        state = torch.load(out / "train_state.pt", weights_only=True)["optimizer"]["state"]
        norms.append(torch.cat([moments["exp_avg"].flatten() for moments in state.values()]).norm().item() / 0.1)
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_bfloat16_leaves_the_quantizers_in_float32(data, tmp_path, monkeypatch):
    convolutions, quantizers = set(), set()
    forward, convolve = VectorQuantize.forward, torch.nn.Conv2d.forward

    def quantize(quantizer, x, **options):
        quantizers.add(x.dtype)
        return forward(quantizer, x, **options)

    def convolution(layer, x):
        output = convolve(layer, x)
        convolutions.add(output.dtype)
        return output

    monkeypatch.setattr(VectorQuantize, "forward", quantize)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", convolution)
    options = replace(TINY, data=data, data_key="x_train", precision="bfloat16", steps=4, eval_every=10)
    run = train(replace(options, out=tmp_path / "run"))
    assert torch.bfloat16 in convolutions
    assert quantizers == {torch.float32}
    assert {weight.dtype for weight in weights_of(run).values() if weight.is_floating_point()} == {torch.float32}


def test_collapse_is_said_once_with_advice(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "grey.npy", np.full((20, 4, 4), 128, np.uint8))  # one code an image, and all images alike
    monkeypatch.setattr(import_module("vqops.vqvae2.training.train"), "COLLAPSED_STEP", 10)
    train(replace(TINY, data=str(tmp_path / "grey.npy"), steps=40, levels=1, out=tmp_path / "run"))
    said = capsys.readouterr().out
    assert said.count("warning: the codes of level bottom have collapsed (perplexity 1.0 of 16)") == 1
    assert "--lr" in said


def test_tensorboard_holds_the_metrics(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("mse")]
    assert shown == [(row["step"], pytest.approx(row["mse"])) for row in rows_of(run)]


def test_without_tensorboard_there_are_no_events(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = train(replace(TINY, data=data, steps=1, data_key="x_train", out=tmp_path / "run"))
    assert sorted(os.listdir(run)) == FILES


def test_held_out_part_is_said(data, tmp_path, capsys):
    train(replace(TINY, data=data, data_key="x_train", steps=1, out=tmp_path / "run"))
    assert "held out 2 of 30 images (5 %, seed 0)" in capsys.readouterr().out


def test_last_lines_name_the_pictures_and_the_next_command(data, tmp_path, capsys):
    run = train(replace(TINY, data=data, data_key="x_train", steps=1, out=tmp_path / "run"))
    *_, curves, following, then, pictures = capsys.readouterr().out.splitlines()
    assert pictures.endswith(str(run / "reconstructions.png"))
    assert curves.endswith(str(run / "curves.png"))
    assert following == f"next: vqops reconstruct {run} IMAGES... --out FOLDER, or, on the way to samples,"
    assert then == f"next: vqops extract {run} --data {data} --data-key x_train --out CODES"


def test_runs_are_numbered(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (train(replace(TINY, data=data, data_key="x_train", steps=1)) for _ in range(2))
    assert first.parent == second.parent == Path("runs")
    assert (first.name[-2:], second.name[-2:]) == ("-1", "-2")


def test_interruption_ends_the_step_and_writes_everything(data, tmp_path, monkeypatch, capsys):
    add = Meter.add

    def add_and_press_ctrl_c(meter, *figures):
        add(meter, *figures)
        if meter.images == 12:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Meter, "add", add_and_press_ctrl_c)
    handler = signal.getsignal(signal.SIGINT)
    run = train(replace(TINY, data=data, data_key="x_train", out=tmp_path / "run"))
    assert files_of(run) == FILES
    assert rows_of(run)[-1]["step"] == 3
    assert "interrupted by Ctrl-C after step 3 of 12" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler


def test_overwriting_replaces_the_run_and_nothing_else(data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    options = replace(TINY, data=data, data_key="x_train", steps=1, out=tmp_path, overwrite=True)
    train(options)
    train(options)
    assert files_of(tmp_path) == sorted([*FILES, "notes.txt"])
    assert len(rows_of(tmp_path)) == 1


# Refused before anything is changed


def refused(message: str, options: TrainOptions | ReconstructOptions) -> None:
    with pytest.raises(InputError, match=message):
        (train if isinstance(options, TrainOptions) else reconstruct)(options)


def test_used_folder(data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused("is not empty", replace(TINY, data=data, data_key="x_train", out=tmp_path))
    refused("notes.txt is a file", replace(TINY, data=data, data_key="x_train", out=tmp_path / "notes.txt" / "run"))
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that even root cannot write in")
def test_unwritable_folder(data):
    refused("/proc/self/run: .* write", replace(TINY, data=data, data_key="x_train", out=Path("/proc/self/run")))


def test_bad_data_leaves_no_folder(data, tmp_path):
    out = tmp_path / "run"
    refused("no such file", replace(TINY, data=str(tmp_path / "x.npz"), out=out))
    refused("has no array 'x'", replace(TINY, data=data, data_key="x", out=out))
    refused("need data", replace(TINY, val_key="x", out=out))
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8), np.uint8))
    refused("holds one image", replace(TINY, data=str(tmp_path / "one.npy"), out=out))
    np.save(tmp_path / "colour.npy", np.zeros((4, 8, 8, 3), np.uint8))
    mixed = replace(TINY, data=data, data_key="x_train", val_data=str(tmp_path / "colour.npy"), out=out)
    refused("images of 3 channels, the training images have 1", mixed)
    assert not out.exists()


def test_missing_device(data, tmp_path):
    refused("^device cuda:99: this torch .* has cpu", replace(TINY, data=data, device="cuda:99", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_diverging_run_says_so(data, tmp_path):
    refused("lr 1e[+]20 is too high", replace(TINY, data=data, data_key="x_train", lr=1e20, out=tmp_path / "run"))
    assert all(np.isfinite(list(row.values())) for row in rows_of(tmp_path / "run"))


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("steps", 0, "at least 1"),
        ("batch_size", -1, "at least 1"),
        ("codebook_size", 0, "at least 1"),
        ("code_dim", 0, "at least 1"),
        ("channels", 6, "a positive multiple of 4"),
        ("lr", 0.0, "positive"),
        ("lr", float("nan"), "positive"),
        ("decay", 1.0, "at least 0 and below 1"),
        ("commitment", -0.1, "at least 0"),
        ("levels", 4, "1, 2 or 3"),
        ("codebook", "other", "ema or gradient"),
        ("device", "tpu", "auto, cpu, cuda, cuda:N or mps"),
        ("seed", -1, "at least 0"),
    ],
)
def test_values_out_of_range(name, value, allowed):
    with pytest.raises(InputError, match=f"^{name} must be {allowed}.*, got {value}"):
        replace(TINY, **{name: value})


# Reconstruct


def save_image(path: Path, *shape: int) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def test_reconstruct_writes_each_image_at_its_own_size(run, tmp_path, capsys):
    images = (save_image(tmp_path / "a.png", 28, 28), save_image(tmp_path / "b.jpg", 5, 33, 3))
    reconstruct(ReconstructOptions(run, images, tmp_path / "out"))
    assert sorted(os.listdir(tmp_path / "out")) == ["a.png", "b.png"]
    with Image.open(tmp_path / "out" / "b.png") as image:
        assert (image.size, image.mode) == ((33, 5), "L")  # the model is grey
    said = capsys.readouterr().out
    assert "a.png  mse 0." in said
    assert said.splitlines()[-2] == f"next: vqops extract {run} --data PATH --out CODES"
    assert said.splitlines()[-1] == f"reconstructions: {tmp_path / 'out'}"


def test_reconstruction_is_the_models(run, tmp_path):
    path = save_image(tmp_path / "a.png", 28, 28)
    reconstruct(ReconstructOptions(run / "model.safetensors", (path,), tmp_path / "out"))
    pixels = torch.from_numpy(np.array(Image.open(path)))[None, None]
    expected = load_model(run).reconstruct(pixels)[0, 0]
    REPEATS.same(np.array(Image.open(tmp_path / "out" / "a.png")), expected)


def test_reconstruct_refuses_before_it_writes(run, tmp_path):
    good, out = save_image(tmp_path / "a.png", 8, 8), tmp_path / "out"
    refused("no such file", ReconstructOptions(tmp_path, (good,), out))
    refused("missing.png: no such image file", ReconstructOptions(run, (good, tmp_path / "missing.png"), out))
    (tmp_path / "bad.png").write_bytes(good.read_bytes()[:60])
    refused("bad.png: not a readable image", ReconstructOptions(run, (good, tmp_path / "bad.png"), out))
    refused("would both be written to", ReconstructOptions(run, (good, save_image(tmp_path / "a.bmp", 8, 8)), out))
    refused("is not empty", ReconstructOptions(run, (good,), run))
    with pytest.raises(InputError, match="name at least one image"):
        ReconstructOptions(run, (), out)
    assert not out.exists()


# Metrics


@pytest.mark.parametrize(
    "counts, expected", [([5, 0, 0, 0], 1), ([1, 1, 1, 1], 4), ([2, 2, 0, 0], 2), ([2, 1, 1, 0], 2**1.5)], ids=str
)
def test_perplexity(counts, expected):
    torch.testing.assert_close(metrics.perplexity(torch.tensor(counts)), torch.tensor(float(expected)))


def test_count_codes_leaves_out_what_has_no_code():
    assert metrics.count_codes(torch.tensor([[0, 2], [-1, 2]]), 4).tolist() == [1, 0, 2, 0]


def test_psnr():
    assert metrics.psnr(0.01) == pytest.approx(20)
    assert metrics.psnr(0.0) == pytest.approx(100)
