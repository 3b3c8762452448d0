"""What a reader is: levels, each a grid of tiles."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable


def missing(extra: str, why: str, cause: ImportError) -> ImportError:
    """The one error line for an extra that is not installed."""
    return ImportError(f"{why} needs {cause.name}: pip install 'flopwise[{extra}]'")


try:
    import numpy as np
except ImportError as cause:
    raise missing("images", "reading images", cause) from cause

TILE_LIMIT = 2**26  # bytes of one decoded tile: 64 MiB, above any sane file and below what a bomb would like


class ImageError(ValueError):
    """A file that is broken, hostile or of a kind that is not read here. The message says which and what to do."""


@runtime_checkable
class Grid(Protocol):
    """One level of a pyramid, cut into tiles of one size; those at the lower and right edge may be smaller."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def tile_height(self) -> int: ...
    @property
    def tile_width(self) -> int: ...

    def tile(self, row: int, column: int) -> np.ndarray | None:
        """(h, w, channels) uint8, at least the part of the tile that lies in the image; None: absent in the file.

        Called by several threads at once.
        """
        ...


@dataclass(frozen=True, eq=False)
class Reader:
    """An open file. It is closed when the last grid is gone.

    Attributes:
        grids: from the finest level to the coarsest.
        channels: of every level.
        microns_per_pixel: (y, x) of the finest level, where the file says.
        sequential: a patch of the finest level costs a large part of the image (rows, one compressed stream), so that
            the pyramid that is built begins with a tiled copy of it.
    """

    grids: Sequence[Grid]
    channels: int
    microns_per_pixel: tuple[float, float] | None = None
    sequential: bool = False


def check_tile(path: Path, height: int, width: int, channels: int) -> None:
    if height * width * channels > TILE_LIMIT:
        raise ImageError(
            f"{path}: a tile is decoded at once, so it has at most {TILE_LIMIT >> 20} MiB; these have "
            f"{height} x {width} x {channels} bytes. Write it anew with tiles of 256 x 256."
        )


@contextmanager
def complaints(path: Path, doing: str) -> Iterator[None]:
    """Whatever a decoder raises on broken bytes becomes an `ImageError` that names the file."""
    try:
        yield
    except (ImageError, PermissionError, ImportError):
        raise
    except Exception as cause:
        raise ImageError(f"{path}: {doing} failed, the file is broken or of an unknown kind: {cause}") from cause
