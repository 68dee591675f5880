"""Memory is what the sizes say: linear in the codes of an image, the same for any number of images; and one line where
there is too little of it."""

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from memory import LargestTemporaries
from PIL import Image
from promises import COPIES, WHOLE

pytest.importorskip("tyro")
pytest.importorskip("safetensors")

from untrained import CONFIG, write_chain

from vqops import vqvae2
from vqops.cli import memory as cli_memory
from vqops.cli.memory import out_of_memory
from vqops.vqvae2 import (
    VQVAE2,
    Codes,
    CompleteOptions,
    Prior,
    PriorConfig,
    SampleOptions,
    TrainOptions,
    complete,
    load_model,
    sample,
)
from vqops.vqvae2.data.batches import training_batches
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.evaluation.classifier import accuracies, network
from vqops.vqvae2.evaluation.reconstruction_metrics import measure
from vqops.vqvae2.pictures import latents
from vqops.vqvae2.pictures.latents import Seen, Some
from vqops.vqvae2.prior import code_folder
from vqops.vqvae2.prior.transformer import nats_per_code

sample_module = import_module("vqops.vqvae2.prior.sample")


def test_the_prior_takes_memory_in_proportion_to_its_codes():
    def most(side: int) -> int:
        config = PriorConfig("bottom", ("bottom",), ((side, side),), 8, width=8, layers=2, heads=2, dropout=0.1)
        prior, codes = Prior(config).train(), torch.zeros(1, side, side, dtype=torch.int64)
        with LargestTemporaries() as memory:
            nats_per_code(prior, codes, (), torch.zeros(1, dtype=torch.int64)).backward()
        return memory.most

    assert most(64) < 4.2 * most(32)


# Any number of images


def most_held(action, *arguments) -> tuple[int, int]:
    """The most bytes that tensors, and that Python's objects and NumPy's arrays held during the call."""
    tracemalloc.start()
    try:
        with LargestTemporaries() as memory:
            action(*arguments)
        return memory.most, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(autouse=True)
def little_shown(monkeypatch):
    """Pictures and blocks so small that a few images are many."""
    monkeypatch.setattr(latents, "SHOWN_VECTORS", 20)
    monkeypatch.setattr(latents, "SHOWN_MEANS", 20)
    monkeypatch.setattr(sample_module, "GRID_ROWS", 1)
    monkeypatch.setattr(code_folder, "COUNTED_AT_ONCE", 16 * 50)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    write_chain(folder, size=32, images=200, config=replace(CONFIG, strides=(8, 2)))
    Image.fromarray(np.load(folder / "images.npy")[0]).save(folder / "image.png")
    return folder


class Batches:
    """Images that are made when asked for."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.full((8, 1, 32, 32), number % 256, dtype=torch.uint8) for number in range(self.count))


def classify(model: VQVAE2, batches: Batches) -> None:
    classifiers = {name: network(1, 2).eval() for name in ("real", "samples")}
    accuracies(classifiers, batches, torch.zeros(8 * len(batches), dtype=torch.int64))


@pytest.mark.parametrize("action", [measure, Seen, classify])
def test_measuring_any_number_of_images_takes_the_same_memory(chain, action):
    model = load_model(chain / "run")
    action(model, Batches(2))  # what is computed once
    few, many = (most_held(action, model, Batches(count)) for count in (10, 60))
    assert many[0] < 1.05 * few[0]
    assert many[1] < few[1] + 200_000  # objects in cycles that are not yet collected; 60 batches are 500 KB


def draw(chain: Path, out: Path, count: int) -> None:
    priors = chain / "bottom", chain / "top"
    sample(SampleOptions(chain / "run", priors, out, count=count, batch_size=20, device="cpu"))


def draw_completions(chain: Path, out: Path, count: int) -> None:
    options = CompleteOptions(chain / "run", (chain / "bottom", chain / "top"), out, images=(chain / "image.png",))
    complete(replace(options, count=count, batch_size=20, device="cpu"))


@pytest.mark.parametrize("action", [draw, draw_completions])
def test_drawing_any_number_of_images_takes_the_same_memory(chain, tmp_path, action):
    action(chain, tmp_path / "first", 1)
    (few, _), (many, _) = (most_held(action, chain, tmp_path / str(count), count) for count in (60, 140))
    assert many < 1.05 * few


def test_codes_are_counted_a_block_at_a_time(chain):
    codes = Codes.open(chain / "codes")
    counts = codes.counts(0, np.arange(10, 200))
    WHOLE.same(counts, np.bincount(codes.levels[0][10:].ravel(), minlength=codes.meta.codebook_size))
    _, few, many = (most_held(codes.counts, 0, np.arange(count))[1] for count in (100, 100, 200))
    assert many < few + 5_000  # all at once it is 15 KB more


def test_some_of_all_rows():
    """All where there are few, else some of everywhere, however they come in batches."""
    rows = torch.arange(1000.0)[:, None]
    few, many, again = Some(1000), Some(100), Some(100)
    for some, size in ((few, 7), (many, 7), (again, 400)):
        for part in rows.split(size):
            some.add(part)
    COPIES.same(few.rows, rows)
    COPIES.same((many.rows, many.positions), (again.rows, again.positions))
    COPIES.same(many.rows[:, 0].long().numpy(), many.positions)
    assert (len(many.rows), many.seen) == (100, 1000)
    assert (np.diff(many.positions) > 0).all()
    quarters = np.bincount(many.positions // 250)
    assert quarters.min() > 10  # 25 each would be equal


# Too little of it

LIMITED = """
import json, os, resource, sys
import vqops.cli, vqops.vqvae2
for name in vqops.vqvae2.__all__:
    getattr(vqops.vqvae2, name)
