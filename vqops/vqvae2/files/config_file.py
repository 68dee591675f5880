"""Options in a TOML file: a key a field, what is left out has its default.

The table [defaults] of a run's file keeps the values that nobody said: a later version with other defaults goes on with
them, and a preset can override them.
"""

import json
import os
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from vqops.vqvae2.errors import InputError
from vqops.vqvae2.files.run_folder import CONFIG, write_text, writing_in
from vqops.vqvae2.options import Kind, made, refused, types_of

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

TRANSIENT = ("preset", "config", "resume", "overwrite")  # of a command, not of what it makes
PLACES = ("data", "val_data", "codes", "labels")  # of what a run reads: a place, or the name of a Hugging Face dataset
DEFAULTS = "defaults"


class Values(NamedTuple):
    """The values of a file, by field."""

    said: dict[str, Any]
    defaults: dict[str, Any]


def read_values(path: Path, kind: type) -> Values:
    """The values of a file by field of `kind`. Raises InputError for what is no TOML, no field, or not allowed."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file ({error})") from error
    defaults = values.pop(DEFAULTS, {})
    if not isinstance(defaults, dict):
        raise InputError(f"{path}: {DEFAULTS} must be a table, got {defaults!r}")
    return Values(checked(path, values, kind), checked(path, defaults, kind))


def checked(path: Path, values: dict[str, Any], kind: type) -> dict[str, Any]:
    hints = types_of(kind)
    for name in values:
        if name not in hints or name in TRANSIENT:
            allowed = ", ".join(field for field in hints if field not in TRANSIENT)
            raise InputError(f"{path}: there is no option {name!r}, only {allowed}")
    values = {name: converted(value, hints[name], f"{path}: {name}") for name, value in values.items()}
    for name, value in values.items():
        if allowed := refused(value, hints[name]):
            raise InputError(f"{path}: {name} must be {allowed}, got {value!r}")
    return values


def read_options(path: Path, kind: type[Kind], **more: object) -> Kind:
    """The options of a file, with `more` that no file holds."""
    said, defaults = read_values(path, kind)
    values = defaults | said | more
    for field in fields(kind):
        if field.name not in values and field.default is MISSING:
            raise InputError(f"{path}: {field.name} is missing")
    return made(kind, values, said)


def write_config(folder: Path, options: Any) -> None:
    """Write the options to the folder that is made with them."""
    with writing_in(folder):
        write_text(folder / CONFIG, written(options))


def written(options: Any) -> str:
    """The options as TOML, without those that are None, and without the place that they are written to."""
    said, others = "", ""
    for field in fields(options):
        name = field.name
        if name in (*TRANSIENT, "out") or getattr(options, name) is None:
            continue
        line = f"{name} = {literal(placed(name, options))}\n"
        said, others = (said + line, others) if name in options.said else (said, others + line)
    return f"{said}\n[{DEFAULTS}]  # nobody said these: as they were\n{others}" if others else said


def placed(name: str, options: Any) -> object:
    """The value of a field; a place as a path that holds in any folder."""
    value = getattr(options, name)
    return os.path.abspath(value) if name in PLACES and os.path.exists(value) else value


def literal(value: object) -> str:
    if isinstance(value, bool | str | Path):
        return json.dumps(value if isinstance(value, bool) else str(value), ensure_ascii=False)
    if isinstance(value, tuple):
        return f"[{', '.join(map(literal, value))}]"
    return repr(value)


def converted(value: object, hint: object, name: str) -> object:
    """The TOML value as the type of the field; tuples are arrays, paths strings."""
    if get_origin(hint) is Annotated:
        return converted(value, get_args(hint)[0], name)
    if get_origin(hint) is Literal:
        return value
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(converted(item, get_args(hint)[0], name) for item in value)
    alternatives = [kind for kind in get_args(hint) if kind is not NoneType] or [hint]
    if get_origin(hint) is not tuple:
        kind = alternatives[0]
        if get_origin(kind) is not None:
            return converted(value, kind, name)
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is kind:
            return value
    raise InputError(f"{name} must be of another type, got {value!r}")
