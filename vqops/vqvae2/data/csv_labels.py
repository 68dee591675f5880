"""Labels of images by file name, in a .csv or .tsv file with a header line."""

import csv
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from posixpath import basename, splitext

from vqops.vqvae2.errors import InputError
from vqops.vqvae2.progress import say

CSV_SUFFIXES = (".csv", ".tsv")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path", "name", "id")
LABEL_COLUMNS = ("label", "class", "category")
SEPARATORS = "\t;,"


def labels_in_csv(path: Path, key: str | None, names: Sequence[str], data: str) -> list[str | None]:  # [len(names)]
    """Column `key` at the image of each name; None where no row names the image.

    Without `key`: the only column beside that of the file names, or one that is called as labels are. A row names an
    image by its path in `data`, or by its base name alone, either with or without the ending. Raises InputError for a
    file that is no such table, and for rows that disagree or could mean several images.
    """
    rows = rows_of(path)
    _, columns = next(rows)
    file, label = file_column(path, columns, key), label_column(path, columns, key)
    images, labels, strangers = Finder(names, data), [None] * len(names), 0
    for line, row in rows:
        found = images.find(row[file])
        if len(found) > 1:
            some = f"{names[found[0]]} or {names[found[1]]}"
            raise InputError(f"{path} line {line}: {row[file]!r} may be {some} of {data}: give its path")
        strangers += not found
        for image in found:
            if labels[image] not in (None, row[label]):
                raise InputError(f"{path} line {line}: {row[file]!r} is {row[label]!r} here, above {labels[image]!r}")
            labels[image] = row[label]
    if strangers:
        say(f"{path}: {strangers} {'row names' if strangers == 1 else 'rows name'} no image of {data}")
    return labels


def columns_of(path: Path) -> list[str]:
    return next(rows_of(path))[1]


def rows_of(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The numbers of lines and their values, the names of the columns first."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=separator_of(path), strict=True, skipinitialspace=True)
            rows = ((reader.line_num, [value.strip() for value in row]) for row in reader if row)
            line, columns = next(rows, (0, []))
            if not columns:
                raise InputError(f"{path} is empty")
            if len(set(columns)) < len(columns):
                raise InputError(f"{path}: its header line has a column twice: {', '.join(columns)}")
            yield line, columns
            for line, values in rows:
                if len(values) != len(columns):
                    raise InputError(f"{path} line {line}: expected {len(columns)} values, as in its header line")
                yield line, values
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error}): save it as UTF-8") from error
    except (csv.Error, OSError) as error:
        raise InputError(f"{path}: not a readable table ({error})") from error


def separator_of(path: Path) -> str:
    """The one by which the header has a column of file names: csv.Sniffer would guess from the values."""
    for separator in SEPARATORS:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file, delimiter=separator), [])
        if len(header) > 1 and known_in(header, FILE_COLUMNS):
            return separator
    return ","


def known_in(columns: Sequence[str], known: Sequence[str]) -> str | None:
    """The column with the first of the known names that there is."""
    found = {column.strip().lower(): column for column in columns}
    return next((found[name] for name in known if name in found), None)


def file_column(path: Path, columns: list[str], key: str | None) -> int:
    column = known_in([column for column in columns if column != key], FILE_COLUMNS)
    if column is None:
        allowed = f"{', '.join(FILE_COLUMNS[:-1])} or {FILE_COLUMNS[-1]}"
        raise InputError(f"{path} needs a header line with a column {allowed}, its first line is {', '.join(columns)}")
    return columns.index(column)


def label_column(path: Path, columns: list[str], key: str | None) -> int:
    others = [column for position, column in enumerate(columns) if position != file_column(path, columns, key)]
    if key is not None and key not in others:
        raise InputError(f"{path} has no column of labels {key!r}, only {', '.join(others)}")
    column = key or (others[0] if len(others) == 1 else known_in(others, LABEL_COLUMNS))
    if column is None:
        raise InputError(f"{path}: which column is the label? Its columns are {', '.join(columns)}")
    return columns.index(column)


class Finder:
    """The images that a name may mean: by their path, or, for a name without folders, by their base name."""

    def __init__(self, names: Sequence[str], data: str):
        self.names, self.tables = names, {}
        parts = Path(data).absolute().parts
        self.above = [f"{'/'.join(parts[-count:])}/".replace("//", "/") for count in range(1, len(parts) + 1)]

    def find(self, name: str) -> Sequence[int]:
        return self.in_data(name) or self.in_data(name.replace("\\", "/").removeprefix("./"))

    def in_data(self, name: str) -> Sequence[int]:
        """Of data/train, also train/cat/1.png is cat/1.png."""
        within = [name.removeprefix(above) for above in self.above if name.startswith(above)]
        ways = [(way, path) for path in (name, *within) for way in (str, without_ending)]
        if "/" not in name:
            ways += [(basename, name), (bare, name)]
        return next((found for way, name in ways if (found := self.table(way).get(name))), ())

    def table(self, shortened: Callable[[str], str]) -> dict[str, list[int]]:
        if shortened not in self.tables:
            self.tables[shortened] = defaultdict(list)
            for image, name in enumerate(self.names):
                self.tables[shortened][shortened(name)].append(image)
        return self.tables[shortened]


def without_ending(name: str) -> str:
    return splitext(name)[0]


def bare(name: str) -> str:
    return splitext(basename(name))[0]
