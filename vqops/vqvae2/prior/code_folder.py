"""A folder of codes: one memory-mapped array a level, labels, and meta.json, which says what they are and of what.

    bottom.npy, top.npy, ...   [N, h, w] uint16, or int32 where K > 65536
    labels.npy                 [N] int64, if the images have labels
    meta.json                  K, shapes, the model's SHA-256, the transform, the classes, how many images are done
"""

import errno
import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqops.vqvae2.errors import InputError, reason
from vqops.vqvae2.files.descriptions import described, parsed, shortened
from vqops.vqvae2.files.run_folder import atomically, write_text
from vqops.vqvae2.networks.vqvae2 import LEVEL_NAMES
from vqops.vqvae2.options import Count, CountOrZero

META, LABELS, KIND = "meta.json", "labels.npy", "vqops.codes"
COUNTED_AT_ONCE = 2**22  # codes


@dataclass(frozen=True)
class CodesMeta:
    """The contents of meta.json. Levels are listed from bottom to top."""

    images: Count  # N
    done: CountOrZero  # images whose codes are written
    image_shape: tuple[Count, Count, Count]  # C, H, W
    codebook_size: Count  # K
    levels: tuple[str, ...]
    sizes: tuple[tuple[Count, Count], ...]  # h, w of each level
    model: str  # SHA-256 of model.safetensors
    data: str  # as it was named, which may be another place by now
    data_sample: str  # SHA-256 of the pixels of the images that are checked
    transform: str
    classes: tuple[str, ...]  # () without labels
    kind: str = KIND

    @property
    def complete(self) -> bool:
        return self.done == self.images


