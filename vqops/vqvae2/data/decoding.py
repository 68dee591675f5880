"""From a picture that Pillow opened to its pixels: uint8 levels of grey or sRGB, upright, on a background.

Pillow's own `convert` clips 16 bits, shows the colours hidden under transparency, and ignores profiles.
"""

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vqops.vqvae2.data.color_profiles import Conversion, lab_to_srgb, to_srgb

ORIENTATION, PHOTOMETRIC, WIDTH, HEIGHT = 0x0112, 262, 256, 257  # tags of EXIF and TIFF
WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # 16 bits; I only where its range is known
GREY_MODES = ("1", "L", "LA", "La", *WIDE_MODES)
COLOR_MODES = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
BITS = re.compile(r"(?:[IL];|LA;|CMYK;|RGB[AaX]?;(?=16[LBN]))(2|4|12|16)[A-Z]*")  # as Pillow names layouts of samples

# What becomes of a file beyond a copy of its pixels; a count goes before
TRANSPARENT = "with transparency, composited on {background}"
DEEP = "of more than 8 bits, scaled to 8"
ANIMATED = "animated or of several pages, the first taken"
TURNED = "turned by the EXIF orientation"
CONVERTED = "with a colour profile, converted to sRGB"
UNCONVERTED = "with a colour profile that cannot be used, taken as sRGB"
NOTES = (TRANSPARENT, DEEP, ANIMATED, TURNED, CONVERTED, UNCONVERTED)


@dataclass(frozen=True)
class Samples:
    """How the file stores its samples. Pillow forgets this on decoding."""

    largest: int  # the value of full intensity
    inverted: bool  # grey, with 0 white, where Pillow doesn't turn it

    @classmethod
    def of(cls, image: Image.Image) -> "Samples":
        """Of a picture that is not decoded yet, or of no file."""
        codec, args, layout = storage_of(image)
        bits = BITS.fullmatch(layout)
        largest = 2 ** int(bits[1]) - 1 if bits else 255
        if image.mode == "I" or (image.mode in WIDE_MODES and not bits):
            largest = 65535
        if codec.startswith("ppm") and isinstance(args, tuple):  # Pillow scales these itself
            largest = 65535 if args[1] > 255 else 255
        return cls(largest, image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0)


def storage_of(image: Image.Image) -> tuple[str, object, str]:
    """Pillow's codec, its arguments, and among them the layout of the samples ("" where they don't say)."""
    codec, _, _, args = (getattr(image, "tile", None) or [("", None, 0, ())])[0]
    layout = args[0] if isinstance(args, tuple) and args else args
    return codec, args, layout if isinstance(layout, str) else ""


def refusal(image: Image.Image) -> str | None:
    """Why the picture cannot be used, if so."""
    if image.mode == "F":
        return "floating-point pixels (mode F) have no known range: save it with 8 or 16 bits"
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # those have 16 bits, in I or I;16 by Pillow's version
        return "32-bit integers (mode I) have no known range: save it with 8 or 16 bits"
    if image.mode in ("P", "PA") and image.palette is None:
        return "its palette is missing"
    if image.mode not in GREY_MODES + COLOR_MODES:
        return f"pixels of mode {image.mode} are not supported: save it as grey or RGB"
    return None


def channels_of(image: Image.Image) -> int:
    """Of a picture that is not decoded yet."""
    layout = storage_of(image)[-1]
    grey = image.mode in GREY_MODES or layout.startswith("LA;") or (image.mode == "P" and has_grey_palette(image))
    return 1 if grey else 3  # grey with opacity, of 16 bits, comes from a PNG as RGBA


def has_grey_palette(image: Image.Image) -> bool:
    """As the palettes of grey GIFs are."""
    colors = Image.new("P", (256, 1))
    layout, entries = image.palette.getdata()
    colors.putpalette(entries, layout)
    colors.putdata(range(256))
    red, green, blue = np.asarray(colors.convert("RGB")).astype(int).T
    return bool((red == green).all() and (green == blue).all())


def upright_size(image: Image.Image) -> tuple[int, int]:  # height, width
    if image.format == "TIFF":  # some versions of Pillow turn these themselves
        width, height = image.tag_v2[WIDTH], image.tag_v2[HEIGHT]
    else:
        width, height = image.size
    return (width, height) if orientation(image) >= 5 else (height, width)


def orientation(image: Image.Image) -> int:
    """1 (upright) to 8, as in EXIF; 1 where there is none, or one that cannot be read."""
    try:
        found = Image.Image.getexif(image).get(ORIENTATION, 1)  # that of a PNG would decode it
    except Exception:  # EXIF is anything
        return 1
    return int(found) if found in range(1, 9) else 1


