"""Patches from tiles: which tiles a patch needs, and their common part copied."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from flopwise.attention_sampling.readers.base import Grid


class Patch(NamedTuple):
    """Where a patch is and where its pixels go.

    Attributes:
        y, x: of the top-left pixel, in pixels of its level.
        out: (h, w, channels), written by one thread at each pixel.
        fill: for what is absent in the file or outside the image.
    """

    y: int
    x: int
    out: np.ndarray
    fill: int


def tiles_under(grid: Grid, y: int, x: int, height: int, width: int) -> Iterator[tuple[int, int]]:
    """(row, column) of every tile of `grid` that a patch touches; the patch may lie outside."""
    top, left, bottom, right = max(y, 0), max(x, 0), min(y + height, grid.height), min(x + width, grid.width)
    if top >= bottom or left >= right:
        return
    for row in range(top // grid.tile_height, (bottom - 1) // grid.tile_height + 1):
        for column in range(left // grid.tile_width, (right - 1) // grid.tile_width + 1):
            yield row, column


def paste_tile(grid: Grid, row: int, column: int, patches: Iterable[Patch]) -> None:
    """Decode one tile and copy it into all the patches that touch it."""
    tile = grid.tile(row, column)
    top, left = row * grid.tile_height, column * grid.tile_width
    bottom, right = min(top + grid.tile_height, grid.height), min(left + grid.tile_width, grid.width)
    for y, x, out, fill in patches:
        y0, y1 = max(y, top), min(y + out.shape[0], bottom)
        x0, x1 = max(x, left), min(x + out.shape[1], right)
        pixels = fill if tile is None else tile[y0 - top : y1 - top, x0 - left : x1 - left]
        out[y0 - y : y1 - y, x0 - x : x1 - x] = pixels


def paste_region(grid: Grid, y: int, x: int, out: np.ndarray) -> None:
    """One patch that lies in the image, tile after tile; what is absent is 0."""
    for row, column in tiles_under(grid, y, x, *out.shape[:2]):
        paste_tile(grid, row, column, [Patch(y, x, out, 0)])


class Jobs:
    """What is to be read for a batch of patches: every tile once, however many patches share it."""

    def __init__(self) -> None:
        self._tiles: dict[tuple[Grid, int, int], list[Patch]] = {}
        self._todo: deque[tuple[tuple[Grid, int, int], list[Patch]]] = deque()

    def add(self, grid: Grid, patch: Patch) -> None:
        y, x, out, fill = patch
        height, width = out.shape[:2]
        if y < 0 or x < 0 or y + height > grid.height or x + width > grid.width:
            out.fill(fill)
        for row, column in tiles_under(grid, y, x, height, width):
            patches = self._tiles.get((grid, row, column))
            if patches is None:
                patches = self._tiles[grid, row, column] = []
                self._todo.append(((grid, row, column), patches))
            patches.append(patch)

    def __len__(self) -> int:
        return len(self._todo)

    def work(self) -> None:
        """Take tiles until none is left: called once in every thread. An error ends them all."""
        try:
            while self._todo:
                try:
                    (grid, row, column), patches = self._todo.popleft()
                except IndexError:  # another thread took the last one
                    return
                paste_tile(grid, row, column, patches)
        except BaseException:
            self._todo.clear()
            raise
