"""From the words of a command line to the options of a command.

The flags given override the file named by --config, and that the preset named by --preset; with --resume all defaults
are the options of that run.
"""

from argparse import ArgumentParser
from dataclasses import MISSING, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from vqops.cli.presets import preset_values
from vqops.vqvae2 import (
    CompareOptions,
    CompleteOptions,
    EvaluateOptions,
    ExtractOptions,
    ReconstructOptions,
    SampleOptions,
    TrainOptions,
    TrainPriorOptions,
)
from vqops.vqvae2.files.config_file import read_options, read_values

OPTIONS = {
    "train": TrainOptions,
    "reconstruct": ReconstructOptions,
    "extract": ExtractOptions,
    "train-prior": TrainPriorOptions,
    "sample": SampleOptions,
    "complete": CompleteOptions,
    "evaluate": EvaluateOptions,
    "compare": CompareOptions,
}
# How the help writes what an option takes; the others as tyro does.
SHOWN = {
    **dict.fromkeys(("data", "val_data", "classifier_data"), "PATH|NAME"),
    **dict.fromkeys(("data_key", "val_key", "label_key", "classifier_key", "classifier_label_key"), "NAME"),
    **{"run": "RUN", "resume": "RUN", "config": "FILE", "codes": "CODES", "out": "FOLDER", "prior": "FOLDER..."},
    **{"images": "IMAGES...", "classes": "NAME...", "strides": "INT...", "image_size": "INT"},
}
POSITIONAL = ("run", "codes", "images")  # where they must be given
NAMES = {"classes": "class"}
DEFAULTS = {"strides": "(default: 4, then 2 a level)"}  # that are not the value of the field


def flag(name: str) -> str:
    return "--" + NAMES.get(name, name).replace("_", "-")


def parsed(command: str, flags: list[str]) -> Any:
    """Raises InputError for values that cannot be used; SystemExit, after a message, for flags that do not parse."""
    kind = OPTIONS[command]
    flagged = flagged_class(kind)
    given = tyro.cli(
        flagged,
        prog=f"vqops {command}",
        args=flags,
        config=(tyro.conf.FlagCreatePairsOff,),
        default=flagged(**vars(defaults_of(kind, flags))) if kind is TrainOptions else None,
    )
    return kind(**vars(given))


def flagged_class(kind: type) -> type:
    """The options with what the help shows of them, and unchecked: tyro would report itself what a check raises."""
    hints = get_type_hints(kind, include_extras=True)
    shown = [(field.name, shown_type(field, hints[field.name])) for field in fields(kind) if field.name in SHOWN]
    unchecked = {"__post_init__": lambda options: None, "__doc__": kind.__doc__}
    return make_dataclass(kind.__name__, shown, bases=(kind,), namespace=unchecked, frozen=True)


def shown_type(field: Any, hint: Any) -> Any:
    required = field.default is MISSING
    described = {"name": NAMES.get(field.name), "metavar": SHOWN[field.name]}
    if field.default is None or SHOWN[field.name].endswith("..."):
        described["help_behavior_hint"] = DEFAULTS.get(field.name, "")
    annotated = Annotated[hint, tyro.conf.arg(**described)]
    return tyro.conf.Positional[annotated] if required and field.name in POSITIONAL else annotated


def defaults_of(kind: type, flags: list[str]) -> TrainOptions:
    named = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--resume", "--config", "--preset"):
        named.add_argument(name, nargs="?")
    sources, _ = named.parse_known_args(flags)
    if sources.resume:
        config = Path(sources.resume) / "config.toml"
        return read_options(config, kind) if config.is_file() else kind()
    values = preset_values(sources.preset) if sources.preset else {}
    return kind(**values | (read_values(Path(sources.config), kind) if sources.config else {}))
