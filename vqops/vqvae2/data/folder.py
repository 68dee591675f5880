"""The image files of a folder and its subfolders, and what else lies there."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vqops.vqvae2.data.encoded import on_one_line
from vqops.vqvae2.errors import InputError

# Pictures of formats that Pillow reads; of AVIF from Pillow 11.3 on
IMAGE_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx"),
    *(".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
)
HIDDEN, CYCLE, SPECIAL = "hidden", "links to a folder that they are in", "pipes, sockets or devices"
NO_SUFFIX, OTHER_SUFFIX = "files without an ending", "files of other endings"


@dataclass(frozen=True)
class Found:
    names: list[str] = field(default_factory=list)  # relative, "/" between parts, sorted part by part
    left_out: Counter[str] = field(default_factory=Counter)  # by reason, such as ".txt files": a count goes before
    unreadable: list[InputError] = field(default_factory=list)  # folders whose files cannot be told, by name


def find_images(folder: Path) -> Found:
    """Links to files and folders are followed, but not back to a folder that they are in.

    A link to nothing is among the names: reading it says what is wrong. A hidden folder counts once.
    """
    found = Found()
    pending: list[tuple[str, frozenset | None]] = [("", frozenset())]  # the next is last; files have no ancestors
    while pending:
        name, ancestors = pending.pop()
        if ancestors is None:
            found.names.append(name)
            continue
        try:
            status = os.stat(folder / name)
            identity = status.st_dev, status.st_ino
            if identity in ancestors:
                found.left_out[CYCLE] += 1
                continue
            inside = entries(folder / name, found.left_out)
        except OSError as error:
            place = on_one_line(str(folder / name))
            found.unreadable.append(InputError(f"{place}: the folder cannot be read ({error.strerror})"))
            continue
        prefix, ancestors = f"{name}/" if name else "", ancestors | {identity}
        pending += [(prefix + entry, ancestors if is_folder else None) for entry, is_folder in inside]
    return found


def entries(folder: Path, left_out: Counter[str]) -> list[tuple[str, bool]]:
    """Name and whether it is a folder, of images and folders, last first."""
    kept = []
    with os.scandir(folder) as scan:
        for entry in scan:
            is_folder, reason = kind_of(entry)
            if reason is None:
                kept.append((entry.name, is_folder))
            else:
                left_out[reason] += 1
    return sorted(kept, reverse=True)


def kind_of(entry: os.DirEntry) -> tuple[bool, str | None]:
    """Whether it is a folder, and why it is left out, if so."""
    if entry.name.startswith("."):
        return False, HIDDEN
    try:
        if entry.is_dir():
            return True, None
        special = not entry.is_file() and os.path.exists(entry.path)
    except OSError:  # such as a link to itself: the name tells whether it was meant as an image
        special = False
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in IMAGE_SUFFIXES:
        return False, left_out_suffix(suffix)
    return False, SPECIAL if special else None


def left_out_suffix(suffix: str) -> str:
    if suffix in ("", "."):
        return NO_SUFFIX
    letters = suffix[1:]
    common = len(letters) <= 8 and letters.isascii() and letters.isalnum() and not letters.isdigit()
    return f"{suffix} files" if common else OTHER_SUFFIX
