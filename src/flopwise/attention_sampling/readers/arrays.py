"""numpy arrays, memory maps and .npy files."""

import mmap
from pathlib import Path

from flopwise.attention_sampling.readers.base import ImageError, Reader, complaints, missing

try:
    import numpy as np
except ImportError as cause:
    raise missing("images", "reading images", cause) from cause

COARSEST = 64  # pixels of the longer side of the last level that is built
SIDE = 512  # of the tiles an array is seen as: a slice, not a copy


class ArrayGrid:
    """One level that is an (H, W, C) array in memory or mapped from a file."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.height, self.width, self.channels = pixels.shape
        self.tile_height = self.tile_width = SIDE

    def tile(self, row: int, column: int) -> np.ndarray:
        y, x = row * SIDE, column * SIDE
        return self.pixels[y : y + SIDE, x : x + SIDE]


def as_pixels(array: np.ndarray, name: object = "the array") -> np.ndarray:
    """(H, W) or (H, W, C) uint8 as (H, W, C)."""
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or 0 in array.shape
        or (array.ndim == 3 and array.shape[2] > 16)
    ):
        raise ImageError(
            f"{name}: an image is (height, width) or (height, width, channels), uint8, at most 16 channels; got "
            f"{array.dtype} {array.shape}. Scale it to 0-255 and move the channels to the end."
        )
    return array if array.ndim == 3 else array[..., None]


def open_npy(path: Path) -> Reader:
    """A .npy file, mapped: nothing is read until a patch is."""
    with complaints(path, "mapping it"):
        grid = ArrayGrid(as_pixels(np.load(path, mmap_mode="r", allow_pickle=False), path))
    return Reader([grid], grid.channels)


def open_raw(path: Path, offset: int, shape: tuple[int, ...]) -> Reader:
    """What a `numpy.memmap` maps."""
    with complaints(path, "mapping it"):
        grid = ArrayGrid(as_pixels(np.memmap(path, np.uint8, "r", offset, shape), path))
    return Reader([grid], grid.channels)


def mapped_file(array: np.ndarray) -> tuple[Path, tuple[int, tuple[int, ...]]] | None:
    """Where the bytes of a `numpy.memmap` lie in its file, None for other arrays and for views of a memmap."""
    if not isinstance(array, np.memmap) or not isinstance(array.base, mmap.mmap) or array.filename is None:
        return None
    if not array.flags.c_contiguous:
        return None
    as_pixels(array)
    return Path(array.filename), (array.offset, array.shape)


def in_memory(array: np.ndarray) -> Reader:
    """An array with all its levels: they cost a third of it."""
    levels = [as_pixels(np.asarray(array))]
    while max(levels[-1].shape[:2]) > COARSEST:
        levels.append(halved(even(levels[-1])))
    return Reader([ArrayGrid(level) for level in levels], levels[0].shape[2])


def even(pixels: np.ndarray, multiple: int = 2) -> np.ndarray:
    """Both sides continued to a multiple by repeating the last row and column."""
    rest = -pixels.shape[0] % multiple, -pixels.shape[1] % multiple
    return np.pad(pixels, ((0, rest[0]), (0, rest[1]), (0, 0)), mode="edge") if any(rest) else pixels


def halved(pixels: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels, rounded; both sides are even."""
    wide = pixels.astype(np.uint16)
    rows = wide[0::2] + wide[1::2]
    return ((rows[:, 0::2] + rows[:, 1::2] + 2) >> 2).astype(np.uint8)
