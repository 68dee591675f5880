"""From the words of a command line to the options of a command.

The flags given override the file named by --config, and that the preset named by --preset; with --resume all defaults
are the options of that run.
"""

from argparse import ArgumentParser
from pathlib import Path

import tyro

from vqops_cli.config import read_options, read_values
from vqops_cli.evaluate_options import CompareOptions, EvaluateOptions
from vqops_cli.options import ReconstructOptions, TrainOptions
from vqops_cli.presets import preset_values
from vqops_cli.prior_options import CompleteOptions, ExtractOptions, SampleOptions, TrainPriorOptions

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


def parsed(command: str, flags: list[str]) -> object:
    """Raises InputError for values that cannot be used; SystemExit, after a message, for flags that do not parse."""
    kind = OPTIONS[command]
    return tyro.cli(
        kind,
        prog=f"vqops {command}",
        args=flags,
        config=(tyro.conf.FlagCreatePairsOff,),
        default=defaults_of(kind, flags) if kind is TrainOptions else None,
    )


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
