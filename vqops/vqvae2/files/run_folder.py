"""The folder of a run: how it is chosen, and files that are either whole or not there."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from itertools import count
from pathlib import Path
from typing import NamedTuple

from vqops.vqvae2.errors import InputError
from vqops.vqvae2.files.lock import LOCK, WRITER, locked

MODEL, METRICS, RECONSTRUCTIONS, CURVES = "model.safetensors", "metrics.jsonl", "reconstructions.png", "curves.png"
CONFIG, TRAIN_STATE, TENSORBOARD = "config.toml", "train_state.pt", "tensorboard"
IMAGES, VALIDATION_IMAGES = "images.json", "validation_images.json"
UNFINISHED = re.compile(r"\.\d+\..+")  # the names that `atomically` gives


def check_output(folder: Path | None, overwrite: bool = False) -> None:
    """Refuse, with an InputError, a folder that cannot be created or written, or that holds files. Changes nothing."""
    existing = nearest_existing(folder or Path("runs"))
    if not existing.is_dir():
        raise InputError(f"{folder}: cannot be a folder, {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{folder or 'runs'}: no permission to write in {existing}")
    if folder == existing and not overwrite and any(path.name not in (LOCK, WRITER) for path in folder.iterdir()):
        raise InputError(f"{folder} is not empty: name an empty or new folder")


def nearest_existing(path: Path) -> Path:
    return path if path.exists() or path.parent == path else nearest_existing(path.parent)


@contextmanager
def created(folder: Path | None, overwrite: bool = False) -> Iterator[Path]:
    """Create the folder, or the next runs/<date>-<n>, with empty metrics, and keep other processes out of it.

    Raises InputError if it cannot be written, or if it holds files that are not to be overwritten.
    """
    with writing_in(folder or Path("runs")):
        folder = next_run() if folder is None else folder
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        check_output(folder, overwrite)  # once more: another process may have been faster
        with writing_in(folder):
            remove_run(folder)
            write_text(folder / METRICS, "")
        yield folder


def remove_run(folder: Path) -> None:
    """Remove the run that is being overwritten; what else is in the folder stays."""
    for name in (METRICS, MODEL, RECONSTRUCTIONS, CURVES, CONFIG, TRAIN_STATE, IMAGES, VALIDATION_IMAGES):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
    remove_unfinished(folder)


def rewind(folder: Path, step: int) -> None:
    """Take back what a run that was cut off wrote after its checkpoint at `step`, and half a line at the end."""
    with writing_in(folder):
        for name in (RECONSTRUCTIONS, CURVES):
            (folder / name).unlink(missing_ok=True)
        remove_unfinished(folder)
        rows = [row for row in read_rows(folder) if row["step"] <= step]
        write_text(folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows))


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote."""
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name):
            path.unlink()


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Turn a refusal of the file system into an InputError that names the folder."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save hides the system's error behind one of its own
        refusal = error if isinstance(error, OSError) else error.__context__
        if not isinstance(refusal, OSError):
            raise
        raise InputError(f"{folder}: cannot write here ({refusal.strerror or refusal})") from error


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
    """A temporary path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    It is on the disk before it takes the place, so that a power failure, too, leaves the old file or the new one.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        temporary.touch()
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")  # names of files need not be UTF-8


class Listed(NamedTuple):
    """Which images, in which order, a run began with, so that one that is lost or added later moves no other.

    None where they have no names, or an earlier version wrote none.
    """

    images: list[str] | None = None
    validation: list[str] | None = None  # None also without --val-data


NOT_LISTED = Listed()


def write_listed(folder: Path, listed: Listed) -> None:
    write_names(folder / IMAGES, listed.images)
    write_names(folder / VALIDATION_IMAGES, listed.validation)


def read_listed(folder: Path) -> Listed:
    """Raises InputError for a file that holds anything but names."""
    return Listed(read_names(folder / IMAGES), read_names(folder / VALIDATION_IMAGES))


def write_names(path: Path, names: list[str] | None) -> None:
    if names is not None:
        with writing_in(path.parent):
            write_text(path, json.dumps(names, indent=0) + "\n")


def read_names(path: Path) -> list[str] | None:
    if not path.exists():
        return None
    try:
        names = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as names of images ({error})") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} must be a list of names of images")
    return names


def append_row(folder: Path, row: dict[str, float]) -> None:
    """Add a line to the metrics. One write of a whole line: a reader, or a crash, sees lines only."""
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of the metrics; what is no whole row, as a full disk leaves it, is left out."""
    path = folder / METRICS
    return list(filter(None, map(row_of, path.read_text(errors="replace").splitlines()))) if path.exists() else []


def row_of(line: str) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
