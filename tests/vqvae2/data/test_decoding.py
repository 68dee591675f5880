"""The right pixels of every mode, depth and format: the expected ones are worked out here, from the definitions."""

import colorsys

import numpy as np
import pytest
from image_files import GREY, GREY_ALPHA, RGB, RGB_ALPHA, chunk, decodes, png, saved, tiff
from PIL import Image, features

from vqops.vqvae2.data import decoding
from vqops.vqvae2.data.encoded import EncodedImage

HEIGHT, WIDTH = 12, 10
LEVELS_16 = np.tile(np.arange(256, dtype=np.uint16) * 257, (8, 1))


def random(*channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, *channels), dtype=np.uint8)


def within(levels: int, found: np.ndarray, expected: np.ndarray) -> None:
    expected = expected if expected.ndim == 3 else expected[..., None]
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= levels


def on(background: int, colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha / 255 if colors.ndim == 2 else alpha[..., None] / 255
    return np.rint(colors * share + background * (1 - share)).astype(int)


def decode(content: bytes, background: int = 255) -> np.ndarray:
    image = EncodedImage("x", content)
    header = image.header()
    pixels = image.decode(header.channels, background)
    assert pixels.shape == (header.height, header.width, header.channels)
    assert pixels.flags.c_contiguous and pixels.flags.writeable
    return pixels


def notes(content: bytes) -> tuple[str, ...]:
    return EncodedImage("x", content).header().notes


# Modes


def rgb_of_cmyk(inks: np.ndarray) -> np.ndarray:
    paper = 255.0 - inks
    return np.rint(paper[..., :3] * paper[..., 3:] / 255)


def rgb_of_ycbcr(pixels: np.ndarray) -> np.ndarray:  # JFIF
    y, cb, cr = np.moveaxis(pixels.astype(float), -1, 0)
    cb, cr = cb - 128, cr - 128
    channels = [y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]
    return np.clip(np.rint(np.stack(channels, axis=-1)), 0, 255)


def rgb_of_hsv(pixels: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.apply_along_axis(lambda pixel: colorsys.hsv_to_rgb(*pixel / 255), -1, pixels))


def rgb_of_lab(pixels: np.ndarray) -> np.ndarray:  # L from 0 to 255, a and b offset by 128
    lightness, a, b = np.moveaxis(pixels.astype(float), -1, 0)
    y = (lightness * 100 / 255 + 16) / 116
    cubes = np.stack([y + (a - 128) / 500, y, y - (b - 128) / 200], axis=-1)
    xyz = np.where(cubes > 6 / 29, cubes**3, 3 * (6 / 29) ** 2 * (cubes - 4 / 29)) * [0.9642, 1, 0.8249]  # D50
    red, green = [3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540]
    linear = np.clip(xyz @ np.stack([red, green, [0.0719453, -0.2289914, 1.4052427]], axis=1), 0, 1)
    return np.rint(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))


PALETTE = np.random.default_rng(1).integers(0, 256, (16, 3), dtype=np.uint8)


