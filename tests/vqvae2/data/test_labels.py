"""Where labels come from: subfolders, arrays, columns, CSV files, and what comes with IDX, CIFAR and archives."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from vqops.vqvae2 import InputError
from vqops.vqvae2.data.cifar import Cifar
from vqops.vqvae2.data.labels import load_labels
from vqops.vqvae2.data.tar import index_tar


@dataclass
class Source:
    """What load_labels asks of images."""

    rows: np.ndarray
    total: int
    names: Sequence[str] | None = None
    source: object = None

    def __len__(self) -> int:
        return len(self.rows)


def unnamed(total: int, source: object = None) -> Source:
    return Source(np.arange(total), total, source=source)


def named(*names: str) -> Source:
    return Source(np.arange(len(names)), len(names), names)


def found(*given, **others) -> tuple[list[int], tuple[str, ...]]:
    labels, classes = load_labels(*given, **others)
    assert labels.dtype == np.int64
    return labels.tolist(), classes


def refused(message: str, *given, **others) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_labels(*given, **others)
    assert "\n" not in str(caught.value)


# Folders


def test_subfolders_are_labels_if_each_image_is_in_one(tmp_path):
    assert found(str(tmp_path), named("cat/1.png", "cat/x/2.png", "dog/1.png")) == ([0, 0, 1], ("cat", "dog"))
    assert load_labels(str(tmp_path), named("3.png", "cat/1.png")) == (None, ())


def test_only_the_images_that_are_left_need_labels(tmp_path):
    images = Source(np.array([3, 0]), 4, ("dog/1.png", "cat/bad.png", "cat/1.png", "ant/1.png"))
    assert found(str(tmp_path), images) == ([0, 1], ("ant", "dog"))
    (tmp_path / "labels.csv").write_text("file,age\ndog/1.png,9\ncat/1.png,\nant/1.png,10\n")
    assert found(str(tmp_path), images, key="age") == ([1, 0], ("9", "10"))


@pytest.mark.parametrize("name", ["labels.csv", "metadata.csv"])
def test_a_table_in_the_folder_is_read_by_key(tmp_path, name):
    (tmp_path / name).write_text("file_name,colour,age\na.png,red,3\nb.png,blue,4\n")
    images = named("a.png", "b.png")
    assert found(str(tmp_path), images, key="colour") == ([1, 0], ("blue", "red"))
    assert load_labels(str(tmp_path), images) == (None, ())
    allowed = "give a file with labels"
    refused(rf"has no labels\.csv or metadata\.csv with a column 'x': {allowed}", str(tmp_path), images, key="x")


# Files of labels


def csv(tmp_path, text: str | bytes, name: str = "labels.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "file_name,label\na.png,x\nsub/b.png,y\n",
        "label,Image\nx,a.png\ny,sub/b.png\n",
        "\ufefffilename;label\r\na.png;x\r\nsub/b.png;y\r\n",
        "id\tlabel\na\tx\nb\ty\n",
        '"path","label"\n"a.png","x"\n"./sub\\b.png","y"\n\n',
        "name , label \na.png , x\nsub/b, y ",
        ",file,label\n0,a.png,x\n1,b.png,y\n",
        "file,class,split\na.png,x,1\nb.png,y,2\n",
        "id,file,label\n7,a.png,x\n9,b.png,y\n",
        "file,label\ndata/a.png,x\ndata/sub/b.png,y\n",
        "file,label\na.png,x\na.png,x\nb.png,y\n",
    ],
    ids=[
        "plain",
        "other order",
        "mark and semicolons",
        "tabs and base names",
        "quotes and backslashes",
        "spaces",
        "numbered rows",
        "one of several columns",
        "id is the last choice",
        "path of the data",
        "twice the same",
    ],
)
def test_every_kind_of_table(tmp_path, text):
    images = named("a.png", "sub/b.png")
    assert found(str(tmp_path / "data"), images, csv(tmp_path, text)) == ([0, 1], ("x", "y"))


def test_whole_numbers_stay_in_their_order(tmp_path):
    images = named("a.png", "b.png", "c.png")
    numbers = csv(tmp_path, "file,label\na.png,10\nb.png,9\nc.png,-1\n")
    assert found("data", images, numbers) == ([2, 1, 0], ("-1", "9", "10"))
    names = csv(tmp_path, "file,label\na.png,10\nb.png,09\nc.png,9\n")
    assert found("data", images, names) == ([1, 0, 2], ("09", "10", "9"))


def test_key_names_the_column(tmp_path):
    table = csv(tmp_path, "name,file,kind\nred,a.png,x\nblue,b.png,y\n")
    images = named("a.png", "b.png")
    assert found("data", images, table, "name") == ([1, 0], ("blue", "red"))
    assert found("data", images, table, "kind") == ([0, 1], ("x", "y"))
    both = csv(tmp_path, "name,id\nred,a\nblue,b\n", "both.csv")
    assert found("data", images, both, "name") == ([1, 0], ("blue", "red"))
    refused(r"which column is the label\? Its columns are name, file, kind", "data", images, table)
    refused("has no column of labels 'z', only name, kind", "data", images, table, "z")


def test_rows_of_no_image_are_said(tmp_path, capsys):
    table = csv(tmp_path, "file,label\na.png,x\nb.png,y\nother/a.png,z\n")
    assert found("data", named("a.png"), table) == ([0], ("x",))
    assert f"{table}: 2 rows name no image of data" in capsys.readouterr().out


def test_tables_that_do_not_label_every_image_once(tmp_path):
    images = named("a.png", "b.png", "sub/b.png")

    def broken(text: str | bytes, message: str) -> None:
        refused(message, "data", images, csv(tmp_path, text))

    broken("file,label\na.png,x\n", r"labels\.csv: 2 of 3 images have no label, the first is b\.png$")
    broken("file,label\na.png,\nb.png,x\nsub/b.png,nan\n", r"2 of 3 images have no label, the first is a\.png")
    broken("file,label\na.png,x\nb.png,y\na.png,y\n", r"labels\.csv line 4: 'a\.png' is 'y' here, above 'x'")
    broken("a.png,x\nb.png,y\n", r"needs a header line with a column .*, its first line is a\.png, x$")
    broken("file,label\na.png,x,y\n", r"labels\.csv line 2: expected 2 values, as in its header line")
    broken("file,label,label\na.png,x,y\n", "a column twice: file, label, label")
    broken("file,label\n", "3 of 3 images have no label")
    broken("", r"labels\.csv is empty")
    broken('file,label\na.png,"x\n', r"labels\.csv: not a readable table \(unexpected end of data\)")
    broken("file,label\na.png,gänse\n".encode("latin1"), r"labels\.csv: not UTF-8 .*save it as UTF-8")
    broken("file,label\na.png,x\n".encode("utf-16"), r"labels\.csv: not UTF-8")
    images = named("x/b.png", "y/b.png", "y/c.png", "y/c.jpg")
    broken("file,label\nb.png,x\n", r"labels\.csv line 2: 'b\.png' may be x/b\.png or y/b\.png of data: give its path")
    broken("file,label\ny/c,x\n", r"line 2: 'y/c' may be y/c\.png or y/c\.jpg")
    refused("the images of data have none", "data", unnamed(2), csv(tmp_path, "file,label\na.png,x\n"))


def test_arrays_of_labels_are_in_the_order_of_the_images(tmp_path):
    images = Source(np.array([2, 0, 1]), 3)
    np.save(tmp_path / "y.npy", np.array([7, 7, 3]))
    assert found("data", images, tmp_path / "y.npy") == ([0, 1, 1], ("3", "7"))
    np.savez(tmp_path / "y.npz", y=np.array([True, False, True]), z=np.array(["b", "b", "a"]))
    assert found("data", images, tmp_path / "y.npz", "y") == ([1, 1, 0], ("False", "True"))
    assert found("data", images, tmp_path / "y.npz", "z") == ([0, 1, 1], ("a", "b"))
    (tmp_path / "y").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 5, 6, 5]))
    assert found("data", images, tmp_path / "y") == ([0, 0, 1], ("5", "6"))
    refused("y.npy holds 3 labels, data 4 images", "data", unnamed(4), tmp_path / "y.npy")
    refused("pick its array with label_key, from y, z", "data", images, tmp_path / "y.npz")
    refused("has no array 'x', only y, z", "data", images, tmp_path / "y.npz", "x")
    refused("holds a single array: it has no array or column 'x'", "data", images, tmp_path / "y.npy", "x")
    refused("labels: .*nowhere.csv: no such file", "data", images, tmp_path / "nowhere.csv")
    (tmp_path / "y.txt").write_text("7")
    refused(r"labels must be a \.csv, \.tsv, \.npy, \.npz or IDX file, got .*txt", "data", images, tmp_path / "y.txt")


@pytest.mark.parametrize("kind", ["csv", "npy", "npz", "idx"])
def test_cut_files_of_labels(tmp_path, kind):
    path = tmp_path / f"y.{kind}"
    if kind == "csv":
        path.write_text("file,label\n0.png,x\n1.png,y\n2.png,z\n")
    elif kind == "npy":
        np.save(path, np.arange(3))
    elif kind == "npz":
        np.savez(path, y=np.arange(3))
    else:
        path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 0, 1, 2]))
    content, images = path.read_bytes(), named("0.png", "1.png", "2.png")
    whole = len(content.rstrip())
    for size in range(whole):
        path.write_bytes(content[:size])
        refused(str(path), "data", images, path)
    path.write_bytes(content[:whole])
    assert found("data", images, path)[0] == [0, 1, 2]


def test_arrays_are_told_by_their_content(tmp_path):
    with open(tmp_path / "y.npz", "wb") as file:
        np.save(file, np.array([5, 4]))
    assert found("data", unnamed(2), tmp_path / "y.npz") == ([1, 0], ("4", "5"))
    with open(tmp_path / "y.npy", "wb") as file:
        np.savez(file, y=np.array([5, 4]))
    assert found("data", unnamed(2), tmp_path / "y.npy") == ([1, 0], ("4", "5"))


@pytest.mark.parametrize(
    "array, message",
    [
        (np.array([1.0, 2.0]), r"labels are integers, names or booleans \[2\].*these are float64 \[2\]"),
        (np.array([[1], [2]]), r"these are int64 \[2, 1\]"),
        (np.array([{}, 1]), "not a readable .npy file .*|cannot be read .*"),
        (np.array(["a", ""]), "1 of 2 images have no label, the first is number 1"),
    ],
    ids=["float", "two axes", "objects", "empty name"],
)
def test_arrays_that_are_no_labels(tmp_path, array, message):
    np.save(tmp_path / "y.npy", array)
    np.savez(tmp_path / "x.npz", y=array)
    refused(message, "data", unnamed(2), tmp_path / "y.npy")
    refused(message, str(tmp_path / "x.npz"), unnamed(2), key="y")


# What comes with the images


def test_arrays_have_labels_by_key(tmp_path):
    np.savez(tmp_path / "x.npz", y=np.array(["b", "a", "b"]))
    assert found(str(tmp_path / "x.npz"), unnamed(3), key="y") == ([1, 0, 1], ("a", "b"))
    assert load_labels(str(tmp_path / "x.npz"), unnamed(3)) == (None, ())
    refused("has no array 'z', only y", str(tmp_path / "x.npz"), unnamed(3), key="z")
    np.save(tmp_path / "x.npy", np.zeros(3))
    assert load_labels(str(tmp_path / "x.npy"), unnamed(3)) == (None, ())
    refused("holds no labels 'y': give a file with labels", str(tmp_path / "x.npy"), unnamed(3), key="y")


def test_idx_labels_lie_beside(tmp_path):
    images = tmp_path / "t10k-images-idx3-ubyte"
    images.write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0]))
    assert load_labels(str(images), unnamed(2)) == (None, ())
    beside = tmp_path / "t10k-labels-idx1-ubyte"
    beside.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 9, 4]))
    assert found(str(images), unnamed(2)) == ([1, 0], ("4", "9"))
    refused("t10k-labels-idx1-ubyte holds 2 labels, .* 3 images", str(images), unnamed(3))
    refused("holds a single array", str(images), unnamed(2), key="y")
    beside.write_bytes(beside.read_bytes()[:-1])
    refused("t10k-labels-idx1-ubyte is cut off", str(images), unnamed(2))


def test_cifar_labels_have_names():
    labels = {"fine_labels": np.array([2, 0, 2]), "coarse_labels": np.array([1, 0, 1])}
    source = Cifar(np.zeros((3, 32, 32, 3), np.uint8), labels, {"fine_labels": ("cat", "ant", "bee")})
    images = unnamed(3, source)
    assert found("data", images) == ([1, 0, 1], ("cat", "bee"))
    assert found("data", images, key="coarse_labels") == ([1, 0, 1], ("0", "1"))
    refused("data has no labels 'labels', only fine_labels, coarse_labels", "data", images, key="labels")
    assert load_labels("data", unnamed(3, Cifar(source.images, {}, {}))) == (None, ())


def archive(path, members: dict[str, bytes]) -> Source:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    members = index_tar([path])
    return Source(np.arange(len(members.names)), len(members.names), members.names, members)


def test_archives_have_labels_of_samples_or_folders(tmp_path):
    path = tmp_path / "x.tar"
    samples = archive(path, {"1.jpg": b"", "1.cls": b"10", "1.txt": b"a cat", "2.jpg": b"", "2.cls": b"9"})
    assert found(str(path), samples) == ([1, 0], ("9", "10"))
    refused(r"x\.tar\[txt\]: 1 of 2 images have no label, the first is 2\.jpg", str(path), samples, key="txt")
    refused("has no labels 'json.x', only cls, txt", str(path), samples, key="json.x")
    first, second = b'{"a": true, "b": 0.5, "c": [1], "d": 1}', b'{"e": NaN, "a": false, "b": 1.5, "c": [2], "d": "x"}'
    fields = archive(path, {"1.jpg": b"", "1.json": first, "2.jpg": b"", "2.json": second})
    assert found(str(path), fields, key="json.a") == ([1, 0], ("False", "True"))
    allowed = "all integers, all names or all booleans"
    refused(rf"x\.tar\[b\]: labels are {allowed}; these are float", str(path), fields, key="b")
    refused("these are list", str(path), fields, key="c")
    refused("2 of 2 images have no label", str(path), fields, key="e")
    refused("these are int and str", str(path), fields, key="d")
    folders = archive(path, {"set/train/cat/1.jpg": b"", "set/train/dog/1.jpg": b"", "set/train/dog/x/1.jpg": b""})
    assert found(str(path), folders) == ([0, 1, 1], ("cat", "dog"))
    assert load_labels(str(path), archive(path, {"train/1.jpg": b"", "train/2.jpg": b""})) == (None, ())
    table = csv(tmp_path, "file,label\n1,x\n2,y\n")
    assert found(str(path), archive(path, {"train/1.jpg": b"", "train/2.jpg": b""}), table) == ([0, 1], ("x", "y"))


# Tables of Arrow


def test_columns_of_parquet_files(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "number": pa.array([10, 9, 10], pa.int8()),
        "name": ["b", "a", "b"],
        "kind": pa.array(["b", "a", "b"]).dictionary_encode(),
        "flag": [True, False, True],
        "gap": [1, None, 2],
        "share": [0.5, 1.0, 2.0],
    }
    path = str(tmp_path / "x.parquet")
    parquet.write_table(pa.table(columns), path)
    assert found(path, unnamed(3), key="number") == ([1, 0, 1], ("9", "10"))
    assert found(path, unnamed(3), key="name") == found(path, unnamed(3), key="kind") == ([1, 0, 1], ("a", "b"))
    assert found(path, unnamed(3), key="flag") == ([1, 0, 1], ("False", "True"))
    assert load_labels(path, unnamed(3)) == (None, ())
    refused(r"x\.parquet\[gap\]: 1 of 3 images have no label, the first is number 1", path, unnamed(3), key="gap")
    refused("labels are integers, names or booleans; 'share' is double", path, unnamed(3), key="share")
    refused("has no column 'x', only number, name, kind, flag, gap, share", path, unnamed(3), key="x")


def test_class_labels_of_hugging_face_have_names():
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=["cat", "ant", "bee"])
    features = datasets.Features({"label": kind, "n": datasets.Value("int8")})
    table = datasets.Dataset.from_dict({"label": [2, 0, 2, -1], "n": [5, 5, 4, 4]}, features=features).data.table
    images = Source(np.arange(3), 4, source=table)
    assert found("someone/pictures", images, key="label") == ([1, 0, 1], ("cat", "bee"))
    assert found("someone/pictures", images, key="n") == ([1, 1, 0], ("4", "5"))
    assert load_labels("someone/pictures", images) == (None, ())
    refused("1 of 4 images have no label, the first is number 3", "someone/pictures", unnamed(4, table), key="label")
