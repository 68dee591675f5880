"""Images side by side in one picture: held-out ones over their reconstructions, samples in a grid."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from vqops.vqvae2.files.run_folder import atomically

SHOWN_IMAGES = 8
SHOWN_SIZE = 128  # small images are enlarged, pixel by pixel, to at least this height


def save_reconstructions(path: Path, images: Tensor, reconstructions: Tensor) -> None:
    """Write a PNG of two rows; both arguments are uint8 [B, C, H, W], at most the first 8 are shown."""
    rows = [np.concatenate(list(framed(batch[:SHOWN_IMAGES])), axis=1) for batch in (images, reconstructions)]
    write_png(path, np.concatenate(rows, axis=0))


def save_grid(path: Path, images: Tensor, columns: int) -> None:  # uint8 [B, C, H, W]
    """Write a PNG of the images, `columns` of them in a row; the last row is filled up with white."""
    cells = framed(images)
    missing = -len(cells) % columns
    cells = np.concatenate([cells, np.full((missing, *cells.shape[1:]), 255, np.uint8)])
    rows = [np.concatenate(list(cells[start : start + columns]), axis=1) for start in range(0, len(cells), columns)]
    write_png(path, np.concatenate(rows, axis=0))


def framed(batch: Tensor) -> np.ndarray:  # uint8 [B, C, H, W]; [B, H', W', C] enlarged, in a white frame
    pixels = batch.cpu().permute(0, 2, 3, 1).numpy()
    enlarge = -(-SHOWN_SIZE // pixels.shape[1])
    pixels = pixels.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    return np.pad(pixels, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)


def write_png(path: Path, pixels: np.ndarray) -> None:  # uint8 [H, W, C], C = 1 or 3
    with atomically(path) as temporary:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(temporary, format="png")
