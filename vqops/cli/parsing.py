"""From the words of a command line to the options of a command.

The flags given override the file named by --config, that the preset named by --preset, and that what nobody said when
the file was written; with --resume all defaults are the options of that run. All but defaults count as said.
"""

from argparse import ArgumentParser
from dataclasses import MISSING, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import tyro

from vqops import vqvae2
from vqops.cli.presets import preset_values
from vqops.vqvae2.files.config_file import TRANSIENT, Values, read_values
from vqops.vqvae2.files.run_folder import CONFIG
from vqops.vqvae2.options import made, types_of

# How the help writes what an option takes; the others as tyro does.
SHOWN = {
    **dict.fromkeys(("data", "val_data", "classifier_data"), "PATH|NAME"),
    **dict.fromkeys(("data_key", "val_key", "label_key", "classifier_key", "classifier_label_key"), "NAME"),
    **{"run": "RUN", "resume": "RUN", "config": "FILE", "codes": "CODES", "out": "FOLDER", "prior": "FOLDER..."},
    **{"images": "IMAGES...", "classes": "NAME...", "strides": "INT...", "image_size": "INT"},
    **{"level": "top|middle|bottom", "labels": "FILE", "classifier_labels": "FILE"},
}
POSITIONAL = ("run", "codes", "images")  # where they must be given
NAMES = {"classes": "class"}
DEFAULTS = {"strides": "(default: 4, then 2 a level)"}  # that are not the value of the field


def flag(name: str) -> str:
    return "--" + NAMES.get(name, name).replace("_", "-")


def flags_of(name: str) -> set[str]:
    """The flag, and the one that turns it off."""
    return {flag(name), flag(f"no_{name}")}


def parsed(command: str, flags: list[str]) -> Any:
    """Raises InputError for values that cannot be used; SystemExit, after a message, for flags that do not parse."""
    kind = getattr(vqvae2, f"{command.title().replace('-', '')}Options")
    flagged = flagged_class(kind)
    values, said = sources(kind, flags)
    needed = {field.name: tyro.MISSING for field in fields(kind) if field.default is MISSING}
    given = tyro.cli(
        flagged,
        prog=f"vqops {command}",
        args=flags,
        default=flagged(**needed | values) if values else None,
    )
    words = {word.partition("=")[0].replace("_", "-") for word in flags}
    flagged_names = {field.name for field in fields(kind) if field.name in needed or words & flags_of(field.name)}
    return made(kind, {field.name: getattr(given, field.name) for field in fields(kind)}, said | flagged_names)


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
    if field.name in TRANSIENT:  # no file turns it on, so none needs to turn it off
        annotated = tyro.conf.FlagCreatePairsOff[annotated]
    return tyro.conf.Positional[annotated] if field.default is MISSING and field.name in POSITIONAL else annotated


def sources(kind: type, flags: list[str]) -> tuple[dict[str, Any], set[str]]:
    """The values of the run, the file and the preset that the flags name; and those fields that count as said."""
    named = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in {"resume", "config", "preset"} & types_of(kind).keys():
        named.add_argument(flag(name), nargs="?")
    given, _ = named.parse_known_args(flags)
    resume, config, preset = (getattr(given, name, None) for name in ("resume", "config", "preset"))
    stored = Path(resume or "") / CONFIG
    run = read_values(stored, kind) if resume and stored.is_file() else Values({}, {})
    file = read_values(Path(config), kind) if config else Values({}, {})
    preset = preset_values(preset) if preset else {}
    values = file.defaults | run.defaults | preset | run.said | file.said
    if resume:
        values.pop("out", None)  # the run may have been moved since
    return values, preset.keys() - run.said.keys() | file.said.keys()
