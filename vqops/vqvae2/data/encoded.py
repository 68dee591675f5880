"""One encoded image, wherever its bytes are: what it says of itself, and its pixels."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from vqops.vqvae2.data.completeness import is_whole
from vqops.vqvae2.data.decoding import Samples, channels_of, decoded, notes_of, refusal, upright_size
from vqops.vqvae2.errors import InputError


@dataclass(frozen=True)
class Part:
    """A stretch of a file, such as a member of a .tar."""

    path: Path
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself, without its pixels."""

    height: int  # upright
    width: int
    channels: int  # 1 grey, 3 colour
    mode: str  # as Pillow names it
    notes: tuple[str, ...]  # what becomes of it beyond a copy of its pixels, of decoding.NOTES


@dataclass(frozen=True)
class EncodedImage:
    """An image file, a part of one, or its bytes. Every method raises InputError, by name, if it cannot be used."""

    name: str
    content: Path | Part | bytes

    @classmethod
    def of_file(cls, path: Path) -> "EncodedImage":
        return cls(str(path), path)

    def header(self) -> Header:
        """Without decoding the pixels, unless nothing else tells that they are all there."""
        with self.opened() as (file, image):
            channels, samples = channels_of(image), Samples.of(image)
            whole = is_whole(file, image)
            if not whole and image.format == "PNG":  # its EXIF may follow the pixels; TIFF's is gone after decoding
                image.load()
            header = Header(*upright_size(image), channels, image.mode, notes_of(image, samples))
            if not whole:
                image.load()
            return header

    def decode(self, channels: int, background: int = 255) -> np.ndarray:  # uint8 [H, W, channels]
        """The first picture, upright, in grey or sRGB; transparency is composited on the grey level `background`."""
        with self.opened() as (_, image):
            return decoded(image, channels, background)

    @contextmanager
    def opened(self) -> Iterator[tuple[BinaryIO, Image.Image]]:
        """The file, and the picture that Pillow found in it, of a kind that can be decoded."""
        try:
            with self.stream() as file:
                if file.seek(0, os.SEEK_END) == 0:
                    raise OSError("empty")
                with Image.open(file) as image:
                    if reason := refusal(image):
                        raise InputError(reason)
                    yield file, image
        except MemoryError:
            raise
        except FileNotFoundError as error:
            raise InputError(f"{on_one_line(self.name)}: no such image file") from error
        except InputError as error:
            raise InputError(f"{on_one_line(self.name)}: {error}") from error
        except Exception as error:  # Pillow's formats raise what they like on corrupt data
            raise InputError(f"{on_one_line(self.name)}: not a readable image ({reason_of(error)})") from error

    def stream(self) -> BinaryIO:
        if isinstance(self.content, bytes):
            return io.BytesIO(self.content)
        part = self.content if isinstance(self.content, Part) else None
        path = part.path if part else self.content
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
            raise OSError("a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        if part and part.offset + part.size > status.st_size:
            raise OSError("the file that it is in ends before it does")
        return io.BufferedReader(PartOfFile(part)) if part else open(path, "rb")


class PartOfFile(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, part: Part):
        self.part, self.position = part, 0
        self.file = io.FileIO(part.path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.part.size}[whence]
        return self.position

    def readinto(self, buffer) -> int:
        self.file.seek(self.part.offset + self.position)
        left = max(0, self.part.size - self.position)
        count = self.file.readinto(memoryview(buffer)[:left])
        self.position += count
        return count

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def reason_of(error: Exception) -> str:
    """In one line, without the place in memory or on the disk that Pillow may name."""
    if isinstance(error, UnidentifiedImageError):
        return "of no format that Pillow knows"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def on_one_line(name: str) -> str:
    """As any terminal can write it."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
