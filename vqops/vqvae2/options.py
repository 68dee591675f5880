"""Options as frozen dataclasses: the type of a field says what it may be, and is checked when one is made.

The docstring of a field is the help of its flag, or a text in its type, where several options share it. What was said
is kept apart from what has its default: only that can contradict a run that is gone on with.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from vqops.vqvae2.errors import Field, InputError

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Check:
    """In the type of a field: what its value must be, in words, and whether one is."""

    allowed: str
    holds: Callable[[Any], object]


Count = Annotated[int, Check("at least 1", lambda number: number >= 1)]
CountOrZero = Annotated[int, Check("at least 0", lambda number: number >= 0)]
Seed = Annotated[int, Check("at least 0 and below 2^63", lambda number: 0 <= number < 2**63)]
Level = Annotated[int, Check("at least 0 and at most 255", lambda level: 0 <= level <= 255)]
Positive = Annotated[float, Check("positive", lambda number: 0 < number < float("inf"))]
NotNegative = Annotated[float, Check("at least 0", lambda number: 0 <= number < float("inf"))]
Share = Annotated[float, Check("at least 0 and below 1", lambda number: 0 <= number < 1)]
Run = Annotated[Path, "The run folder of `vqops train`, or its model.safetensors."]
Device = Annotated[
    str,
    "auto (cuda if there is one), cpu, cuda, cuda:N or mps.",
    Check("auto, cpu, cuda, cuda:N or mps", re.compile(r"auto|cpu|mps|cuda(:\d+)?").fullmatch),
]


class Options:
    """A base of dataclasses that checks the values. Raises InputError for the first that its type does not allow.

    `said` holds the names of the arguments that it was made with. `dataclasses.replace` says all of them, `changed` its
    changes only.
    """

    def __new__(cls, *values: object, **named: object) -> "Options":
        options = super().__new__(cls)
        places = [field.name for field in fields(cls) if not field.kw_only]
        object.__setattr__(options, "said", frozenset((*places[: len(values)], *named)))
        return options

    def __post_init__(self):
        for name, hint in types_of(type(self)).items():
            if allowed := refused(value := getattr(self, name), hint):
                raise InputError(Field(name), f" must be {allowed}, got {value}")


@cache
def types_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def refused(value: object, hint: Any) -> str:
    """The allowed values, in words, if the type does not allow this one; else empty."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        checks = (part for part in parts[1:] if isinstance(part, Check))
        return refused(value, parts[0]) or next((check.allowed for check in checks if not check.holds(value)), "")
    if origin is Literal:
        *some, last = map(str, parts)
        return "" if (type(value), value) in [(type(part), part) for part in parts] else f"{', '.join(some)} or {last}"
    if origin is tuple:
        return next(filter(None, (refused(item, parts[0]) for item in value)), "")
    if NoneType in parts:
        return "" if value is None else next(refused(value, part) for part in parts if part is not NoneType)
    return ""


def needed(options: Any, *names: str) -> None:
    """Raises InputError for the first of these fields that is None; with --resume they are those of the run."""
    for name in names:
        if getattr(options, name) is None and options.resume is None:
            raise InputError(Field(name), " is needed, unless ", Field("resume"), " names what to go on with")


def made(kind: type[Kind], values: dict[str, Any], said: Iterable[str]) -> Kind:
    """Options of which only these names count as said."""
    options = kind(**values)
    object.__setattr__(options, "said", frozenset(said))
    return options


def changed(options: Kind, **changes: object) -> Kind:
    """The options with these changes, which count as said beside what was said before."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return made(type(options), values | changes, options.said | changes.keys())


def values_for(kind: type, options: object) -> dict[str, Any]:
    """The values of those fields of `kind` that the options have too."""
    return {field.name: getattr(options, field.name) for field in fields(kind) if hasattr(options, field.name)}
