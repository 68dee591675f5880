"""Descriptions in JSON, such as those of models and codes: anyone may have written them, so every value is checked."""

import json
from dataclasses import MISSING, fields
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from vqops.vqvae2.errors import InputError
from vqops.vqvae2.options import refused, types_of

Kind = TypeVar("Kind")


def parsed(text: str) -> dict[str, Any]:
    """The object that a JSON text holds; raises InputError if it holds anything else."""
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"no JSON: {error}") from error
    if not isinstance(description, dict):
        raise InputError("no JSON object")
    return description


def described(kind: type[Kind], values: object) -> Kind:
    """The dataclass of these values of a JSON text; raises InputError for one that is missing, unknown or not allowed.

    Lists become tuples.
    """
    values = as_tuples(values)
    if not isinstance(values, dict):
        raise InputError(f"no values of {kind.__name__}")
    hints = types_of(kind)
    for name, value in values.items():
        if name not in hints:
            raise InputError(f"there is no {name!r}")
        if not of_type(value, hints[name]):
            raise InputError(f"{name} is {shortened(value)}")
        if allowed := refused(value, hints[name]):
            raise InputError(f"{name} must be {allowed}, is {shortened(value)}")
    for field in fields(kind):
        if field.name not in values and field.default is MISSING:
            raise InputError(f"{field.name} is missing")
    return kind(**values)


def as_tuples(value: object) -> object:
    if isinstance(value, dict):
        return {key: as_tuples(item) for key, item in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def of_type(value: object, hint: Any) -> bool:
    """Whether a value of a JSON text, lists as tuples, is of the type of a field."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return of_type(value, parts[0])
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        kinds = [parts[0]] * len(value) if isinstance(value, tuple) and parts[-1] is Ellipsis else parts
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(of_type, value, kinds))
    if NoneType in parts:
        return value is None or any(of_type(value, part) for part in parts if part is not NoneType)
    if hint is float:
        return type(value) is float or of_type(value, int)
    return type(value) is hint and (hint is not int or abs(value) < 2**63)


def shortened(value: object) -> str:
    """The value in one short line."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
