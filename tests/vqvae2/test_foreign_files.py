"""Files that are damaged, foreign or edited: named in one line; nothing in them is run, nothing written."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("safetensors")

from safetensors.torch import save_file
from untrained import CONFIG, write_chain

from vqops.vqvae2 import (
    Codes,
    CompleteOptions,
    EvaluateOptions,
    ExtractOptions,
    InputError,
    ReconstructOptions,
    SampleOptions,
    TrainOptions,
    TrainPriorOptions,
    complete,
    evaluate,
    extract,
    load_model,
    reconstruct,
    sample,
    train,
    train_prior,
)
from vqops.vqvae2.data.batches import hold_out
from vqops.vqvae2.networks.checkpoint import KIND, fingerprint, read_file, training_options, write_file
from vqops.vqvae2.prior.checkpoint import KIND as PRIOR_KIND
from vqops.vqvae2.prior.checkpoint import load_priors

MODEL, PRIOR, META = "run/model.safetensors", "top/prior.safetensors", "codes/meta.json"
ODD = (None, True, -1, 0, 2**31, 10**30, 0.5, "x", "../../x", "a\nb", [], [[]], {}, [1, "x"], float("nan"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_chain(folder)
    Image.fromarray(np.load(folder / "images.npy")[0]).save(folder / "image.png")
    return folder


@pytest.fixture
def chain(made, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(made, tmp_path / "chain"))


class RunsCode:
    """Its pickle makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("run_by_a_pickle",)


def read_codes(folder: Path) -> None:
    codes = Codes.open(folder)
    codes.read(np.arange(codes.meta.images))


def read_priors(chain: Path) -> None:
    load_priors((chain / "bottom", chain / "top"), fingerprint(chain / MODEL), CONFIG, torch.device("cpu"))


def read_model(chain: Path) -> None:
    load_model(chain / "run")
    training_options(chain / MODEL)


READERS: dict[str, Callable[[Path], None]] = {
    MODEL: read_model,
    PRIOR: read_priors,
    META: lambda chain: read_codes(chain / "codes"),
    "codes/top.npy": lambda chain: read_codes(chain / "codes"),
    "codes/labels.npy": lambda chain: read_codes(chain / "codes"),
}


def refusal(action: Callable, *arguments) -> str:
    """The message, of one line; empty if there is none. Any other error than an InputError is the test's."""
    try:
        action(*arguments)
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def damaged(content: bytes, count: int) -> Iterator[bytes]:
    """The content cut off, changed in a few bytes, mostly of its beginning, or with bytes put in between."""
    random = np.random.default_rng(0)
    for number in range(count):
        place = int(len(content) * random.random() ** (1 if number % 2 else 4))
        if number % 3 == 0:
            yield content[:place]
        elif number % 3 == 1:
            some = random.integers(0, 256, 3, dtype=np.uint8).tobytes()
            yield content[:place] + some + content[place + 3 :]
        else:
            yield content[:place] + b"[{\x00\xff" + content[place:]


def edits(value: object) -> Iterator[object]:
    """The JSON value with each thing in it, in turn, left out or of another kind."""
    yield from ODD
    if isinstance(value, dict):
        yield value | {"unheard_of": 1}
        for key in value:
            yield {name: item for name, item in value.items() if name != key}
            yield from (value | {key: edited} for edited in edits(value[key]))
    if isinstance(value, list):
        yield value * 2
        for place in range(len(value)):
            yield from ([*value[:place], edited, *value[place + 1 :]] for edited in edits(value[place]))


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_work(chain, name):
    content = (chain / name).read_bytes()
    refused = 0
    for broken in damaged(content, 90):
        (chain / name).write_bytes(broken)
        refused += bool(refusal(READERS[name], chain))
        assert (chain / name).read_bytes() == broken
    assert refused > 45


@pytest.mark.parametrize("name", READERS)
def test_files_of_another_kind_are_named(chain, name, monkeypatch):
    monkeypatch.chdir(chain)
    torch.save({"a": RunsCode()}, chain / "torch.pt")
    np.savez(chain / "arrays.npz", a=np.zeros(2))
    np.save(chain / "objects.npy", np.array([RunsCode(), None]), allow_pickle=True)
    save_file({"weight": torch.zeros(1)}, chain / "other.safetensors", metadata={"format": "pt"})
    foreign = [(chain / file).read_bytes() for file in ("torch.pt", "arrays.npz", "objects.npy", "other.safetensors")]
    texts = b"", b"\0" * 100, b"[]", b"{}", b"null", b"[" * 5000, b"\xff\xfe{}", b'{"kind": "vqops.codes"}', b"<html>"
    for content in (*texts, pickle.dumps(RunsCode()), *foreign):
        (chain / name).write_bytes(content)
        assert Path(name).name in refusal(READERS[name], chain), content[:40]
    (chain / name).unlink()
    (chain / name).mkdir()
    assert Path(name).parent.name in refusal(READERS[name], chain)
    assert not (chain / "run_by_a_pickle").exists()


