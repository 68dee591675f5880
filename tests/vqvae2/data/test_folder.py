"""Every image file of a folder, however it is laid out, and a count of what is left out."""

import os
import socket
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vqops.vqvae2.data.folder import CYCLE, HIDDEN, IMAGE_SUFFIXES, NO_SUFFIX, OTHER_SUFFIX, SPECIAL, find_images


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_nested_and_mixed_in_the_order_of_their_parts(tmp_path):
    names = ["10.png", "9.png", "Z.png", "a/b/c/d.jpg", "a/b.png", "a/z.png", "a b.png", "a-/x.gif", "a.png"]
    found = find_images(made(tmp_path, *reversed(names)))
    assert found.names == names
    assert found.names == [path.as_posix() for path in sorted(map(Path, names))]
    assert not found.left_out and not found.unreadable


def test_any_case_of_endings(tmp_path):
    assert find_images(made(tmp_path, "a.PNG", "b.Jpeg", "c.tIf")).names == ["a.PNG", "b.Jpeg", "c.tIf"]


def test_what_is_left_out_is_counted(tmp_path):
    made(tmp_path, "a.png", "b.txt", "sub/c.TXT", "README", "d.", "e.0001", "f.of a long ending", "labels.csv", "g.7z")
    left_out = {".txt files": 2, NO_SUFFIX: 2, OTHER_SUFFIX: 2, ".csv files": 1, ".7z files": 1}
    assert find_images(tmp_path).left_out == Counter(left_out)


def test_hidden_files_and_folders_count_once_each(tmp_path):
    made(tmp_path, "a.png", ".DS_Store", "._a.png", "sub/.thumbnails/a.png", "sub/.thumbnails/b.png")
    found = find_images(tmp_path)
    assert found.names == ["a.png"]
    assert found.left_out == {HIDDEN: 3}


def test_the_folder_itself_may_be_hidden(tmp_path):
    assert find_images(made(tmp_path, ".cache/a.png") / ".cache").names == ["a.png"]


def test_links_are_followed(tmp_path):
    elsewhere = made(tmp_path, "elsewhere/a.png", "elsewhere/deep/b.png") / "elsewhere"
    folder = made(tmp_path, "folder/c.png") / "folder"
    (folder / "link.png").symlink_to(elsewhere / "a.png")
    (folder / "class").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere, target_is_directory=True)
    of_class = ["class/a.png", "class/deep/b.png"]
    assert find_images(folder).names == ["again/a.png", "again/deep/b.png", "c.png", *of_class, "link.png"]
    (tmp_path / "root").symlink_to(folder)
    assert find_images(tmp_path / "root").names == find_images(folder).names


def test_links_back_end(tmp_path):
    made(tmp_path, "a/x.png", "b/y.png")
    (tmp_path / "a" / "here").symlink_to(".")
    (tmp_path / "a" / "root").symlink_to(tmp_path)
    found = find_images(tmp_path)
    assert found.names == ["a/x.png", "b/y.png"]
    assert found.left_out == {CYCLE: 2}


def test_mutual_links_end(tmp_path):
    made(tmp_path, "a/x.png", "b/y.png")
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a")
    found = find_images(tmp_path)
    assert found.names == ["a/to_b/y.png", "a/x.png", "b/to_a/x.png", "b/y.png"]
    assert found.left_out == {CYCLE: 2}


def test_links_to_nothing_are_kept_to_be_named(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    found = find_images(tmp_path)
    assert found.names == ["gone.png", "loop.png"]
    assert found.left_out == {NO_SUFFIX: 2}


def test_pipes_and_sockets_are_left_out(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.png"))
        found = find_images(made(tmp_path, "a.png"))
    assert found.names == ["a.png"]
    assert found.left_out == {SPECIAL: 3}


def test_folders_that_are_named_as_images(tmp_path):
    assert find_images(made(tmp_path, "x.png/a.png")).names == ["x.png/a.png"]


def denial(folder: Path) -> str:
    return f"{folder}: the folder cannot be read (Permission denied)"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_folders_without_permission(tmp_path):
    made(tmp_path, "a.png", "locked/b.png")
    (tmp_path / "locked").chmod(0)
    found = find_images(tmp_path)
    (tmp_path / "locked").chmod(0o700)
    assert found.names == ["a.png"]
    assert [str(error) for error in found.unreadable] == [denial(tmp_path / "locked")]


def test_folders_that_cannot_be_listed_are_named(tmp_path, monkeypatch):
    made(tmp_path, "a.png", "locked/b.png", "z/c.png")
    scandir = os.scandir

    def denied(folder):
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    found = find_images(tmp_path)
    assert found.names == ["a.png", "z/c.png"]
    assert [str(error) for error in found.unreadable] == [denial(tmp_path / "locked")]


@pytest.mark.skipif(sys.platform != "linux", reason="names are text there")
def test_names_that_are_no_text(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff\xfe.png", "wb"):
        pass
    (found,) = find_images(tmp_path).names
    assert (tmp_path / found).is_file()


@pytest.fixture
def deep(tmp_path):
    """A folder deeper than Python recurses, taken away again, as pytest could not."""
    here = os.getcwd()
    os.chdir(tmp_path)
    for _ in range(1100):
        os.mkdir("d")
        os.chdir("d")
    Path("a.png").touch()
    yield tmp_path
    Path("a.png").unlink()
    for _ in range(1100):
        os.chdir("..")
        os.rmdir("d")
    os.chdir(here)


def test_deeper_than_python_recurses(deep):
    assert find_images(deep).names == ["d/" * 1100 + "a.png"]


def test_empty(tmp_path):
    found = find_images(tmp_path)
    assert (found.names, found.left_out, found.unreadable) == ([], Counter(), [])


def test_endings_are_those_that_pillow_opens():
    Image.init()
    opened = {suffix for suffix, format in Image.registered_extensions().items() if format in Image.OPEN}
    unknown = set(IMAGE_SUFFIXES) - opened - {".mpo"}  # opened as JPEG
    assert unknown <= {".avif", ".jfif"}  # what an old Pillow lacks
