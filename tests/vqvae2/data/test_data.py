"""What `--data` accepts, what it refuses and how, and the batches that are cut from it."""

import io
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from promises import COPIES, REPEATS

pytest.importorskip("skimage")

from vqops.vqvae2 import InputError
from vqops.vqvae2.data import batches
from vqops.vqvae2.data.encoded import EncodedImage
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.data.photographs import held_out_photographs, training_photographs
from vqops.vqvae2.data.sources import load_images
from vqops.vqvae2.data.survey import Reading


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png")
    return buffer.getvalue()


# Accepted


def test_folder_is_searched_recursively_and_grey_joins_colour(tmp_path):
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    (tmp_path / "b.png").write_bytes(png(pixels(5, 6, 3)))
    (tmp_path / "sub" / "a.PNG").write_bytes(png(pixels(7, 4)))
    (tmp_path / "sub" / ".hidden" / "c.png").write_bytes(b"nothing")
    (tmp_path / "notes.txt").write_text("no image")
    images = load_images(str(tmp_path))
    assert [image.shape for image in images] == [(5, 6, 3), (7, 4, 3)]
    assert images.largest == (7, 6)
    COPIES.same(images[0], pixels(5, 6, 3))


def test_all_grey_has_one_channel(tmp_path):
    (tmp_path / "a.png").write_bytes(png(pixels(5, 6)))
    assert load_images(str(tmp_path)).channels == 1
    assert load_images(str(tmp_path), reading=Reading(channels=3)).channels == 3


@pytest.mark.parametrize("shape, channels", [((4, 8, 6, 3), 3), ((4, 8, 6, 1), 1), ((4, 8, 6), 1)], ids=str)
def test_arrays(tmp_path, shape, channels):
    np.save(tmp_path / "x.npy", pixels(*shape))
    np.savez(tmp_path / "x.npz", x=pixels(*shape), labels=np.arange(4))
    for images in (load_images(str(tmp_path / "x.npy")), load_images(str(tmp_path / "x.npz"))):
        assert len(images) == 4
        assert images.channels == channels
        COPIES.same(images[3].squeeze(), pixels(*shape)[3].squeeze())


def test_channels_first_is_told_and_turned(tmp_path):
    """As PyTorch keeps images; where both ends could be channels they are the last."""
    np.save(tmp_path / "x.npy", pixels(4, 3, 8, 6))
    images = load_images(str(tmp_path / "x.npy"))
    assert images.report == f"{tmp_path / 'x.npy'}: 4 images (colour, uint8 array, channels first), 8 x 6 pixels"
    COPIES.same(images[2], np.moveaxis(pixels(4, 3, 8, 6)[2], 0, -1))
    np.save(tmp_path / "y.npy", pixels(4, 3, 8, 3))
    assert load_images(str(tmp_path / "y.npy")).largest == (3, 8)


def test_orders_in_memory(tmp_path):
    """Fortran's, a view with steps, big endian: of bytes it is the same."""
    for number, array in enumerate((np.asfortranarray(pixels(4, 8, 6, 3)), pixels(8, 16, 6, 3)[::2, ::2])):
        np.save(tmp_path / f"{number}.npy", array)
        for images in (load_images(str(tmp_path / f"{number}.npy")), Images.of_array(array, "x")):
            COPIES.same(images[3], array[3])
    COPIES.same(Images.of_array(pixels(4, 8, 6).astype(">u1"), "x")[1][..., 0], pixels(4, 8, 6)[1])


def test_an_array_is_not_loaded_but_mapped(tmp_path):
    np.save(tmp_path / "x.npy", pixels(4, 8, 6))
    assert isinstance(load_images(str(tmp_path / "x.npy")).items.base, np.memmap)


def test_key_picks_the_array(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=pixels(4, 8, 8), x_val=pixels(2, 8, 8))
    assert len(load_images(str(tmp_path / "x.npz"), "x_val")) == 2


