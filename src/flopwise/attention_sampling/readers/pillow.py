"""PNG, JPEG and what else Pillow knows: decoded once, as a whole, while the tiled copy is made."""

import warnings
from functools import cached_property
from pathlib import Path

import numpy as np

from flopwise.attention_sampling.readers.base import ImageError, Reader, complaints, missing

try:
    from PIL import Image
except ImportError as cause:
    raise missing("images", "reading PNG and JPEG", cause) from cause

GREY, COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


class PillowGrid:
    """One tile, the image. Transparency is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as image:
            self.width, self.height = image.size
            if image.mode not in GREY + COLOUR:
                raise ImageError(f"{path}: pixels are 8-bit grey or colour; got mode {image.mode!r}. Convert it.")
            self.channels = 1 if image.mode in GREY else 3
        self.tile_height, self.tile_width = self.height, self.width

    @cached_property
    def pixels(self) -> np.ndarray:
        with complaints(self.path, "decoding it"), _opened(self.path) as image:
            return np.asarray(image.convert("L" if self.channels == 1 else "RGB")).reshape(self.height, self.width, -1)

    def tile(self, row: int, column: int) -> np.ndarray:
        return self.pixels


def _opened(path: Path) -> Image.Image:
    with warnings.catch_warnings():  # Pillow warns above 89 megapixels and refuses above 179: the refusal is ours, too
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(path)
        except Image.DecompressionBombError as cause:
            raise ImageError(
                f"{path}: decoded as a whole, so at most 179 megapixels: {cause} Make it a tiled TIFF."
            ) from cause


def open_pillow(path: Path) -> Reader:
    with complaints(path, "opening it"):
        grid = PillowGrid(path)
    return Reader([grid], grid.channels, sequential=True)
