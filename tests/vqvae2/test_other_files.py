"""IDX files, CIFAR's python batches and .tar archives: the right values, and every way in which they can be broken."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
from collections import Counter

import numpy as np
import pytest
from promises import COPIES

from vqops.vqvae2 import InputError
from vqops.vqvae2.data import cifar
from vqops.vqvae2.data.cifar import is_cifar, read_cifar
from vqops.vqvae2.data.idx import is_idx, labels_beside, read_idx
from vqops.vqvae2.data.tar import index_tar


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
        path.write_bytes(pickle.dumps({"data": array, "labels": np.array([3, 1])}, protocol=protocol))
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


# Archives


def packed(path, members: dict[str, bytes | tarfile.TarInfo], form=tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def of_type(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def contents(members) -> list[bytes]:
    found = []
    for shard, offset, size in zip(members.shards, members.offsets, members.sizes, strict=True):
        with open(members.paths[shard], "rb") as file:
            file.seek(offset)
            found.append(file.read(size))
    return found


LONG = "/".join(["folder" * 10] * 4) + "/image.png"  # 254 characters: more than a plain header holds


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_images_are_found_where_they_lie(tmp_path, form):
    images = {LONG: b"long", "./b/ü.PNG": b"upper" * 300, "../a.jpg": b"", "/c.webp": b"root", "b/.x/../d.png": b"hid"}
    packed(tmp_path / "x.tar", images, form)
    found = index_tar([tmp_path / "x.tar"])
    assert found.names == [LONG, "b/ü.PNG", "../a.jpg", "/c.webp"]
    assert contents(found) == [b"long", b"upper" * 300, b"", b"root"]
    assert found.offsets.dtype == found.sizes.dtype == found.shards.dtype == np.int64
    assert found.left_out == Counter(hidden=1)
    assert found.keys() == []


def test_what_is_left_out_is_counted(tmp_path):
    others = {
        "folder": of_type("folder", tarfile.DIRTYPE),
        "a.png": b"a",
        "b.png": of_type("b.png", tarfile.SYMTYPE, "a.png"),
        "c.png": of_type("c.png", tarfile.LNKTYPE, "a.png"),
        "d.png": of_type("d.png", tarfile.FIFOTYPE),
        "._a.png": b"of a Mac",
        "README": b"read",
        "a.npy": b"array",
        "b.npy": b"array",
        "a.txt": b"of a",
        "notes.txt": b"of none",
    }
    packed(tmp_path / "x.tar", others)
    found = index_tar([tmp_path / "x.tar"])
    assert found.names == ["a.png"]
    once = ("links", "hard links", "devices and pipes", "hidden", "files without an ending", ".txt files")
    assert found.left_out == Counter({**dict.fromkeys(once, 1), ".npy files": 2})
    assert found.keys() == ["txt"]


def test_labels_of_samples(tmp_path):
    first = {
        "x/1.cls": b"3\n",
        "x/1.jpg": b"one",
        "x/1.json": json.dumps({"label": 5, "text": "cat"}).encode(),
        "x/2.jpg": b"two",
        "x/1.mask.png": b"mask",
        "y/1.0.jpg": b"three",
        "x/2.cls": b"4",
    }
    packed(tmp_path / "0.tar", first)
    packed(tmp_path / "1.tar", {"x/1.jpg": b"other", "x/1.cls": "\ufeffgänse".encode()})
    packed(tmp_path / "2.tar", {"z.jpg": b"without"})
    found = index_tar([tmp_path / f"{number}.tar" for number in range(3)])
    assert found.names == ["x/1.jpg", "x/2.jpg", "x/1.mask.png", "y/1.0.jpg", "x/1.jpg", "z.jpg"]
    assert found.shards.tolist() == [0, 0, 0, 0, 1, 2]
    assert contents(found) == [b"one", b"two", b"mask", b"three", b"other", b"without"]
    assert found.keys() == ["cls", "json.label", "json.text"]
    assert found.labels("cls") == ["3", "4", "3", None, "gänse", None]
    assert found.labels("json.label") == found.labels("label") == [5, None, 5, None, None, None]
    assert found.labels("text") == ["cat", None, "cat", None, None, None]
    assert found.left_out == Counter()
    refused(r"0\.tar has no labels 'z', only cls, json.label, json.text$", found.labels, "z")
    refused("no labels 'json', only", found.labels, "json")


def test_broken_label_members_are_named(tmp_path):
    path = tmp_path / "x.tar"
    packed(path, {"1.jpg": b"", "1.json": b"{", "1.cls": b"\xff", "2.jpg": b""})
    found = index_tar([path])
    refused(r"x\.tar: the \.json of 1\.jpg: not readable JSON", found.labels, "label")
    refused(r"x\.tar: the \.cls of 1\.jpg: not UTF-8", found.labels, "cls")
    packed(path, {"1.jpg": b"", "1.json": b"[1]"})
    refused("must be an object of fields", index_tar([path]).labels, "label")
    packed(path, {"1.jpg": b"", "1.cls": b"1", "1.CLS": b"2"})
    refused(r"x\.tar: 1 of its samples have two \.cls members", index_tar, [path])
    path.unlink()
    refused(r"x\.tar: not readable", found.labels, "cls")


def test_every_cut_archive_is_refused(tmp_path):
    members = {"a.png": b"a" * 700, LONG: b"long", "a.cls": b"1"}
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        packed(tmp_path / "whole.tar", members, form)
        content = (tmp_path / "whole.tar").read_bytes()
        end = len(content.rstrip(b"\0")) // 512 * 512 + 512
        for size in positions(end, 60) + list(range(512, end, 512)):
            (tmp_path / "x.tar").write_bytes(content[:size])
            refused(r"x\.tar", index_tar, [tmp_path / "x.tar"])
        (tmp_path / "x.tar").write_bytes(content[: end + 512])
        assert len(index_tar([tmp_path / "x.tar"]).names) == 2


def test_a_broken_archive_says_where(tmp_path):
    path = tmp_path / "x.tar"
    packed(path, {"a.png": b"a" * 700, "b.png": b"b" * 700})
    content = path.read_bytes()

    def broken(changed: bytes, message: str) -> None:
        path.write_bytes(changed)
        refused(message, index_tar, [path])

    broken(content[:1000], r"x\.tar is cut off in a\.png: expected 1536 bytes, got 1000$")
    broken(content[:1536], r"x\.tar is cut off or damaged after a\.png")
    broken(content[:3000], r"x\.tar is cut off in b\.png")
    broken(content[:1540] + b"!" + content[1541:], r"x\.tar is cut off or damaged after a\.png \(bad checksum\)")
    broken(content + content, "goes on after its end, behind b.png")
    broken(b"\x89PNG" + bytes(2000), r"x\.tar: not a tar archive")
    broken(b"", r"x\.tar: not a tar archive")
    packed(path, {"a.png": b"1", "b.png": b"2"})
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    refused(r"x\.tar holds a\.png 2 times", index_tar, [path])
    refused(r"nowhere\.tar: not readable", index_tar, [tmp_path / "nowhere.tar"])
    negative = tarfile.TarInfo("a.png")
    negative.size = -(2**40)
    broken(negative.tobuf(tarfile.GNU_FORMAT) + bytes(1024), r"x\.tar")


def test_sparse_members_are_refused_by_name(tmp_path):
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"GNU.sparse.size": "8", "GNU.sparse.numblocks": "0", "GNU.sparse.map": "0,4"}
    packed(tmp_path / "x.tar", {"a.png": member})
    refused(r"x\.tar: a\.png is a sparse member", index_tar, [tmp_path / "x.tar"])


@pytest.mark.parametrize("mode, program", [("w:gz", "gunzip"), ("w:bz2", "bunzip2"), ("w:xz", "unxz")])
def test_compressed_archives_are_refused(tmp_path, mode, program):
    with tarfile.open(tmp_path / "x.tar", mode) as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    refused(rf"x\.tar is compressed: decompress it first \({program}\)", index_tar, [tmp_path / "x.tar"])


def test_an_archive_without_images(tmp_path):
    packed(tmp_path / "x.tar", {})
    assert index_tar([tmp_path / "x.tar"]).names == []
    packed(tmp_path / "x.tar", {"a.txt": b"x"})
    found = index_tar([tmp_path / "x.tar"])
    assert (found.names, found.left_out, found.labels("txt")) == ([], Counter({".txt files": 1}), [])


@pytest.mark.slow
def test_damaged_archives_give_images_or_a_line(tmp_path):
    packed(tmp_path / "whole.tar", {"a.png": b"a" * 700, LONG: b"long", "a.cls": b"1"})
    content, random = (tmp_path / "whole.tar").read_bytes(), np.random.default_rng(0)
    for _ in range(3000):
        damaged = bytearray(content)
        for place in random.integers(len(content), size=3):
            damaged[place] = random.integers(256)
        (tmp_path / "x.tar").write_bytes(damaged)
        try:
            assert all(contents(index_tar([tmp_path / "x.tar"])))
        except InputError as error:
            assert "x.tar" in str(error)
