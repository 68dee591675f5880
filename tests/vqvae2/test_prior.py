"""The prior: its likelihood, that it sees nothing it should not, and that drawing with a cache is drawing without."""

import itertools
import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from promises import COPIES, REPEATS
from torch.testing import assert_close

pytest.importorskip("safetensors")

from vqops.vqvae2 import (
    Codes,
    CodesMeta,
    DrawOptions,
    InputError,
    Prior,
    PriorConfig,
    TrainOptions,
    TrainPriorOptions,
    load_prior,
    train,
    train_prior,
)
from vqops.vqvae2.networks.checkpoint import read_file, write_file
from vqops.vqvae2.prior.sampling import choose, draw, draw_levels
from vqops.vqvae2.prior.transformer import Rotation, nats_per_code

K, NAMES, SIZES = 11, ("bottom", "middle", "top"), ((4, 6), (2, 3), (1, 2))
LEVELS = ["bottom", "middle", "top"]
DRAW = DrawOptions(run=Path("run"), prior=(Path("prior"),), out=Path("out"))


def small_prior(level: str, trained: bool = True) -> Prior:
    """`trained`: with a head that is not zero, as if it had been trained."""
    torch.manual_seed(0)
    config = PriorConfig(level, NAMES, SIZES, K, ("cat", "dog"), width=16, layers=2, heads=2)
    prior = Prior(config).eval()
    if trained:
        for parameter in prior.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return prior


def random_codes(batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, K, (batch, *size), generator=generator) for size in SIZES]


def inputs_of(prior: Prior, batch: int = 3):
    own, *above = random_codes(batch)[prior.config.position :]
    return own, tuple(above), torch.arange(batch) % 3


