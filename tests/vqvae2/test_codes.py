"""`vqops extract`: what is in the files, that it goes on where it was cut off, and what it refuses."""

import errno
import json
import os
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from promises import REPEATS

pytest.importorskip("safetensors")

from vqops.vqvae2 import Codes, CodesMeta, ExtractOptions, InputError, TrainOptions, extract, load_model, train
from vqops.vqvae2.networks.vqvae2 import as_float

N = 21


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images larger than the crops, with labels, and a model of them."""
    folder = tmp_path_factory.mktemp("codes")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (N, 18, 20, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", x=images, y=np.arange(N) % 3 + 5, x_two=images[:2])
    options = TrainOptions(
        data=str(folder / "images.npz"), data_key="x", image_size=16, steps=3, batch_size=8, channels=8, device="cpu"
    )
    train(replace(options, codebook_size=16, code_dim=4, out=folder / "run"))
    return folder


def options_of(folder: Path, out: Path, **changes) -> ExtractOptions:
    options = ExtractOptions(
        run=folder / "run", data=str(folder / "images.npz"), out=out, data_key="x", label_key="y", batch_size=4
    )
    return replace(options, device="cpu", **changes)


def test_files_hold_the_codes_of_the_middle_crops(folder, tmp_path, capsys):
    codes = Codes.open(extract(options_of(folder, tmp_path / "codes")))
    meta = codes.meta
    assert (meta.images, meta.done, meta.image_shape, meta.codebook_size) == (N, N, (3, 16, 16), 16)
    assert (meta.levels, meta.sizes, meta.classes) == (("bottom", "top"), ((4, 4), (2, 2)), ("5", "6", "7"))
    assert [array.dtype for array in codes.levels] == [np.uint16, np.uint16]
    assert codes.labels.tolist() == [n % 3 for n in range(N)]
    pixels = np.load(folder / "images.npz")["x"][:, 1:17, 2:18]
    expected = load_model(folder / "run").encode(as_float(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
    for read, index in zip(codes.read(np.arange(N)), expected, strict=True):
        assert (read == index).float().mean() > 0.99  # a vector between two codes may fall to either
    checked = np.unique(np.linspace(0, N - 1, 16, dtype=int))
    said = capsys.readouterr().out
    assert "labels: 3 classes (5, 6, 7)" in said.splitlines()
    reconstruction = load_model(folder / "run").reconstruct(torch.from_numpy(pixels).permute(0, 3, 1, 2))[checked]
    error = (reconstruction / 255 - torch.from_numpy(pixels).permute(0, 3, 1, 2)[checked] / 255).square().mean()
    decoded = re.search(r"16 images decoded from the files: mse ([\d.]+) to the originals", said)
    assert float(decoded[1]) == pytest.approx(error.item(), rel=0.02)
    assert f"next: vqops train-prior {tmp_path / 'codes'} --level top --out FOLDER" in said
    assert said.splitlines()[-1] == f"images over what their codes decode to: {tmp_path / 'codes' / 'decoded.png'}"
    assert sorted(os.listdir(tmp_path / "codes")) == [
        ".lock", ".writer", "bottom.npy", "decoded.png", "labels.npy", "meta.json", "top.npy"
    ]  # fmt: skip


@pytest.mark.parametrize("cut_after", [0, 1, 3])
def test_cut_off_extraction_goes_on(folder, tmp_path, monkeypatch, cut_after, capsys):
    whole = Codes.open(extract(options_of(folder, tmp_path / "whole")))
    monkeypatch.setattr(import_module("vqops.vqvae2.prior.extract"), "MARK_EVERY", -1.0)  # after each batch
    write, batches = Codes.write, []

    def write_and_die(codes, start, indices):
        batches.append(start)
        if len(batches) > cut_after:
            raise KeyboardInterrupt
        write(codes, start, indices)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Codes, "write", write_and_die)
        extract(options_of(folder, tmp_path / "codes"))
    assert Codes.open(tmp_path / "codes").meta.done == 4 * cut_after
    codes = Codes.open(extract(options_of(folder, tmp_path / "codes")))
    going_on = f"{4 * cut_after} of {N} images are there, going on"
    assert (going_on in capsys.readouterr().out) == (cut_after > 0)
    for array, expected in zip(codes.levels, whole.levels, strict=True):
        REPEATS.same(array, expected)
    assert codes.meta == whole.meta


def test_full_disk_is_noticed_before_the_first_write(folder, tmp_path, monkeypatch):
    """A write to a memory map would end in SIGBUS."""
    code_folder = import_module("vqops.vqvae2.prior.code_folder")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(code_folder.os, "posix_fallocate", full, raising=False)
        refused(r"codes: cannot write here \(No space left on device\)", options_of(folder, tmp_path / "codes"))
    codes = Codes.open(extract(options_of(folder, tmp_path / "codes")))
    assert codes.meta.complete
    assert all(os.stat(tmp_path / "codes" / f"{name}.npy").st_blocks > 0 for name in codes.meta.levels)


def test_complete_codes_are_checked_and_left(folder, tmp_path):
    out = extract(options_of(folder, tmp_path / "codes"))
    before = (out / "bottom.npy").read_bytes()
    extract(options_of(folder, out))
    assert (out / "bottom.npy").read_bytes() == before


def test_damaged_codes_are_noticed(folder, tmp_path):
    out = extract(options_of(folder, tmp_path / "codes"))
    array = np.load(out / "bottom.npy", mmap_mode="r+")
    array[:] = (array + 1) % 16
    array.flush()
    refused("the codes in the files are not those of the images", options_of(folder, out))


# Refused


def refused(message: str, options: ExtractOptions) -> None:
    with pytest.raises(InputError, match=message):
        extract(options)


def test_what_is_refused_leaves_nothing(folder, tmp_path):
    out = tmp_path / "codes"
    refused("no such file", options_of(folder, out, run=tmp_path))
    refused("has no array 'z'", options_of(folder, out, data_key="z"))
    refused("has no array 'z'", options_of(folder, out, label_key="z"))
    refused(r"x_two\]: labels are .*\[21\].*these are uint8 \[2, ", options_of(folder, out, label_key="x_two"))
    np.save(tmp_path / "grey.npy", np.zeros((4, 16, 16), np.uint8))
    grey = options_of(folder, out, data=str(tmp_path / "grey.npy"), data_key=None, label_key=None)
    refused("holds images of 1 channels", grey)
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused("is not empty", options_of(folder, out))


def test_other_model_or_data_is_refused(folder, tmp_path):
    out = extract(options_of(folder, tmp_path / "codes"))
    refused(r"holds other codes \(images 21 there, 2 now\)", options_of(folder, out, data_key="x_two", label_key=None))
    refused(r"holds other codes \(image shape", options_of(folder, out, image_size=12))
    other = TrainOptions(data=str(folder / "images.npz"), data_key="x", image_size=16, steps=1, channels=8, seed=1)
    train(replace(other, batch_size=8, codebook_size=16, code_dim=4, device="cpu", out=tmp_path / "run"))
    refused(r"holds other codes \(model ", options_of(folder, out, run=tmp_path / "run"))


def test_other_labels_are_refused(folder, tmp_path):
    out = extract(options_of(folder, tmp_path / "codes"))
    np.save(tmp_path / "labels.npy", np.arange(N)[::-1] % 3 + 5)
    message = "codes holds codes of images with other labels: name another folder$"
    refused(message, options_of(folder, out, label_key=None, labels=tmp_path / "labels.npy"))
    np.save(tmp_path / "labels.npy", np.arange(N) % 3 + 5)
    extract(options_of(folder, out, label_key=None, labels=tmp_path / "labels.npy"))


def test_folders_that_hold_no_codes(folder, tmp_path):
    with pytest.raises(InputError, match="no codes are there"):
        Codes.open(tmp_path)
    out = extract(options_of(folder, tmp_path / "codes"))
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps(meta | {"images": 30}))
    with pytest.raises(InputError, match=r"bottom.npy is uint16 \[21, 4, 4\], meta.json says uint16 \[30, 4, 4\]"):
        Codes.open(out)
    (out / "meta.json").write_text("{}")
    with pytest.raises(InputError, match="not the description of codes"):
        Codes.open(out)


@pytest.mark.parametrize("codebook_size, dtype", [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_arrays_are_as_narrow_as_the_codebook_allows(tmp_path, codebook_size, dtype):
    meta = CodesMeta(2, 0, (3, 4, 4), codebook_size, ("bottom",), ((1, 1),), "sha", "data", "", "", ())
    codes = Codes.create(tmp_path, meta, None)
    codes.write(0, (torch.tensor([[[0]], [[codebook_size - 1]]]),))
    assert codes.levels[0].dtype == dtype
    assert codes.read(np.array([1]))[0].item() == codebook_size - 1
