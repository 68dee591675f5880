"""From what `--data` names to images: a folder, a .npz, .npy or .parquet file, or a Hugging Face dataset.

Each function raises InputError, naming the source, where it holds no images that can be read.
"""

import re
from pathlib import Path

import numpy as np

from vqops.vqvae2.data.images import IMAGE_SUFFIXES, EncodedImage, Images, image_files
from vqops.vqvae2.data.parquet import images_in_column, load_hugging_face, read_parquet
from vqops.vqvae2.errors import Field, InputError

FILE_SUFFIXES = (".npz", ".npy", ".parquet")
HUGGING_FACE_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_images(
    data: str, key: str | None = None, splits: tuple[str, ...] = ("train",), channels: int | None = None
) -> Images:
    """The images that `data` names.

    `key` picks the array of a .npz or the column of a table, and may be None where only one holds images. Of a Hugging
    Face dataset the first of `splits` that it has is taken. Encoded images are decoded to `channels` (default: as many
    as they have), arrays of another number are an error.
    """
    images = read_images(data, key, splits, channels)
    if channels not in (None, images.channels):
        raise InputError(f"{data} holds images of {images.channels} channels, the training images have {channels}")
    return images


def read_images(data: str, key: str | None, splits: tuple[str, ...], channels: int | None) -> Images:
    path = Path(data)
    suffix = path.suffix.lower()
    if path.is_dir():
        if key is not None:
            raise InputError(f"{data} is a folder of images: it has no array or column {key!r}")
        return images_in_folder(path, channels)
    if path.is_file() and suffix == ".npy":
        return images_in_npy(path, key)
    if path.is_file() and suffix == ".npz":
        return images_in_npz(path, key)
    if path.is_file() and suffix == ".parquet":
        return images_in_column(read_parquet(path), key, data, channels)
    if path.exists():
        raise InputError(f"{data} must be a folder of images, a {', '.join(FILE_SUFFIXES)} file or a dataset's name")
    if suffix in FILE_SUFFIXES or not HUGGING_FACE_NAME.fullmatch(data):
        raise InputError(f"{data}: no such file or folder")
    return images_in_column(load_hugging_face(data, splits), key, data, channels)


def images_in_folder(folder: Path, channels: int | None) -> Images:
    files = image_files(folder)
    if not files:
        raise InputError(f"{folder} holds no image (looked in it and its subfolders for {' '.join(IMAGE_SUFFIXES)})")
    return Images.of_encoded([EncodedImage.of_file(file) for file in files], channels)


def images_in_npy(path: Path, key: str | None) -> Images:
    if key is not None:
        raise InputError(f"{path} holds a single array: it has no array {key!r}")
    return Images.of_array(loaded(path), str(path))


def images_in_npz(path: Path, key: str | None) -> Images:
    with loaded(path) as archive:
        names = archive.files if key is None else [key]
        if key is not None and key not in archive.files:
            raise InputError(f"{path} has no array {key!r}, only {', '.join(archive.files)}")
        try:
            arrays = {name: archive[name] for name in names}
        except Exception as error:  # BadZipFile, zlib.error, ValueError (pickled objects), EOFError
            raise InputError(f"{path}: not a readable .npz file ({error})") from error
    if key is None:
        arrays = {name: array for name, array in arrays.items() if array.dtype == np.uint8 and array.ndim in (3, 4)}
        if len(arrays) != 1:
            keys = Field("data_key"), " or ", Field("val_key")
            raise InputError(f"{path}: pick the array of images with ", *keys, f", from {', '.join(names)}")
    ((name, array),) = arrays.items()
    return Images.of_array(array, f"{path}[{name}]")


def loaded(path: Path) -> np.ndarray | np.lib.npyio.NpzFile:
    try:
        return np.load(path, allow_pickle=False)
    except Exception as error:  # a corrupt file raises OSError, ValueError, EOFError or BadZipFile
        raise InputError(f"{path}: not a readable {path.suffix} file ({error})") from error
