"""Images in .tar archives: where they lie, the labels of samples, and every way in which an archive can be broken."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest

from vqops.vqvae2 import InputError
from vqops.vqvae2.data.tar import index_tar


def refused(message: str, read, *given) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(*given)
    assert "\n" not in str(caught.value)



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


def test_a_sample_without_fields_has_no_label(tmp_path):
    packed(tmp_path / "x.tar", {"1.png": b"", "1.json": b"{}", "2.png": b"", "2.json": b'{"kind": 3}'})
    found = index_tar([tmp_path / "x.tar"])
    assert found.labels("kind") == [None, 3]
    with pytest.raises(InputError, match=r"has no labels 'sort', only json\.kind$"):
        found.labels("sort")


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
        for size in {*range(3), *range(0, end, 97), *range(512, end, 512), end - 1}:
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
    for size in (-512, -(2**40)):  # back to its own header, and before the file
        negative = tarfile.TarInfo("a.png")
        negative.size = size
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
