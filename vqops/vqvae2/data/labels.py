"""The labels of images: the subfolders they are in, or an array or column of integers or names."""

from pathlib import Path

import numpy as np

from vqops.vqvae2.data.images import image_files
from vqops.vqvae2.data.parquet import read_parquet
from vqops.vqvae2.data.sources import loaded
from vqops.vqvae2.errors import InputError


def load_labels(data: str, key: str | None, images: int) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels [N] int64 and the names of the classes, (None, ()) if there are none.

    A folder's images are labelled by its subfolders if each is in one. Raises InputError if `key` names no labels for
    this number of images.
    """
    path = Path(data)
    if path.is_dir():
        if key is not None:
            raise InputError(f"{data} is a folder of images: its subfolders are the labels, not {key!r}")
        parts = [file.relative_to(path).parts for file in image_files(path)]
        return numbered(np.array([part[0] for part in parts])) if min(map(len, parts)) > 1 else (None, ())
    if key is None:
        return None, ()
    values = np.asarray(column(path, key))
    if values.ndim != 1 or values.dtype.kind not in "iuUO" or len(values) != images:
        allowed = f"integers or names [{images}], one an image"
        raise InputError(f"{data}: labels are {allowed}; {key!r} is {values.dtype} {list(values.shape)}")
    return numbered(values)


def column(path: Path, key: str) -> np.ndarray:
    if path.suffix.lower() == ".npz":
        with loaded(path) as archive:
            if key not in archive.files:
                raise InputError(f"{path} has no array {key!r}, only {', '.join(archive.files)}")
            return archive[key]
    if path.suffix.lower() == ".parquet":
        table = read_parquet(path)
        if key not in table.column_names:
            raise InputError(f"{path} has no column {key!r}, only {', '.join(table.column_names)}")
        return table.column(key).to_numpy()
    raise InputError(f"{path}: labels are read from folders, .npz and .parquet files")


def numbered(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    names, numbers = np.unique(values, return_inverse=True)
    return numbers.astype(np.int64), tuple(map(str, names))
