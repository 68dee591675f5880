"""IDX files, the format of MNIST and its kin: one array, big-endian, behind a header of its type and shape."""

import gzip
import math
import re
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vqops.vqvae2.errors import InputError

DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
GZIP_MAGIC = b"\x1f\x8b"
CHUNK = 2**20  # bytes read at once: a header may claim any size


def is_idx(path: Path) -> bool:
    """Whether the file, gunzipped if need be, starts as an IDX file does."""
    try:
        with opened(path) as file:
            return type_of(file.read(4)) is not None
    except (OSError, EOFError, zlib.error):
        return False


def read_idx(path: Path) -> np.ndarray:
    """The array, memory-mapped if it is uint8 and not compressed. Raises InputError if the file is broken."""
    try:
        with opened(path) as file:
            dtype, shape, start = header_of(file, path)
            expected = math.prod(shape) * dtype.itemsize
            if isinstance(file, gzip.GzipFile):
                content = at_most(file, expected + 1)
                check_size(path, start, expected, len(content))
            else:
                check_size(path, start, expected, path.stat().st_size - start)
                if dtype == np.uint8 and expected:
                    return np.memmap(path, np.uint8, "r", start, shape)
                content = bytearray(file.read())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a readable IDX file ({error})") from error
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def labels_beside(path: Path) -> Path | None:
    """The labels in the folder of these images: train-labels-idx1-ubyte beside train-images-idx3-ubyte, .gz or not."""
    name, known = re.subn(r"images([-.])idx3", r"labels\1idx1", path.name)
    other = name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"
    return next((path.with_name(name) for name in (name, other) if known and path.with_name(name).is_file()), None)


def opened(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        compressed = file.read(2) == GZIP_MAGIC
    return gzip.open(path) if compressed else open(path, "rb")


def type_of(magic: bytes) -> np.dtype | None:
    """The dtype, as stored, that the first four bytes of a file announce; None if they announce no array."""
    known = len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in DTYPES and magic[3] > 0
    return np.dtype(DTYPES[magic[2]]) if known else None


def header_of(file: BinaryIO, path: Path) -> tuple[np.dtype, tuple[int, ...], int]:  # dtype, shape, bytes of the header
    magic = file.read(4)
    dtype = type_of(magic)
    if dtype is None:
        raise InputError(f"{path}: not an IDX file (it starts with {magic.hex(' ') or 'nothing'}, not 00 00 08 01)")
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise InputError(f"{path} is cut off: expected {magic[3]} sizes of 4 bytes, got {len(sizes)} bytes")
    return dtype, tuple(np.frombuffer(sizes, ">u4").tolist()), 4 + len(sizes)


def at_most(file: BinaryIO, limit: int) -> bytearray:
    content = bytearray()
    while chunk := file.read(min(limit - len(content), CHUNK)):
        content += chunk
    return content


def check_size(path: Path, header: int, expected: int, found: int) -> None:
    if found < expected:
        raise InputError(f"{path} is cut off: expected {header + expected} bytes, got {header + found}")
    if found > expected:
        raise InputError(f"{path} is too long: expected {header + expected} bytes, got more")
