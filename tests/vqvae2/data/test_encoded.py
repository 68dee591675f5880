"""Encoded images: upright, of the first picture, wherever their bytes are; what cannot be read is named in one line."""

import multiprocessing
import os
import socket
import struct
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from io import BytesIO
from operator import methodcaller
from pathlib import Path

import numpy as np
import pytest
from icc_profiles import DISPLAY_P3, LINEAR_CURVE, rgb_profile
from image_files import PALETTE, RGB, chunk, decodes, png, saved
from PIL import Image, features
from promises import COPIES, REPEATS

from vqops.vqvae2 import InputError
from vqops.vqvae2.data.completeness import is_whole
from vqops.vqvae2.data.decoding import ANIMATED, TURNED
from vqops.vqvae2.data.encoded import EncodedImage, Header, Part

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
BLOCKS = PIXELS[:4, :3].repeat(16, axis=0).repeat(16, axis=1)  # what lossy formats keep
LOSSY = {"JPEG": 12, "MPO": 12, "AVIF": 12}
OPTIONS = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "MPO": {"quality": 100, "subsampling": 0},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "WEBP": {"lossless": True},
}
AVIF = pytest.param("AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="a Pillow without AVIF"))
FORMATS = ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP", AVIF]


def content(format: str, pixels: np.ndarray = BLOCKS, **options) -> bytes:
    return saved(pixels, format, **OPTIONS.get(format, {}), **options)


def within(levels: int, found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= levels


def refused(image: EncodedImage, message: str) -> None:
    for read in (image.header, lambda: image.decode(3)):
        with pytest.raises(InputError, match=message) as error:
            read()
        assert len(str(error.value).splitlines()) == 1


# Orientation

UPRIGHT = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored.transpose(1, 0, 2), 2),
    8: np.rot90,
}


