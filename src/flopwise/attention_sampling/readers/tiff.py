"""Tiled (Big)TIFF, SVS and their pyramids: tifffile decodes the tiles, which are read at their positions."""

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np

from flopwise.attention_sampling.readers import directory as tag
from flopwise.attention_sampling.readers.arrays import ArrayGrid
from flopwise.attention_sampling.readers.base import ImageError, Reader, check_tile, complaints, missing
from flopwise.attention_sampling.readers.directory import Directory, File, directories

try:
    import imagecodecs  # noqa: F401 (tifffile falls back to unbounded decoders without it)
    import tifffile
except ImportError as cause:
    raise missing("images", "reading TIFF", cause) from cause

JPEG, JPEG_2000 = 7, (33005, 34712)
COMPRESSIONS = {1, 5, JPEG, 8, 32946, 32773, 50000, *JPEG_2000}  # none, LZW, JPEG, deflate, PackBits, zstd, JPEG 2000
TILES = 2**24  # of one level: a square of a million pixels in tiles of 256
COLOUR = (2, 6)  # photometric interpretations: RGB, YCbCr
ENLARGED = 2  # a compressed tile is at most that much larger than a raw one


class TiffGrid:
    """One level: the tile at (row, column) is pread at its offset and decoded."""

    def __init__(self, source: Directory, page: tifffile.TiffPage) -> None:
        self.file = source.file
        layout = Layout(source)
        self.height, self.width, self.channels = layout.height, layout.width, layout.channels
        self.tile_height, self.tile_width = layout.tile_height, layout.tile_width
        self.compression, self.inverted = layout.compression, layout.photometric == 0
        self._columns = math.ceil(self.width / self.tile_width)
        self._offsets = np.array(page.dataoffsets, np.uint64)
        self._counts = np.array(page.databytecounts, np.uint64)
        self._decode, self._options = page.decode, {}
        if self.compression == JPEG:
            self._options = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        self._check_index(layout.samples)

    def _check_index(self, samples: int) -> None:
        tiles = math.ceil(self.height / self.tile_height) * self._columns
        if len(self._offsets) != tiles or len(self._counts) != tiles:
            raise ImageError(
                f"{self.file.path}: {self.height} x {self.width} pixels in tiles of {self.tile_height} x "
                f"{self.tile_width} are {tiles} tiles; it lists {len(self._offsets)} offsets and {len(self._counts)} "
                "lengths."
            )
        size = np.uint64(self.file.size)
        ends = np.minimum(self._offsets, size) + np.minimum(self._counts, size)  # neither may wrap around
        beyond = int(((self._counts > 0) & (ends > size)).sum())
        if beyond:
            raise ImageError(
                f"{self.file.path}: truncated, or wrong tile offsets: {beyond} of {tiles} tiles lie beyond the end of "
                f"the file, {size} bytes. Copy it again."
            )
        raw = self.tile_height * self.tile_width * samples
        largest = int(self._counts.max())
        if largest > ENLARGED * raw + 2**16:
            raise ImageError(
                f"{self.file.path}: a tile of {raw} bytes takes at most {ENLARGED} times that in the file; one has "
                f"{largest}."
            )

    def tile(self, row: int, column: int) -> np.ndarray | None:
        index = row * self._columns + column
        offset, count = int(self._offsets[index]), int(self._counts[index])
        if offset == 0 or count == 0:
            return None
        data = self.file.read(offset, count)
        try:
            self._check_size(data)
            pixels = np.asarray(self._decode(data, index, **self._options)[0])
        except Exception as cause:
            raise ImageError(
                f"{self.file.path}: tile ({row}, {column}) of the {self.height} x {self.width} level cannot be "
                f"decoded, its bytes or its offset {offset} are wrong: {cause}"
            ) from cause
        pixels = pixels[0, :, :, : self.channels]
        rows = min(self.tile_height, self.height - row * self.tile_height)
        columns = min(self.tile_width, self.width - column * self.tile_width)
        if pixels.shape[0] < rows or pixels.shape[1] < columns or pixels.dtype != np.uint8:
            raise ImageError(
                f"{self.file.path}: tile ({row}, {column}) holds {pixels.dtype} {pixels.shape}, of a level with "
                f"tiles of {self.tile_height} x {self.tile_width}."
            )
        return 255 - pixels if self.inverted else pixels

    def _check_size(self, data: bytes) -> None:
        """An image inside a tile has its own header, and a bomb would lie there: it is read before it is believed."""
        if self.compression == JPEG:
            sizes = jpeg_size(data)
        elif self.compression in JPEG_2000:
            start = data.index(b"\xff\x4f\xff\x51") + 8
            sizes = int.from_bytes(data[start + 4 : start + 8]), int.from_bytes(data[start : start + 4])
        else:
            return
        if sizes[0] > self.tile_height or sizes[1] > self.tile_width:
            raise ValueError(f"the image inside has {sizes[0]} x {sizes[1]} pixels")


