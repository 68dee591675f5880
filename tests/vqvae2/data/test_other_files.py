"""IDX files and CIFAR's python batches: the right values, and every way in which they can be broken."""

import gzip
import os
import pickle
import struct

import numpy as np
import pytest
from promises import COPIES

from vqops.vqvae2 import InputError
from vqops.vqvae2.data import cifar
from vqops.vqvae2.data.cifar import is_cifar, read_cifar
from vqops.vqvae2.data.idx import is_idx, labels_beside, read_idx


def refused(message: str, read, *given) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(*given)
    assert "\n" not in str(caught.value)


def positions(size: int, count: int) -> list[int]:
    """Some lengths to cut a file of this size to."""
    return sorted({*range(0, min(size, 6)), size - 1, *np.random.default_rng(0).integers(0, size, count).tolist()})


# IDX


IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3, *range(10, 22)])  # two images of 2 x 3
LABELS = bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 4])


def test_idx_is_read_compressed_or_not_whatever_its_name(tmp_path):
    expected = [[[10, 11, 12], [13, 14, 15]], [[16, 17, 18], [19, 20, 21]]]
    plain, zipped = tmp_path / "train-images-idx3-ubyte", tmp_path / "images.bin"
    plain.write_bytes(IMAGES)
    zipped.write_bytes(gzip.compress(IMAGES))
    for path in (plain, zipped):
        assert is_idx(path)
        assert read_idx(path).tolist() == expected
        assert read_idx(path).dtype == np.uint8
    mapped = read_idx(plain)
    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable


@pytest.mark.parametrize(
    "code, stored, dtype, values",
    [
        (0x09, "bbb", np.int8, [-1, 2, -3]),
        (0x0B, "hhh", np.int16, [-1, 2, 300]),
        (0x0C, "iii", np.int32, [-1, 2, 70000]),
        (0x0D, "fff", np.float32, [-1.5, 2.0, 0.25]),
        (0x0E, "ddd", np.float64, [-1.5, 2.0, 0.1]),
    ],
)
def test_idx_of_other_types_is_big_endian(tmp_path, code, stored, dtype, values):
    content = bytes([0, 0, code, 1, 0, 0, 0, 3]) + struct.pack(f">{stored}", *values)
    (tmp_path / "x").write_bytes(content)
    (tmp_path / "x.gz").write_bytes(gzip.compress(content))
    for name in ("x", "x.gz"):
        assert read_idx(tmp_path / name).tolist() == values
        assert read_idx(tmp_path / name).dtype == dtype


def test_idx_without_items(tmp_path):
    (tmp_path / "x").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 0, 0, 0, 0, 28, 0, 0, 0, 28]))
    assert read_idx(tmp_path / "x").shape == (0, 28, 28)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_labels_lie_beside_the_images_of_their_split(tmp_path, suffix):
    for name in ("train-labels-idx1-ubyte", "t10k-labels.idx1-ubyte.gz"):
        (tmp_path / name).write_bytes(LABELS)
    assert labels_beside(tmp_path / f"train-images-idx3-ubyte{suffix}") == tmp_path / "train-labels-idx1-ubyte"
    assert labels_beside(tmp_path / f"t10k-images.idx3-ubyte{suffix}") == tmp_path / "t10k-labels.idx1-ubyte.gz"
    assert labels_beside(tmp_path / f"val-images-idx3-ubyte{suffix}") is None
    assert labels_beside(tmp_path / "t10k-labels.idx1-ubyte.gz") is None


@pytest.mark.parametrize("content", [IMAGES, gzip.compress(IMAGES)], ids=["plain", "gzip"])
def test_every_cut_idx_is_refused_by_name(tmp_path, content):
    for size in range(len(content)):
        (tmp_path / "x").write_bytes(content[:size])
        refused(rf"{tmp_path}/x\b", read_idx, tmp_path / "x")


def test_every_changed_byte_of_a_gzip_is_found(tmp_path):
    content = gzip.compress(IMAGES, mtime=0)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        (tmp_path / "x").write_bytes(damaged)
        if place in (4, 5, 6, 7, 8, 9):  # time, level and system of the writer
            assert read_idx(tmp_path / "x").tolist() == np.arange(10, 22).reshape(2, 2, 3).tolist()
        else:
            refused(rf"{tmp_path}/x\b", read_idx, tmp_path / "x")