def picture(mode: str) -> tuple[Image.Image, np.ndarray]:
    """A picture of a mode, and its pixels on white."""
    if mode == "1":
        bits = random() > 127
        return Image.fromarray(bits), bits * 255
    if mode in ("P", "PA"):
        indices, alpha = random() % 16, random(2)[..., 1]
        image = Image.frombytes("P", (WIDTH, HEIGHT), indices.tobytes())
        image.putpalette(PALETTE.tobytes())
        if mode == "P":
            return image, PALETTE[indices]
        image = image.convert("PA")
        image.putalpha(Image.fromarray(alpha))
        return image, on(255, PALETTE[indices], alpha)
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = random(channels) if channels > 1 else random()
    if mode in ("La", "RGBa"):  # no colour is more than its opacity
        values[..., :-1] = values[..., :-1].astype(int) * values[..., -1:] // 255
    if mode == "LAB":  # colours that sRGB has
        values = np.stack([values[..., 0] // 2 + 64, 118 + values[..., 1] % 20, 118 + values[..., 2] % 20], axis=-1)
    expected = {
        "L": lambda: values,
        "LA": lambda: on(255, values[..., 0], values[..., 1]),
        "La": lambda: values[..., 0] + np.rint(255.0 - values[..., 1]),
        "RGB": lambda: values,
        "RGBA": lambda: on(255, values[..., :3], values[..., 3]),
        "RGBa": lambda: values[..., :3] + np.rint(255.0 - values[..., 3:]),
        "RGBX": lambda: values[..., :3],
        "CMYK": lambda: rgb_of_cmyk(values),
        "YCbCr": lambda: rgb_of_ycbcr(values),
        "HSV": lambda: rgb_of_hsv(values),
        "LAB": lambda: rgb_of_lab(values),
    }[mode]()
    values = values.astype(np.uint8)
    if mode == "LAB":
        values[..., 1:] ^= 128  # signed, as TIFF has them
    return Image.frombytes(mode, (WIDTH, HEIGHT), values.tobytes()), expected


LOSSLESS = {"WEBP": {"lossless": True, "exact": True}}
ROUNDED = {"CMYK": 1, "YCbCr": 1, "LAB": 2, "HSV": 2, "La": 1, "RGBa": 1}  # levels, by rounding within Pillow
WRITTEN = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["1", "L", "P"],
    "BMP": ["1", "L", "P", "RGB"],
    "DIB": ["L", "RGB"],
    "JPEG2000": ["L", "LA", "RGB", "RGBA"],
    "PCX": ["1", "L", "P", "RGB"],
    "PPM": ["1", "L", "RGB"],
    "TGA": ["1", "L", "LA", "P", "RGB", "RGBA"],
}


@pytest.mark.parametrize("format, mode", [(format, mode) for format, modes in WRITTEN.items() for mode in modes])
def test_every_mode_of_every_format(format, mode):
    image, expected = picture(mode)
    content = saved(image, format, **LOSSLESS.get(format, {}))
    if not decodes(content):
        pytest.skip("this Pillow cannot")
    within(ROUNDED.get(mode, 0), decode(content), expected)


@pytest.mark.parametrize("mode", ["La", "RGBa", "HSV", "RGBX"])
def test_modes_that_no_file_has(mode):
    image, expected = picture(mode)
    channels = expected.shape[-1] if expected.ndim == 3 else 1
    within(ROUNDED.get(mode, 0), decoding.decoded(image, channels, 255), expected)


def smooth(*channels: int) -> np.ndarray:
    """What JPEG keeps within a level or two."""
    ramp = np.linspace(40, 200, 32).astype(np.uint8)
    return np.broadcast_to(ramp[:, None] if not channels else ramp[:, None, None], (32, 32, *channels)).copy()


@pytest.mark.parametrize("mode, channels", [("L", ()), ("RGB", (3,)), ("CMYK", (4,))])
def test_jpeg(mode, channels):
    """Also of inks, which Adobe stores inverted."""
    values = smooth(*channels)
    content = saved(Image.frombytes(mode, (32, 32), values.tobytes()), "JPEG", quality=100)
    within(3, decode(content), rgb_of_cmyk(values) if mode == "CMYK" else values)


@pytest.mark.skipif(not features.check("avif"), reason="a Pillow without AVIF")
def test_avif():
    within(4, decode(saved(smooth(3), "AVIF", quality=100)), smooth(3))


def test_grey_and_colour_of_each_other():
    rgb = EncodedImage("x", saved(random(3), "PNG")).decode(1)
    within(1, rgb, np.rint(random(3) @ [0.299, 0.587, 0.114]))
    within(0, EncodedImage("x", saved(random(), "PNG")).decode(3), random()[..., None].repeat(3, axis=-1))


def test_grey_palettes_are_grey():
    image = Image.frombytes("P", (WIDTH, HEIGHT), (random() % 16).tobytes())
    image.putpalette(np.arange(16, dtype=np.uint8).repeat(3).tobytes())
    within(0, decode(saved(image, "PNG")), random() % 16)


# Depths


def test_16_bits_become_the_nearest_of_8():
    """What convert("L") clips to two levels."""
    for format, options in [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})]:
        content = saved(LEVELS_16, format, **options)
        within(0, decode(content), np.tile(np.arange(256), (8, 1)))
        assert notes(content) == (decoding.DEEP,)
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    within(0, decode(saved(values, "PNG")), np.rint(values / 257))


