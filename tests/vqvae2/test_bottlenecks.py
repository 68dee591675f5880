"""The bottlenecks that VQ is compared with: their losses against torch.distributions, and training through each."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from promises import COPIES, INDICES
from torch.distributions import Categorical, Normal, kl_divergence
from torch.testing import assert_close

pytest.importorskip("safetensors")

from vqops.vqvae2 import VQVAE2, ExtractOptions, InputError, TrainOptions, VQVAE2Config, extract, load_model, train
from vqops.vqvae2.data.batches import training_batches
from vqops.vqvae2.data.photographs import training_photographs
from vqops.vqvae2.networks.bottlenecks import KL_WEIGHT, LOGIT_SCALE, Gaussian, Gumbel
from vqops.vqvae2.networks.vqvae2 import as_float

VALUES = 48  # of an image


def test_gaussian():
    x = torch.randn(3, 8, 2, 5, generator=torch.Generator().manual_seed(0))
    mean, log_variance = x.chunk(2, dim=1)
    module = Gaussian(VALUES)
    z, indices, loss = module(x)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum() / 3
    assert_close(loss, KL_WEIGHT * expected / VALUES)
    assert_close(module.rate, expected)
    assert indices is None
    assert z.shape == mean.shape
    assert (z != mean).any()
    COPIES.same(module.eval()(x)[0], mean)


def test_gaussian_draws_have_its_mean_and_variance():
    x = torch.tensor([0.7, math.log(0.3)]).view(1, 2, 1, 1).expand(1, 2, 100, 200)
    z, _, _ = Gaussian(VALUES)(x)
    assert_close(z.mean().item(), 0.7, rtol=0, atol=5 * (0.3 / 20000) ** 0.5)
    assert_close(z.var().item(), 0.3, rtol=0.05, atol=0)


def logits(*shape: int) -> torch.Tensor:
    """Such as an encoder gives: codes are far apart on the whole, and hardly differ from place to place."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randn(1, shape[1], 1, 1, generator=generator)
    return offsets + 0.1 * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("normalised", [True, False])
def test_gumbel(normalised):
    x = logits(3, 7, 2, 5)
    module = Gumbel(4, 7, VALUES, normalised)
    z, indices, loss = module(x)
    if normalised:
        x = LOGIT_SCALE * (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True, correction=0)
    share = Categorical(logits=x.movedim(1, -1))
    expected = kl_divergence(share, Categorical(torch.ones(7))).sum() / 3
    assert_close(loss, KL_WEIGHT * expected / VALUES)
    INDICES.same(indices, x.argmax(1))
    assert z.shape == (3, 4, 2, 5)
    z, again, _ = module.eval()(logits(3, 7, 2, 5))  # with averages over one batch, which are its own
    INDICES.same(again, indices)
    COPIES.same(z, module.codebook[indices].movedim(-1, 1))


def test_normalised_logits_choose_most_codes():
    def used(normalised):
        return len(Gumbel(4, 64, VALUES, normalised)(logits(8, 64, 8, 8))[1].unique())

    assert used(normalised=True) > 60
    assert used(normalised=False) < 5


@pytest.mark.parametrize("version, least, most", [(1, 1, 20), (2, 250, 512)])
def test_codes_that_a_new_discrete_vae_uses(version, least, most):
    """Of 512, for 32 crops of photographs."""
    torch.manual_seed(0)
    batches = training_batches(training_photographs(), (32, 32), batch_size=32, steps=1, seed=0, num_workers=0)
    config = VQVAE2Config(levels=1, channels=64, bottleneck="gumbel", image_values=3 * 32 * 32, version=version)
    (indices,) = VQVAE2(config)(as_float(next(iter(batches)))).indices
    assert least <= len(indices.unique()) <= most


def test_gumbel_averages_its_statistics():
    module, batches = Gumbel(4, 7, VALUES), [step + logits(3, 7, 2, 5) for step in range(12)]
    for batch in batches:
        module(batch)
    mean = batches[0].mean((0, 2, 3))
    assert_close(module.mean, mean + averaged_steps(12), rtol=1e-5, atol=1e-5)
    assert_close(module.variance, batches[0].var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-6)


def averaged_steps(count: int) -> float:
    """The average of 0, 1, ..., count - 1 that the tenth weighs a tenth in, and each one after it."""
    average = sum(range(10)) / 10
    for step in range(10, count):
        average += (step - average) / 10
    return average


def test_gumbel_of_a_single_vector_is_finite():
    module, x = Gumbel(4, 7, VALUES), torch.randn(1, 7, 1, 1, requires_grad=True)
    z, _, loss = module(x)
    (z.sum() + loss).backward()
    assert z.isfinite().all()
    assert x.grad.isfinite().all()
    assert module.eval()(x)[0].isfinite().all()


def test_gumbel_cools_down():
    module, x = Gumbel(4, 7, VALUES), logits(1, 7, 20, 20)
    temperatures, distances = [], []
    for progress in (0.0, 0.5, 1.0):
        module.anneal(progress)
        temperatures.append(module.temperature)
        z = module(x)[0].flatten(2)[0].T
        distances.append(torch.cdist(z, module.codebook).min(1).values.mean().item())
    assert temperatures == pytest.approx([1, 0.5**0.5, 0.5])
    assert distances[0] > 1.3 * distances[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "images.npy"
    offsets = np.random.default_rng(0).integers(0, 90, (40, 16, 1), dtype=np.uint8)
    np.save(path, offsets + np.arange(0, 160, 10, dtype=np.uint8))
    return str(path)


@pytest.mark.parametrize("bottleneck, levels", [("none", 1), ("gaussian", 2), ("gumbel", 2)])
def test_training_reduces_the_error(data, tmp_path, bottleneck, levels):
    sizes = {"channels": 16, "codebook_size": 16, "code_dim": 8, "batch_size": 8}
    options = TrainOptions(data=data, **sizes, bottleneck=bottleneck, levels=levels, lr=3e-3, device="cpu")
    rows = []
    for steps in (1, 60):
        run = train(replace(options, steps=steps, eval_every=steps, out=tmp_path / str(steps)))
        rows.append(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]))
    assert rows[1]["val_mse"] < rows[0]["val_mse"] / 2
    assert ("perplexity_bottom" in rows[1]) == (bottleneck == "gumbel")
    model = load_model(tmp_path / "60")
    assert (model.config.bottleneck, model.config.image_values) == (bottleneck, 256)
    assert len(model(torch.rand(1, 1, 16, 16)).indices) == (levels if bottleneck == "gumbel" else 0)


def test_what_has_no_codes_cannot_be_extracted(data, tmp_path, capsys):
    sizes = {"channels": 8, "codebook_size": 16, "code_dim": 4, "batch_size": 4}
    run = train(TrainOptions(data=data, **sizes, bottleneck="none", steps=1, device="cpu", out=tmp_path / "run"))
    assert capsys.readouterr().out.splitlines()[-2] == f"next: vqops reconstruct {run} IMAGES... --out FOLDER"
    with pytest.raises(InputError, match="bottleneck none has no codes"):
        extract(ExtractOptions(run, data, tmp_path / "codes"))
