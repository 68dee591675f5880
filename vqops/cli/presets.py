"""Settings that suit a kind of images; flags and --config override them.

The sizes of imagenet128 and ffhq256 follow the papers (128 channels, K 512, D 64); the photographs and the small data
sets are sized for a CPU. cifar10 is the run of docs/vqvae2.md; imagenet128 and ffhq256 have not been run to their end.
"""

from typing import Any

LONG = {"schedule": "cosine", "warmup": 1000, "weight_ema": 0.999, "grad_clip": 1.0, "precision": "bfloat16"}

PRESETS: dict[str, dict[str, Any]] = {
    "photos": {"image_size": 64, "levels": 2, "steps": 1000, "batch_size": 32},
    "cifar10": {"image_size": 32, "levels": 2, "steps": 1500, "batch_size": 32},
    "fashion": {"image_size": 28, "levels": 2, "channels": 64, "steps": 1500, "batch_size": 64},
    "imagenet128": {"image_size": 128, "levels": 2, "steps": 250_000, "batch_size": 128, "eval_every": 2000} | LONG,
    "ffhq256": {"image_size": 256, "levels": 3, "steps": 300_000, "batch_size": 128, "eval_every": 2000} | LONG,
}


def preset_values(name: str) -> dict[str, Any]:
    return PRESETS.get(name, {})  # the parser refuses other names, with all there are