def test_broken_idx_says_what_is_wrong(tmp_path):
    path = tmp_path / "x"

    def broken(content: bytes, message: str) -> None:
        path.write_bytes(content)
        refused(message, read_idx, path)

    broken(IMAGES[:-3], "x is cut off: expected 28 bytes, got 25$")
    broken(gzip.compress(IMAGES[:-3]), "x is cut off: expected 28 bytes, got 25$")
    broken(IMAGES + b"\0", "x is too long: expected 28 bytes, got more$")
    broken(gzip.compress(IMAGES + b"\0"), "x is too long: expected 28 bytes, got more$")
    broken(IMAGES[:10], "expected 3 sizes of 4 bytes, got 6 bytes")
    broken(b"\x89PNG", r"x: not an IDX file \(it starts with 89 50 4e 47")
    broken(bytes([0, 0, 8, 0]), "not an IDX file")
    broken(b"", "not an IDX file .*nothing")
    broken(bytes([0, 0, 8, 4, *[255] * 16]), "x is cut off: expected .* bytes, got 20$")
    broken(gzip.compress(bytes([0, 0, 8, 4, *[255] * 16])), "x is cut off")
    broken(gzip.compress(IMAGES)[:-1], "x: not a readable IDX file")
    wrong_sum = bytearray(gzip.compress(IMAGES))
    wrong_sum[-6] ^= 1
    broken(bytes(wrong_sum), "x: not a readable IDX file .*CRC")
    refused("nowhere: not a readable IDX file", read_idx, tmp_path / "nowhere")
    assert not is_idx(tmp_path)
    assert not is_idx(tmp_path / "nowhere")


# CIFAR


def rows(count: int, start: int = 0) -> np.ndarray:  # uint8 [count, 3072]
    return ((np.arange(count * 3072) + start) % 251).astype(np.uint8).reshape(count, 3072)


