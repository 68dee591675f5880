"""What encoded images are, found out before any of them is used: sizes, kinds, and which cannot be read.

Of each image the header and the end are read; all pixels only where they are so few that they are kept. In several
processes of torchrun each looks at its part.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from vqops.quantizers.codebook.ranks import num_ranks, rank
from vqops.vqvae2.data.decoding import NOTES
from vqops.vqvae2.data.encoded import EncodedImage, Header
from vqops.vqvae2.data.images import WHITE, Images
from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.progress import Counting

KEPT_DECODED_BYTES = 2**30  # datasets up to here are decoded once and kept
AT_A_TIME = 256  # images between two signs of progress
NAMED = 5  # images that cannot be read, in an error
FOUND = np.dtype([("height", "i4"), ("width", "i4"), ("channels", "i1"), ("mode", "S8"), ("notes", "u2")])


@dataclass(frozen=True)
class Reading:
    """How encoded images are read."""

    channels: int | None = None  # 1 or 3; None: 1 if all images are grey, else 3
    background: int = WHITE
    skip_bad: bool | None = False  # leave out what cannot be read; None where nobody can ask for that
    listed: Sequence[str] | None = None  # names of the images, in their order: those of an earlier run
    quiet: bool = False


@dataclass
class Survey:
    """Of N images what each is, and which cannot be read."""

    found: np.ndarray  # [N] FOUND, zeros where an image cannot be read
    bad: dict[int, str]  # the reason, by position

    @classmethod
    def of_nothing(cls, count: int) -> "Survey":
        return cls(np.zeros(count, FOUND), {})

    def note(self, position: int, header: Header | InputError) -> None:
        if isinstance(header, InputError):
            self.found[position], self.bad[position] = np.zeros((), FOUND), str(header)
            return
        notes = sum(1 << NOTES.index(note) for note in header.notes)
        self.found[position] = header.height, header.width, header.channels, header.mode.encode(), notes

    @property
    def good(self) -> np.ndarray:
        return self.found[self.found["height"] > 0]


def survey(items: Sequence[EncodedImage], quiet: bool) -> Survey:
    whole = own = Survey.of_nothing(len(items))
    positions = range(rank(), len(items), num_ranks())
    for position, header in looked_at(lambda position: items[position].header(), positions, "images checked", quiet):
        own.note(position, header)
    if num_ranks() > 1:
        parts: list[Any] = [None] * num_ranks()
        dist.all_gather_object(parts, own)
        whole = Survey.of_nothing(len(items))
        for first, part in enumerate(parts):
            whole.found[first :: num_ranks()] = part.found[first :: num_ranks()]
            whole.bad |= part.bad
    return whole


def looked_at(
    look: Callable[[int], Any], positions: Sequence[int], what: str, quiet: bool
) -> Iterator[tuple[int, Any]]:
    """Each position with what `look` finds there, or with the InputError that it raises."""

    def caught(position: int) -> Any:
        try:
            return look(position)
        except InputError as error:
            return error

    with ThreadPoolExecutor() as threads, Counting(what, len(positions), quiet=quiet) as counting:
        for start in range(0, len(positions), AT_A_TIME):
            part = positions[start : start + AT_A_TIME]
            yield from zip(part, threads.map(caught, part), strict=True)
            counting.reach(start + len(part))


def of_encoded(
    items: Sequence[EncodedImage],
    source: str,
    reading: Reading,
    names: Sequence[str] | None = None,
    left_out: Mapping[str, int] | None = None,
    knows: Any = None,
) -> Images:
    """The images among `items`. Those of a list that an earlier run left keep their place also where they are lost.

    Raises InputError for what cannot be read, unless it is to be left out, and where nothing else is left.
    """
    found = survey(items, reading.quiet)
    channels = reading.channels or int(found.found["channels"].max(initial=1))
    items = decoded(items, found, channels, reading) if keeps(found, channels) else items
    bad = [found.bad[position] for position in sorted(found.bad)]
    if bad and not reading.skip_bad:
        raise InputError(refusal(source, len(items), bad), *without(reading))
    if len(bad) == len(items):
        raise InputError(f"{source}: none of {len(items)} images can be read ({bad[0]})")
    rows = np.arange(len(items))
    return Images(
        items,
        rows if reading.listed else np.delete(rows, sorted(found.bad)),
        channels,
        (int(found.good["height"].max()), int(found.good["width"].max())),
        background=reading.background,
        names=names,
        source=knows,
        report=report(source, found, channels, reading.background, left_out or {}),
        bad=tuple(bad),
    )


def keeps(found: Survey, channels: int) -> bool:
    pixels = found.found["height"].astype(np.int64) * found.found["width"]
    return channels * int(pixels.sum()) <= KEPT_DECODED_BYTES


def decoded(items: Sequence[EncodedImage], found: Survey, channels: int, reading: Reading) -> Sequence:
    """The items with their pixels in place of those that can be read."""
    kept: list = list(items)
    good = np.flatnonzero(found.found["height"]).tolist()
    pixels = looked_at(lambda position: items[position].decode(channels, reading.background), good, "images read", True)
    for position, read in pixels:
        if isinstance(read, InputError):
            found.note(position, read)
        else:
            kept[position] = read
    return kept


def refusal(source: str, total: int, bad: Sequence[str]) -> str:
    more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    return f"{source}: {len(bad)} of {total} images cannot be used: {'; '.join(bad[:NAMED])}{more}"


def without(reading: Reading) -> tuple[str, ...]:
    return () if reading.skip_bad is None else (". Without them: ", Field("skip_bad_images"))


def of_files(paths: Sequence[Path], reading: Reading) -> Images:
    """The images that somebody named one by one."""
    source = str(paths[0]) if len(paths) == 1 else "images named"
    return of_encoded([EncodedImage.of_file(path) for path in paths], source, replace(reading, skip_bad=None))


def report(source: str, found: Survey, channels: int, background: int, left_out: Mapping[str, int]) -> str:
    """One line: how many images, of which modes and sizes, what becomes of them, what is left out and why."""
    good = found.good
    modes, counts = np.unique(good["mode"], return_counts=True)
    kinds = ", ".join(f"{counts[at]} {modes[at].decode()}" for at in np.argsort(-counts, kind="stable"))
    parts = [f"{source}: {len(good)} images ({kinds}), {extent(good['height'])} x {extent(good['width'])} pixels"]
    shade = {0: "black", WHITE: "white"}.get(background, f"grey {background}")
    for bit, note in enumerate(NOTES):
        count = int((good["notes"] >> bit & 1).sum())
        parts += [f"{count} {note.format(background=shade)}"] if count else []
    turned = int((good["channels"] == 3).sum()) if channels == 1 else 0
    parts += [f"{turned} in colour, turned to grey"] if turned else []
    out = [f"{count} {reason}" for reason, count in left_out.items() if count]
    out += [f"{len(found.bad)} that cannot be read"] if found.bad else []
    parts += [f"left out: {', '.join(out)}"] if out else []
    return "; ".join(parts)


def extent(sizes: np.ndarray) -> str:
    least, most = sizes.min(), sizes.max()
    return f"{least}" if least == most else f"{least} to {most}"
