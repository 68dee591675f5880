"""Images of any kind behind one interface: uint8 arrays [H, W, C] of one channel count, decoded when asked for."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vqops.vqvae2.errors import InputError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
GREY_MODES = ("1", "L", "LA", "I;16", "I", "F")
ORIENTED_FORMATS, ORIENTATION = ("JPEG", "MPO", "TIFF", "WEBP"), 0x0112  # EXIF; 5 to 8 swap width and height
KEPT_DECODED_BYTES = 2**30  # datasets up to here are decoded once and kept


@dataclass(frozen=True)
class EncodedImage:
    """An image file, or the bytes of one. Every method raises InputError, with the name, if it cannot be read."""

    name: str
    content: Path | bytes

    @classmethod
    def of_file(cls, path: Path) -> "EncodedImage":
        return cls(str(path), path)

    @contextmanager
    def opened(self) -> Iterator[Image.Image]:
        if isinstance(self.content, Path) and not self.content.is_file():
            raise InputError(f"{self.name}: no such image file")
        try:
            with Image.open(self.content if isinstance(self.content, Path) else BytesIO(self.content)) as image:
                yield image
        except Exception as error:  # Pillow's formats raise what they like on corrupt data
            raise InputError(f"{self.name}: not a readable image ({type(error).__name__}: {error})") from error

    def header(self) -> tuple[int, int, int]:
        """Height, width and number of channels (1 grey, 3 colour), without decoding the pixels."""
        with self.opened() as image:
            turned = image.format in ORIENTED_FORMATS and image.getexif().get(ORIENTATION, 1) >= 5
            width, height = reversed(image.size) if turned else image.size
            return height, width, 1 if image.mode in GREY_MODES else 3

    def decode(self, channels: int) -> np.ndarray:  # uint8 [H, W, channels]
        """The pixels, turned upright as EXIF says; transparency is dropped."""
        with self.opened() as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB"))
        return pixels.reshape(*pixels.shape[:2], channels)


@dataclass(frozen=True)
class Images(Sequence):
    """A sequence of uint8 images [H, W, channels], of one size or many."""

    items: Sequence  # an array [N, H, W, C], arrays [H, W, C], or EncodedImages
    positions: Sequence[int]  # which items, in which order
    channels: int
    largest: tuple[int, int]  # largest height, largest width

    @classmethod
    def of_array(cls, array: np.ndarray, name: str) -> "Images":  # uint8 [N, H, W, C] or [N, H, W]
        """Raises InputError if the array is anything else; `name` says which in the message."""
        shape = list(array.shape)
        array = array[..., None] if array.ndim == 3 else array
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3):
            allowed = "uint8 images [N, H, W, C] with C = 1 or 3, or [N, H, W]"
            raise InputError(f"{name} must hold {allowed}, got {array.dtype} {shape}")
        if array.size == 0:
            raise InputError(f"{name} holds no image: its shape is {shape}")
        return cls(array, range(len(array)), array.shape[-1], array.shape[1:3])

    @classmethod
    def of_encoded(cls, items: Sequence[EncodedImage], channels: int | None = None) -> "Images":
        """Reads every header, and decodes and keeps all images if they are small enough together.

        Without `channels`: 1 if all images are grey, else 3. Raises InputError for the first that cannot be read.
        """
        with ThreadPoolExecutor() as threads:
            heights, widths, found = zip(*threads.map(EncodedImage.header, items), strict=True)
            largest, channels = (max(heights), max(widths)), channels or max(found)
            if channels * sum(map(int.__mul__, heights, widths)) <= KEPT_DECODED_BYTES:
                items = list(threads.map(lambda item: item.decode(channels), items))
        return cls(items, range(len(items)), channels, largest)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> np.ndarray:  # uint8 [H, W, channels]
        item = self.items[self.positions[index]]
        return item.decode(self.channels) if isinstance(item, EncodedImage) else item

    def take(self, indices: Sequence[int]) -> "Images":
        return replace(self, positions=[self.positions[index] for index in indices])


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, sorted; hidden ones are left out."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))
