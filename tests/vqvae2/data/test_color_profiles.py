"""Pixels of any colour profile become sRGB, those of sRGB stay as they are: expected by the profiles' own equations."""

import numpy as np
import pytest
from icc_profiles import (
    DISPLAY_P3,
    LINEAR_CURVE,
    SRGB,
    SRGB_CURVE,
    gamma_curve,
    grey_profile,
    ink_profile,
    rgb_profile,
    table_curve,
)
from image_files import saved
from PIL import Image, ImageCms, features
from promises import COPIES

from vqops.vqvae2.data import color_profiles
from vqops.vqvae2.data.decoding import CONVERTED, TRANSPARENT, UNCONVERTED
from vqops.vqvae2.data.encoded import EncodedImage

pytestmark = pytest.mark.skipif(not features.check("littlecms2"), reason="a Pillow without littlecms")

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 4), dtype=np.uint8)


def linear(levels: np.ndarray) -> np.ndarray:  # of sRGB
    levels = levels / 255
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def encoded(light: np.ndarray) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def srgb_of(light: np.ndarray, colorants: dict) -> np.ndarray:
    """Of linear red, green and blue of other colorants."""
    to_xyz, from_xyz = np.array(list(colorants.values())).T, np.linalg.inv(np.array(list(SRGB.values())).T)
    return encoded(light @ (from_xyz @ to_xyz).T)


def decoded(pixels: np.ndarray, profile: bytes, mode: str, format: str = "TIFF", channels: int = 3) -> np.ndarray:
    image = Image.frombytes(mode, (10, 12), np.ascontiguousarray(pixels).tobytes())
    return EncodedImage("x", saved(image, format, icc_profile=profile)).decode(channels)


def notes(pixels: np.ndarray, profile: bytes, format: str = "PNG") -> tuple[str, ...]:
    return EncodedImage("x", saved(pixels, format, icc_profile=profile)).header().notes


