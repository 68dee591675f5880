"""The images used when no data is given: photographs inside the scikit-image wheel, so nothing is downloaded.

They are read as plain files, since skimage.data may ask pooch to download them. Sources and licences: the docstrings in
skimage.data.
"""

from importlib.metadata import version
from importlib.resources import files

import numpy as np
from PIL import Image

from vqops.vqvae2.data.encoded import EncodedImage
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.errors import Field, InputError

TRAINING = ("astronaut.png", "coffee.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg", "motorcycle_left.png")
HELD_OUT = "chelsea.png"


def training_photographs() -> Images:
    """Each photograph at full, half and quarter size, so that crops show texture as well as whole things."""
    return of_arrays([scaled(name, shrink) for name in TRAINING for shrink in (1, 2, 4)])


def held_out_photographs(size: int) -> Images:
    """Eight overlapping windows of `size` pixels a side, spread over chelsea at quarter and at half size."""
    windows = []
    for shrink, rows, columns in ((4, 1, 2), (2, 2, 3)):
        photograph = scaled(HELD_OUT, shrink)
        height, width = photograph.shape[:2]
        for top in np.linspace(0, max(height - size, 0), rows, dtype=int):
            for left in np.linspace(0, max(width - size, 0), columns, dtype=int):
                windows.append(photograph[top : top + size, left : left + size])
    return of_arrays(windows)


def of_arrays(arrays: list[np.ndarray]) -> Images:
    heights, widths = zip(*(array.shape[:2] for array in arrays), strict=True)
    return Images(arrays, np.arange(len(arrays)), 3, (max(heights), max(widths)))


def scaled(name: str, shrink: int) -> np.ndarray:  # uint8 [H // shrink, W // shrink, 3]
    path = files("skimage") / "data" / name
    if not path.is_file():
        found = f"scikit-image {version('scikit-image')} comes without {name}"
        raise InputError(found, ": give images with ", Field("data"))
    pixels = EncodedImage.of_file(path).decode(channels=3)
    return np.asarray(Image.fromarray(pixels).reduce(shrink))
