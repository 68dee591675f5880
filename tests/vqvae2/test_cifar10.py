"""Training curves on CIFAR-10, against the figures that plain PyTorch reaches with the same sizes (docs/vqvae2.md)."""

import json
import os
from dataclasses import replace

import pytest

pytest.importorskip("safetensors")

from vqops.vqvae2 import TrainOptions, train

CIFAR10 = os.environ.get("VQOPS_CIFAR10")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CIFAR10 is None, reason="VQOPS_CIFAR10 names no .npz of CIFAR-10 (x_train, x_val uint8 [N, 32, 32, 3])"
    ),
]


@pytest.mark.parametrize("levels, val_mse", [(1, 0.0048), (2, 0.0044)])
def test_error_and_code_use_after_1500_steps(tmp_path, levels, val_mse):
    options = TrainOptions(data=CIFAR10, data_key="x_train", val_key="x_val", levels=levels, steps=1500, eval_every=500)
    run = train(replace(options, out=tmp_path / "run"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_mse"] <= val_mse
    assert rows[-1]["val_used_bottom"] * 512 >= 500
    settled = [value for row in rows if row["step"] > 300 for key, value in row.items() if "perplexity" in key]
    assert min(settled) > 2
