"""A folder of codes: one memory-mapped array a level, labels, and meta.json, which says what they are and of what.

    bottom.npy, top.npy, ...   [N, h, w] uint16, or int32 where K > 65536
    labels.npy                 [N] int64, if the images have labels
    meta.json                  K, shapes, the model's SHA-256, the transform, the classes, how many images are done
"""

import errno
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqops.vqvae2.errors import InputError
from vqops.vqvae2.files.run_folder import atomically, write_text
from vqops.vqvae2.networks.checkpoint import as_tuples

META, LABELS, KIND = "meta.json", "labels.npy", "vqops.codes"


@dataclass(frozen=True)
class CodesMeta:
    """The contents of meta.json. Levels are listed from bottom to top."""

    images: int  # N
    done: int  # images whose codes are written
    image_shape: tuple[int, int, int]  # C, H, W
    codebook_size: int  # K
    levels: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]  # h, w of each level
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
        dtype = np.uint16 if meta.codebook_size <= 2**16 else np.int32
        for name, size in zip(meta.levels, meta.sizes, strict=True):
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (meta.images, *size))
        if labels is not None:
            with atomically(folder / LABELS) as temporary, temporary.open("wb") as file:
                np.save(file, labels)
        write_meta(folder, meta)
        return cls.open(folder, "r+")

    @classmethod
    def open(cls, folder: Path, mode: str = "r") -> "Codes":
        """Raises InputError if the folder holds no codes, or files that do not fit its meta.json."""
        meta = read_meta(folder)
        try:
            levels = tuple(np.load(folder / f"{name}.npy", mmap_mode=mode) for name in meta.levels)
            labels = np.load(folder / LABELS) if meta.classes else None
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: not readable as codes ({error})") from error
        for name, array, size in zip(meta.levels, levels, meta.sizes, strict=True):
            if array.shape != (meta.images, *size):
                expected = [meta.images, *size]
                raise InputError(f"{folder}: {name}.npy is {list(array.shape)}, {META} says {expected}")
        if mode == "r+":
            for name in meta.levels:
                reserve(folder / f"{name}.npy")
        return cls(folder, meta, levels, labels)

    def write(self, start: int, indices: tuple[Tensor, ...]) -> None:  # [B, h, w] each
        for array, index in zip(self.levels, indices, strict=True):
            array[start : start + len(index)] = index.cpu().numpy()

    def read(self, images: np.ndarray) -> tuple[Tensor, ...]:  # positions [B]; [B, h, w] int64 each
        return tuple(torch.from_numpy(array[images].astype(np.int64)) for array in self.levels)

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
        meta = CodesMeta(**as_tuples(json.loads(path.read_text())))
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not the description of codes ({error})") from error
    if meta.kind != KIND:
        raise InputError(f"{path} describes {meta.kind}, not {KIND}")
    return meta


def difference(before: CodesMeta, now: CodesMeta) -> str:
    """The first difference in what two descriptions describe, not in how far it is or where; empty if there is none."""
    for field in fields(CodesMeta):
        there, here = getattr(before, field.name), getattr(now, field.name)
        if field.name not in ("done", "data") and there != here:
            return f"{field.name.replace('_', ' ')} {there} there, {here} now"
    return ""
