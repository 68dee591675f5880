"""From the words of a command line to the options of a command.

The flags given override the file named by --config, and that the preset named by --preset; with --resume all defaults
are the options of that run.
"""

from argparse import ArgumentParser
from dataclasses import MISSING, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import tyro

from vqops import vqvae2
from vqops.cli.presets import preset_values
from vqops.vqvae2.files.config_file import read_options, read_values
from vqops.vqvae2.options import types_of

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
    kind = getattr(vqvae2, f"{command.title().replace('-', '')}Options")
    flagged = flagged_class(kind)
    given = tyro.cli(
        flagged,
        prog=f"vqops {command}",
        args=flags,
        config=(tyro.conf.FlagCreatePairsOff,),
        default=flagged(**vars(defaults_of(kind, flags))) if command == "train" else None,
    )
    return kind(**vars(given))


def flagged_class(kind: type) -> type:
    """The options with what the help shows of them, and unchecked: tyro would report itself what a check raises."""
    shown = [(field.name, shown_type(field, types_of(kind)[field.name])) for field in fields(kind)]
    unchecked = {"__post_init__": lambda options: None, "__doc__": kind.__doc__}
    return make_dataclass(kind.__name__, shown, bases=(kind,), namespace=unchecked, frozen=True, kw_only=True)


def shown_type(field: Any, hint: Any) -> Any:
    metavar = SHOWN.get(field.name)
    described = {"name": NAMES.get(field.name), "metavar": metavar}
    if get_origin(hint) is Annotated:
        described["help"] = next((part for part in get_args(hint) if isinstance(part, str)), None)
    if metavar and (field.default is None or metavar.endswith("...")):
        described["help_behavior_hint"] = DEFAULTS.get(field.name, "")
    annotated = Annotated[hint, tyro.conf.arg(**described)]
    return tyro.conf.Positional[annotated] if field.default is MISSING and field.name in POSITIONAL else annotated


def defaults_of(kind: type, flags: list[str]) -> Any:
    named = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--resume", "--config", "--preset"):
        named.add_argument(name, nargs="?")
    sources, _ = named.parse_known_args(flags)
    if sources.resume:
        config = Path(sources.resume) / "config.toml"
        return read_options(config, kind) if config.is_file() else kind()
    values = preset_values(sources.preset) if sources.preset else {}
    return kind(**values | (read_values(Path(sources.config), kind) if sources.config else {}))