def exif(orientation: object) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def turned(image: EncodedImage, orientation: int, pixels: np.ndarray, levels: int = 0) -> None:
    header, found = image.header(), image.decode(3)
    within(levels, found, UPRIGHT[orientation](pixels))
    assert (header.height, header.width) == found.shape[:2]
    assert (TURNED in header.notes) == (orientation != 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", AVIF])
def test_every_orientation_of_every_format(format, orientation):
    image = EncodedImage("x", content(format, exif=exif(orientation)))
    turned(image, orientation, BLOCKS, LOSSY.get(format, 0))


@pytest.mark.parametrize("orientation", [3, 6])
def test_compressed_tiff_is_turned_once(orientation):
    image = EncodedImage("x", content("TIFF", exif=exif(orientation), compression="tiff_lzw"))
    turned(image, orientation, BLOCKS)


def test_tiff_that_must_be_decoded_is_turned():
    """Its strip is said to be longer than it is."""
    encoded, size = content("TIFF", exif=exif(6)), BLOCKS.size
    lying = encoded.replace(struct.pack("<HHII", 279, 4, 1, size), struct.pack("<HHII", 279, 4, 1, size + 999))
    assert lying != encoded
    turned(EncodedImage("x", lying), 6, BLOCKS)


def test_exif_after_the_pixels_of_a_png():
    late = chunk(b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0"))
    image = EncodedImage("x", png([row.tobytes() for row in PIXELS], 10, 8, RGB, after=late))
    turned(image, 6, PIXELS)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_there_are_not(orientation):
    turned(EncodedImage("x", content("PNG", exif=exif(orientation))), 1, BLOCKS)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("broken", [b"Exif\0\0", b"Exif\0\0nothing of it", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_broken_exif_does_not_matter(broken):
    for format in ("JPEG", "PNG", "WEBP"):
        turned(EncodedImage("x", content(format, exif=broken)), 1, BLOCKS, LOSSY.get(format, 0))


# Several pictures

MOVING = ["GIF", "PNG", "WEBP", "TIFF", "MPO", AVIF]


@pytest.mark.parametrize("format", MOVING)
def test_the_first_of_several_pictures(format):
    other = Image.fromarray(np.zeros_like(BLOCKS))
    image = EncodedImage("x", content(format, save_all=True, append_images=[other]))
    assert image.header().notes == (ANIMATED,)
    within(LOSSY.get(format, 0), image.decode(3), BLOCKS)
    assert EncodedImage("x", content(format)).header().notes == ()


# Places

PLACES = ["bytes", "file", "part"]


def placed(place: str, encoded: bytes, folder: Path) -> EncodedImage:
    if place == "bytes":
        return EncodedImage("x", encoded)
    path = folder / "x"
    path.write_bytes(encoded if place == "file" else b"before" * 99 + encoded + b"\xff\xd9 after")
    return EncodedImage.of_file(path) if place == "file" else EncodedImage("x", Part(path, 6 * 99, len(encoded)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("format", [*FORMATS, "GREY TIFF"])
def test_everywhere_the_same(format, place, tmp_path):
    encoded = content("TIFF", BLOCKS[..., 0], compression="tiff_lzw") if format == "GREY TIFF" else content(format)
    image = placed(place, encoded, tmp_path)
    header, channels = image.header(), 1 if format == "GREY TIFF" else 3
    assert (header.height, header.width, header.channels) == (*BLOCKS.shape[:2], channels)
    within(LOSSY.get(format, 0), image.decode(3), BLOCKS if channels == 3 else BLOCKS[..., :1].repeat(3, axis=-1))


def test_header():
    assert EncodedImage("x", content("PNG", PIXELS[..., 0])).header() == Header(12, 10, 1, "L", ())


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc")
@pytest.mark.parametrize("place", ["file", "part"])
def test_no_file_stays_open(place, tmp_path):
    whole, cut = content("GIF", save_all=True, append_images=[Image.fromarray(PIXELS)]), content("PNG")[:200]
    before = sorted(os.listdir("/proc/self/fd"))
    for encoded in (whole, cut, b"nothing"):
        image = placed(place, encoded, tmp_path)
        for read in (image.header, lambda: image.decode(3)):  # noqa: B023 - called at once
            try:
                read()
            except InputError:
                assert encoded != whole
    assert sorted(os.listdir("/proc/self/fd")) == before


def read(image: EncodedImage) -> np.ndarray:
    image.header()
    return image.decode(3)


def test_threads():
    contents = [content(format) for format in FORMATS if isinstance(format, str)]
    contents += [content("PNG", icc_profile=rgb_profile(DISPLAY_P3, LINEAR_CURVE))]
    images = [EncodedImage("x", encoded) for encoded in contents] * 8
    once = [read(image) for image in images]
    with ThreadPoolExecutor(4) as threads:
        REPEATS.same(list(threads.map(read, images)), once)


def test_images_are_sent_to_other_processes(tmp_path):
    images = []
    for place in PLACES:
        (tmp_path / place).mkdir()
        images.append(placed(place, content("PNG", PIXELS), tmp_path / place))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:  # which cannot import tests
        COPIES.same(list(processes.map(methodcaller("decode", 3), images)), [PIXELS] * len(images))


# Whole or not


@pytest.mark.parametrize("format", [*[format for format in FORMATS if format not in ("PPM", "TGA")], "MPO"])
def test_whole_files_are_not_decoded(format):
    encoded = content(format) + (b"\0" * 99 if format == "JPEG" else b"")
    with Image.open(BytesIO(encoded)) as image:
        file = BytesIO(encoded)
        file.seek(5)
        assert is_whole(file, image)
        assert file.tell() == 5


NOISE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
SPECIAL = {"progressive JPEG": ("JPEG", {"progressive": True}), "small TIFF": ("TIFF", {"compression": "tiff_lzw"})}
SEVERAL = {f"two of {format}": format for format in ("GIF", "MPO", "PNG", "TIFF", "WEBP")}


def of_noise(format: str) -> bytes:
    if format in SEVERAL:
        return content(SEVERAL[format], NOISE, save_all=True, append_images=[Image.fromarray(NOISE[::-1])])
    name, options = SPECIAL.get(format, (format, {}))
    return content(name, NOISE, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["bytes", "part"])
@pytest.mark.parametrize("format", [*FORMATS, *SPECIAL, *SEVERAL])
def test_what_is_cut_anywhere_is_found_by_its_header(format, place, tmp_path):
    """Where Pillow can tell at all: neither less nor more is refused."""
    whole = of_noise(format)
    cuts = {0, 1, len(whole) - 1, len(whole) - 2, len(whole) - 5, *range(2, len(whole), max(1, len(whole) // 23))}
    refusals = 0
    for cut in sorted(cuts):
        image = placed(place, whole[:cut], tmp_path)
        if decodes(whole[:cut]):
            assert image.decode(3).shape == (40, 50, 3)
            image.header()
        else:
            refused(image, "^x: not a readable image")
            refusals += 1
    assert refusals > 10


@pytest.mark.parametrize("tail", [b"\0" * 5000, b"garbage" * 1000, b"\0"], ids=["zeros", "garbage", "zero"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_follows_a_whole_image_does_not_matter(format, tail):
    encoded = content(format) + tail
    if not decodes(encoded):
        pytest.skip("Pillow refuses it")
    image = EncodedImage("x", encoded)
    assert (image.header().height, image.header().width) == BLOCKS.shape[:2]
    within(LOSSY.get(format, 0), image.decode(3), BLOCKS)


# Refused


def test_places_without_an_image(tmp_path):
    refused(EncodedImage.of_file(tmp_path / "nowhere.png"), r"nowhere\.png: no such image file")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    refused(EncodedImage.of_file(tmp_path / "link.png"), r"link\.png: no such image file")
    (tmp_path / "folder.png").mkdir()
    refused(EncodedImage.of_file(tmp_path / "folder.png"), r"folder\.png: not a readable image \(a folder\)")
    (tmp_path / "empty.png").touch()
    refused(EncodedImage.of_file(tmp_path / "empty.png"), r"empty\.png: not a readable image \(empty\)")
    (tmp_path / "text.png").write_text("text\n" * 100)
    refused(EncodedImage.of_file(tmp_path / "text.png"), "not a readable image .of no format that Pillow knows")
    refused(EncodedImage.of_file(tmp_path / "text.png" / "x.png"), "not a readable image .Not a directory")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    refused(EncodedImage.of_file(tmp_path / "loop.png"), "not a readable image .Too many levels of symbolic links")


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    refused(EncodedImage.of_file(tmp_path / "pipe.png"), "not a regular file")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.png"))
        refused(EncodedImage.of_file(tmp_path / "socket.png"), "not a regular file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission(tmp_path):
    (tmp_path / "x.png").write_bytes(content("PNG"))
    (tmp_path / "x.png").chmod(0)
    refused(EncodedImage.of_file(tmp_path / "x.png"), r"x\.png: not a readable image \(Permission denied\)")


def test_files_that_cannot_be_opened(tmp_path, monkeypatch):
    def denied(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "x.png").write_bytes(content("PNG"))
    monkeypatch.setattr("builtins.open", denied)
    refused(EncodedImage.of_file(tmp_path / "x.png"), r"x\.png: not a readable image \(Permission denied\)$")


def test_parts_beyond_the_end(tmp_path):
    (tmp_path / "x.tar").write_bytes(content("PNG"))
    part = Part(tmp_path / "x.tar", 10, len(content("PNG")))
    refused(EncodedImage("x.tar: a.png", part), r"x\.tar: a\.png: .*the file that it is in ends before it does")


def test_unknown_ranges():
    refused(EncodedImage("x", saved(PIXELS[..., 0].astype(np.float32), "TIFF")), "^x: floating-point pixels .mode F")
    refused(EncodedImage("x", saved(PIXELS[..., 0].astype(np.int32), "TIFF")), "^x: 32-bit integers .mode I")


def test_palettes_that_are_missing():
    refused(EncodedImage("x", png([bytes(8)] * 4, 8, 8, PALETTE)), "^x: its palette is missing")


def test_decompression_bombs(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    refused(EncodedImage("x", content("PNG")), "^x: not a readable image .*exceeds limit of 20 pixels")


def test_names_are_shown_on_one_line(tmp_path):
    refused(EncodedImage("a\nb\udcff.png", b"x"), "^a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}.png: not a")


def test_reasons_are_shown_on_one_line(monkeypatch):
    def broken(*_):
        raise ValueError("first\nsecond")

    monkeypatch.setattr(Image, "open", broken)
    refused(EncodedImage("x", b"x"), r"^x: not a readable image \(first second\)$")


def test_memory_is_not_the_image_s_fault(monkeypatch):
    def full(*_):
        raise MemoryError

    image = EncodedImage("x", content("PNG"))
    monkeypatch.setattr(Image.Image, "load", full)
    with pytest.raises(MemoryError):
        image.decode(3)
