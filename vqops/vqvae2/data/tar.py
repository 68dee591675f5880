"""Images in .tar archives, such as the shards of webdataset: where each lies, found in one pass over the headers.

Nothing is extracted. Members of one path up to the first dot of its base name are a sample: 0001.cls labels 0001.jpg.
"""

import json
import tarfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from posixpath import splitext
from typing import BinaryIO

import numpy as np

from vqops.vqvae2.data.folder import IMAGE_SUFFIXES
from vqops.vqvae2.errors import InputError
from vqops.vqvae2.progress import Counting

LABEL_ENDINGS = ("class", "cls", "id", "index", "json", "label", "text", "txt")
UNPACKERS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
CHUNK = 2**20  # bytes


@dataclass(frozen=True)
class Members:
    """The images of archives, in their order, and the label members of their samples."""

    paths: tuple[Path, ...]
    names: list[str]  # [N], as in the archives, without a leading ./
    shards: np.ndarray  # int64 [N]: which of the paths
    offsets: np.ndarray  # int64 [N], in bytes
    sizes: np.ndarray  # int64 [N], in bytes
    label_parts: dict[str, np.ndarray]  # by ending ("cls", "json"): int64 [N, 2], offset and size, -1 where none
    left_out: Counter[str]  # by reason, in words that go behind a count

    def keys(self) -> list[str]:
        """What `labels` takes: endings, and the fields of the first .json member that has any as "json.field"."""
        first = next(filter(None, self.fields()), {})
        return [*(ending for ending in self.label_parts if ending != "json"), *(f"json.{field}" for field in first)]

    def labels(self, key: str) -> list:
        """The label of each image, None where it has none: the text of its member, or a field of its .json member.

        `key` is an ending, or a field: "json.field" or its name alone. Raises InputError for a key that no sample has,
        and for a member that is no text or no JSON.
        """
        if key in self.label_parts and key != "json":
            return [text if text is None else text.strip() for text in self.texts(key)]
        field = key.removeprefix("json.")
        labels = [None if fields is None else fields.get(field) for fields in self.fields()]
        if all(label is None for label in labels):
            allowed = f"only {', '.join(self.keys())}" if self.label_parts else "no member goes with an image"
            raise InputError(f"{self.paths[0]} has no labels {key!r}, {allowed}")
        return labels

    def fields(self) -> Iterator[dict | None]:
        for image, text in enumerate(self.texts("json")) if "json" in self.label_parts else ():
            try:
                fields = None if text is None else json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{self.of_sample(image, 'json')}: not readable JSON ({error})") from error
            if not isinstance(fields, dict | None):
                raise InputError(f"{self.of_sample(image, 'json')}: must be an object of fields, {{...}}")
            yield fields

    def texts(self, ending: str) -> Iterator[str | None]:
        starts = np.searchsorted(self.shards, np.arange(len(self.paths) + 1)).tolist()
        for shard, path in enumerate(self.paths):
            try:
                with open(path, "rb") as file:
                    for image in range(starts[shard], starts[shard + 1]):
                        offset, size = self.label_parts[ending][image].tolist()
                        file.seek(max(offset, 0))
                        yield None if offset < 0 else file.read(size).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise InputError(f"{self.of_sample(image, ending)}: not UTF-8 ({error})") from error
            except OSError as error:
                raise InputError(f"{path}: not readable ({error})") from error

    def of_sample(self, image: int, ending: str) -> str:
        return f"{self.paths[self.shards[image]]}: the .{ending} of {self.names[image]}"


def index_tar(paths: Sequence[Path]) -> Members:
    """The images of uncompressed archives, one after the other.

    Raises InputError, naming the archive and the member, for one that is compressed, cut off or damaged.
    """
    shards = []
    with Counting("indexing archives", len(paths)) as counting:
        for path in paths:
            shards.append(Shard(path))
            counting.reach(len(shards))
    images = np.concatenate([shard.images for shard in shards])
    endings = sorted({ending for shard in shards for ending in shard.labels})
    return Members(
        tuple(paths),
        [name for shard in shards for name in shard.names],
        np.repeat(np.arange(len(shards)), [len(shard.names) for shard in shards]),
        *images.T.copy(),
        {ending: np.concatenate([shard.labels_of(ending) for shard in shards]) for ending in endings},
        sum((shard.left_out for shard in shards), Counter()),
    )