def test_parquet_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    encoded = [png(pixels(5, 6, 3)), png(pixels(7, 4, 3))]
    column = pa.array([{"bytes": item, "path": None} for item in encoded])
    parquet.write_table(pa.table({"image": column, "label": [0, 1]}), tmp_path / "hugging_face.parquet")
    parquet.write_table(pa.table({"image": pa.array(encoded)}), tmp_path / "bytes.parquet")
    nested = pa.array(pixels(2, 5, 6).tolist(), pa.list_(pa.list_(pa.uint8())))
    parquet.write_table(pa.table({"image": nested}), tmp_path / "nested.parquet")
    for name in ("hugging_face", "bytes"):
        images = load_images(str(tmp_path / f"{name}.parquet"))
        assert [image.shape for image in images] == [(5, 6, 3), (7, 4, 3)]
        COPIES.same(images[0], pixels(5, 6, 3))
    COPIES.same(load_images(str(tmp_path / "nested.parquet"))[1][..., 0], pixels(2, 5, 6)[1])


def test_hugging_face_dataset(monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})

    def split(size):
        rows = {"img": [Image.fromarray(pixels(5, 6, 3))] * size, "label": [0] * size}
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": split(3), "test": split(2)})
    assert len(load_images("someone/pictures")) == 3
    said = "someone/pictures is no file or folder here: looking for a Hugging Face dataset of this name\n"
    assert capsys.readouterr().out == said  # where there is no network, what comes next takes half a minute
    assert len(load_images("someone/pictures", "img", ("validation", "test"))) == 2
    COPIES.same(load_images("someone/pictures")[0], pixels(5, 6, 3))
    with pytest.raises(InputError, match="no split validation, only train, test"):
        load_images("someone/pictures", None, ("validation",))


def test_photographs_come_with_scikit_image():
    images = training_photographs()
    assert len(images) == 18
    assert images.largest == (1411, 1411)
    held_out = held_out_photographs(64)
    assert [image.shape for image in held_out] == [(64, 64, 3)] * 8


def test_large_folders_are_decoded_on_demand(tmp_path, monkeypatch):
    monkeypatch.setattr("vqops.vqvae2.data.survey.KEPT_DECODED_BYTES", 10)
    (tmp_path / "a.png").write_bytes(png(pixels(5, 6, 3)))
    images = load_images(str(tmp_path))
    assert isinstance(images.items[0], EncodedImage)
    COPIES.same(images[0], pixels(5, 6, 3))


# Refused


def refused(message: str, data: object, key: str | None = None, **others) -> None:
    with pytest.raises(InputError, match=message):
        load_images(str(data), key, **others)


def test_missing_paths(tmp_path):
    refused("nowhere.npz: no such file or folder", tmp_path / "nowhere.npz")
    refused("nowhere: no such file or folder", tmp_path / "nowhere")
    refused(r"x: cannot be read \([^)]*too long\)$", tmp_path / ("x" * 300))
    refused("^the images have an empty name: give a folder of images, ", "")


