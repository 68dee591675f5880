"""The reference VQ-VAE-2, from images to samples: what the commands run. It needs `pip install 'vqops[train]'`."""

from vqops.vqvae2.checkpoint import load_model, save_model
from vqops.vqvae2.codes import Codes, CodesMeta
from vqops.vqvae2.compare import compare
from vqops.vqvae2.evaluate import evaluate
from vqops.vqvae2.extract import extract
from vqops.vqvae2.model import VQVAE2, VQVAE2Config, VQVAE2Output
from vqops.vqvae2.prior import Prior, PriorConfig
from vqops.vqvae2.prior_checkpoint import load_prior
from vqops.vqvae2.reconstruct import reconstruct
from vqops.vqvae2.sample import complete, sample
from vqops.vqvae2.train import train
from vqops.vqvae2.train_prior import train_prior

__all__ = [
    "VQVAE2",
    "Codes",
    "CodesMeta",
    "Prior",
    "PriorConfig",
    "VQVAE2Config",
    "VQVAE2Output",
    "compare",
    "complete",
    "evaluate",
    "extract",
    "load_model",
    "load_prior",
    "reconstruct",
    "sample",
    "save_model",
    "train",
    "train_prior",
]