@pytest.mark.parametrize("mode, dtype", [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I;16N", "=u2")])
def test_byte_orders(mode, dtype):
    values = LEVELS_16.astype(dtype)
    image = Image.frombytes(mode, values.shape[::-1], values.tobytes())
    within(0, decoding.decoded(image, 1, 255), np.tile(np.arange(256), (8, 1)))
    if mode in ("I;16", "I;16B"):
        within(0, decode(saved(image, "TIFF")), np.tile(np.arange(256), (8, 1)))


def test_16_bits_where_0_is_white():
    content = tiff(LEVELS_16.astype("<u2").tobytes(), (256, 8), bits=16, samples=1, photometric=0)
    within(0, decode(content), np.tile(np.arange(256)[::-1], (8, 1)))
    content = tiff(random().tobytes(), (WIDTH, HEIGHT), bits=8, samples=1, photometric=0)
    within(0, decode(content), 255 - random().astype(int))


def test_12_bits():
    values = np.arange(4096).reshape(64, 64)
    first, second = values[:, ::2], values[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8)
    content = tiff(packed.tobytes(), (64, 64), bits=12, samples=1, photometric=1)
    within(0, decode(content), np.rint(values * 255 / 4095))
    assert notes(content) == (decoding.DEEP,)


@pytest.mark.parametrize("largest", [255, 1000, 4095, 65535])
def test_portable_greymaps(largest):
    values = np.linspace(0, largest, 120).astype(int).reshape(HEIGHT, WIDTH)
    header = f" {WIDTH} {HEIGHT} {largest}\n"
    binary = values.astype(">u2" if largest > 255 else "u1").tobytes()
    plain = " ".join(map(str, values.ravel())).encode() + b"\n"
    for content in (b"P5" + header.encode() + binary, b"P2" + header.encode() + plain):
        within(1 if largest in (1000, 4095) else 0, decode(content), np.rint(values * 255 / largest))
        assert notes(content) == ((decoding.DEEP,) if largest > 255 else ())


def test_portable_pixmaps_of_16_bits():
    values = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    content = f"P6 {WIDTH} {HEIGHT} 65535\n".encode() + values.astype(">u2").tobytes()
    within(1, decode(content), np.rint(values / 257))
    assert notes(content) == (decoding.DEEP,)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits(depth):
    values = random()[:, :8] % 2**depth
    bits = (values[..., None] >> np.arange(depth)[::-1] & 1).reshape(HEIGHT, -1)
    rows = [np.packbits(row).tobytes() for row in bits]
    within(0, decode(png(rows, 8, depth, GREY)), values.astype(int) * (255 // (2**depth - 1)))
    key = chunk(b"tRNS", b"\0\0")
    expected = np.where(values == 0, 200, values.astype(int) * (255 // (2**depth - 1)))
    within(0, decode(png(rows, 8, depth, GREY, before=key), background=200), expected)
    key = chunk(b"tRNS", bytes([0, 2**depth - 1]))
    expected = np.where(values == 2**depth - 1, 0, values.astype(int) * (255 // (2**depth - 1)))
    within(0, decode(png(rows, 8, depth, GREY, before=key), background=0), expected)


@pytest.mark.parametrize("color, channels", [(RGB, 3), (GREY_ALPHA, 2), (RGB_ALPHA, 4)])
def test_colours_of_16_bits(color, channels):
    """Pillow takes the high byte: a level less at most."""
    values = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, channels), dtype=np.uint16)
    expected = values[..., 0] / 257 if channels == 2 else values[..., :3] / 257
    if channels in (2, 4):
        expected = on(255, expected, values[..., -1] / 257)
    content = png([row.tobytes() for row in values.astype(">u2")], WIDTH, 16, color)
    within(2 if channels in (2, 4) else 1, decode(content), expected)
    assert decoding.DEEP in notes(content)
    if color != GREY_ALPHA:
        extra = 2 if channels == 4 else None
        content = tiff(values.astype("<u2").tobytes(), (WIDTH, HEIGHT), 16, channels, photometric=2, extra=extra)
        within(2 if channels == 4 else 1, decode(content), expected)
        assert decoding.DEEP in notes(content)


# Transparency


@pytest.mark.parametrize("background", [0, 100, 255])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "TGA", "JPEG2000"])
def test_transparency_is_composited(format, background):
    values = random(4)
    values[:4, :, 3], values[4:8, :, 3] = 0, 255
    found = decode(saved(values, format, **LOSSLESS.get(format, {})), background)
    within(0, found, on(background, values[..., :3], values[..., 3]))
    assert (found[:4] == background).all()  # whatever colours are hidden there


def test_grey_with_transparency_stays_grey():
    values = random(2)
    for format in ("PNG", "TIFF"):
        content = saved(Image.frombytes("LA", (WIDTH, HEIGHT), values.tobytes()), format)
        within(0, decode(content, 90), on(90, values[..., 0], values[..., 1]))
        assert notes(content) == (decoding.TRANSPARENT,)


def test_cutout_in_grey():
    """Composited before it becomes grey."""
    expected = np.rint(on(255, random(4)[..., :3], random(4)[..., 3]) @ [0.299, 0.587, 0.114])
    within(1, EncodedImage("x", saved(random(4), "PNG")).decode(1), expected)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palettes_with_a_transparent_colour(format):
    image, expected = picture("P")
    content = saved(image, format, transparency=3)
    within(0, decode(content, 7), np.where((random() % 16 == 3)[..., None], 7, expected))
    assert notes(content) == (decoding.TRANSPARENT,)


def test_palettes_with_opacities():
    image, expected = picture("P")
    opacities = np.arange(0, 256, 17, dtype=np.uint8)
    content = saved(image, "PNG", transparency=opacities.tobytes())
    within(0, decode(content, 30), on(30, expected, opacities[random() % 16]))


@pytest.mark.parametrize("dtype, background", [("u1", 9), (">u2", 255)])
def test_transparent_levels_and_colours(dtype, background):
    values = (random() % 4).astype(dtype) * (257 if dtype == ">u2" else 1)
    depth, key = 8 * values.itemsize, int(values[0, 0])
    rows = [row.tobytes() for row in values]
    content = png(rows, WIDTH, depth, GREY, before=chunk(b"tRNS", key.to_bytes(2, "big")))
    levels = np.rint(values / (257 if depth == 16 else 1))
    within(0, decode(content, background), np.where(values == key, background, levels))
    rows = [row.tobytes() for row in values[..., None].repeat(3, axis=-1)]
    content = png(rows, WIDTH, depth, RGB, before=chunk(b"tRNS", key.to_bytes(2, "big") * 3))
    found = decode(content, background)
    within(0, found, np.where(values == key, background, levels)[..., None].repeat(3, axis=-1))
    assert decoding.TRANSPARENT in notes(content)


def test_transparent_bit():
    image, expected = picture("1")
    within(0, decode(saved(image, "PNG", transparency=255), 60), np.where(expected == 255, 60, 0))


@pytest.mark.parametrize("samples", [2, 4])
def test_premultiplied(samples):
    values = random(samples)
    values[..., :-1] = values[..., :-1].astype(int) * values[..., -1:] // 255
    content = tiff(values.tobytes(), (WIDTH, HEIGHT), 8, samples, photometric=1 if samples == 2 else 2, extra=1)
    if not decodes(content):
        pytest.skip("this Pillow cannot")
    within(1, decode(content, 100), np.rint(values[..., :-1] + 100 * (255.0 - values[..., -1:]) / 255))


def test_what_is_no_alpha_is_ignored():
    content = tiff(random(4).tobytes(), (WIDTH, HEIGHT), 8, 4, photometric=2, extra=0)
    within(0, decode(content), random(4)[..., :3])
    assert notes(content) == ()
