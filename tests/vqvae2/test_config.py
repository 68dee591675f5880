"""Options from a TOML file, a preset, a run and flags: what overrides what, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tyro")

from vqops.cli.parsing import parsed
from vqops.cli.presets import PRESETS
from vqops.vqvae2 import CompareOptions, InputError, TrainOptions, TrainPriorOptions
from vqops.vqvae2.files.config_file import read_options, written


def test_options_survive_the_file(tmp_path):
    options = TrainOptions(data='a "quoted"\\path', lr=1e-5, levels=3, codebook="gradient", out=Path("runs/ü"))
    options = replace(options, strides=(2, 4, 2))
    (tmp_path / "x.toml").write_text(written(options))
    assert read_options(tmp_path / "x.toml", TrainOptions) == replace(options, out=None)  # a place is no option


def test_flags_override_the_file_and_the_file_the_preset(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("lr = 1\nimage_size = 20\nout = 'runs/x'\n")
    preset = PRESETS["fashion"]
    options = parsed("train", ["--preset", "fashion", "--config", str(path), "--image-size", "24"])
    assert (options.channels, options.lr, options.image_size) == (preset["channels"], 1.0, 24)
    assert options.out == Path("runs/x")
    assert parsed("train", [f"--config={path}"]).image_size == 20
    assert parsed("train", []) == TrainOptions()


def test_lists_of_words():
    options = parsed("sample", ["run", "--prior", "a", "b", "--class", "cat", "dog", "--count", "3", "--out", "out"])
    assert (options.run, options.prior, options.classes) == (Path("run"), (Path("a"), Path("b")), ("cat", "dog"))
    options = parsed("complete", ["run", "--prior", "a", "--images", "x.png", "y.png", "--out", "out"])
    assert options.images == (Path("x.png"), Path("y.png"))
    assert parsed("compare", ["--bottleneck", "none", "vq", "--out", "out"]).bottleneck == ("none", "vq")
    assert parsed("train", ["--strides", "8", "4", "--steps", "3"]).strides == (8, 4)
    assert parsed("compare", ["--strides", "8", "--out", "out"]).strides == (8,)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_options(name):
    assert parsed("train", ["--preset", name]) == replace(TrainOptions(**PRESETS[name]), preset=name)


def test_resume_takes_the_options_of_the_run(tmp_path):
    (tmp_path / "config.toml").write_text('out = "elsewhere"\n' + written(TrainOptions(lr=0.5, steps=7)))
    options = parsed("train", ["--resume", str(tmp_path), "--steps", "9"])
    assert (options.lr, options.steps, options.resume, options.out) == (0.5, 9, tmp_path, None)
    assert options.said == {"steps", "resume"}


@pytest.mark.parametrize("flag, value", [("--skip-bad-images", True), ("--no-skip-bad-images", False)])
def test_switches_can_be_said_whatever_the_run_has(tmp_path, flag, value):
    for there in (True, False):
        (tmp_path / "config.toml").write_text(written(TrainOptions(skip_bad_images=there)))
        options = parsed("train", ["--resume", str(tmp_path), flag])
        assert options.skip_bad_images is value
        assert options.said == {"skip_bad_images", "resume"}
        assert parsed("train", ["--resume", str(tmp_path)]).skip_bad_images is there


def test_only_what_is_given_counts_as_said(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("lr = 1\n[defaults]\nwarmup = 3\n")
    options = parsed("train", ["--config", str(path), "--preset", "fashion", "--batch_size=32", "--data", "x"])
    assert options.said == {"config", "preset", "lr", "batch_size", "data", *PRESETS["fashion"]}
    assert (options.warmup, options.batch_size) == (3, 32)
    assert parsed("train", []).said == set()
    assert parsed("sample", ["run", "--prior", "a", "--class", "cat", "--out", "o"]).said == {
        "run", "prior", "classes", "out"
    }  # fmt: skip


def test_presets_override_what_nobody_said_when_the_file_was_written(tmp_path):
    (tmp_path / "config.toml").write_text(written(TrainOptions(steps=7)))
    fashion = PRESETS["fashion"]
    options = parsed("train", ["--config", str(tmp_path / "config.toml"), "--preset", "fashion"])
    assert (options.steps, options.channels) == (7, fashion["channels"])
    options = parsed("train", ["--resume", str(tmp_path), "--preset", "fashion"])
    assert (options.steps, options.channels) == (7, fashion["channels"])
    assert "steps" not in options.said


def test_other_commands_take_the_options_of_what_they_go_on_with(tmp_path):
    (tmp_path / "config.toml").write_text(written(TrainPriorOptions(Path("codes"), "top", tmp_path, width=16)))
    options = parsed("train-prior", ["moved", "--resume", str(tmp_path)])
    assert (options.codes, options.level, options.width) == (Path("moved"), "top", 16)
    assert options.said == {"codes", "resume"}
    (tmp_path / "config.toml").write_text(written(CompareOptions(tmp_path, bottleneck=("vq", "none"))))
    assert parsed("compare", ["--resume", str(tmp_path)]).bottleneck == ("vq", "none")


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr = ", "not a TOML file"),
        ("colour = 1", "there is no option 'colour', only data, "),
        ("overwrite = true", "there is no option 'overwrite'"),
        ("lr = '1'", "lr must be of another type, got '1'"),
        ("steps = 1.5", "steps must be of another type"),
        ("steps = true", "steps must be of another type"),
        ("levels = 4", "levels must be 1, 2 or 3, got 4"),
        ("strides = [4.0, 2.0]", "strides must be of another type, got 4.0"),
        ("strides = [4, 6]", "strides must be 2 numbers, .* of 2, 4, 8 or 16, got 4 6"),
        ("levels = true", "levels must be 1, 2 or 3, got True"),
        ("steps = 0", "steps must be at least 1, got 0"),
        ("[defaults]\nsteps = 0", "steps must be at least 1, got 0"),
        ("[defaults]\ncolour = 1", "there is no option 'colour'"),
        ("defaults = 1", "defaults must be a table, got 1"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        parsed("train", ["--config", str(tmp_path / "x.toml")])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.toml: cannot be read"):
        parsed("train", ["--config", str(tmp_path / "nowhere.toml")])
