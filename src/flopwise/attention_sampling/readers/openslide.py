"""Vendor formats through OpenSlide."""

from pathlib import Path

import numpy as np

from flopwise.attention_sampling.readers.base import Reader, complaints, missing

try:
    import openslide
except ImportError as cause:
    raise missing("openslide", "reading this slide", cause) from cause

SIDE = 512


class OpenSlideGrid:
    """One level. OpenSlide's handles may be used by several threads."""

    def __init__(self, slide: openslide.OpenSlide, level: int, path: Path) -> None:
        self.slide, self.level, self.path = slide, level, path
        self.width, self.height = slide.level_dimensions[level]
        self.tile_height = self.tile_width = SIDE

    def tile(self, row: int, column: int) -> np.ndarray:
        y, x = row * SIDE, column * SIDE
        size = min(SIDE, self.width - x), min(SIDE, self.height - y)
        scale = self.slide.level_downsamples[self.level]
        with complaints(self.path, f"reading tile ({row}, {column}) of level {self.level}"):
            pixels = np.asarray(self.slide.read_region((round(x * scale), round(y * scale)), self.level, size))
        return np.where(pixels[..., 3:] > 0, pixels[..., :3], np.uint8(255))  # what was never scanned is white


def open_openslide(path: Path) -> Reader:
    with complaints(path, "opening it with OpenSlide"):
        slide = openslide.OpenSlide(path)
        grids = [OpenSlideGrid(slide, level, path) for level in range(slide.level_count)]
        microns = [float(slide.properties.get(f"openslide.mpp-{axis}", 0)) for axis in "yx"]
    return Reader(grids, 3, (microns[0], microns[1]) if all(microns) else None)