def jpeg_size(data: bytes) -> tuple[int, int]:
    """(height, width) from the frame header: the markers before it are skipped by their lengths."""
    place = 2
    while data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[place + 5 : place + 7]), int.from_bytes(data[place + 7 : place + 9])
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4])
    raise ValueError("no JPEG frame inside")


class Layout:
    """The tags that say how the pixels lie, checked."""

    def __init__(self, source: Directory) -> None:
        path = source.file.path
        self.height, self.width = source.integer(tag.HEIGHT), source.integer(tag.WIDTH)
        self.tiled = tag.TILE_WIDTH in source or tag.TILE_OFFSETS in source
        if self.tiled:
            self.tile_height, self.tile_width = source.integer(tag.TILE_HEIGHT), source.integer(tag.TILE_WIDTH)
            offsets, counts = tag.TILE_OFFSETS, tag.TILE_COUNTS
        else:
            self.tile_height = min(source.integer(tag.ROWS_PER_STRIP, self.height), self.height)
            self.tile_width, offsets, counts = self.width, tag.STRIP_OFFSETS, tag.STRIP_COUNTS
        if 0 in (self.height, self.width, self.tile_height, self.tile_width):
            raise ImageError(
                f"{path}: an image and its tiles have at least one pixel; got {self.height} x {self.width} in tiles of "
                f"{self.tile_height} x {self.tile_width}."
            )
        tiles = math.ceil(self.height / self.tile_height) * math.ceil(self.width / self.tile_width)
        if tiles > TILES or source.count(offsets) != tiles or source.count(counts) != tiles:
            raise ImageError(
                f"{path}: {self.height} x {self.width} pixels in tiles of {self.tile_height} x {self.tile_width} are "
                f"{tiles} tiles (at most {TILES}); it lists {source.count(offsets)} offsets and "
                f"{source.count(counts)} lengths."
            )
        self.compression = source.integer(tag.COMPRESSION, 1)
        self.photometric = source.integer(tag.PHOTOMETRIC, 1)
        self.samples = source.integer(tag.SAMPLES, 1)
        self.channels = 3 if self.photometric in COLOUR else self.samples
        self._check_kind(path, source)

    def _check_kind(self, path: Path, source: Directory) -> None:
        bits, kinds = set(source.integers(tag.BITS)) or {1}, set(source.integers(tag.SAMPLE_FORMAT)) - {1}
        wrong = None
        if self.compression not in COMPRESSIONS:
            wrong = f"compression {self.compression}"
        elif bits != {8} or kinds:
            wrong = f"samples of {sorted(bits)} bits, format {sorted(kinds) or [1]}"
        elif self.photometric not in (0, 1, *COLOUR) or (self.photometric == 6 and self.compression != JPEG):
            wrong = f"photometric interpretation {self.photometric} with compression {self.compression}"
        elif not 1 <= self.samples <= 16 or self.samples < self.channels:
            wrong = f"{self.samples} samples"
        elif self.samples > 1 and source.integer(tag.PLANAR, 1) != 1:
            wrong = "one plane for each channel"
        elif source.integer(32997, 1) != 1 or source.integer(32998, 1) != 1:
            wrong = "volumes"
        if wrong:
            raise ImageError(
                f"{path}: TIFF is read here with 8-bit grey or RGB samples side by side, uncompressed or in LZW, "
                f"deflate, zstd, PackBits, JPEG or JPEG 2000; this one has {wrong}. Write it as a tiled "
                "pyramid with deflate compression, or try open_image(path, reader='openslide')."
            )


