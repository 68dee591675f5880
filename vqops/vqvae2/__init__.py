"""The reference VQ-VAE-2, from images to samples: the network, and what each command does as a function of its options.

The functions need `pip install 'vqops[train]'` and are loaded when first asked for.
"""

from importlib import import_module

from vqops.vqvae2.errors import InputError
from vqops.vqvae2.evaluation.options import CompareOptions, EvaluateOptions, ReconstructOptions
from vqops.vqvae2.networks.vqvae2 import VQVAE2, VQVAE2Config, VQVAE2Output
from vqops.vqvae2.prior.options import CompleteOptions, DrawOptions, ExtractOptions, SampleOptions, TrainPriorOptions
from vqops.vqvae2.prior.transformer import Prior, PriorConfig
from vqops.vqvae2.training.options import TrainOptions

LOADED_LATER = {
    "Codes": "prior.code_folder",
    "CodesMeta": "prior.code_folder",
    "compare": "evaluation.compare",
    "complete": "prior.sample",
    "evaluate": "evaluation.evaluate",
    "extract": "prior.extract",
    "load_model": "networks.checkpoint",
    "load_prior": "prior.checkpoint",
    "reconstruct": "evaluation.reconstruct",
    "sample": "prior.sample",
    "save_model": "networks.checkpoint",
    "train": "training.train",
    "train_prior": "prior.train_prior",
}

__all__ = [
    "VQVAE2",
    "CompareOptions",
    "CompleteOptions",
    "DrawOptions",
    "EvaluateOptions",
    "ExtractOptions",
    "InputError",
    "Prior",
    "PriorConfig",
    "ReconstructOptions",
    "SampleOptions",
    "TrainOptions",
    "TrainPriorOptions",
    "VQVAE2Config",
    "VQVAE2Output",
    *LOADED_LATER,
]


def __getattr__(name: str) -> object:
    if name not in LOADED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LOADED_LATER[name]}"), name)
