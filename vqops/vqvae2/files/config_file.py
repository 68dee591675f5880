"""Options in a TOML file: a key a field, what is left out has its default."""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from vqops.vqvae2.errors import InputError
from vqops.vqvae2.options import refused, types_of

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

Kind = TypeVar("Kind")
TRANSIENT = ("preset", "config", "resume", "overwrite")  # of a command, not of what it makes


def read_values(path: Path, kind: type) -> dict[str, Any]:
    """The values of a file by field of `kind`. Raises InputError for what is no TOML, no field, or not allowed."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file ({error})") from error
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


def read_options(path: Path, kind: type[Kind]) -> Kind:
    values = read_values(path, kind)
    for field in fields(kind):
        if field.name not in values and field.default is MISSING:
            raise InputError(f"{path}: {field.name} is missing")
    return kind(**values)


def written(options: object) -> str:
    """The options as TOML; those that are None are left out."""
    values = {field.name: getattr(options, field.name) for field in fields(options) if field.name not in TRANSIENT}
    return "".join(f"{name} = {literal(value)}\n" for name, value in values.items() if value is not None)


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
