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

from vqops.vqvae2 import ExtractOptions, InputError, TrainOptions, extract, load_model, train
from vqops.vqvae2.networks.bottlenecks import KL_WEIGHT, Gaussian, Gumbel

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


def test_gumbel():
    x = torch.randn(3, 7, 2, 5, generator=torch.Generator().manual_seed(0))
    module = Gumbel(4, 7, VALUES)
    z, indices, loss = module(x)
    share = Categorical(logits=x.movedim(1, -1))
    expected = kl_divergence(share, Categorical(torch.ones(7))).sum() / 3
    assert_close(loss, KL_WEIGHT * expected / VALUES)
    INDICES.same(indices, x.argmax(1))
    assert z.shape == (3, 4, 2, 5)
    z, _, _ = module.eval()(x)
    COPIES.same(z, module.codebook[indices].movedim(-1, 1))


def test_gumbel_cools_down_to_single_codes():
    module, x = Gumbel(4, 7, VALUES), torch.zeros(1, 7, 20, 20)
    temperatures, distances = [], []
    for progress in (0.0, 0.5, 1.0):
        module.anneal(progress)
        temperatures.append(module.temperature)
        z = module(x)[0].flatten(2)[0].T
        distances.append(torch.cdist(z, module.codebook).min(1).values.median().item())
    assert temperatures == pytest.approx([1, 1 / 4, 1 / 16])
    assert distances[0] > 3 * distances[2]


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
    assert capsys.readouterr().out.splitlines()[-1] == f"next: vqops reconstruct {run} IMAGES... --out FOLDER"
    with pytest.raises(InputError, match="bottleneck none has no codes"):
        extract(ExtractOptions(run, data, tmp_path / "codes"))