@pytest.mark.parametrize("level", LEVELS)
def test_at_first_every_code_is_as_likely(level):
    prior = small_prior(level, trained=False)
    assert_close(nats_per_code(prior, *inputs_of(prior)).item(), math.log(K), rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_a_code_sees_those_before_it_and_nothing_else(level):
    prior = small_prior(level)
    own, above, labels = inputs_of(prior)
    logits = prior(own, above, labels)
    for position in range(prior.config.length):
        changed = own.flatten(1).clone()
        changed[:, position] = (changed[:, position] + 1) % K
        moved = (prior(changed.view_as(own), above, labels) - logits).abs().amax(dim=(0, 2))
        assert moved[: position + 1].max() < 1e-5
        assert position + 1 == len(moved) or moved[position + 1 :].min() > 1e-4


@pytest.mark.parametrize("level", LEVELS)
def test_the_class_and_every_level_above_matter(level):
    prior = small_prior(level)
    own, above, labels = inputs_of(prior)
    logits = prior(own, above, labels)
    assert not torch.allclose(prior(own, above, (labels + 1) % 3), logits)
    for number in range(len(above)):
        others = tuple((codes + 1) % K if n == number else codes for n, codes in enumerate(above))
        assert not torch.allclose(prior(own, others, labels), logits)


@pytest.mark.parametrize("level", LEVELS)
def test_cached_logits_are_the_uncached_ones(level):
    prior = small_prior(level)
    own, above, labels = inputs_of(prior)
    expected = prior(own, above, labels)
    before, addend = prior.context(above, labels)
    caches = prior.caches(before)
    for position in range(prior.config.length):
        assert_close(prior.step(before, addend, caches), expected[:, position], rtol=1e-4, atol=1e-5)
        before = prior.codes(own.flatten(1)[:, position])[:, None]


def test_rotated_products_depend_on_rows_and_columns_apart():
    """Of a query and a key, for all pairs of places in a grid of 5 x 4."""
    rotation = Rotation((5, 4), 16).double()
    query, key = (torch.randn(1, 1, 1, 16, dtype=torch.float64).expand(-1, -1, 20, -1) for _ in range(2))
    product = (rotation(query) @ rotation(key).transpose(2, 3)).view(5, 4, 5, 4)
    found = {}
    for row, column, other_row, other_column in itertools.product(range(5), range(4), range(5), range(4)):
        value = product[row, column, other_row, other_column].item()
        apart = other_row - row, other_column - column
        assert value == pytest.approx(found.setdefault(apart, value), rel=1e-5, abs=1e-5)
    assert len({round(value, 4) for value in found.values()}) == len(found) == 9 * 7


# Drawing


def test_drawn_codes_follow_the_logits():
    """The likeliest code of each position, found by the whole forward pass; with guidance those of the two passes."""
    prior = small_prior("bottom")
    _, above, labels = inputs_of(prior)
    for guidance in (1.0, 2.5):
        options = replace(DRAW, temperature=0.0, guidance=guidance)
        drawn = draw(prior, above, labels, options, torch.Generator())
        logits = prior(drawn, above, labels)
        without = prior(drawn, above, torch.full_like(labels, prior.no_class))
        guided = without + guidance * (logits - without)
        chosen = guided.gather(-1, drawn.flatten(1)[..., None])[..., 0]
        assert_close(chosen, guided.amax(-1))


def test_draws_have_the_probabilities_of_the_prior():
    prior = small_prior("top")
    count = 4000
    labels = torch.zeros(count, dtype=torch.int64)
    drawn = draw(prior, (), labels, DRAW, torch.Generator().manual_seed(0))
    first = prior(drawn[:1], (), labels[:1])[0, 0].softmax(-1)
    shares = torch.bincount(drawn[:, 0, 0], minlength=K) / count
    assert (shares - first).abs().max() < 5 * (0.25 / count) ** 0.5


def test_given_rows_are_kept():
    priors = [small_prior(level) for level in LEVELS]
    given = tuple(codes[:, : codes.shape[1] // 2] for codes in random_codes())
    drawn = draw_levels(priors, torch.zeros(3, dtype=torch.int64), DRAW, torch.Generator().manual_seed(0), given)
    assert [tuple(codes.shape[1:]) for codes in drawn] == list(SIZES)
    for codes, known in zip(drawn, given, strict=True):
        COPIES.same(codes[:, : known.shape[1]], known)


def test_seed_decides_the_draw():
    prior, labels = small_prior("top"), torch.zeros(50, dtype=torch.int64)
    once, again, other = (draw(prior, (), labels, DRAW, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    REPEATS.same(once, again)
    assert (once != other).any()


def test_logits_that_are_not_finite_are_refused():
    prior, labels = small_prior("top"), torch.zeros(2, dtype=torch.int64)
    prior.head.bias.data[3] = torch.inf
    with pytest.raises(InputError, match=r"the prior of level top gives logits that are not finite.* guidance 1\.0"):
        draw(prior, (), labels, DRAW, torch.Generator())


@pytest.mark.parametrize(
    "settings, allowed",
    [
        ({}, {0, 1, 2}),
        ({"top_k": 2}, {0, 2}),
        ({"top_k": 9}, {0, 1, 2}),
        ({"top_p": 0.49}, {2}),
        ({"top_p": 0.51}, {0, 2}),
    ],
    ids=str,
)
def test_likeliest_codes(settings, allowed):
    logits = torch.tensor([[0.3, 0.2, 0.5]]).log().expand(400, -1)
    drawn = choose(logits, 1.0, settings.get("top_k", 0), settings.get("top_p", 1.0), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == allowed


def test_temperature():
    logits = torch.tensor([[0.3, 0.2, 0.5]]).log().expand(4000, -1)
    assert choose(logits, 0.0, 0, 1.0, torch.Generator()).unique().tolist() == [2]
    drawn = choose(logits, 0.5, 0, 1.0, torch.Generator().manual_seed(0))
    expected = torch.tensor([0.3, 0.2, 0.5]).square()
    assert_close(torch.bincount(drawn) / 4000, expected / expected.sum(), rtol=0, atol=0.04)


# Training

GOING_ON = {"steps": 12, "eval_every": 5, "dropout": 0.2, "level": "bottom", "weight_ema": 0.9}


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    """Codes with a structure to learn: the class says the top codes, those the bottom ones, and a row repeats."""
    folder = tmp_path_factory.mktemp("codes")
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 200)
    top = (labels * 4)[:, None, None] + random.integers(0, 2, (200, 2, 2))
    bottom = np.repeat(np.repeat(top, 2, axis=1), 2, axis=2) + 1
    meta = CodesMeta(200, 0, (3, 16, 16), K, ("bottom", "top"), ((4, 4), (2, 2)), "sha", "data", "", "", ("a", "b"))
    written = Codes.create(folder, meta, labels)
    written.write(0, (torch.from_numpy(bottom), torch.from_numpy(top)))
    written.mark(200)
    return folder


def options_of(codes: Path, out: Path, **changes) -> TrainPriorOptions:
    options = TrainPriorOptions(codes, "bottom", out, steps=60, width=16, layers=2, heads=2, lr=1e-2, warmup=5)
    return replace(options, eval_every=20, device="cpu", **changes)


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.mark.parametrize("level, reachable", [("top", math.log(2)), ("bottom", 0.0)])
def test_training_learns_class_and_levels_above(codes, tmp_path, capsys, level, reachable):
    """The top codes are one of two given the class; the bottom ones are certain given the top ones."""
    out = train_prior(replace(options_of(codes, tmp_path / "prior", level=level), steps=120))
    rows = rows_of(out)
    assert rows[-1]["val_nats_per_code"] < reachable + 0.15
    prior, description = load_prior(out)
    assert description["val_nats_per_code"] == min(row.get("val_nats_per_code", 9) for row in rows)
    assert (description["model"], description["image_shape"]) == ("sha", [3, 16, 16])
    assert not prior.training
    said = capsys.readouterr().out
    bits = description["val_nats_per_code"] * prior.config.length / math.log(2) / (3 * 16 * 16)
    assert f"{bits:.4f} bits per dimension" in said
    following, curves = said.splitlines()[-2:]
    assert following.startswith("next: vqops sample RUN --prior ")
    assert curves == f"curves: {out / 'curves.png'}"


def test_same_seed_same_prior(codes, tmp_path):
    options = options_of(codes, tmp_path / "a", dropout=0.2)
    once, again = (load_prior(train_prior(replace(options, steps=3, out=tmp_path / name)))[0] for name in "ab")
    REPEATS.same(again.state_dict(), once.state_dict())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_average_of_the_weights_is_kept(codes, tmp_path, precision):
    options = replace(options_of(codes, tmp_path / "prior"), steps=20, weight_ema=0.9, precision=precision)
    kept = load_prior(train_prior(options))[0].state_dict()
    state = torch.load(tmp_path / "prior" / "train_state.pt")
    names = [name for name, _ in Prior(load_prior(tmp_path / "prior")[0].config).named_parameters()]
    COPIES.same([kept[name] for name in names], state["average"])
    assert all((kept[name] != state["module"][name]).any() for name in names)


def test_prior_of_the_first_version_is_refused(codes, tmp_path):
    out = train_prior(replace(options_of(codes, tmp_path / "prior"), steps=1))
    description, tensors = read_file(out / "prior.safetensors", "vqops.prior")
    del description["prior"]["version"]
    write_file(out / "prior.safetensors", tensors, description)
    with pytest.raises(InputError, match=r"a prior of the first version, .* train it anew"):
        load_prior(out)


def test_early_stop_keeps_the_best(tmp_path, capsys):
    """Codes without any structure, few enough to learn by heart: held-out codes only get less likely."""
    meta = CodesMeta(40, 0, (3, 16, 16), K, ("bottom",), ((4, 4),), "sha", "data", "", "", ())
    written = Codes.create(tmp_path, meta, None)
    written.write(0, (torch.from_numpy(np.random.default_rng(0).integers(0, K, (40, 4, 4))),))
    written.mark(40)
    options = replace(options_of(tmp_path, tmp_path / "prior", dropout=0.0, patience=2), steps=2000, width=32)
    rows = rows_of(train_prior(options))
    held_out = [row["val_nats_per_code"] for row in rows if "val_nats_per_code" in row]
    assert rows[-1]["step"] < 2000
    assert load_prior(tmp_path / "prior")[1]["val_nats_per_code"] == min(held_out) < held_out[-1]
    assert "no better for 2 measurements" in capsys.readouterr().out


# Going on


@pytest.fixture(scope="module")
def whole(codes, tmp_path_factory) -> Path:
    return train_prior(replace(options_of(codes, tmp_path_factory.mktemp("whole") / "prior"), **GOING_ON))


def cut_off(monkeypatch, options, step: int, how) -> None:
    """A training that ends in this step: by a signal, or by an exception as if it were killed."""
    adam_step, calls = torch.optim.AdamW.step, []

    def step_and_end(optimizer, *arguments):
        calls.append(optimizer)
        if len(calls) == step:
            how()
        return adam_step(optimizer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step_and_end)
        train_prior(options)


def check_same_prior(out: Path, whole: Path) -> None:
    """Weights, optimizer, what is best, the generators, the file; the steps of the metrics."""
    ours, theirs = (torch.load(folder / "train_state.pt", weights_only=True) for folder in (out, whole))
    for part in ("module", "random", "more"):
        REPEATS.same(ours[part], theirs[part], where=part)
    REPEATS.same(ours["optimizer"]["state"], theirs["optimizer"]["state"])
    REPEATS.same(load_prior(out)[0].state_dict(), load_prior(whole)[0].state_dict())
    kept, expected = ([row["step"] for row in rows_of(folder)] for folder in (out, whole))
    assert kept == sorted(set(kept))
    assert set(expected) <= set(kept)
    measured, expected = (
        {row["step"]: row["val_nats_per_code"] for row in rows_of(folder) if "val_nats_per_code" in row}
        for folder in (out, whole)
    )
    assert measured == expected


@pytest.mark.parametrize("step", [2, 5, 8])  # before the first measurement, at one, between two
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_interrupted_prior_goes_on(codes, whole, tmp_path, monkeypatch, capsys, step, number):
    options = replace(options_of(codes, tmp_path / "prior"), **GOING_ON)
    cut_off(monkeypatch, options, step, lambda: signal.raise_signal(number))
    go_on = f"after step {step} of 12; go on: vqops train-prior {codes} --resume {options.out}\n"
    assert go_on in capsys.readouterr().out
    assert (options.out / "prior.safetensors").exists() == (step > 5 or number == signal.SIGINT)
    torch.rand(step)
    train_prior(TrainPriorOptions(codes, resume=options.out))
    assert f"resumed from step {step}\n" in capsys.readouterr().out
    check_same_prior(options.out, whole)


def killed():
    raise KeyboardInterrupt


def test_killed_prior_goes_on_from_its_last_measurement(codes, whole, tmp_path, monkeypatch, capsys):
    options = replace(options_of(codes, tmp_path / "prior"), **GOING_ON)
    for step in (3, 8):
        with pytest.raises(KeyboardInterrupt):
            cut_off(monkeypatch, options, step, killed)
        options = TrainPriorOptions(codes, resume=tmp_path / "prior")
    assert "no checkpoint yet: starts anew\n" in capsys.readouterr().out
    with (tmp_path / "prior" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "nats_')  # as a full disk leaves it
    train_prior(options)
    assert "resumed from step 5\n" in capsys.readouterr().out
    check_same_prior(tmp_path / "prior", whole)


def test_early_stop_is_the_same_after_an_interruption(codes, tmp_path, monkeypatch):
    options = replace(options_of(codes, tmp_path / "a"), steps=500, eval_every=5, lr=0.3, patience=2)
    whole = train_prior(options)
    ended = torch.load(whole / "train_state.pt", weights_only=True)["step"]
    assert ended < 500
    options = replace(options, out=tmp_path / "b")
    cut_off(monkeypatch, options, ended - 2, lambda: signal.raise_signal(signal.SIGTERM))
    train_prior(TrainPriorOptions(codes, resume=tmp_path / "b"))
    check_same_prior(tmp_path / "b", whole)
    with pytest.raises(InputError, match=rf"got no better in 2 measurements, after step {ended}: name more with patie"):
        train_prior(TrainPriorOptions(codes, resume=tmp_path / "b"))


def test_what_does_not_fit_the_prior_is_refused(codes, whole, tmp_path):
    def refused(message, **changes):
        with pytest.raises(InputError, match=message):
            train_prior(TrainPriorOptions(**{"codes": codes, "resume": whole, "steps": 20, **changes}))

    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    refused(r"resume .*: width is 16 there and cannot change, got 32", width=32)
    refused(r"level is bottom there and cannot change, got top", level="top")
    refused("eval_every is 5 there and cannot change, got 6", eval_every=6)
    refused("has done its steps, after step 12: name more with steps", steps=12)
    refused("no run of vqops train-prior is there", resume=tmp_path)
    with pytest.raises(InputError, match=r"^resume .*: vqops train cannot go on there: .*: there is no option 'width'"):
        train(TrainOptions(resume=whole))
    shutil.copytree(codes, tmp_path / "codes")
    meta = json.loads((codes / "meta.json").read_text())
    (tmp_path / "codes" / "meta.json").write_text(json.dumps(meta | {"model": "other"}))
    refused(r"train_state\.pt was written with model sha, now it is other", codes=tmp_path / "codes")
    with pytest.raises(InputError, match=r"^level is needed, unless resume"):
        TrainPriorOptions(codes)
    before[".writer"] = (whole / ".writer").read_bytes()
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


def test_prior_can_be_lengthened(codes, tmp_path):
    out = train_prior(replace(options_of(codes, tmp_path / "prior"), **GOING_ON | {"steps": 5}))
    train_prior(TrainPriorOptions(codes, resume=out, steps=7))
    assert [row["step"] for row in rows_of(out)] == [5, 7]


def test_refusals(codes, tmp_path):
    def refused(message, **changes):
        with pytest.raises(InputError, match=message):
            train_prior(replace(options_of(codes, tmp_path / "prior"), **changes))

    refused("has no level middle, only bottom, top", level="middle")
    refused("no codes are there", codes=tmp_path)
    refused("is not empty", out=codes)
    with pytest.raises(InputError, match=r"^width must be a multiple of four times heads 2, got 18"):
        replace(options_of(codes, tmp_path), width=18)
    with pytest.raises(InputError, match="no prior is there"):
        load_prior(tmp_path)
    assert not (tmp_path / "prior").exists()


def test_incomplete_codes_are_refused(codes, tmp_path):
    meta = json.loads((codes / "meta.json").read_text()) | {"done": 100}
    for name in ("bottom.npy", "top.npy", "labels.npy"):
        (tmp_path / name).write_bytes((codes / name).read_bytes())
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="100 of 200 images are done, extract the rest"):
        train_prior(options_of(tmp_path, tmp_path / "prior"))