def test_folders_without_permission(tmp_path, monkeypatch):
    """As Path.exists raises in some versions of Python."""

    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    refused(r"private.x: cannot be read \(Permission denied\)$", tmp_path / "private" / "x")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_listed(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir(mode=0)
    refused("the folder cannot be read", folder)
    refused("holds no image .* 1 folders that cannot be read", folder, reading=Reading(skip_bad=True))


def test_archives_in_a_folder_are_its_images(tmp_path):
    """Except for hidden ones, such as the ._ files that macOS leaves beside each file."""
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.TAR", "w") as archive:
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(content := png(pixels(5, 6, 3)))
            archive.addfile(member, io.BytesIO(content))
    (tmp_path / "._0.TAR").write_bytes(b"no archive")
    assert load_images(str(tmp_path)).used_names == ["0.png", "1.png"]


def test_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    refused(r"holds no image.*\.png", tmp_path)
    refused("must be a folder of images, a .npz, .npy, .parquet, .tar file", tmp_path / "notes.txt")
    refused("is a folder of images: it has no array or column 'x'", tmp_path, "x")


def test_a_folder_of_idx_files_names_one(tmp_path):
    for name in ("labels.idx1-ubyte", "train-images-idx3-ubyte"):
        (tmp_path / name).write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 5]))
    refused(r"holds no image .*; of IDX files give one, such as .*labels\.idx1-ubyte$", tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an image", png(pixels(64, 64, 3))[:3000]], ids=["empty", "text", "cut"])
def test_corrupt_image_is_named(tmp_path, content):
    (tmp_path / "good.png").write_bytes(png(pixels(5, 6, 3)))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "bad.png").write_bytes(content)
    refused("sub.bad.png: not a readable image", tmp_path)