def as_python_2(entries: dict) -> bytes:
    """The pickle that Python 2 wrote: str is bytes, and numpy is numpy.core."""
    array, others = entries[b"data"], {key: value for key, value in entries.items() if key != b"data"}

    def of(value: object) -> bytes:
        if isinstance(value, bytes):
            return b"T" + struct.pack("<i", len(value)) + value
        if isinstance(value, list):
            return b"](" + b"".join(map(of, value)) + b"e"
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    content = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01("
    content += of(array.shape[0]) + of(array.shape[1]) + b"t" + dtype + b"\x89" + of(array.tobytes()) + b"tb"
    items = b"".join(of(key) + of(value) for key, value in others.items())
    return b"\x80\x02}(" + items + of(b"data") + content + b"u."


def batch(count: int = 2, start: int = 0, **labels: list) -> bytes:
    return as_python_2({b"data": rows(count, start), **{key.encode(): value for key, value in labels.items()}})


@pytest.fixture
def cifar_10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number in range(1, 6):
        (folder / f"data_batch_{number}").write_bytes(batch(2, number, labels=[number, 0]))
    (folder / "test_batch").write_bytes(batch(1, 9, labels=[7]))
    names = [f"class {number}" for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    return folder


def test_cifar_pixels_are_planes_of_red_green_and_blue(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(batch(2, labels=[3, 1]))
    found = read_cifar(tmp_path / "data_batch_1", ("train",))
    assert found.images.shape == (2, 32, 32, 3)
    assert found.images[0, 0, 1].tolist() == [1, 1025 % 251, 2049 % 251]
    assert found.images[0, 1, 0].tolist() == [32, (1024 + 32) % 251, (2048 + 32) % 251]
    assert found.images[1, 31, 31, 2] == (2 * 3072 - 1) % 251
    assert found.labels["labels"].tolist() == [3, 1]
    assert found.labels["labels"].dtype == np.int64
    assert found.classes == {}


def test_cifar_10_folder_has_its_batches_in_order(cifar_10):
    assert is_cifar(cifar_10)
    train, test = read_cifar(cifar_10, ("train",)), read_cifar(cifar_10, ("validation", "test"))
    assert train.labels["labels"].tolist() == [1, 0, 2, 0, 3, 0, 4, 0, 5, 0]
    assert train.images[::2, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert test.labels["labels"].tolist() == [7]
    assert train.classes["labels"][3] == "class 3"
    refused("has no split validation, only train, test", read_cifar, cifar_10, ("validation",))
    (cifar_10 / "data_batch_3").unlink()
    refused("data_batch_3 of the split train is missing", read_cifar, cifar_10, ("train",))


def test_cifar_100_has_two_kinds_of_labels(tmp_path):
    (tmp_path / "train").write_bytes(batch(2, fine_labels=[1, 0], coarse_labels=[0, 0]))
    (tmp_path / "test").write_bytes(batch(1, fine_labels=[1], coarse_labels=[0]))
    meta = {b"fine_label_names": [b"apple", b"bear"], b"coarse_label_names": [b"things"]}
    (tmp_path / "meta").write_bytes(pickle.dumps(meta))
    found = read_cifar(tmp_path, ("train",))
    labels = {kind: numbers.tolist() for kind, numbers in found.labels.items()}
    assert labels == {"fine_labels": [1, 0], "coarse_labels": [0, 0]}
    assert found.classes == {"fine_labels": ("apple", "bear"), "coarse_labels": ("things",)}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_cifar_written_again_by_this_numpy(tmp_path, protocol):
    path = tmp_path / "test_batch"
    for array in (rows(2), np.asfortranarray(rows(2))):
        path.write_bytes(pickle.dumps({"data": array, "labels": np.array([3, 1], ">i4")}, protocol=protocol))
        assert is_cifar(path)
        found = read_cifar(path, ("test",))
        COPIES.same(found.images, rows(2).reshape(2, 3, 32, 32).transpose(0, 2, 3, 1))
        assert found.labels["labels"].tolist() == [3, 1]


def test_what_is_no_cifar(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test_batch").write_bytes(b"some text")
    (tmp_path / "other").write_bytes(batch())
    assert not any(map(is_cifar, (tmp_path, tmp_path / "train", tmp_path / "test_batch", tmp_path / "other")))


class Runs:
    """Pickled, it calls what it is given when it is loaded."""

    def __init__(self, *call: object):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_pickle_does_not_run(tmp_path, protocol):
    marker, path = tmp_path / "marker", tmp_path / "data_batch_1"
    harmful = [Runs(os.mkdir, str(marker)), Runs(eval, f"__import__('os').mkdir({str(marker)!r})")]
    for entry in harmful:
        path.write_bytes(pickle.dumps({"data": rows(1), "labels": [entry]}, protocol=protocol))
        refused(r"data_batch_1: refused: the pickle names \w+\.(mkdir|eval)", read_cifar, path, ("train",))
        path.write_bytes(batch(1, labels=[0]))
        (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": entry}, protocol=protocol))
        refused(r"batches\.meta: refused", read_cifar, path, ("train",))
        (tmp_path / "batches.meta").unlink()
    assert not marker.exists()


def test_pickles_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "test_batch"

    def broken(content: bytes, message: str) -> None:
        path.write_bytes(content)
        refused(f"test_batch.*{message}", read_cifar, path, ("test",))

    broken(pickle.dumps([1]), "holds a dict, this one list")
    broken(pickle.dumps({"labels": [1]}), r"data of uint8 \[N, 3072\], this one NoneType")
    broken(pickle.dumps({"data": rows(2)[:, 1:]}), r"this one uint8 \[2, 3071\]")
    broken(pickle.dumps({"data": rows(2).astype(np.int16)}), r"this one int16 \[2, 3072\]")
    broken(pickle.dumps({"data": rows(2).astype(float)}), "refused: an array of 'f8'")
    broken(pickle.dumps({"data": np.array([[{}]])}), "refused: an array of 'O8'")
    broken(pickle.dumps({"data": rows(2), "labels": [1]}), "holds 2 images, but 1 labels")
    broken(pickle.dumps({"data": rows(1), "labels": [-1]}), "labels must be a list of integers")
    broken(pickle.dumps({"data": rows(1), "labels": ["cat"]}), "labels must be a list of integers")
    broken(pickle.dumps({"data": rows(1), "labels": [[1, 2]]}), "labels must be a list of integers")
    broken(b"\x80\x02c_codecs\nencode\n(U\x01xU\x03ziptR.", "refused: the pickle encodes as 'zip'")
    path.write_bytes(batch(1, labels=[2]))
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}))
    refused("labels go up to 2, but only 2 classes have names", read_cifar, path, ("test",))
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "a", "b"]}))
    refused(r"batches\.meta: label_names must be a list of names", read_cifar, path, ("test",))


def test_a_pickle_cannot_change_what_reads_it(tmp_path):
    attributes = b"N}X\x0c\0\0\0__defaults__K\x01\x85s\x86b."  # what BUILD sets on a global
    (tmp_path / "test_batch").write_bytes(b"\x80\x02cnumpy.core.numeric\n_frombuffer\n" + attributes)
    refused("a CIFAR file holds a dict, this one function", read_cifar, tmp_path / "test_batch", ("test",))
    assert cifar.from_buffer.__defaults__ is None


def test_cut_and_damaged_batches(tmp_path):
    content, path = batch(1, labels=[3]), tmp_path / "test_batch"
    for size in positions(len(content), 60):
        path.write_bytes(content[:size])
        refused("test_batch: not a readable CIFAR batch", read_cifar, path, ("test",))
    random = np.random.default_rng(1)
    for _ in range(200):  # a changed byte is another pixel, or refused: nothing else
        damaged = bytearray(content)
        damaged[random.choice([*range(60), *range(len(content) - 20, len(content))])] = random.integers(256)
        path.write_bytes(damaged)
        try:
            assert read_cifar(path, ("test",)).images.shape == (1, 32, 32, 3)
        except InputError as error:
            assert str(path) in str(error)
