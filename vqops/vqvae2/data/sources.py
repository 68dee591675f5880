"""From what `--data` names to images: a folder, a file of one of many kinds, or a Hugging Face dataset.

Each function raises InputError, naming the source, where it holds no images that can be read.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vqops.vqvae2.data.cifar import is_cifar, read_cifar
from vqops.vqvae2.data.encoded import EncodedImage, Part
from vqops.vqvae2.data.folder import IMAGE_SUFFIXES, find_images
from vqops.vqvae2.data.idx import is_idx, read_idx
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.data.names import Files, Names
from vqops.vqvae2.data.parquet import images_in_column, load_hugging_face, read_parquet
from vqops.vqvae2.data.survey import Reading, of_encoded, without
from vqops.vqvae2.data.tar import Members, index_tar
from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.progress import say

FILE_SUFFIXES = (".npz", ".npy", ".parquet", ".tar")
ALLOWED = (
    f"a folder of images, a {', '.join(FILE_SUFFIXES)} file, an IDX file (as MNIST has), a CIFAR batch or folder, or a "
    f"dataset's name"
)
PACKED = re.compile(r"\.(zip|7z|rar|tgz|(tar\.)?(gz|bz2|xz|zst))$", re.IGNORECASE)
HUGGING_FACE_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_images(
    data: str, key: str | None = None, splits: tuple[str, ...] = ("train",), reading: Reading | None = None
) -> Images:
    """The images that `data` names.

    `key` picks the array of a .npz or the column of a table, and may be None where only one holds images. Of a Hugging
    Face dataset and of a folder of CIFAR the first of `splits` that it has is taken. Encoded images are decoded to
    `reading.channels` (default: as many as they have), arrays of another number are an error.
    """
    reading = reading or Reading()
    images = read_images(data, key, splits, reading)
    if reading.channels not in (None, images.channels):
        raise InputError(f"{data} holds images of {images.channels} channels, the training images have "
                         f"{reading.channels}")  # fmt: skip
    return images


def read_images(data: str, key: str | None, splits: tuple[str, ...], reading: Reading) -> Images:
    if not data:
        raise InputError(f"the images have an empty name: give {ALLOWED}")
    path = Path(data)
    suffix = path.suffix.lower()
    if is_there(path):
        if suffix == ".npz" and path.is_file():
            return images_in_npz(path, key)
        if suffix == ".parquet" and path.is_file():
            return images_in_column(read_parquet(path), key, data, reading)
        if key is not None:
            kind = "is a folder of images: it" if path.is_dir() else "holds a single array: it"
            raise InputError(f"{data} {kind} has no array or column {key!r}")
        if is_cifar(path):
            cifar = read_cifar(path, splits)
            return Images.of_array(cifar.images, data, cifar)
        if path.is_dir():
            return images_in_folder(path, reading)
        if suffix == ".npy":
            return Images.of_array(array_in(path), data)
        if is_idx(path):
            return Images.of_array(read_idx(path), data)
        if suffix == ".tar":
            return images_in_tar([path], data, reading)
        if PACKED.search(data):
            raise InputError(f"{data}: unpack it first, and give what comes out")
        if suffix in IMAGE_SUFFIXES:
            raise InputError(f"{data} is one image: give the folder that it is in")
        raise InputError(f"{data} must be {ALLOWED}")
    if suffix in FILE_SUFFIXES or not HUGGING_FACE_NAME.fullmatch(data):
        raise InputError(f"{data}: no such file or folder")
    if not reading.quiet:
        say(f"{data} is no file or folder here: looking for a Hugging Face dataset of this name")
    return images_in_column(load_hugging_face(data, splits), key, data, reading)


def is_there(path: Path) -> bool:
    """Raises InputError where that cannot be told, as in a folder without permission."""
    try:
        return path.exists()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def images_in_folder(folder: Path, reading: Reading) -> Images:
    """The images in a folder and its subfolders, or where there are none, those in its .tar files."""
    found = find_images(folder)
    archives = sorted(folder.glob("[!.]*.[tT][aA][rR]")) if not found.names else []
    if archives:
        return images_in_tar(archives, str(folder), reading)
    if found.unreadable and not reading.skip_bad:
        more = f" and {len(found.unreadable) - 1} more" if len(found.unreadable) > 1 else ""
        raise InputError(f"{found.unreadable[0]}{more}", *without(reading))
    left_out = found.left_out + Counter({"folders that cannot be read": len(found.unreadable)})
    names = found.names
    if reading.listed is not None:
        left_out["that the run did not begin with"] = len(set(names) - set(reading.listed))
        names = list(reading.listed)
    if not names:
        there = f"; there are {', '.join(f'{count} {what}' for what, count in left_out.items())}" if left_out else ""
        looked = f"looked in it and its subfolders for {' '.join(IMAGE_SUFFIXES)}"
        idx = next((path for path in sorted(folder.iterdir()) if path.is_file() and is_idx(path)), None)
        hint = f"; of IDX files give one, such as {idx}" if idx else ""
        raise InputError(f"{folder} holds no image ({looked}{there}){hint}")
    packed = Names(names)
    return of_encoded(Files(folder, packed), str(folder), reading, packed, left_out)


def images_in_tar(archives: list[Path], source: str, reading: Reading) -> Images:
    members = index_tar(archives)
    if not members.names:
        raise InputError(f"{source} holds no image (looked in it for {' '.join(IMAGE_SUFFIXES)})")
    names, chosen = members.names, None
    if reading.listed is not None:
        names, places = list(reading.listed), {name: place for place, name in enumerate(members.names)}
        if missing := [name for name in names if name not in places]:
            raise InputError(f"{source} lacks {len(missing)} images that the run began with, such as {missing[0]}")
        chosen = [places[name] for name in names]
    left_out = members.left_out
    return of_encoded(InArchives(archives, members, chosen), source, reading, names, left_out, members)


class InArchives(Sequence):
    """The images in .tar files, read where they lie."""

    def __init__(self, archives: list[Path], members: Members, chosen: list[int] | None):
        self.archives, self.members = archives, members
        self.chosen = range(len(members.names)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> EncodedImage:
        members, place = self.members, self.chosen[index]
        archive = self.archives[members.shards[place]]
        part = Part(archive, int(members.offsets[place]), int(members.sizes[place]))
        return EncodedImage(f"{archive}: {members.names[place]}", part)


def images_in_npz(path: Path, key: str | None) -> Images:
    with archive_in(path) as archive:
        names = archive.files if key is None else [key]
        if key is not None and key not in archive.files:
            raise InputError(f"{path} has no array {key!r}, only {', '.join(archive.files)}")
        arrays = {}
        for name in names:
            try:
                arrays[name] = archive[name]
            except Exception as error:  # BadZipFile, zlib.error, ValueError (pickled objects), EOFError
                other = ("; pick the array of images with ", Field("data_key")) if len(names) > 1 else ()
                raise InputError(f"{path}[{name}]: not a readable array ({error})", *other) from error
    if key is None:
        arrays = {name: array for name, array in arrays.items() if array.dtype == np.uint8 and array.ndim in (3, 4)}
        if len(arrays) != 1:
            keys = Field("data_key"), " or ", Field("val_key")
            raise InputError(f"{path}: pick the array of images with ", *keys, f", from {', '.join(names)}")
    ((name, array),) = arrays.items()
    return Images.of_array(array, f"{path}[{name}]")


def array_in(path: Path) -> np.ndarray:
    found = loaded(path, mmap_mode="r")
    if not isinstance(found, np.ndarray):
        raise InputError(f"{path} is an archive of arrays: name it .npz")
    return found


def archive_in(path: Path) -> np.lib.npyio.NpzFile:
    found = loaded(path)
    if isinstance(found, np.ndarray):
        raise InputError(f"{path} is a single array: name it .npy")
    return found


def loaded(path: Path, mmap_mode: str | None = None) -> np.ndarray | np.lib.npyio.NpzFile:
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except Exception as error:  # a corrupt file raises OSError, ValueError, EOFError or BadZipFile
        raise InputError(f"{path}: not a readable {path.suffix} file ({error})") from error
