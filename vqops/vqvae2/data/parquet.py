"""Images in the columns of a parquet file or a Hugging Face dataset, both read as Arrow tables.

A column holds images as Hugging Face writes them (a struct of `bytes` and `path`), as encoded bytes, or as nested lists
of uint8 of one shape. pyarrow and datasets come with the `hf` extra and are imported when first needed.
"""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from vqops.vqvae2.data.encoded import EncodedImage
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.data.survey import Reading, of_encoded
from vqops.vqvae2.errors import Field, InputError

if TYPE_CHECKING:
    import pyarrow as pa


def read_parquet(path: Path) -> "pa.Table":
    """Raises InputError if pyarrow is missing or cannot read the file."""
    parquet = of_hf_extra("pyarrow.parquet", f"{path}: reading parquet files")
    try:
        return parquet.read_table(path)
    except Exception as error:  # ArrowInvalid is a ValueError, corrupt pages raise OSError
        raise InputError(f"{path}: not a readable .parquet file ({error})") from error


def load_hugging_face(name: str, splits: tuple[str, ...]) -> "pa.Table":
    """The first of `splits` that the dataset has; raises InputError if there is none or the dataset cannot be had."""
    datasets = of_hf_extra("datasets", f"{name} is no file or folder here; loading it as a Hugging Face dataset")
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # not found, no network, gated, a script: each has its own class
        raise InputError(f"{name}: no file or folder here, and no Hugging Face dataset to be had ({error})") from error
    split = next((split for split in splits if split in loaded), None)
    if split is None:
        raise InputError(f"{name} has no split {' or '.join(splits)}, only {', '.join(loaded)}")
    return loaded[split].data.table


def images_in_column(table: "pa.Table", key: str | None, source: str, reading: Reading) -> Images:
    """The images of column `key`, or of the only column that holds images; `source` names the table in errors."""
    if key is not None and key not in table.column_names:
        raise InputError(f"{source} has no column {key!r}, only {', '.join(table.column_names)}")
    fitting = [name for name in table.column_names if holds_images(storage_type(table.schema.field(name).type))]
    if key is None and len(fitting) != 1:
        columns = ", ".join(table.column_names)
        keys = Field("data_key"), " or ", Field("val_key")
        raise InputError(f"{source}: pick the column of images with ", *keys, f", from {columns}")
    key = fitting[0] if key is None else key
    if key not in fitting:
        allowed = "a struct of bytes and path, bytes, or nested lists of uint8 [H, W] or [H, W, C]"
        raise InputError(f"{source}: images in a column are {allowed}; {key!r} is {table.schema.field(key).type}")
    if table.num_rows == 0:
        raise InputError(f"{source} holds no image: column {key!r} is empty")
    kind = storage_type(table.schema.field(key).type)
    if is_list(kind):
        return Images.of_array(nested_lists(table.column(key), f"{source}[{key}]"), f"{source}[{key}]", table)
    return of_encoded(EncodedColumn(table.column(key), source), source, reading, knows=table)


def values_in_column(table: "pa.Table", key: str, source: str) -> tuple[list, tuple[str, ...]]:
    """Labels, None where there is none, and the names of classes that Hugging Face wrote into the table."""
    if key not in table.column_names:
        raise InputError(f"{source} has no column {key!r}, only {', '.join(table.column_names)}")
    types, kind = import_module("pyarrow.types"), table.schema.field(key).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    checks = types.is_integer, types.is_boolean, types.is_string, types.is_large_string
    if not any(is_kind(kind) for is_kind in checks):
        raise InputError(f"{source}: labels are integers, names or booleans; {key!r} is {table.schema.field(key).type}")
    values, classes = table.column(key).to_pylist(), class_names(table, key) if types.is_integer(kind) else ()
    if classes:  # -1 is a label that nobody knows
        values = [value if value is not None and 0 <= value < len(classes) else None for value in values]
    return values, classes


def class_names(table: "pa.Table", key: str) -> tuple[str, ...]:
    written = (table.schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        feature = json.loads(written)["info"]["features"][key]
        return tuple(feature["names"]) if feature["_type"] == "ClassLabel" else ()
    except (ValueError, KeyError, TypeError):
        return ()


class EncodedColumn(Sequence):
    """The encoded images of an Arrow column, fetched from the table (and so from disk) one at a time."""

    def __init__(self, column: "pa.ChunkedArray", source: str):
        self.column, self.source = column, source

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, row: int) -> EncodedImage:
        value = self.column[row].as_py()
        content = value if not isinstance(value, dict) else value["bytes"] or Path(value["path"] or "")
        return EncodedImage(f"{self.source} row {row}", content or b"")


def nested_lists(column: "pa.ChunkedArray", name: str) -> np.ndarray:  # [N, H, W] or [N, H, W, C]
    """Raises InputError if the lists of one nesting depth differ in length."""
    compute = import_module("pyarrow.compute")
    values, shape = column.combine_chunks(), [len(column)]
    values = getattr(values, "storage", values)
    while is_list(values.type):
        inner = values.flatten()
        length, rest = divmod(len(inner), len(values))
        if rest or set(compute.list_value_length(values).to_pylist()) != {length}:
            raise InputError(f"{name}: arrays of one size are expected, these differ")
        values, shape = inner, [*shape, length]
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def storage_type(kind: "pa.DataType") -> "pa.DataType":
    return getattr(kind, "storage_type", kind)  # of an extension type, such as Array3D of datasets


def is_list(kind: "pa.DataType") -> bool:
    types = import_module("pyarrow.types")
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def holds_images(kind: "pa.DataType") -> bool:
    types = import_module("pyarrow.types")
    if types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
    if is_list(kind):
        depth = 0
        while is_list(kind):
            kind, depth = kind.value_type, depth + 1
        return types.is_uint8(kind) and depth in (2, 3)
    return types.is_binary(kind) or types.is_large_binary(kind)


def of_hf_extra(module: str, purpose: str) -> ModuleType:
    """The module, or an InputError that says which extra of vqops brings it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"{purpose} needs {module.partition('.')[0]}: pip install 'vqops[hf]'") from error