def within(levels: float, found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= levels


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_wide_gamuts(format):
    pixels = PIXELS[..., :3]
    options = {"lossless": True} if format == "WEBP" else {}
    content = saved(pixels, format, icc_profile=rgb_profile(DISPLAY_P3, SRGB_CURVE), **options)
    image = EncodedImage("x", content)
    within(2, image.decode(3), srgb_of(linear(pixels), DISPLAY_P3))
    assert image.header().notes == (CONVERTED,)


def test_gammas():
    pixels = PIXELS[..., :3]
    within(2, decoded(pixels, rgb_profile(SRGB, gamma_curve(1.8)), "RGB"), encoded((pixels / 255) ** 1.8))
    within(2, decoded(pixels, rgb_profile(SRGB, LINEAR_CURVE, name="sRGB linear"), "RGB"), encoded(pixels / 255))


def test_swapped_colorants():
    swapped = {"r": SRGB["g"], "g": SRGB["r"], "b": SRGB["b"]}
    within(2, decoded(PIXELS[..., :3], rgb_profile(swapped, SRGB_CURVE), "RGB"), PIXELS[..., [1, 0, 2]])


@pytest.mark.parametrize("channels", [1, 3])
def test_grey(channels):
    expected = encoded((PIXELS[..., :1] / 255) ** 1.8).repeat(channels, axis=-1)
    within(2, decoded(PIXELS[..., 0], grey_profile(gamma_curve(1.8)), "L", channels=channels), expected)
    assert notes(PIXELS[..., 0], grey_profile(gamma_curve(1.8))) == (CONVERTED,)


def test_wide_grey():
    values = PIXELS[..., 0].astype(np.uint16) * 257
    content = saved(values, "PNG", icc_profile=grey_profile(gamma_curve(1.8)))
    within(2, EncodedImage("x", content).decode(1), encoded((PIXELS[..., :1] / 255) ** 1.8))


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_inks(format):
    """Cyan and black: the lightness of the profile, to sRGB by the definitions of L* and sRGB."""
    black, cyan = np.meshgrid([0, 80, 160], [0, 100, 200])
    inks = np.stack([cyan, 0 * cyan, 0 * cyan, black], axis=-1).astype(np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    image = Image.frombytes("CMYK", inks.shape[1::-1], inks.tobytes())
    options = {"quality": 100} if format == "JPEG" else {}
    found = EncodedImage("x", saved(image, format, icc_profile=ink_profile(), **options)).decode(3)
    shares = inks / 255.0
    lightness = 100 * (1 - shares[..., 3:]) * (1 - shares[..., :1] / 2)
    light = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    within(4 if format == "JPEG" else 2, found, encoded(light).repeat(3, axis=-1))


def test_transparency_is_composited_after_conversion():
    content = saved(PIXELS, "PNG", icc_profile=rgb_profile(DISPLAY_P3, SRGB_CURVE))
    image = EncodedImage("x", content)
    share = PIXELS[..., 3:] / 255
    within(2, image.decode(3, 40), srgb_of(linear(PIXELS[..., :3]), DISPLAY_P3) * share + 40 * (1 - share))
    assert image.header().notes == (TRANSPARENT, CONVERTED)


def test_palettes():
    palette = PIXELS[:2, :8, :3].reshape(16, 3)
    image = Image.frombytes("P", (10, 12), (PIXELS[..., 0] % 16).tobytes())
    image.putpalette(palette.tobytes())
    content = saved(image, "PNG", icc_profile=rgb_profile(DISPLAY_P3, SRGB_CURVE))
    within(2, EncodedImage("x", content).decode(3), srgb_of(linear(palette), DISPLAY_P3)[PIXELS[..., 0] % 16])


SRGB_PROFILES = {
    "of littlecms": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "by equation": rgb_profile(SRGB, SRGB_CURVE, name="c2"),
    "by 1024 levels": rgb_profile(SRGB, table_curve(linear(np.linspace(0, 255, 1024)))),
    "by 26 levels": rgb_profile(SRGB, table_curve(linear(np.linspace(0, 255, 26)))),
}


@pytest.mark.parametrize("name", SRGB_PROFILES)
def test_srgb_of_any_name_stays_as_it_is(name):
    for pixels in (PIXELS[..., :3], PIXELS[..., 0]):  # grey files carry it, too
        image = EncodedImage("x", saved(pixels, "PNG", icc_profile=SRGB_PROFILES[name]))
        COPIES.same(image.decode(1 if pixels.ndim == 2 else 3).squeeze(), pixels)
        assert image.header().notes == ()


def test_grey_with_the_curve_of_srgb_stays_as_it_is():
    COPIES.same(decoded(PIXELS[..., 0], grey_profile(SRGB_CURVE), "L", channels=1)[..., 0], PIXELS[..., 0])
    assert notes(PIXELS[..., 0], grey_profile(SRGB_CURVE)) == ()


@pytest.mark.parametrize(
    "profile",
    [b"broken", rgb_profile(DISPLAY_P3, SRGB_CURVE)[:300], grey_profile(SRGB_CURVE), ink_profile()],
    ids=["broken", "cut", "grey", "inks"],
)
def test_profiles_that_cannot_be_used(profile):
    image = EncodedImage("x", saved(PIXELS[..., :3], "PNG", icc_profile=profile))
    COPIES.same(image.decode(3), PIXELS[..., :3])
    assert image.header().notes == (UNCONVERTED,)


def test_colour_profiles_of_grey_pixels_cannot_be_used():
    image = EncodedImage("x", saved(PIXELS[..., 0], "PNG", icc_profile=rgb_profile(DISPLAY_P3, gamma_curve(1.8))))
    COPIES.same(image.decode(1)[..., 0], PIXELS[..., 0])
    assert image.header().notes == (UNCONVERTED,)


def test_a_pillow_without_a_colour_engine(monkeypatch):
    def missing(*_):
        raise ImportError("The _imagingcms C module is not installed")

    color_profiles.to_srgb.cache_clear()
    monkeypatch.setattr(ImageCms, "ImageCmsProfile", missing)
    try:
        assert notes(PIXELS[..., :3], rgb_profile(DISPLAY_P3, SRGB_CURVE)) == (UNCONVERTED,)
    finally:
        color_profiles.to_srgb.cache_clear()
