"""The command line: exit codes, and one line for what the user got wrong; what the library loads without it."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import vqops.cli


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, **options)


def check_refusal(capsys, exit_code: int, *parts: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that holds the parts."""
    assert exit_code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_the_network_loads_neither_the_command_line_nor_what_only_commands_need():
    names = "VQVAE2, VQVAE2Config, InputError, TrainOptions, SampleOptions, EvaluateOptions"
    script = f"import sys; from vqops.vqvae2 import {names}; print(*sys.modules)"
    loaded = set(run("-c", script, cwd=Path(__file__).parent).stdout.split())
    assert {"torch", "vqops.vqvae2.networks.vqvae2"} <= loaded
    assert not loaded & {"vqops.cli", *vqops.cli.EXTRA}


@pytest.mark.parametrize("command", [command for command in vqops.cli.COMMANDS if command != "info"])
def test_help_says_what_the_command_does(capsys, command):
    pytest.importorskip("tyro")
    with pytest.raises(SystemExit) as stop:
        vqops.cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: vqops {command} " in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    assert vqops.cli.main(["--help"]) == vqops.cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("train", "reconstruct", "info"))


def test_train_help_lists_every_flag(capsys):
    pytest.importorskip("tyro")
    with pytest.raises(SystemExit) as stop:
        vqops.cli.main(["train", "--help"])
    assert stop.value.code == 0
    flags = (
        "preset config data data-key val-data val-key image-size background skip-bad-images levels strides bottleneck "
        "codebook steps batch-size "
        "lr schedule warmup grad-clip weight-ema precision seed codebook-size code-dim channels decay commitment "
        "eval-every checkpoint-every num-workers device out overwrite resume"
    )
    text = capsys.readouterr().out
    assert [flag for flag in flags.split() if not re.search(f"--{flag}[ ,]", text)] == []


def test_unknown_command(capsys):
    check_refusal(capsys, vqops.cli.main(["trane"]), "'trane'", "train, reconstruct, extract")


@pytest.mark.parametrize("package", ["tyro", "safetensors", "matplotlib"])
def test_missing_extra_is_named(package):
    """In a process of its own, where nothing is imported yet: the package is missed where it is first needed."""
    pytest.importorskip("tyro")
    script = f"import sys; sys.modules[{package!r}] = None; import vqops.cli; sys.exit(vqops.cli.main(['train']))"
    refused = run("-c", script, cwd=Path(__file__).parent)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"vqops train needs {package}: pip install 'vqops[train]'\n"


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["train", "--steps", "0"], ["--steps must be at least 1, got 0"]),
        (["train", "--data", "no/such/file.npz"], ["no/such/file.npz: no such file or folder"]),
        (["train", "--device", "cuda:99"], ["--device cuda:99", "cpu"]),
        (["train", "--strides", "3", "3"], ["--strides must be 2 numbers, one for each of --levels 2, of 2, 4"]),
        (["train", "--val-key", "x"], ["--data-key, --val-data and --val-key need --data"]),
        (["train-prior", "x", "--level", "top", "--out", "y", "--width", "6"], ["--width", "four times --heads 4"]),
        (["complete", "no-run", "--prior", "a", "--out", "x"], ["--images names no image file"]),
        (["reconstruct", "no-run", "a.png", "--out", "x"], ["no-run: no such file"]),
        (["reconstruct", "no-run", "--out", "x"], ["at least one image"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_refusals(capsys, arguments, parts, tmp_path, monkeypatch):
    pytest.importorskip("tyro")
    monkeypatch.chdir(tmp_path)
    check_refusal(capsys, vqops.cli.main(arguments), f"vqops {arguments[0]}: ", *parts)
    assert list(tmp_path.iterdir()) == []


def test_what_a_resumed_run_cannot_change(capsys, tmp_path):
    pytest.importorskip("tyro")
    (tmp_path / "config.toml").write_text("lr = 0.001")
    check_refusal(capsys, vqops.cli.main(["train", "--resume", str(tmp_path), "--lr", "0.1"]), "--lr is 0.001 there")


def test_a_flag_may_have_another_name_than_its_option():
    pytest.importorskip("tyro")
    from vqops.cli.parsing import flag

    assert (flag("val_data"), flag("classes")) == ("--val-data", "--class")


def test_a_place_that_cannot_be_reached_is_one_line(capsys, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    refusal = f"vqops train: {Path('private/run/config.toml')}: Permission denied\n"
    check_refusal(capsys, vqops.cli.main(["train", "--resume", "private/run"]), refusal)


def test_flags_that_do_not_parse(capsys):
    pytest.importorskip("tyro")
    for flags, part in [(["--steps", "many"], "many"), (["--levels", "4"], "1"), (["--colour", "red"], "--colour")]:
        with pytest.raises(SystemExit) as stop:
            vqops.cli.main(["train", *flags])
        assert stop.value.code == 2
        assert part in capsys.readouterr().err


def test_warnings_of_pillow_stay_off_the_screen(tmp_path):
    pytest.importorskip("skimage")
    from PIL import Image
    from untrained import write_chain

    write_chain(tmp_path)
    entries = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"  # announces more than there are
    Image.new("L", (16, 16)).save(tmp_path / "x.jpg", exif=entries)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vqops.cli.main(["reconstruct", str(tmp_path / "run"), str(tmp_path / "x.jpg"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "x.png").exists()
    assert [str(warning.message) for warning in caught if "EXIF" in str(warning.message)] == []


def test_train_and_reconstruct_as_processes(tmp_path):
    for package in ("tyro", "rich", "safetensors", "matplotlib", "skimage"):
        pytest.importorskip(package)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (20, 12, 12, 3), dtype=np.uint8))
    flags = "--data images.npy --steps 2 --batch-size 4 --channels 8 --codebook-size 16 --code-dim 4 --out run"
    trained = run("-m", "vqops", "train", *flags.split(), cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[-3:] == [
        "next: vqops reconstruct run IMAGES... --out FOLDER, or, on the way to samples,",
        "next: vqops extract run --data images.npy --out CODES",
        "held-out images over their reconstructions: run/reconstructions.png",
    ]
    reconstructed = run("-m", "vqops", "reconstruct", "run", "run/curves.png", "--out", "out", cwd=tmp_path)
    assert reconstructed.returncode == 0, reconstructed.stderr
    assert (tmp_path / "out" / "curves.png").is_file()
    again = run("-m", "vqops", "train", *flags.split(), cwd=tmp_path)
    assert (again.returncode, again.stderr) == (2, "vqops train: run is not empty: name an empty or new folder\n")
