"""Whether an image file is whole, told by its structure: what a decoder would find out, at the cost of a few reads."""

import os
from collections.abc import Callable
from typing import BinaryIO

from PIL import Image

STRIPS, TILES = (273, 279), (324, 325)  # TIFF's tags for the offsets and the sizes of its data
LATE_EXIF = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # texts of a PNG that can hold an orientation


def is_whole(file: BinaryIO, image: Image.Image) -> bool:
    """Whether the first picture is surely all there; where False, only decoding can tell.

    `image` is what Pillow opened from `file`, which is left where it was.
    """
    check = CHECKS.get(image.format)
    position = file.tell()
    try:
        return check is not None and check(file, image, file.seek(0, os.SEEK_END))
    finally:
        file.seek(position)


def ends_with_marker(file: BinaryIO, image: Image.Image, size: int) -> bool:
    """JPEG and JPEG 2000. The marker cannot occur within the compressed data; zeros after it are padding."""
    file.seek(max(0, size - 4096))
    return file.read().rstrip(b"\0").endswith(b"\xff\xd9")


def has_all_chunks(file: BinaryIO, image: Image.Image, size: int) -> bool:
    """PNG, up to IEND. Not sure where metadata comes after the pixels: Pillow reads them on decoding only."""
    position = 8
    while position + 12 <= size:
        file.seek(position)
        length, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        late = position > image.tile[0][2] if image.tile else False
        if late and (kind == b"eXIf" or (kind in (b"zTXt", b"iTXt", b"tEXt") and file.read(21).startswith(LATE_EXIF))):
            return False
        position += 12 + length
        if kind == b"IEND":
            return True
    return False


def has_all_blocks(file: BinaryIO, image: Image.Image, size: int) -> bool:
    """GIF: the blocks of the first picture, up to the empty one."""
    position = image.tile[0][2]
    while position < size:
        file.seek(position)
        length = file.read(1)[0]
        if length == 0:
            return True
        position += 1 + length
    return False


def told_on_opening(file: BinaryIO, image: Image.Image, size: int) -> bool:
    """WebP: Pillow opens none that is cut."""
    return True


def has_stated_size(file: BinaryIO, image: Image.Image, size: int) -> bool:
    """BMP; some writers state 0."""
    file.seek(2)
    return int.from_bytes(file.read(4), "little") == size


def has_all_strips(file: BinaryIO, image: Image.Image, size: int) -> bool:
    """TIFF: every strip or tile lies within the file."""
    for offsets, counts in (STRIPS, TILES):
        starts, sizes = image.tag_v2.get(offsets), image.tag_v2.get(counts)
        if starts and sizes and len(starts) == len(sizes):
            return all(start + count <= size for start, count in zip(starts, sizes, strict=True))
    return False


def has_all_boxes(file: BinaryIO, image: Image.Image, size: int) -> bool:
    """AVIF. A box of size 0 reaches to the end, wherever that is, and one of size 1 states it elsewhere."""
    position = 0
    while position < size:
        file.seek(position)
        length = int.from_bytes(file.read(4), "big")
        if length < 8:
            return False
        position += length
    return position == size


CHECKS: dict[str, Callable[[BinaryIO, Image.Image, int], bool]] = {
    "AVIF": has_all_boxes,
    "BMP": has_stated_size,
    "GIF": has_all_blocks,
    "JPEG": ends_with_marker,
    "JPEG2000": ends_with_marker,
    "MPO": ends_with_marker,
    "PNG": has_all_chunks,
    "TIFF": has_all_strips,
    "WEBP": told_on_opening,
}