def open_tiff(path: Path) -> Reader:
    """The largest tiled image of the file and those that are its reductions; else its first image, in strips.

    Raises:
        ImageError: the file is broken, hostile or of a kind that is not read here.
    """
    file = File(path)
    with complaints(path, "reading its directories"):
        found = directories(file)
        levels = pyramid(found)
        layout = Layout(levels[0])
        if not layout.tiled:
            grid = _plain_rows(levels[0], layout)
            if grid is not None:
                return Reader([grid], grid.channels, microns_per_pixel(found, levels[0]))
        for level in levels:
            layout = Layout(level)
            check_tile(path, layout.tile_height, layout.tile_width, layout.samples)
        with tifffile.TiffFile(path) as tiff:
            grids = []
            for level in levels:
                tiff.filehandle.seek(level.offset)
                grids.append(TiffGrid(level, tifffile.TiffPage(tiff, index=0)))
        return Reader(grids, grids[0].channels, microns_per_pixel(found, levels[0]), sequential=not layout.tiled)


def pyramid(found: list[Directory]) -> list[Directory]:
    """Base and reductions: tiled, the same kind of pixels, both sides smaller by one factor up to rounding."""
    tiled = [d for d in found if tag.TILE_WIDTH in d]
    if not tiled:
        return found[:1]

    def size(d: Directory) -> tuple[int, int]:
        return d.integer(tag.HEIGHT), d.integer(tag.WIDTH)

    def kind(d: Directory) -> tuple:
        return d.integer(tag.SAMPLES, 1), d.integers(tag.BITS), d.integer(tag.PHOTOMETRIC, 1) in COLOUR

    base = max(tiled, key=lambda d: math.prod(size(d)))
    height, width = size(base)
    levels = {(height, width): base}
    for d in tiled:
        h, w = size(d)
        if 0 < h <= height and 0 < w <= width and kind(d) == kind(base):
            long, short = ((height, h), (width, w)) if height > width else ((width, w), (height, h))
            factor = long[0] / long[1]
            if abs(short[0] / factor - short[1]) <= 2:
                levels.setdefault((h, w), d)
    ordered = sorted(levels.values(), key=size, reverse=True)
    if any(size(b)[1] > size(a)[1] for a, b in pairwise(ordered)):
        raise ImageError(f"{base.file.path}: the levels of a pyramid shrink in both sides; got {list(levels)}.")
    return ordered


def _plain_rows(source: Directory, layout: Layout) -> ArrayGrid | None:
    """Uncompressed rows that follow each other are an array in the file: mapped, no copy needed."""
    strips = layout.height // layout.tile_height + (layout.height % layout.tile_height > 0)
    if layout.compression != 1 or layout.photometric == 0 or source.integer(tag.PREDICTOR, 1) != 1:
        return None
    offsets, counts = (source.integers(t, TILES) for t in (tag.STRIP_OFFSETS, tag.STRIP_COUNTS))
    row = layout.width * layout.samples
    together = all(a + n == b for a, n, b in zip(offsets, counts, offsets[1:], strict=False))
    if not together or sum(counts) != layout.height * row or strips != len(offsets):
        return None
    source.file.read(offsets[0] + sum(counts) - 1, 1)  # is it there?
    shape = layout.height, layout.width, layout.samples
    pixels = np.memmap(source.file.path, np.uint8, "r", offsets[0], shape)
    return ArrayGrid(pixels[..., : layout.channels])


def microns_per_pixel(found: list[Directory], base: Directory) -> tuple[float, float] | None:
    """From Aperio's MPP, OME's PhysicalSize, or the resolution tags when they are finer than any print (10 microns)."""
    text = found[0].text(tag.DESCRIPTION)
    aperio = re.search(r"\|\s*MPP\s*=\s*([0-9.]+)", text)
    if aperio:
        return float(aperio[1]), float(aperio[1])
    ome = [re.search(rf'PhysicalSize{axis}="([0-9.eE+-]+)"', text) for axis in "YX"]
    units = [re.search(rf'PhysicalSize{axis}Unit="([^"]*)"', text) for axis in "YX"]
    if ome[0] and ome[1]:
        scales = [{"nm": 1e-3, "mm": 1e3}.get(unit[1] if unit else "", 1.0) for unit in units]
        return float(ome[0][1]) * scales[0], float(ome[1][1]) * scales[1]
    unit = {2: 25400.0, 3: 10000.0}.get(base.integer(tag.UNIT, 1), 0.0)
    density = base.rational(tag.Y_RESOLUTION), base.rational(tag.X_RESOLUTION)
    if unit and all(density) and max(unit / d for d in density) < 10:
        return unit / density[0], unit / density[1]
    return None
