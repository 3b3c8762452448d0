"""The levels a file lacks, built once into a tiled BigTIFF in a cache folder, in memory that does not grow with it."""

import fcntl
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flopwise.attention_sampling.readers.arrays import COARSEST, even, halved
from flopwise.attention_sampling.readers.base import Grid, ImageError, Reader, missing
from flopwise.attention_sampling.readers.paste import paste_region
from flopwise.attention_sampling.readers.tiff import open_tiff

try:
    import tifffile
except ImportError as cause:
    raise missing("images", "building a pyramid", cause) from cause

TILE = 256
BLOCK = 4096  # pixels of a row that are read at once, unless the source's own tiles are wider
PIXELS = 2**34  # of the level that is copied or halved: 131,072 squared


def complete(reader: Reader, cached: Path, name: object) -> Reader:
    """`reader` and its missing levels, from `cached`, which is built unless it is there.

    Another process that wants the same file waits for the one that builds it. A build that dies leaves a `.part` file
    that the next one overwrites.
    """
    if not cached.exists():
        source = reader.grids[-1]
        if source.height * source.width > PIXELS:
            raise ImageError(
                f"{name}: coarser levels are built here of at most {PIXELS} pixels; its coarsest has {source.height} x "
                f"{source.width}. Write the file with its pyramid."
            )
        cached.parent.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(".part")
        with part.open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if cached.exists():  # another process built it while this one waited
                part.unlink(missing_ok=True)
            else:
                try:
                    build(reader, part)
                except BaseException:
                    os.truncate(part, 0)  # not removed: others wait for its lock
                    raise
                part.replace(cached)
    coarser = open_tiff(cached)
    kept = [] if reader.sequential else list(reader.grids)
    return Reader([*kept, *coarser.grids], reader.channels, reader.microns_per_pixel)


def build(reader: Reader, path: Path) -> None:
    """Halve `reader`'s coarsest level until it has 64 pixels; a sequential reader's only level is copied first."""
    source, factor, append = reader.grids[-1], 1 if reader.sequential else 2, False
    path.write_bytes(b"")
    while True:
        height, width = math.ceil(source.height / factor), math.ceil(source.width / factor)
        with tifffile.TiffWriter(path, bigtiff=True, append=append) as writer:
            writer.write(
                tiles(source, factor, reader.channels),
                shape=(height, width, reader.channels)[: 2 + (reader.channels > 1)],
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb" if reader.channels == 3 else "minisblack",
                planarconfig="contig" if reader.channels > 1 else None,
                compression="zstd",
                compressionargs={"level": 1},
                predictor=True,
                subfiletype=int(append),
                metadata=None,
                maxworkers=1,
            )
        if max(height, width) <= COARSEST:
            return
        source, factor, append = open_tiff(path).grids[-1], 2, True
        if (source.height, source.width) != (height, width):
            raise ImageError(
                f"{path}: a level of {height} x {width} was written, but {source.height} x {source.width} read."
            )


def tiles(source: Grid, factor: int, channels: int) -> Iterator[np.ndarray]:
    """The tiles of `source` reduced by 1 or 2 (means of 2 x 2), row by row. Odd sides repeat their last pixels."""
    side = TILE * factor
    width = max(BLOCK // side, math.ceil(source.tile_width / side)) * side
    for y in range(0, source.height, side):
        for x in range(0, source.width, width):
            block = np.empty((min(side, source.height - y), min(width, source.width - x), channels), np.uint8)
            paste_region(source, y, x, block)
            block = even(block, side)
            if factor == 2:
                block = halved(block)
            for start in range(0, block.shape[1], TILE):
                yield np.ascontiguousarray(block[:, start : start + TILE])
