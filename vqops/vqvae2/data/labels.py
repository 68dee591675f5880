"""The labels of images: the subfolders they are in, an array, a column, or a file of labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqops.vqvae2.data.cifar import Cifar
from vqops.vqvae2.data.csv_labels import CSV_SUFFIXES, columns_of, labels_in_csv
from vqops.vqvae2.data.idx import is_idx, labels_beside, read_idx
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.data.parquet import read_parquet, values_in_column
from vqops.vqvae2.data.sources import loaded
from vqops.vqvae2.data.tar import Members
from vqops.vqvae2.errors import Field, InputError

LABEL_FILES = ("labels.csv", "metadata.csv")  # looked for in a folder of images


@dataclass(frozen=True)
class Column:
    """A label for each item of a source: integers, names or booleans, None where there is none."""

    name: str  # for messages
    values: Sequence  # an array or a list
    classes: Sequence[str] = ()  # the names of the integers 0, 1, ..., if they have any
    written: bool = False  # in a text, where numbers are strings


def load_labels(
    data: str, images: Images, labels: Path | None = None, key: str | None = None
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels [len(images)] int64 and the names of the classes, (None, ()) if there are none.

    From the file `labels`, or from what `data` holds: `key` names the array, column or member; without it, subfolders
    are labels if each image is in one, and so are the labels that come with IDX files, CIFAR batches and samples in
    archives. Raises InputError where labels cannot be read, and unless every image has exactly one.
    """
    column = of_file(labels, key, images, data) if labels is not None else of_data(data, images, key)
    if column is None:
        return None, ()
    return numbered(taken(column, images, data), column.classes)


def of_file(path: Path, key: str | None, images: Images, data: str) -> Column:
    suffix = path.suffix.lower()
    if not path.is_file():
        raise InputError(Field("labels"), f": {path}: no such file")
    if suffix in CSV_SUFFIXES:
        if images.names is None:
            allowed = "give their labels in order, as .npy, .npz or IDX"
            raise InputError(f"{path} labels files by name, the images of {data} have none: {allowed}")
        return Column(str(path), labels_in_csv(path, key, images.names, data), written=True)
    if suffix in (".npy", ".npz"):
        return Column(str(path), array_in(path, key))
    if not is_idx(path):
        raise InputError(Field("labels"), f" must be a {', '.join(CSV_SUFFIXES)}, .npy, .npz or IDX file, got {path}")
    refuse_key(path, key)
    return Column(str(path), read_idx(path))


def of_data(data: str, images: Images, key: str | None) -> Column | None:
    path, source = Path(data), images.source
    if isinstance(source, Cifar):
        return of_cifar(source, data, key)
    if isinstance(source, Members):
        return of_archive(source, data, key)
    if path.is_dir():
        return of_folder(path, images, key)
    if path.is_file() and is_idx(path):
        return of_idx(path, key)
    if key is None:
        return None
    if path.suffix.lower() == ".npz":
        return Column(f"{data}[{key}]", array_in(path, key))
    if source is not None or path.suffix.lower() == ".parquet":
        table = read_parquet(path) if source is None else source
        return Column(f"{data}[{key}]", *values_in_column(table, key, data))
    raise InputError(f"{data} holds no labels {key!r}: give a file with ", Field("labels"))


def of_cifar(source: Cifar, data: str, key: str | None) -> Column | None:
    key = next(iter(source.labels), None) if key is None else key  # of CIFAR-100 the fine ones come first
    if key is None:
        return None
    if key not in source.labels:
        raise InputError(f"{data} has no labels {key!r}, only {', '.join(source.labels) or 'images'}")
    return Column(f"{data}[{key}]", source.labels[key], source.classes.get(key, ()))


def of_archive(source: Members, data: str, key: str | None) -> Column | None:
    if key is None and "cls" not in source.label_parts:
        return of_subfolders(data, without_common_folders(source.names))
    key = "cls" if key is None else key
    return Column(f"{data}[{key}]", source.labels(key), written=True)


def of_folder(folder: Path, images: Images, key: str | None) -> Column | None:
    if key is None:
        return of_subfolders(str(folder), images.names)
    file = next((folder / name for name in LABEL_FILES if has_column(folder / name, key)), None)
    if file is None:
        problem = f"{folder} has no {' or '.join(LABEL_FILES)} with a column {key!r}: give a file with "
        raise InputError(problem, Field("labels"))
    return Column(f"{file}[{key}]", labels_in_csv(file, key, images.names, str(folder)), written=True)


