"""From a file's colour profile to sRGB, the colours that images are taken to have."""

from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

BLACK_POINT_COMPENSATION = 0x2000  # the blacks of paper become black; Pillow names the flag from 10.3 on
SAME = 2  # levels; what profiles of sRGB differ by, as each approximates its curve


@dataclass(frozen=True)
class Conversion:
    """How pixels become sRGB: by `transform`, or by nothing as they are sRGB, or are taken as it."""

    transform: ImageCms.ImageCmsTransform | None = None
    usable: bool = True


SRGB, UNUSABLE = Conversion(), Conversion(usable=False)


@lru_cache(maxsize=64)  # a folder has few profiles
def to_srgb(profile: bytes, mode: str) -> Conversion:
    """`mode`: L, RGB, CMYK or LAB. Grey pixels may carry a profile of sRGB, which then says nothing more."""
    try:
        transform = built(ImageCms.ImageCmsProfile(BytesIO(profile)), mode)
    except Exception:  # broken, of other colours than the pixels, or a Pillow without littlecms
        return SRGB if mode == "L" and to_srgb(profile, "RGB") == SRGB else UNUSABLE
    return SRGB if changes_nothing(transform, mode) else Conversion(transform)


@lru_cache(maxsize=1)
def lab_to_srgb() -> ImageCms.ImageCmsTransform:
    return built(ImageCms.createProfile("LAB"), "LAB")


def built(profile: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    srgb = ImageCms.createProfile("sRGB")
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    return ImageCms.buildTransform(profile, srgb, mode, "RGB", intent, BLACK_POINT_COMPENSATION)


def changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Measured, not read from the profile's name: any text may stand there."""
    levels = np.arange(256, dtype=np.uint8)
    if mode == "L":
        before = levels[:, None]
        after = levels[:, None, None].repeat(3, axis=-1)
    elif mode == "RGB":
        before = after = np.stack(np.meshgrid(*[levels[::15]] * 3), axis=-1).reshape(-1, 18, 3)
    else:
        return False
    difference = np.asarray(transform.apply(Image.fromarray(before))).astype(int) - after
    return bool(np.abs(difference).max() <= SAME)
