"""The reference VQ-VAE-2: what `vqops train` and `vqops reconstruct` run. It needs `pip install 'vqops[train]'`."""

from vqops.vqvae2.checkpoint import load_model, save_model
from vqops.vqvae2.model import VQVAE2, VQVAE2Config, VQVAE2Output
from vqops.vqvae2.reconstruct import reconstruct
from vqops.vqvae2.train import train

__all__ = ["VQVAE2", "VQVAE2Config", "VQVAE2Output", "load_model", "reconstruct", "save_model", "train"]