SOME_OR_ALL = pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])


@SOME_OR_ALL
@pytest.mark.parametrize("name, kind", [(MODEL, KIND), (PRIOR, PRIOR_KIND)])
def test_edited_descriptions_are_refused_or_work(chain, name, kind, every):
    description, tensors = read_file(chain / name, kind)
    parts = {KIND: ("model", "training"), PRIOR_KIND: ("prior", "model", "image_shape")}[kind]
    edited = [description | {part: edit} for part in parts for edit in edits(description[part])][::every]
    refused = 0
    for one in edited:
        save_file(tensors, chain / name, metadata={"vqops": json.dumps(one)})
        refused += bool(refusal(READERS[name], chain))
    assert refused > len(edited) / 4


def test_edited_metas_are_refused_or_work(chain):
    edited = list(edits(json.loads((chain / META).read_text())))
    refused = 0
    for one in edited:
        (chain / META).write_text(json.dumps(one))
        refused += bool(refusal(read_codes, chain / "codes"))
    assert refused > len(edited) / 2


@pytest.mark.parametrize("name, kind", [(MODEL, KIND), (PRIOR, PRIOR_KIND)])
def test_tensors_are_those_of_the_network(chain, name, kind):
    """By name, shape and dtype, and finite."""
    description, tensors = read_file(chain / name, kind)
    key, weight = next((key, tensor) for key, tensor in tensors.items() if tensor.ndim > 1)

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        write_file(chain / name, changed, description)
        assert message in refusal(READERS[name], chain)

    infinite = weight.clone()
    infinite[0, 0] = torch.inf
    refused(tensors | {key: infinite}, f"{key} is not finite")
    refused(tensors | {key: weight * torch.nan}, f"{key} is not finite")
    refused(tensors | {key: weight.half()}, f"{key} is torch.float16 {list(weight.shape)}, of the network torch.float")
    refused(tensors | {key: weight[:-1]}, f"of the network torch.float32 {list(weight.shape)}")
    refused(tensors | {"more": weight.clone()}, "more is not of the network")
    refused({name: tensor for name, tensor in tensors.items() if name != key}, f"{key} is missing")


def test_priors_fit_the_model(chain):
    description, tensors = read_file(chain / PRIOR, PRIOR_KIND)

    def refused(message: str, **changes) -> None:
        write_file(chain / PRIOR, tensors, description | changes)
        assert message in refusal(read_priors, chain)

    refused("another model than this run's", model="other")
    refused("describes no images of 1 channels: image_shape is (3, 16, 16)", image_shape=[3, 16, 16])
    refused("its sizes are ((8, 8), (4, 4)), of the model ((16, 16), (8, 8))", image_shape=[1, 32, 32])
    wide = replace(CONFIG, codebook_size=16)
    priors, sha = (chain / "bottom", chain / "top"), fingerprint(chain / MODEL)
    write_file(chain / PRIOR, tensors, description)
    with pytest.raises(InputError, match="its codes a level are 8, of the model 16"):
        load_priors(priors, sha, wide, torch.device("cpu"))


def test_codes_are_below_their_number(chain):
    image = int(hold_out(20, seed=0)[0].max())
    bottom = np.load(chain / "codes/bottom.npy", mmap_mode="r+")
    bottom[image, 2, 3] = 8
    bottom.flush()
    message = f"bottom.npy: image {image} has the code 8, codes are 0 to 7"
    options = TrainPriorOptions(chain / "codes", "bottom", chain / "out", steps=1, device="cpu")
    assert message in refusal(train_prior, options)
    assert not (chain / "out").exists()
    read = Codes.open(chain / "codes").read
    assert message in refusal(read, np.arange(20))
    assert refusal(read, np.arange(image)) == ""
    assert refusal(read, np.arange(20), 1) == ""  # of the top level alone


def test_labels_are_those_of_the_classes(chain):
    def refused(labels: np.ndarray, message: str) -> None:
        np.save(chain / "codes/labels.npy", labels)
        assert message in refusal(Codes.open, chain / "codes")

    refused(np.full(20, 2), "labels.npy holds 2 to 2, meta.json names 2 classes")
    refused(np.full(20, -1), "labels.npy holds -1 to -1")
    refused(np.zeros(20), "labels.npy is float64 [20], meta.json says int64 [20]")
    refused(np.zeros(19, np.int64), "labels.npy is int64 [19], meta.json says int64 [20]")
    refused(np.zeros(20, ">i8"), "labels.npy is >i8 [20]")


