"""Image files of kinds that Pillow reads and does not write, byte by byte."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def saved(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decodes(encoded: bytes) -> bool:
    """Whether Pillow can: versions differ."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
    except Exception:
        return False
    return True


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # colour types of PNG


def png(rows: list[bytes], width: int, depth: int, color: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """`before` and `after` are chunks around the pixels."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = chunk(b"IHDR", header), before, chunk(b"IDAT", pixels), after, chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(pixels: bytes, size: tuple[int, int], bits: int, samples: int, photometric: int, extra: int | None = None):
    """Little endian, of one strip; `size` is width and height, `extra` says what the last sample is (2: alpha)."""
    tags = [(256, size[0]), (257, size[1]), (259, 1), (262, photometric), (277, samples), (278, size[1])]
    tags += [(279, len(pixels)), *([(338, extra)] if extra is not None else [])]
    count = len(tags) + 2
    end = 8 + 2 + 12 * count + 4
    depths = struct.pack(f"<{samples}H", *[bits] * samples).ljust(8, b"\0")
    entries = [(tag, struct.pack("<HHII", tag, 4, 1, value)) for tag, value in tags]
    depths_or_place = depths[:4] if samples <= 2 else struct.pack("<I", end)
    entries.append((258, struct.pack("<HHI", 258, 3, samples) + depths_or_place))
    entries.append((273, struct.pack("<HHII", 273, 4, 1, end + 8)))
    directory = struct.pack("<H", count) + b"".join(entry for _, entry in sorted(entries)) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + depths + pixels