@pytest.mark.parametrize("suffix", ["npy", "npz", "parquet"])
def test_corrupt_file_is_named(tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / f"x.{suffix}").write_bytes(b"nothing of the kind")
    refused(rf"x\.{suffix}: not a readable \.{suffix} file", tmp_path / f"x.{suffix}")


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((4, 8, 8, 3), np.float32), r"must hold uint8 images .*, got float32 \[4, 8, 8, 3\]: floats have no"),
        (np.zeros((4, 8, 8), np.float16), r"got float16 \[4, 8, 8\]: floats have no known range"),
        (np.zeros((4, 8, 8), np.uint16), r"got uint16 \[4, 8, 8\]: 16 bits become 8 by"),
        (np.zeros((4, 8, 8), bool), r"got bool \[4, 8, 8\]: booleans become 0 and 255 by"),
        (np.zeros((4, 8, 8), np.int8), r"got int8 \[4, 8, 8\]: where all are 0 to 255"),
        (np.zeros((4, 8, 8), np.complex64), r"got complex64 \[4, 8, 8\]$"),
        (np.zeros((4, 8, 8), [("r", "u1"), ("g", "u1")]), r"got \[\('r', 'u1'\), \('g', 'u1'\)\] \[4, 8, 8\]"),
        (np.zeros((4, 4, 8, 8), np.uint8), r"got uint8 \[4, 4, 8, 8\]"),
        (np.zeros((4, 8), np.uint8), r"got uint8 \[4, 8\]"),
        (np.zeros((4, 8, 8, 4), np.uint8), r"C = 1 or 3.*got uint8 \[4, 8, 8, 4\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"holds no image: its shape is \[0, 8, 8, 3\]"),
        (np.zeros((4, 0, 8), np.uint8), r"holds no image: its shape is \[4, 0, 8\]"),
        (np.array([{}, {}]), "not a readable"),
    ],
    ids=lambda value: value.dtype.name if isinstance(value, np.ndarray) else "",
)
def test_arrays_that_are_no_images(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", x=array)
    refused(message, tmp_path / "x.npy")
    refused(message, tmp_path / "x.npz", "x")


def test_keys_that_do_not_pick(tmp_path):
    np.savez(tmp_path / "x.npz", a=pixels(4, 8, 8), b=pixels(4, 8, 8))
    np.save(tmp_path / "x.npy", pixels(4, 8, 8))
    refused("has no array 'c', only a, b", tmp_path / "x.npz", "c")
    refused("pick the array of images with data_key or val_key, from a, b", tmp_path / "x.npz")
    np.savez(tmp_path / "objects.npz", images=pixels(4, 8, 8), names=np.array(["a", None, "b", "c"], object))
    message = r"objects\.npz\[names\]: not a readable array \(Object .*\); pick the array of images with data_key$"
    refused(message, tmp_path / "objects.npz")
    assert len(load_images(str(tmp_path / "objects.npz"), "images")) == 4
    refused("holds a single array", tmp_path / "x.npy", "a")
    refused("images of 1 channels, the training images have 3", tmp_path / "x.npy", reading=Reading(channels=3))


def test_parquet_columns_that_do_not_pick(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    ragged = pa.array([[[1, 2]], [[1, 2, 3]]], pa.list_(pa.list_(pa.uint8())))
    parquet.write_table(pa.table({"a": [b"x", b"y"], "b": [b"x", b"y"], "label": [0, 1], "ragged": ragged}), path)
    refused("has no column 'c', only a, b, label, ragged", path, "c")
    refused("pick the column of images", path)
    refused("'label' is int64", path, "label")
    refused("arrays of one size are expected", path, "ragged")
    refused("row 0: not a readable image", path, "a")


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    refused(r"needs pyarrow: pip install 'vqops\[hf\]'", tmp_path / "x.parquet")
    refused(r"someone/pictures is no file or folder here.*needs datasets", "someone/pictures")


# Batches


def of_sizes(*sizes: tuple[int, int]) -> Images:
    arrays = [np.full((*size, 3), number, np.uint8) for number, size in enumerate(sizes)]
    return Images(arrays, np.arange(len(arrays)), 3, tuple(np.max(sizes, axis=0)))


def training_list(images, image_size=8, batch_size=4, steps=5, seed=0, num_workers=0):
    window = batches.window_of(images, image_size)
    return list(batches.training_batches(images, window, batch_size, steps, seed, num_workers))


def test_batches_have_one_size_whatever_the_images():
    images = of_sizes((20, 30), (5, 40), (1, 1), (8, 8))
    assert [batch.shape for batch in training_list(images, image_size=16)] == [(4, 3, 16, 16)] * 5
    assert [batch.shape for batch in training_list(images, image_size=64)] == [(4, 3, 20, 40)] * 5


def test_small_images_are_used_whole():
    images = Images.of_array(pixels(6, 8, 8), "x")
    batch = training_list(images, image_size=64, batch_size=6, steps=1)[0]
    assert sorted(batch[:, 0].numpy().tolist()) == sorted(pixels(6, 8, 8).tolist())


def test_each_epoch_visits_every_image_once_in_a_new_order():
    images = of_sizes(*[(8, 8)] * 6)
    seen = torch.cat(training_list(images, steps=6))[:, 0, 0, 0].reshape(4, 6).tolist()
    assert [sorted(epoch) for epoch in seen] == [list(range(6))] * 4
    assert len({tuple(epoch) for epoch in seen}) == 4


def test_batches_depend_on_the_seed_and_not_on_the_workers():
    images = Images.of_array(pixels(6, 20, 20), "x")
    once = torch.stack(training_list(images))
    REPEATS.same(torch.stack(training_list(images)), once)
    REPEATS.same(torch.stack(training_list(images, num_workers=2)), once)
    assert (torch.stack(training_list(images, seed=1)) != once).any()


def test_validation_takes_the_middle_of_each_image():
    images = Images.of_array(pixels(5, 12, 10), "x")
    cut = list(batches.validation_batches(images, (8, 8), batch_size=2, num_workers=0))
    assert [len(batch) for batch in cut] == [2, 2, 1]
    COPIES.same(torch.cat(cut)[:, 0], pixels(5, 12, 10)[:, 2:10, 1:9])


@pytest.mark.parametrize("total, held", [(2, 1), (20, 1), (100, 5)])
def test_hold_out_splits_by_seed(total, held):
    images = of_sizes(*[(1, 1)] * total)
    kept, held_out = (images.take(part.tolist()) for part in batches.hold_out(total, seed=3))
    assert (len(kept), len(held_out)) == (total - held, held)
    assert sorted(int(image[0, 0, 0]) for part in (kept, held_out) for image in part) == list(range(total))
    assert batches.hold_out(total, seed=3)[1].tolist() == held_out.rows.tolist()
