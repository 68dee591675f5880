"""Images of any kind behind one interface: uint8 arrays [H, W, C] of one channel count, decoded when asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from vqops.vqvae2.data.encoded import EncodedImage
from vqops.vqvae2.errors import InputError
from vqops.vqvae2.progress import say

WHITE = 255
NAMED = 20  # images that cannot be read, on screen
# What is wrong with an array of another dtype, and how it is put right.
ADVICE = {
    "i": ": where all are 0 to 255 it is x.astype('uint8')",
    "f": ": floats have no known range; in [0, 1] it is (x * 255).round().astype('uint8')",
    "u": ": 16 bits become 8 by (x / 257).round().astype('uint8')",
    "b": ": booleans become 0 and 255 by x.astype('uint8') * 255",
}


@dataclass(frozen=True)
class Images(Sequence):
    """A sequence of uint8 images [H, W, channels], of one size or many: some of the items of a source."""

    items: Sequence  # of the source, all: an array [N, H, W, C], arrays [H, W, C], or EncodedImages
    rows: np.ndarray  # int64 [N]: which items, in which order
    channels: int
    largest: tuple[int, int]  # largest height, largest width
    background: int = WHITE  # grey level under transparency
    names: Sequence[str] | None = None  # of all items, relative to the source
    source: Any = None  # what else the source knows, such as labels
    report: str = ""  # how many, of which kinds, and what was left out and why
    bad: tuple[str, ...] = ()  # what was left out since it cannot be read, and the reasons
    replaces: bool = False  # whether the next image stands in for one that cannot be read any more

    @classmethod
    def of_array(cls, array: np.ndarray, name: str, source: Any = None) -> "Images":
        """Of uint8 [N, H, W, C] or [N, C, H, W] with C = 1 or 3 (channels last where it is both), or [N, H, W].

        Raises InputError if the array is anything else; `name` says which in the message.
        """
        shape, order = list(array.shape), ""
        if array.ndim == 3:
            array = array[..., None]
        elif array.ndim == 4 and shape[-1] not in (1, 3) and shape[1] in (1, 3):
            array, order = np.moveaxis(array, 1, -1), ", channels first"
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3):
            allowed = "uint8 images [N, H, W, C] or [N, C, H, W] with C = 1 or 3, or [N, H, W]"
            advice = "" if array.dtype == np.uint8 else ADVICE.get(array.dtype.kind, "")
            raise InputError(f"{name} must hold {allowed}, got {array.dtype} {shape}{advice}")
        if array.size == 0:
            raise InputError(f"{name} holds no image: its shape is {shape}")
        count, height, width, channels = array.shape
        kind = "grey" if channels == 1 else "colour"
        report = f"{name}: {count} images ({kind}, uint8 array{order}), {height} x {width} pixels"
        return cls(array, np.arange(count), channels, (height, width), source=source, report=report)

    @property
    def total(self) -> int:
        """Items of the source, those that were left out among them."""
        return len(self.items)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:  # uint8 [H, W, channels]
        """Raises InputError if the image cannot be read any more; if it `replaces` such, only if none can be read."""
        item = self.items[self.rows[index]]
        if not isinstance(item, EncodedImage):
            return item
        try:
            return item.decode(self.channels, self.background)
        except InputError as error:
            if not self.replaces:
                raise
            say_lost(str(error))
            return self.after(index, error)

    def after(self, index: int, error: InputError) -> np.ndarray:
        """The next image, in the order of the source and from its start again, that can be read."""
        for further in range(1, len(self)):
            item = self.items[self.rows[(index + further) % len(self)]]
            try:
                return item.decode(self.channels, self.background) if isinstance(item, EncodedImage) else item
            except InputError as also:
                say_lost(str(also))
        raise error

    def take(self, indices: Sequence[int]) -> "Images":
        return replace(self, rows=self.rows[np.asarray(indices, dtype=np.int64)])

    @property
    def used_names(self) -> list[str] | None:
        return None if self.names is None else [self.names[row] for row in self.rows]

    @property
    def lines(self) -> list[str]:
        """What a command says of its images: one line, and one for each that was left out since it cannot be read."""
        more = [f"and {len(self.bad) - NAMED} more that cannot be read"] if len(self.bad) > NAMED else []
        return [self.report, *(f"left out: {reason}" for reason in self.bad[:NAMED]), *more]


@cache  # once a process and image
def say_lost(message: str) -> None:
    say(f"{message}: the image after it takes its place")
