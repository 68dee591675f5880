"""Names of many files in two arrays, and the images behind them.

Millions of Python objects would take gigabytes, and as much again in each process that loads images: counting
references writes to the pages that they share.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vqops.vqvae2.data.encoded import EncodedImage


class Names(Sequence):
    """Strings, of file names that need not be UTF-8 either."""

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self.text = np.frombuffer(b"".join(encoded), np.uint8)
        self.ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return os.fsdecode(self.text[self.ends[index] : self.ends[index + 1]].tobytes())


class Files(Sequence):
    """The images of these names in a folder."""

    def __init__(self, folder: Path, names: Names):
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> EncodedImage:
        return EncodedImage.of_file(self.folder / self.names[index])
