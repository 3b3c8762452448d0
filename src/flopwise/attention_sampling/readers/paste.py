"""Patches from tiles: which tiles a patch needs, and their common part copied."""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from flopwise.attention_sampling.readers.base import Grid

Patch = tuple[int, int, np.ndarray]  # y and x of its top-left pixel in its level, and where its pixels go


def tiles_under(grid: Grid, y: int, x: int, height: int, width: int) -> Iterator[tuple[int, int]]:
    """(row, column) of every tile of `grid` that a patch touches; the patch may lie outside."""
    top, left, bottom, right = max(y, 0), max(x, 0), min(y + height, grid.height), min(x + width, grid.width)
    if top >= bottom or left >= right:
        return
    for row in range(top // grid.tile_height, (bottom - 1) // grid.tile_height + 1):
        for column in range(left // grid.tile_width, (right - 1) // grid.tile_width + 1):
            yield row, column


def paste_tile(grid: Grid, row: int, column: int, patches: Iterable[Patch]) -> None:
    """Decode one tile and copy it into all the patches that touch it. What is absent or outside is left as it was."""
    tile = grid.tile(row, column)
    if tile is None:
        return
    top, left = row * grid.tile_height, column * grid.tile_width
    bottom, right = min(top + grid.tile_height, grid.height), min(left + grid.tile_width, grid.width)
    for y, x, out in patches:
        y0, y1 = max(y, top), min(y + out.shape[0], bottom)
        x0, x1 = max(x, left), min(x + out.shape[1], right)
        out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - top : y1 - top, x0 - left : x1 - left]


def paste_region(grid: Grid, y: int, x: int, out: np.ndarray) -> None:
    """One patch, tile after tile."""
    for row, column in tiles_under(grid, y, x, *out.shape[:2]):
        paste_tile(grid, row, column, [(y, x, out)])


class Jobs:
    """What is to be read for a batch of patches: every tile once, however many patches share it."""

    def __init__(self) -> None:
        self._tiles: dict[tuple[Grid, int, int], list[Patch]] = {}
        self._todo: deque[tuple[tuple[Grid, int, int], list[Patch]]] = deque()

    def add(self, grid: Grid, y: int, x: int, out: np.ndarray) -> None:
        for row, column in tiles_under(grid, y, x, *out.shape[:2]):
            patches = self._tiles.get((grid, row, column))
            if patches is None:
                patches = self._tiles[grid, row, column] = []
                self._todo.append(((grid, row, column), patches))
            patches.append((y, x, out))

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