def has_column(file: Path, key: str) -> bool:
    return file.is_file() and key in columns_of(file)


def of_subfolders(data: str, names: Sequence[str]) -> Column | None:
    return Column(data, [name.partition("/")[0] for name in names]) if all("/" in name for name in names) else None


def without_common_folders(names: Sequence[str]) -> Sequence[str]:
    """Without the folders that all are in, as an archive of one folder has them."""
    folders = {tuple(name.split("/")[:-1]) for name in names}
    pairs = enumerate(zip(min(folders), max(folders), strict=False))  # what these two share, all between them share
    common = next((depth for depth, (one, other) in pairs if one != other), len(min(folders)))
    return [name.split("/", common)[-1] for name in names]


def of_idx(path: Path, key: str | None) -> Column | None:
    refuse_key(path, key)
    beside = labels_beside(path)
    return None if beside is None else Column(str(beside), read_idx(beside))


def refuse_key(path: Path, key: str | None) -> None:
    if key is not None:
        raise InputError(f"{path} holds a single array: it has no array or column {key!r}")


def array_in(path: Path, key: str | None) -> np.ndarray:
    content = loaded(path)
    if isinstance(content, np.ndarray):
        refuse_key(path, key)
        return content
    with content as archive:
        names = archive.files
        if key is None and len(names) != 1:
            raise InputError(f"{path}: pick its array with ", Field("label_key"), f", from {', '.join(names)}")
        if key is not None and key not in names:
            raise InputError(f"{path} has no array {key!r}, only {', '.join(names)}")
        try:
            return archive[names[0] if key is None else key]
        except Exception as error:  # BadZipFile, zlib.error, ValueError (pickled objects), EOFError
            raise InputError(f"{path}: array {key or names[0]!r} cannot be read ({error})") from error


def taken(column: Column, images: Images, data: str) -> np.ndarray:  # [len(images)]
    """The labels of those items of the source that the images are."""
    values = column.values
    if isinstance(values, np.ndarray) and (values.ndim != 1 or values.dtype.kind not in "biuU"):
        allowed = f"integers, names or booleans [{images.total}], one an image"
        raise InputError(f"{column.name}: labels are {allowed}; these are {values.dtype} {list(values.shape)}")
    if len(values) != images.total:
        raise InputError(f"{column.name} holds {len(values)} labels, {data} {images.total} images")
    if isinstance(values, np.ndarray) and values.dtype.kind != "U":
        return values[images.rows]
    chosen = [values[row] for row in images.rows.tolist()]
    refuse_missing(column.name, chosen, images)
    chosen = whole_numbers(chosen) if column.written else chosen
    kinds = {type(value) for value in chosen}
    if len(kinds) > 1 or not issubclass(*kinds, str | int):
        found = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError(f"{column.name}: labels are all integers, all names or all booleans; these are {found}")
    return np.array(chosen, object)  # an array of strings would give each the room of the longest


def refuse_missing(name: str, labels: list, images: Images) -> None:
    missing = [image for image, label in enumerate(labels) if is_missing(label)]
    if missing:
        row = int(images.rows[missing[0]])
        first = f"number {row}" if images.names is None else images.names[row]
        found = f"{len(missing)} of {len(labels)} images have no label, the first is {first}"
        raise InputError(f"{name}: {found}")


def is_missing(label: object) -> bool:
    """NaN is what a table writes for a value that it does not have."""
    return label is None or label != label or (isinstance(label, str) and label.strip().lower() in ("", "nan"))


def whole_numbers(labels: list) -> list:
    """Integers, so that 10 comes after 9, if all labels are written as integers are; 01 is a name."""
    try:
        numbers = [int(label) for label in labels]
    except (TypeError, ValueError, OverflowError):
        return labels
    return numbers if list(map(str, numbers)) == list(map(str, labels)) else labels


def numbered(values: np.ndarray, classes: Sequence[str] = ()) -> tuple[np.ndarray, tuple[str, ...]]:
    found, numbers = np.unique(values, return_inverse=True)
    return numbers.astype(np.int64), tuple(classes[value] if classes else str(value) for value in found)