def notes_of(image: Image.Image, samples: Samples) -> tuple[str, ...]:
    """Those of NOTES that hold, in their order."""
    conversion = conversion_of(image)
    holds = {
        TRANSPARENT: image.has_transparency_data,
        DEEP: samples.largest > 255,
        ANIMATED: has_several_pictures(image),
        TURNED: orientation(image) != 1,
        CONVERTED: conversion is not None and conversion.transform is not None,
        UNCONVERTED: conversion is not None and not conversion.usable,
    }
    return tuple(note for note in NOTES if holds[note])


def has_several_pictures(image: Image.Image) -> bool:
    """Without counting them."""
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # the second is broken
        return True


def conversion_of(image: Image.Image) -> Conversion | None:
    """None without a profile."""
    profile = image.info.get("icc_profile")
    mode = "L" if image.mode in GREY_MODES else image.mode if image.mode in ("CMYK", "LAB") else "RGB"
    return to_srgb(profile, mode) if profile else None


def decoded(image: Image.Image, channels: int, background: int) -> np.ndarray:  # uint8 [H, W, channels]
    """The pixels of a picture that is not decoded yet."""
    samples, conversion = Samples.of(image), conversion_of(image)
    image.load()
    colors, alpha = separated(image, samples)
    pixels = np.asarray(as_srgb(colors, conversion))
    if alpha is not None:
        pixels = composited(pixels, alpha, background)
    if channels == 1 and pixels.ndim == 3:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    pixels = turned(pixels if pixels.ndim == 3 else pixels[..., None], orientation(image))
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], channels)), order="C")


def separated(image: Image.Image, samples: Samples) -> tuple[Image.Image, np.ndarray | None]:
    """A picture of mode L, RGB, CMYK or LAB, and its opacity (uint8 [H, W]), if it has one."""
    key = image.info.get("transparency")  # of P: that of its palette; else the level or colour that is transparent
    if image.mode in WIDE_MODES:
        values = np.asarray(image)
        return Image.fromarray(scaled(values, samples)), None if key is None else opacity(values != key)
    if image.mode in ("La", "PA", "RGBa") or (image.mode == "P" and image.has_transparency_data):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("LA", "RGBA"):
        return image.convert(image.mode.removesuffix("A")), np.asarray(image.getchannel("A"))
    if image.mode == "1":
        image, key = image.convert("L"), 255 if key else key  # 1 or 255, by Pillow's version
    if image.mode in ("P", "RGBX", "YCbCr", "HSV"):
        image = image.convert("RGB")
    if image.mode == "L" and isinstance(key, int):
        return image, opacity(np.asarray(image) != key * 255 // samples.largest)
    if image.mode == "RGB" and isinstance(key, tuple):
        key = [level >> 8 if samples.largest > 255 else level for level in key]  # Pillow keeps the high bytes
        return image, opacity((np.asarray(image) != key).any(axis=-1))
    return image, None


def opacity(opaque: np.ndarray) -> np.ndarray:  # bool to uint8
    return np.where(opaque, np.uint8(255), np.uint8(0))


def scaled(values: np.ndarray, samples: Samples) -> np.ndarray:  # [H, W] to uint8
    """Rounded to the nearest level."""
    levels = (np.arange(samples.largest + 1) * 255 + samples.largest // 2) // samples.largest
    return (255 - levels if samples.inverted else levels).astype(np.uint8)[values]


def as_srgb(colors: Image.Image, conversion: Conversion | None) -> Image.Image:  # of mode L or RGB
    transform = conversion.transform if conversion else None
    if transform is None and colors.mode == "LAB":
        transform = lab_to_srgb()
    if transform is not None:
        return transform.apply(colors)
    return colors.convert("RGB") if colors.mode == "CMYK" else colors


def composited(pixels: np.ndarray, alpha: np.ndarray, background: int) -> np.ndarray:
    """round((pixels alpha + background (255 - alpha)) / 255), in uint16, which holds it."""
    alpha = alpha.astype(np.uint16).reshape(*alpha.shape, *[1] * (pixels.ndim - 2))
    return ((pixels * alpha + background * (255 - alpha) + 127) // 255).astype(np.uint8)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:  # [H, W, C]
    """Upright: 1 to 4 are the flips of rows and columns, 5 to 8 the same after the diagonal."""
    pixels = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    flip = (orientation - 1) % 4
    return pixels[:: -1 if flip >= 2 else 1, :: -1 if flip in (1, 2) else 1]
