"""Images that cannot be read: found before the first step, left out where that is asked for, survived when lost."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from promises import COPIES, REPEATS

pytest.importorskip("skimage")

from safetensors.torch import load_file

from vqops.vqvae2 import CompareOptions, InputError, TrainOptions, compare, train
from vqops.vqvae2.data import batches
from vqops.vqvae2.data.encoded import EncodedImage
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.data.sources import load_images
from vqops.vqvae2.data.survey import Reading
from vqops.vqvae2.files.run_folder import read_rows

TINY = TrainOptions(
    steps=6, batch_size=4, image_size=8, channels=8, codebook_size=8, code_dim=4, checkpoint_every=2, device="cpu"
)
SKIPPING = Reading(skip_bad=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve images that differ everywhere."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(pixels(number)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(params=["kept", "decoded when asked for"])
def size(request, monkeypatch) -> None:
    """Of data sets below and above what is kept in memory."""
    if request.param != "kept":
        monkeypatch.setattr("vqops.vqvae2.data.survey.KEPT_DECODED_BYTES", 0)


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def weights(run: Path) -> dict:
    return load_file(run / "model.safetensors")


def names(run: Path) -> list[str]:
    return json.loads((run / "images.json").read_text())


# Before the first step


def test_all_are_named_before_anything_is_written(folder, size, tmp_path):
    for number in (3, 7):
        cut(folder / f"{number:02}.png")
    message = r"data: 2 of 12 images cannot be used: .*03\.png: .*; .*07\.png: .*\. Without them: skip_bad_images$"
    with pytest.raises(InputError, match=message):
        train(replace(TINY, data=str(folder), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_of_many_five_are_named(folder, size):
    for number in range(8):
        cut(folder / f"{number:02}.png")
    with pytest.raises(InputError, match=r"8 of 12 images .*04\.png: [^;]*; and 3 more\. Without"):
        load_images(str(folder))


def test_left_out_counted_and_named(folder, size, tmp_path, capsys):
    cut(folder / "03.png")
    shutil.copy(folder / "03.png", tmp_path / "03.png")
    options = replace(TINY, data=str(folder), skip_bad_images=True)
    run = train(replace(options, out=tmp_path / "run"))
    first, second, *_, last, _ = capsys.readouterr().out.splitlines()
    assert last == f"next: vqops extract {run} --data {folder} --skip-bad-images --out CODES"
    assert first == f"{folder}: 11 images (11 RGB), 8 x 8 pixels; left out: 1 that cannot be read"
    assert second.startswith(f"left out: {folder / '03.png'}: not a readable image")
    assert names(run) == [f"{number:02}.png" for number in range(12) if number != 3]
    (folder / "03.png").unlink()
    REPEATS.same(weights(train(replace(options, out=tmp_path / "without"))), weights(run))


def test_none_is_left(folder, size):
    for path in folder.iterdir():
        cut(path)
    with pytest.raises(InputError, match=r"none of 12 images can be read \(.*00\.png"):
        load_images(str(folder), reading=SKIPPING)


# While the run trains


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_is_one_line_whichever_process_meets_it(num_workers):
    images = Images([EncodedImage("gone.png", b"not an image")] * 4, np.arange(4), 3, (8, 8))
    with pytest.raises(InputError, match=r"^gone\.png: not a readable image [^\n]*$"):
        list(batches.training_batches(images, (8, 8), 4, 5, 0, num_workers))


def test_a_process_that_is_killed_is_one_line():
    class Killer(Images):
        def __getitem__(self, index):
            os.kill(os.getpid(), signal.SIGKILL)

    images = Killer(np.zeros((4, 8, 8, 3), np.uint8), np.arange(4), 3, (8, 8))
    with pytest.raises(InputError, match=r"^a process that loads images has ended: lower num_workers 2 \([^\n]*\)$"):
        list(batches.training_batches(images, (8, 8), 4, 5, 0, 2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_image_after_a_lost_one_takes_its_place(folder, monkeypatch, capfd, num_workers):
    monkeypatch.setattr("vqops.vqvae2.data.survey.KEPT_DECODED_BYTES", 0)
    images = replace(load_images(str(folder)), replaces=True)
    for number in (4, 5, 11):
        (folder / f"{number:02}.png").unlink()
    batch = next(iter(batches.validation_batches(images, (8, 8), 12, num_workers)))
    stand_in = {4: 6, 5: 6, 11: 0}
    for number, found in enumerate(batch):
        COPIES.same(found.permute(1, 2, 0), pixels(stand_in.get(number, number)))
    said = capfd.readouterr().out
    assert said.count("05.png: no such image file: the image after it takes its place") == 1


def lose(monkeypatch, folder: Path, after: int) -> None:
    """Remove an image when so many batches have been cut."""
    cut_batches, stack = [], batches.stack

    def stack_and_lose(images):
        cut_batches.append(images)
        if len(cut_batches) == after:
            (folder / "03.png").unlink()
        return stack(images)

    monkeypatch.setattr(batches, "stack", stack_and_lose)


def test_run_goes_on_without_a_lost_image(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vqops.vqvae2.data.survey.KEPT_DECODED_BYTES", 0)
    lose(monkeypatch, folder, after=2)
    train(replace(TINY, data=str(folder), skip_bad_images=True, out=tmp_path / "run"))
    said = capsys.readouterr().out
    assert said.count("03.png: no such image file: the image after it takes its place") == 1


def test_run_that_ends_at_a_lost_image_goes_on(folder, size, tmp_path, capsys):
    """With the file in its place again as if nothing had happened; for good without it, where that is asked for."""
    options = replace(TINY, data=str(folder))
    whole = train(replace(options, out=tmp_path / "whole"))
    for again in ("back", "lost"):
        run = train(replace(options, steps=4, out=tmp_path / again))
        (folder / "03.png").rename(tmp_path / "03.png")
        with pytest.raises(InputError, match=r"1 of 12 images cannot be used: .*03\.png: no such image file"):
            train(replace(options, resume=run))
        if again == "back":
            (tmp_path / "03.png").rename(folder / "03.png")
            REPEATS.same(weights(train(replace(options, resume=run))), weights(whole))
        else:
            train(replace(options, resume=run, skip_bad_images=True))
            assert "1 that cannot be read" in capsys.readouterr().out
            assert len(names(run)) == 12


@pytest.fixture
def validation(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "validation"))


def test_run_that_ends_at_a_lost_validation_image_goes_on(folder, validation, tmp_path, monkeypatch):
    """From the step that it had reached, as if nothing had happened."""
    monkeypatch.setattr("vqops.vqvae2.data.survey.KEPT_DECODED_BYTES", 0)
    options = replace(TINY, data=str(folder), val_data=str(validation), eval_every=2, checkpoint_every=100)
    whole = train(replace(options, out=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        lose(patch, validation, after=2)
        run = tmp_path / "run"
        with pytest.raises(InputError, match=f"03.png: no such image file; stopped after step 2, go on: .* {run}$"):
            train(replace(options, out=run))
    shutil.copy(folder / "03.png", validation)
    train(replace(options, resume=run))
    REPEATS.same(weights(run), weights(whole))
    of_run, of_whole = ([row["val_mse"] for row in read_rows(folder)] for folder in (run, whole))
    assert of_run == of_whole


def test_validation_image_may_be_lost_for_good(folder, validation, tmp_path, capsys):
    options = replace(TINY, data=str(folder), val_data=str(validation))
    run = train(replace(options, steps=4, out=tmp_path / "run"))
    (validation / "00.png").unlink()
    train(replace(options, resume=run, skip_bad_images=True))
    assert "00.png: no such image file: the image after it takes its place" in capsys.readouterr().out


def test_new_images_do_not_change_a_run(folder, tmp_path, capsys):
    options = replace(TINY, data=str(folder))
    whole = train(replace(options, out=tmp_path / "whole"))
    run = train(replace(options, steps=4, out=tmp_path / "run"))
    Image.fromarray(pixels(99)).save(folder / "01b.png")
    train(replace(options, resume=run))
    assert "left out: 1 that the run did not begin with" in capsys.readouterr().out
    REPEATS.same(weights(run), weights(whole))


def test_other_images_of_the_same_names_are_refused(folder, tmp_path):
    run = train(replace(TINY, data=str(folder), steps=4, out=tmp_path / "run"))
    for path in folder.iterdir():
        Image.fromarray(pixels(100 + int(path.stem))).save(path)
    with pytest.raises(InputError, match="was written with other pixels"):
        train(replace(TINY, data=str(folder), resume=run))


def test_damaged_list_of_names_is_named(folder, tmp_path):
    run = train(replace(TINY, data=str(folder), steps=4, out=tmp_path / "run"))
    for content in ("{", "[]", "[1]", "{}"):
        (run / "images.json").write_text(content)
        with pytest.raises(InputError, match=r"images\.json"):
            train(replace(TINY, data=str(folder), resume=run))


def test_validation_images_keep_their_places(folder, size, tmp_path, capsys):
    validation = tmp_path / "validation"
    shutil.copytree(folder, validation)
    options = replace(TINY, data=str(folder), val_data=str(validation))
    whole = train(replace(options, out=tmp_path / "whole"))
    run = train(replace(options, steps=4, out=tmp_path / "run"))
    Image.fromarray(pixels(99)).save(validation / "01b.png")
    (validation / "03.png").unlink()
    with pytest.raises(InputError, match=r"1 of 12 images cannot be used: .*03\.png: no such image file"):
        train(replace(options, resume=run))
    capsys.readouterr()
    train(replace(options, resume=run, skip_bad_images=True))
    assert "left out: 1 that the run did not begin with, 1 that cannot be read" in capsys.readouterr().out
    REPEATS.same(weights(run), weights(whole))


def test_a_comparison_goes_on_with_the_images_it_began_with(folder, tmp_path, capsys):
    sizes = "batch_size", "image_size", "channels", "codebook_size", "code_dim"
    options = CompareOptions(tmp_path / "whole", data=str(folder), steps=2, bottleneck=("none", "vq"), device="cpu")
    whole = compare(replace(options, **{name: getattr(TINY, name) for name in sizes}))
    table = (whole / "comparison.md").read_text()
    shutil.rmtree(whole / "vq")
    Image.fromarray(pixels(99)).save(folder / "01b.png")
    capsys.readouterr()
    compare(CompareOptions(resume=whole))
    assert "left out: 1 that the run did not begin with" in capsys.readouterr().out
    figures = [line.split("|")[1:-2] for line in table.splitlines()[:4]]
    assert [line.split("|")[1:-2] for line in (whole / "comparison.md").read_text().splitlines()[:4]] == figures
    (folder / "03.png").unlink()
    shutil.rmtree(whole / "vq")
    with pytest.raises(InputError, match=r"1 of 12 images cannot be used: .*03\.png.* Without them: skip_bad_images"):
        compare(CompareOptions(resume=whole))
    compare(CompareOptions(resume=whole, skip_bad_images=True))
    assert names(whole / "vq") == names(whole) == [f"{number:02}.png" for number in range(12)]
