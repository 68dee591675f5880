"""The python batches of CIFAR-10 and CIFAR-100, read without running what a pickle may hold.

Nothing of a pickle is imported or called: the few names that numpy's arrays need stand for the classes below.
"""

import io
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqops.vqvae2.errors import InputError

SPLITS_10 = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
SPLITS_100 = {"train": ("train",), "test": ("test",)}
FILES = tuple(name for splits in (SPLITS_10, SPLITS_100) for files in splits.values() for name in files)
CLASS_NAMES = {  # of each kind of label: the file beside the batches, and its entry there
    "labels": ("batches.meta", "label_names"),
    "fine_labels": ("meta", "fine_label_names"),
    "coarse_labels": ("meta", "coarse_label_names"),
}
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Cifar:
    """Images, and for each kind of label ("labels", or "fine_labels" and "coarse_labels") numbers and class names."""

    images: np.ndarray  # uint8 [N, 32, 32, 3]
    labels: dict[str, np.ndarray]  # int64 [N]
    classes: dict[str, tuple[str, ...]]  # only where a file of names lies beside


def is_cifar(path: Path) -> bool:
    """Whether this is a batch, or a folder of them, by the names of files and their first byte."""
    files = [path / name for name in FILES] if path.is_dir() else [path] * (path.name in FILES)
    return any(starts_as_pickle(file) for file in files)


def read_cifar(path: Path, splits: Sequence[str]) -> Cifar:
    """A batch file, or of a folder the first of `splits` that it has ("train" or "test").

    Raises InputError if a file is missing, broken, no batch, or a pickle that holds anything but arrays and lists.
    """
    files = batch_files(path, splits) if path.is_dir() else [path]
    batches = [read_batch(file) for file in files]
    kinds = set.intersection(*(set(labels) for _, labels in batches))
    found = {kind: np.concatenate([labels[kind] for _, labels in batches]) for kind in CLASS_NAMES if kind in kinds}
    classes = {kind: names for kind in found if (names := class_names(files[0].parent, kind))}
    for kind, names in classes.items():
        if found[kind].size and found[kind].max() >= len(names):
            raise InputError(f"{path}: {kind} go up to {found[kind].max()}, but only {len(names)} classes have names")
    return Cifar(np.concatenate([images for images, _ in batches]), found, classes)


def starts_as_pickle(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(1) in (b"\x80", b"(", b"}")  # a protocol's number, or the dict of protocols 0 and 1
    except OSError:
        return False


def batch_files(folder: Path, splits: Sequence[str]) -> list[Path]:
    there = {file.name for file in folder.iterdir() if file.is_file()}
    known = SPLITS_100 if there.isdisjoint(sum(SPLITS_10.values(), ())) else SPLITS_10
    held = [split for split, names in known.items() if not there.isdisjoint(names)]
    split = next((split for split in splits if split in held), None)
    if split is None:
        raise InputError(f"{folder} has no split {' or '.join(splits)}, only {', '.join(held) or 'other files'}")
    missing = [name for name in known[split] if name not in there]
    if missing:
        raise InputError(f"{folder}: {', '.join(missing)} of the split {split} is missing")
    return [folder / name for name in known[split]]


def read_batch(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:  # uint8 [N, 32, 32, 3], each int64 [N]
    entries = read_pickle(path)
    rows = entries.get("data")
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != PIXELS:
        found = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise InputError(f"{path}: a CIFAR batch has data of uint8 [N, {PIXELS}], this one {found}")
    labels = {kind: labels_of(path, kind, entries[kind], len(rows)) for kind in CLASS_NAMES if kind in entries}
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels


def labels_of(path: Path, kind: str, values: object, count: int) -> np.ndarray:  # int64 [count]
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**31 for value in values):
        raise InputError(f"{path}: {kind} must be a list of integers from 0 up")
    if len(values) != count:
        raise InputError(f"{path} holds {count} images, but {len(values)} {kind}")
    return np.array(values, np.int64)


def class_names(folder: Path, kind: str) -> tuple[str, ...]:
    file, entry = CLASS_NAMES[kind]
    if not (folder / file).is_file():
        return ()
    names = read_pickle(folder / file).get(entry)
    names = [text(name) for name in names] if isinstance(names, list) else []
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise InputError(f"{folder / file}: {entry} must be a list of names, each once")
    return tuple(names)


def read_pickle(path: Path) -> dict[str, object]:
    """The dict in a pickle, its arrays read; raises InputError for one that is broken or would import anything."""
    try:
        entries = DataOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # a broken pickle raises what it likes, also MemoryError
        raise InputError(f"{path}: not a readable CIFAR batch ({type(error).__name__}: {error})") from error
    if not isinstance(entries, Mapping):
        raise InputError(f"{path}: a CIFAR file holds a dict, this one {type(entries).__name__}")
    return {text(key): getattr(value, "array", value) for key, value in entries.items()}


def text(value: object) -> object:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


class DataOnly(pickle.Unpickler):
    """Refuses every name but those that stand for an array, its dtype and its bytes."""

    def find_class(self, module: str, name: str) -> object:
        allowed = KNOWN_NAMES.get((module.replace("numpy._core", "numpy.core"), name))
        if allowed is None:
            raise InputError(f"refused: the pickle names {module}.{name}, which is no array")
        return lambda *given: allowed(*given)  # a new one each time, since a pickle can set attributes of what it names


class DType:
    """numpy.dtype as a pickle makes it: a code such as "u1", then a state whose second item is the byte order."""

    def __init__(self, code: str | bytes, *_: object):
        self.code, self.order = text(code), "="

    def __setstate__(self, state: tuple) -> None:
        self.order = text(state[1])

    def numpy(self) -> np.dtype:
        if not re.fullmatch(r"[iu][1248]", self.code) or self.order not in tuple("<>|="):
            raise InputError(f"refused: an array of {self.code!r}, where integers are expected")
        return np.dtype(self.code).newbyteorder(self.order)


class Array:
    """numpy.ndarray as a pickle makes it: empty, then a state of version, shape, dtype, whether Fortran, bytes."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        self.array = np.frombuffer(content, dtype.numpy()).reshape(shape, order="F" if fortran else "C")


def reconstruct(*_: object) -> Array:
    return Array()


def from_buffer(content: bytes, dtype: DType, shape: tuple[int, ...], order: str) -> Array:
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", content))
    return array


def encode(content: str, encoding: str | bytes) -> bytes:  # as Python 3 writes bytes in protocols 0 to 2
    if text(encoding) != "latin1":
        raise InputError(f"refused: the pickle encodes as {text(encoding)!r}")
    return content.encode("latin1")


KNOWN_NAMES = {
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): DType,
    ("numpy.core.multiarray", "_reconstruct"): reconstruct,
    ("numpy.core.numeric", "_frombuffer"): from_buffer,
    ("_codecs", "encode"): encode,
}