def test_extraction_does_not_fill_up_a_file_that_is_cut_off(chain):
    """NumPy would: opened to be written, an array is made as long as its header says."""
    options = ExtractOptions(chain / "run", str(chain / "images.npy"), chain / "new", batch_size=4, device="cpu")
    extract(options)
    path = chain / "new/bottom.npy"
    path.write_bytes(path.read_bytes()[:-100])
    before = path.read_bytes()
    assert "bottom.npy is not readable" in refusal(extract, options)
    assert path.read_bytes() == before


def contents(run: Path) -> dict[str, bytes]:
    """Without the note of who writes there, which says nothing of the run."""
    own = (path for path in run.iterdir() if path.is_file() and path.name not in (".lock", ".writer"))
    return {path.name: path.read_bytes() for path in own}


@pytest.mark.parametrize("name", ["train_state.pt", "config.toml"])
def test_a_run_with_damaged_or_foreign_files_is_left_as_it_is(chain, name, monkeypatch):
    monkeypatch.chdir(chain)
    sizes = {"channels": 4, "codebook_size": 8, "code_dim": 4, "batch_size": 4}
    options = TrainOptions(data=str(chain / "images.npy"), steps=1, out=chain / "trained", device="cpu", **sizes)
    whole = train(options)
    foreign = [b"", b"[]", pickle.dumps(RunsCode())]
    for state in ([1], {"a": 1}, torch.zeros(2), {"about": 3}, {"about": {"images": 19, "image size": [16, 16]}}):
        torch.save(state, chain / "state.pt")
        foreign.append((chain / "state.pt").read_bytes())
    refused = 0
    for number, content in enumerate([*foreign, *damaged((whole / name).read_bytes(), 30)]):
        run = Path(shutil.copytree(whole, chain / f"{name}_{number}"))
        (run / name).write_bytes(content)
        before = contents(run)
        said = refusal(train, replace(options, steps=2, out=None, resume=run))
        assert (name in said or "cannot change" in said) if said else number >= len(foreign)
        assert not said or contents(run) == before, "files changed"  # short: they are long
        refused += bool(said)
    assert refused > len(foreign) + 15
    assert not (chain / "run_by_a_pickle").exists()


# Commands


def run_commands(chain: Path) -> Iterator[str]:
    """What each command says of the chain; the refused have begun nothing."""
    run, data, priors = chain / "run", str(chain / "images.npy"), (chain / "bottom", chain / "top")
    drawn = {"run": run, "prior": priors, "device": "cpu", "out": chain / "out"}
    commands = {
        reconstruct: ReconstructOptions(run, (chain / "image.png",), chain / "out"),
        extract: ExtractOptions(run, data, chain / "out", device="cpu"),
        train_prior: TrainPriorOptions(chain / "codes", "top", chain / "out", steps=1, width=16, device="cpu"),
        sample: SampleOptions(**drawn, count=2, classes=("cat",)),
        complete: CompleteOptions(**drawn, images=(chain / "image.png",), count=1),
        evaluate: EvaluateOptions(run, data, chain / "out", prior=priors, device="cpu"),
    }
    for command, options in commands.items():
        said = refusal(command, options)
        assert (chain / "out").exists() == (not said)
        shutil.rmtree(chain / "out", ignore_errors=True)
        yield said


# The places, in the list of commands, of those that read the file.
READ_BY = {MODEL: (0, 1, 3, 4, 5), PRIOR: (3, 4, 5), META: (2,), "codes/top.npy": (2,), "codes/labels.npy": (2,)}


def test_commands_work_on_files_as_they_are_written(chain):
    assert [*run_commands(chain)] == [""] * 6


@pytest.mark.parametrize("name", READ_BY)
def test_commands_name_the_file_and_begin_nothing(chain, name):
    content = (chain / name).read_bytes()
    (chain / name).write_bytes(content[:-2])
    said = [*run_commands(chain)]
    assert tuple(number for number, line in enumerate(said) if line) == READ_BY[name]
    assert all(Path(name).name in line for line in said if line)


@pytest.mark.slow
@pytest.mark.parametrize("name", READ_BY)
def test_commands_with_damaged_files_refuse_or_work(chain, name):
    for broken in damaged((chain / name).read_bytes(), 20):
        (chain / name).write_bytes(broken)
        said = [*run_commands(chain)]
        assert not any(line for number, line in enumerate(said) if number not in READ_BY[name])
        assert (chain / name).read_bytes() == broken