@dataclass(frozen=True)
class Codes:
    """The codes of N images, on disk."""

    folder: Path
    meta: CodesMeta
    levels: tuple[np.memmap, ...]  # [N, h, w] each, bottom first
    labels: np.ndarray | None  # [N] int64

    @classmethod
    def create(cls, folder: Path, meta: CodesMeta, labels: np.ndarray | None) -> "Codes":
        for name, size in zip(meta.levels, meta.sizes, strict=True):
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype_of(meta), (meta.images, *size))
        if labels is not None:
            with atomically(folder / LABELS) as temporary, temporary.open("wb") as file:
                np.save(file, labels)
        write_meta(folder, meta)
        return cls.open(folder, "r+")

    @classmethod
    def open(cls, folder: Path, mode: str = "r") -> "Codes":
        """Raises InputError if the folder holds no codes, or files that do not fit its meta.json."""
        meta = read_meta(folder)
        paths = [folder / f"{name}.npy" for name in meta.levels]
        levels = tuple(
            read_array(path, dtype_of(meta), (meta.images, *size)) for path, size in zip(paths, meta.sizes, strict=True)
        )
        labels = None
        if meta.classes:
            labels = np.array(read_array(folder / LABELS, np.int64, (meta.images,)))
            if labels.min() < 0 or labels.max() >= len(meta.classes):
                found = f"holds {labels.min()} to {labels.max()}"
                raise InputError(f"{folder / LABELS} {found}, {META} names {len(meta.classes)} classes")
        if mode != "r":  # only now: opened to be written, a file that is too short would be filled up
            for path in paths:
                reserve(path)
            levels = tuple(np.load(path, mmap_mode=mode) for path in paths)
        return cls(folder, meta, levels, labels)

    def write(self, start: int, indices: tuple[Tensor, ...]) -> None:  # [B, h, w] each
        for array, index in zip(self.levels, indices, strict=True):
            array[start : start + len(index)] = index.cpu().numpy()

    def read(self, images: np.ndarray, first: int = 0) -> tuple[Tensor, ...]:  # positions [B]; [B, h, w] int64 each
        """The codes of these images, of the levels from `first` up; raises InputError for what is no code of K."""
        return tuple(self.read_level(level, images) for level in range(first, len(self.levels)))

    def read_level(self, level: int, images: np.ndarray) -> Tensor:  # positions [B]; [B, h, w] int64
        K, codes = self.meta.codebook_size, self.levels[level][images].astype(np.int64)
        if codes.min() < 0 or codes.max() >= K:
            wrong = ((codes < 0) | (codes >= K)).reshape(len(codes), -1)
            row = int(wrong.any(1).argmax())
            code = codes[row].ravel()[wrong[row].argmax()]
            path = self.folder / f"{self.meta.levels[level]}.npy"
            raise InputError(f"{path}: image {images[row]} has the code {code}, codes are 0 to {K - 1}: extract anew")
        return torch.from_numpy(codes)

    def counts(self, level: int, images: np.ndarray) -> np.ndarray:  # positions; [K] int64
        """How often each code of a level is in these images, which are read a block at a time."""
        counts = np.zeros(self.meta.codebook_size, np.int64)
        images = np.sort(images)
        for start in range(0, len(images), block := max(1, COUNTED_AT_ONCE // math.prod(self.meta.sizes[level]))):
            codes = self.read_level(level, images[start : start + block])
            counts += np.bincount(codes.numpy().ravel(), minlength=len(counts))
        return counts

    def mark(self, done: int) -> "Codes":
        """Note, once the arrays are on disk, that the first `done` images are written."""
        for array in self.levels:
            array.flush()
        meta = replace(self.meta, done=done)
        write_meta(self.folder, meta)
        return replace(self, meta=meta)

    def level(self, name: str) -> int:
        """Raises InputError if there is no level of this name."""
        if name not in self.meta.levels:
            raise InputError(f"{self.folder} has no level {name}, only {', '.join(self.meta.levels)}")
        return self.meta.levels.index(name)


def reserve(path: Path) -> None:
    """Take the disk space of a file that has holes: writing to a memory map where there is none kills the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("rb+") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not on this file system
                raise


def write_meta(folder: Path, meta: CodesMeta) -> None:
    write_text(folder / META, json.dumps(asdict(meta), indent=2) + "\n")


def read_meta(folder: Path) -> CodesMeta:
    path = folder / META
    if not path.is_file():
        raise InputError(f"{folder}: no codes are there (no {META}); vqops extract writes them")
    try:
        meta = described(CodesMeta, parsed(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, InputError) as error:
        raise InputError(f"{path}: not the description of codes ({reason(error)})") from error
    if meta.kind != KIND:
        raise InputError(f"{path} describes {shortened(meta.kind)}, not {KIND}")
    if meta.levels not in LEVEL_NAMES.values() or len(meta.sizes) != len(meta.levels) or meta.done > meta.images:
        found = f"levels {shortened(meta.levels)}, {len(meta.sizes)} sizes, {meta.done} of {meta.images} images done"
        raise InputError(f"{path}: not the description of codes ({found})")
    return meta


def dtype_of(meta: CodesMeta) -> np.dtype:
    return np.dtype(np.uint16 if meta.codebook_size <= 2**16 else np.int32)


def read_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """Raises InputError unless the file holds an array of this type and shape."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a corrupt header is text that Python fails to read in as many ways as it has
        raise InputError(f"{path.parent}: {path.name} is not readable as codes ({reason(error)})") from error
    if not isinstance(array, np.memmap):
        raise InputError(f"{path.parent}: {path.name} is not readable as codes (an archive of several arrays)")
    if (array.dtype, array.shape) != (dtype, shape):
        found = f"{str(array.dtype)[:60]} {list(array.shape)}"
        raise InputError(f"{path.parent}: {path.name} is {found}, {META} says {np.dtype(dtype)} {list(shape)}")
    return array


def difference(before: CodesMeta, now: CodesMeta) -> str:
    """The first difference in what two descriptions describe, not in how far it is or where; empty if there is none."""
    for field in fields(CodesMeta):
        there, here = getattr(before, field.name), getattr(now, field.name)
        if field.name not in ("done", "data") and there != here:
            return f"{field.name.replace('_', ' ')} {there} there, {here} now"
    return ""
