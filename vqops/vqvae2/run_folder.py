"""The folder of a run: how it is chosen, and files that are either whole or not there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from itertools import count
from pathlib import Path

from vqops_cli.options import InputError

MODEL, METRICS, RECONSTRUCTIONS, CURVES = "model.safetensors", "metrics.jsonl", "reconstructions.png", "curves.png"


def check_output(folder: Path | None, overwrite: bool = False) -> None:
    """Refuse, with an InputError, a folder that cannot be created or written, or that holds files. Changes nothing."""
    existing = nearest_existing(folder or Path("runs"))
    if not existing.is_dir():
        raise InputError(f"{folder}: cannot be a folder, {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{folder or 'runs'}: no permission to write in {existing}")
    if folder == existing and not overwrite and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: name an empty or new folder")


def nearest_existing(path: Path) -> Path:
    return path if path.exists() or path.parent == path else nearest_existing(path.parent)


def create(folder: Path | None) -> Path:
    """Create the folder, or the next runs/<date>-<n>, with empty metrics; raises InputError if it cannot be written."""
    with writing_in(folder or Path("runs")):
        folder = next_run() if folder is None else folder
        folder.mkdir(parents=True, exist_ok=True)
        with atomically(folder / METRICS):
            pass
        for name in (MODEL, RECONSTRUCTIONS, CURVES):  # of the run that is being overwritten
            (folder / name).unlink(missing_ok=True)
    return folder


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Turn a refusal of the file system into an InputError that names the folder."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder}: cannot write here ({error.strerror})") from error


def next_run() -> Path:
    for n in count(1):
        folder = Path("runs") / f"{date.today()}-{n}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when the block ends without an error."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        temporary.touch()
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_row(folder: Path, row: dict[str, float]) -> None:
    """Add a line to the metrics. One write of a whole line: a reader, or a crash, sees lines only."""
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
