"""Images side by side in one picture, with names: what models make of images in rows, samples in columns."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from textwrap import wrap

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vqops.vqvae2.files.run_folder import atomically

SHOWN_IMAGES = 8
SHOWN_SIZE = 128  # small images are enlarged, pixel by pixel, to at least this height
FRAME = 2  # pixels of white around each
TEXT_SIZE, LETTER_WIDTH, MARGIN = 16, 10, 8  # pixels; a letter's on average
HEAD_LINES = 2


def save_rows(path: Path, rows: dict[str, Tensor]) -> None:
    """Write a PNG with a row of images for each name, at its left; uint8 [B, C, H, W] each, the first 8 are shown."""
    strips = [np.concatenate(list(framed(images[:SHOWN_IMAGES])), axis=1) for images in rows.values()]
    width = max(math.ceil(font().getlength(name)) for name in rows) + 2 * MARGIN
    names = [text(name, len(strip), width) for name, strip in zip(rows, strips, strict=True)]
    write_png(path, np.concatenate([np.concatenate(names, axis=0), np.concatenate(strips, axis=0)], axis=1))


def save_grid(path: Path, images: Tensor, columns: int, names: Sequence[str] = ()) -> None:  # uint8 [B, C, H, W]
    """Write a PNG of the images, `columns` of them in a row, under the names of the columns, if there are any.

    The last row is filled up with white.
    """
    cells = framed(images)
    height, width = cells.shape[1:3]
    cells = np.concatenate([cells, np.full((-len(cells) % columns, height, width, 3), 255, np.uint8)])
    rows = [np.concatenate(list(cells[start : start + columns]), axis=1) for start in range(0, len(cells), columns)]
    if names:
        letters = max(width // LETTER_WIDTH, 1)
        heads = ["\n".join(wrap(name, letters, max_lines=HEAD_LINES, placeholder="…")) for name in names]
        lines = max(head.count("\n") for head in heads) + 1
        rows.insert(0, np.concatenate([text(head, lines * TEXT_SIZE + 2 * MARGIN, width) for head in heads], axis=1))
    write_png(path, np.concatenate(rows, axis=0))


def framed(batch: Tensor) -> np.ndarray:  # uint8 [B, C, H, W]; [B, H', W', 3] enlarged, in a white frame
    pixels = batch.cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    enlarge = -(-SHOWN_SIZE // pixels.shape[1])
    pixels = pixels.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    return np.pad(pixels, ((0, 0), (FRAME, FRAME), (FRAME, FRAME), (0, 0)), constant_values=255)


@cache
def font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), TEXT_SIZE)


def text(words: str, height: int, width: int) -> np.ndarray:  # uint8 [height, width, 3], the words in its middle
    box = Image.new("RGB", (width, height), "white")
    middle = width / 2, height / 2
    ImageDraw.Draw(box).multiline_text(middle, words, "black", font(), anchor="mm", align="center")
    return np.asarray(box)


def write_png(path: Path, pixels: np.ndarray) -> None:  # uint8 [H, W, C], C = 1 or 3
    with atomically(path) as temporary:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(temporary, format="png")
