"""Synthetic images for the tests of lazy pyramids: small ones made of pixels, enormous ones made of a few tiles."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tifffile
from imagecodecs import jpeg_encode, zlib_encode


def photograph(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Smooth waves of every size: compresses like a photograph, and no two regions are alike."""
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    planes = [np.sin(y / (7 + 3 * c)) + np.sin(x / 11 + c) + np.sin((x + 2 * y) / 61) for c in range(channels)]
    return ((np.stack(planes, -1) + 3) * 42).astype(np.uint8)


def mean_of_squares(pixels: np.ndarray, side: int = 2) -> np.ndarray:
    """The slow reference of a coarser level: each pixel the mean of those under it, edges repeated."""
    rows, columns = -(-pixels.shape[0] // side) * side, -(-pixels.shape[1] // side) * side
    padded = pixels[np.arange(rows).clip(max=pixels.shape[0] - 1)][:, np.arange(columns).clip(max=pixels.shape[1] - 1)]
    blocks = padded.reshape(rows // side, side, columns // side, side, -1).astype(float)
    return np.floor(blocks.mean((1, 3)) + 0.5).astype(np.uint8)


def write_pyramid(
    path: Path, pixels: np.ndarray, *, levels: int = 3, factor: int = 2, subifds: bool = False, **options
) -> list[np.ndarray]:
    """A tiled TIFF with its levels as reduced pages or SubIFDs; returns the levels."""
    images = [pixels]
    while len(images) < levels:
        images.append(mean_of_squares(images[-1], factor))
    settings = {"tile": (64, 64), "compression": "zlib", "photometric": "rgb", "metadata": None, **options}
    with tifffile.TiffWriter(path, bigtiff=settings.pop("bigtiff", False)) as writer:
        for i, image in enumerate(images):
            if i:
                for option in ("description", "resolution", "resolutionunit"):
                    settings.pop(option, None)
            below = {"subifds": levels - 1} if subifds and i == 0 else {}
            writer.write(image, subfiletype=int(i > 0), **below, **settings)
    return images


def everywhere(level: int, row: int, column: int) -> bool:
    return True


def write_large(
    path: Path,
    height: int,
    width: int,
    *,
    compression: str = "jpeg",
    tile: int = 256,
    pyramid: bool = True,
    present: Callable[[int, int, int], bool] = everywhere,
) -> None:
    """A BigTIFF pyramid down to one tile, of 4 noisy tiles encoded once: seconds for 20,000 squared.

    `present(level, row, column)` says which tiles are in the file. Its levels do not show the same picture.
    """
    generator = np.random.default_rng(0)
    encoded = []
    for k in range(4):
        pixels = photograph(tile, tile * 4)[:, k * tile : (k + 1) * tile].astype(int)
        pixels = np.clip(pixels + generator.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        raw = pixels.tobytes()
        encoded.append(jpeg_encode(pixels, level=85) if compression == "jpeg" else zlib_encode(raw, level=6))

    def tiles(level: int, height: int, width: int) -> Iterator[bytes]:
        for row in range(-(-height // tile)):
            for column in range(-(-width // tile)):
                yield encoded[(row + 3 * column // 2 + level) % 4] if present(level, row, column) else b""

    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        level = 0
        while True:
            writer.write(
                tiles(level, height, width),
                shape=(height, width, 3),
                dtype=np.uint8,
                tile=(tile, tile),
                photometric="rgb" if compression != "jpeg" else "ycbcr",
                compression=compression,
                subfiletype=int(level > 0),
                metadata=None,
            )
            if max(height, width) <= tile or not pyramid:
                return
            level, height, width = level + 1, -(-height // 2), -(-width // 2)