class Shard:
    """One archive: its images, and for each ending of labels, where the label of each image lies."""

    def __init__(self, path: Path):
        self.path, self.names, self.left_out = path, [], Counter()
        samples, found = {}, defaultdict(lambda: array("q"))  # of (sample, offset, size), "" for images
        for member in members_of(path):
            name = without_dots(member.name)
            base = name.rpartition("/")[2]
            stem, _, ending = base.partition(".")
            kind = self.kind_of(member, name, ending.lower())
            if kind is not None:
                sample = samples.setdefault(name[: len(name) - len(base) + len(stem)], len(samples))
                found[kind].extend((sample, member.offset_data, member.size))
            if kind == "":
                self.names.append(name)
        self.refuse_twice()
        places = {kind: np.frombuffer(flat, np.int64).reshape(-1, 3) for kind, flat in found.items()}
        placed = places.pop("", np.empty((0, 3), np.int64))
        self.images = placed[:, 1:]
        self.labels = {ending: self.joined(placed[:, 0], place, ending) for ending, place in sorted(places.items())}

    def kind_of(self, member: tarfile.TarInfo, name: str, ending: str) -> str | None:
        """Empty for an image, the ending of a label, None for what is left out."""
        suffix = splitext(name)[1].lower()
        reason = left_out(member, name)
        if reason is None and suffix in IMAGE_SUFFIXES:
            if member.issparse():
                raise InputError(f"{self.path}: {name} is a sparse member, stored in pieces: pack it without --sparse")
            return ""
        if reason is None and ending in LABEL_ENDINGS and not member.issparse():
            return ending
        if not member.isdir():
            self.left_out[reason or (f"{suffix} files" if suffix else "files without an ending")] += 1
        return None

    def refuse_twice(self) -> None:
        if len(set(self.names)) < len(self.names):
            (name, count), *_ = Counter(self.names).most_common(1)
            raise InputError(f"{self.path} holds {name} {count} times")

    def joined(self, samples: np.ndarray, places: np.ndarray, ending: str) -> np.ndarray:  # [N], [M, 3]; [N, 2]
        """Offset and size of the label of each image; labels without an image count as left out."""
        labels = np.full((1 + max(samples.max(initial=-1), places[:, 0].max()), 2), -1)
        labels[places[:, 0]] = places[:, 1:]
        if (repeated := len(places) - len(np.unique(places[:, 0]))) > 0:
            raise InputError(f"{self.path}: {repeated} of its samples have two .{ending} members")
        if orphans := len(places) - int(np.isin(places[:, 0], samples).sum()):
            self.left_out[f".{ending} files"] += orphans
        return labels[samples]

    def labels_of(self, ending: str) -> np.ndarray:  # [N, 2]
        return self.labels.get(ending, np.full((len(self.names), 2), -1))


def members_of(path: Path) -> Iterator[tarfile.TarInfo]:
    """The headers to the mark of the archive's end; TarFile's own iteration ends in silence at a damaged one."""
    try:
        with open(path, "rb") as file:
            tar, size = opened(file, path), path.stat().st_size
            offset, last = 0, "its start"
            while (member := next_member(tar, path, offset, last)) is not None:
                if not offset < tar.offset <= size:
                    raise InputError(f"{path} is cut off in {member.name}: expected {tar.offset} bytes, got {size}")
                offset, last = tar.offset, member.name
                yield member
            file.seek(offset)
            while chunk := file.read(CHUNK):
                if chunk.strip(b"\0"):
                    raise InputError(f"{path} goes on after its end, behind {last}: two archives in one file?")
    except OSError as error:
        raise InputError(f"{path}: not readable ({error})") from error


def opened(file: BinaryIO, path: Path) -> tarfile.TarFile:
    start = file.read(6)
    file.seek(0)
    if unpacker := next((program for magic, program in UNPACKERS.items() if start.startswith(magic)), None):
        raise InputError(f"{path} is compressed: decompress it first ({unpacker}), images are read at random places")
    try:
        return tarfile.TarFile(fileobj=file, encoding="utf-8")
    except Exception as error:  # of a broken header: ReadError, ValueError, MemoryError
        raise InputError(f"{path}: not a tar archive ({error})") from error


def next_member(tar: tarfile.TarFile, path: Path, offset: int, last: str) -> tarfile.TarInfo | None:
    tar.fileobj.seek(offset)
    try:
        return tarfile.TarInfo.fromtarfile(tar)
    except tarfile.EOFHeaderError:
        return None
    except Exception as error:
        raise InputError(f"{path} is cut off or damaged after {last} ({error})") from error


def without_dots(name: str) -> str:
    while name.startswith("./"):
        name = name[2:]
    return name


def left_out(member: tarfile.TarInfo, name: str) -> str | None:
    if any(part.startswith(".") and part not in (".", "..") for part in name.split("/")):
        return "hidden"
    if member.issym():
        return "links"
    if member.islnk():
        return "hard links"
    return None if member.isreg() else "devices and pipes"
