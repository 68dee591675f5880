"""A place is not an identity: runs, data, codes and priors may be moved, renamed, copied and spelled as one likes."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")

from vqops.vqvae2 import (
    Codes,
    EvaluateOptions,
    ExtractOptions,
    InputError,
    SampleOptions,
    TrainOptions,
    TrainPriorOptions,
    evaluate,
    extract,
    sample,
    train,
    train_prior,
)
from vqops.vqvae2.files.config_file import read_options, read_values, write_config
from vqops.vqvae2.options import changed
from vqops.vqvae2.training.resume import continued

SIZES = {"batch_size": 4, "image_size": 12, "channels": 8, "codebook_size": 16, "code_dim": 4, "device": "cpu"}
TINY = TrainOptions(steps=2, **SIZES)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The current folder, with data in it and a run of it, both named as one does there."""
    np.save(tmp_path / "data.npy", np.random.default_rng(0).integers(0, 256, (23, 16, 16, 3), dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    train(replace(TINY, data="data.npy", out=Path("run")))
    return tmp_path


def step_of(run: Path) -> int:
    return torch.load(run / "train_state.pt", weights_only=True)["step"]


def test_run_under_any_spelling(home):
    (home / "link").symlink_to("run")
    (home / "data").mkdir()
    train(TrainOptions(resume=home / "link", out=Path("run/"), steps=3))  # out, said too, is the same folder
    assert step_of(home / "run") == 3
    for spelling in (f"{home}/run", f"{home}/run/", f"../{home.name}/run", "./data/../run", "link"):
        assert continued(TrainOptions(resume=Path(spelling)), "train").data == f"{home}/data.npy"
    with pytest.raises(InputError, match="out other is another"):
        continued(TrainOptions(resume=Path("run"), out=Path("other")), "train")


def test_run_from_elsewhere_moved_and_copied(home, monkeypatch):
    """With the data where they were, though the run was told a relative path."""
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    train(TrainOptions(resume=Path("../run"), steps=3))
    (home / "run").rename("renamed")
    train(TrainOptions(resume=Path("renamed"), steps=4))
    shutil.copytree("renamed", home / "copied")
    for run in ("renamed", home / "copied"):
        train(TrainOptions(resume=Path(run), steps=5))
    whole = train(replace(TINY, data=f"{home}/data.npy", out=Path("whole"), steps=5))
    for run in (Path("renamed"), home / "copied"):  # also of the file, whose SHA-256 the codes remember
        assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_data_may_lie_elsewhere_but_must_be_the_same(home):
    (home / "data.npy").rename("scratch.npy")
    gone = rf"^resume run: its data {home}/data.npy is no longer there: name its place with data$"
    with pytest.raises(InputError, match=gone):
        train(TrainOptions(resume=Path("run"), steps=3))
    train(TrainOptions(resume=Path("run"), data="scratch.npy", steps=3))
    assert step_of(home / "run") == 3
    train(TrainOptions(resume=Path("run"), steps=4))  # the place it was told last
    np.save("other.npy", np.load("scratch.npy")[1:])
    with pytest.raises(InputError, match=r"train_state\.pt was written with images 22, now it is 21"):
        train(TrainOptions(resume=Path("run"), data="other.npy", steps=5))
    assert step_of(home / "run") == 4


# What was said, and what has its default


def test_options_know_what_was_said():
    options = TrainOptions(lr=0.1, steps=800)
    assert options.said == {"lr", "steps"}
    assert changed(options, seed=1).said == {"lr", "steps", "seed"}
    assert "weight_ema" in replace(options, seed=1).said
    assert ExtractOptions(Path("run"), "data", out=Path("out")).said == {"run", "data", "out"}
    assert options == TrainOptions(lr=0.1) != TrainOptions()


def test_what_nobody_says_is_as_it_was(home):
    write_config(home, TrainOptions(steps=7, lr=0.01))
    (home / "old.toml").write_text('lr = 0.01\nout = "somewhere"\n')  # as of a version without [defaults]
    said, defaults = read_values(home / "config.toml", TrainOptions)
    assert said == {"steps": 7, "lr": 0.01}
    assert defaults["batch_size"] == 32
    assert read_options(home / "config.toml", TrainOptions).said == {"steps", "lr"}
    assert read_options(home / "old.toml", TrainOptions).said == {"lr", "out"}


def test_no_place_is_stored_and_data_holds_anywhere(home):
    text = (home / "run" / "config.toml").read_text()
    assert not any(line.startswith(("out", "resume", "overwrite", "preset", "config")) for line in text.splitlines())
    assert f'data = "{home}/data.npy"\n' in text


def test_resumed_run_keeps_the_defaults_of_its_time(home):
    """A later version has another default: the file says what this run began with."""
    path = home / "run" / "config.toml"
    assert "commitment = 0.25" in path.read_text()
    path.write_text(path.read_text().replace("commitment = 0.25", "commitment = 0.5"))
    train(TrainOptions(resume=Path("run"), steps=3))
    assert read_options(path, TrainOptions).commitment == 0.5
    with pytest.raises(InputError, match=r"^resume run: commitment is 0\.5 there and cannot change, got 0\.25$"):
        train(TrainOptions(resume=Path("run"), steps=4, commitment=0.25))


# Codes and priors


@pytest.fixture
def codes(home) -> Path:
    return extract(ExtractOptions(Path("run"), "data.npy", out=Path("codes"), device="cpu"))


def test_extraction_of_the_same_data_elsewhere(home, codes):
    meta = json.loads((codes / "meta.json").read_text())
    (codes / "meta.json").write_text(json.dumps(meta | {"done": 8}))
    (home / "run").rename("renamed")
    (home / "data.npy").rename("scratch.npy")
    codes.rename("moved")
    extract(ExtractOptions(home / "renamed", str(home / "scratch.npy"), out=home / "moved", device="cpu"))
    assert Codes.open(Path("moved")).meta.complete


def test_everything_moved_works_together(home, codes):
    sizes = {"width": 8, "layers": 1, "heads": 2, "device": "cpu", "eval_every": 2}
    priors = [
        train_prior(TrainPriorOptions(codes, level=level, out=Path(level), steps=2, **sizes))
        for level in ("top", "bottom")
    ]
    moved = [path.rename(f"moved-{path}") for path in (codes, Path("run"), *priors)]
    codes, run, *priors = moved
    train_prior(TrainPriorOptions(codes, resume=priors[0], steps=3))
    train_prior(TrainPriorOptions(home / codes, resume=home / priors[0], steps=4))
    assert step_of(priors[0]) == 4
    sample(SampleOptions(run, tuple(priors), Path("images"), count=1, device="cpu"))
    options = EvaluateOptions(home / run, "data.npy", Path("figures"), prior=tuple(priors), device="cpu")
    evaluate(options)
    assert os.path.exists("images/grid.png")
    assert "evaluation.md" in os.listdir("figures")