for arguments in json.loads(sys.argv[1]):
    if not os.fork():
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)
        os._exit(vqops.cli.main(arguments))
    print("exit", os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr)
"""


MADE = ("run", "--prior", "bottom", "top")
WIDE = ("--data", "wide.npy", "--image-size", "1024", "--device", "cpu")
LOWER = {
    ("train", *WIDE): "--batch-size (32), --image-size (1024) or --channels (128)",
    ("train-prior", "codes", "--level", "top", "--width", "4096"): "--batch-size (32), --width (4096) or --layers (4)",
    ("sample", *MADE, "--count", "3000000", "--batch-size", "3000000"): "--batch-size (3000000)",
    ("complete", *MADE, "--images", "image.png", "--count", "99999", "--batch-size", "99999"): "--batch-size (99999)",
    ("compare", *WIDE): "--batch-size (32), --image-size (1024) or --channels (128)",
    ("extract", "run", *WIDE): "--batch-size (64) or --image-size (1024)",
    ("evaluate", "run", *WIDE): "--batch-size (64), --image-size (1024) or --classifier-images (2000)",
    ("reconstruct", "run", "wide.png"): "smaller images need less",
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits what /proc says is used")
@pytest.mark.parametrize("commands", [list(LOWER)[:2], pytest.param(list(LOWER)[2:], marks=pytest.mark.slow)])
def test_too_little_memory_is_one_line(chain, tmp_path, commands):
    np.save(chain / "wide.npy", np.zeros((40, 1024, 1024), np.uint8))
    Image.new("L", (5000, 5000)).save(chain / "wide.png")
    arguments = json.dumps([(*command, "--out", str(tmp_path / command[0])) for command in commands])
    script = [sys.executable, "-W", "ignore", "-c", LIMITED, arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(script, capture_output=True, text=True, timeout=300, cwd=chain, env=environment)
    said = ended.stderr.splitlines()
    assert said[1::2] == ["exit 2"] * len(commands), ended.stderr
    for command, line in zip(commands, said[::2], strict=True):
        assert line.startswith(f"vqops {command[0]}: out of memory")
        assert line.endswith(LOWER[command])


def test_what_to_lower_are_options_of_the_command():
    for command, names in cli_memory.LOWER.items():
        kind = getattr(vqvae2, f"{command.title().replace('-', '')}Options")
        assert set(names) <= {field.name for field in fields(kind)}


TRAIN = TrainOptions(num_workers=2)
WORKERS = (
    "the processes that load images are out of memory or shared memory (/dev/shm): "
    "lower --num-workers (2) or --batch-size (32)"
)


@pytest.mark.parametrize(
    "error, line",
    [
        (MemoryError(), "out of memory: lower --batch-size"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory: lower --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
         "out of memory (21.5 GB asked for): lower --batch-size"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB). Tried to allocate 256.00 MiB on private pool"),
         "out of memory (268.4 MB asked for): lower --batch-size"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8000000000 bytes."),
         "out of memory (8.0 GB asked for): lower --batch-size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory: lower --batch-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"), WORKERS),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), WORKERS),
        (RuntimeError("Caught _ArrayMemoryError in DataLoader worker process 0.\nOriginal Traceback"), WORKERS),
        (RuntimeError("unable to mmap 8388608 bytes from file </torch_18_3_0>: Cannot allocate memory (12)"), WORKERS),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault."), ""),
        (RuntimeError("could not create a primitive"), "out of memory: lower --batch-size"),
        (RuntimeError("could not create a primitive descriptor for a convolution"), ""),
        (RuntimeError("shapes cannot be multiplied"), ""),
        (OSError(errno.ENOSPC, "No space left on device"), ""),
        (None, ""),
    ],
    ids=str,
)  # fmt: skip
def test_errors_of_memory(error, line):
    assert out_of_memory(error, "train", TRAIN).startswith(line)
    assert bool(out_of_memory(error, "train", TRAIN)) == bool(line)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked with the patch")
def test_shared_memory_that_is_short_is_an_error_of_the_worker(monkeypatch):
    """Not of the thread that sends a batch: nobody hears of that, and the training would wait for ever."""

    def short(*_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device")

    monkeypatch.setattr(torch.Tensor, "share_memory_", short)
    images = Images.of_array(np.zeros((4, 8, 8), np.uint8), "x")
    with pytest.raises(RuntimeError) as error:
        next(iter(training_batches(images, (8, 8), 2, steps=2, seed=0, num_workers=1)))
    assert out_of_memory(error.value, "train", TRAIN) == WORKERS
