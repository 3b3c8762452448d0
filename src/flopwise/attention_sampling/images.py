"""Lazy pyramids: images larger than memory, of which only the patches that are asked for are read.

    image = open_image("slide.tiff")
    image.levels                                    # Level(height, width, downsample), the finest first
    image.read(0, y, x, 256, 256)                   # (channels, 256, 256) uint8; what lies outside the image is `fill`
    read_patches([image], 0, positions, (256, 256)) # many at once, by threads, every tile decoded once

An image holds its path and its sizes, never a handle: files are opened where they are read, at most `OPEN_FILES` of
them in a process. So images may be pickled, sent to workers, forked, and there may be thousands of them.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, Num, UInt8
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from flopwise.attention_sampling.readers import Reader

OPEN_FILES = 32  # in one process; the least recently read is closed
ALMOST = 0.01  # relative, of a downsample: levels are rounded to whole pixels


@runtime_checkable
class Readable(Protocol):
    """All that a lazy image must do; `LazyImage` does it for files and arrays."""

    def read(self, level: int, y: int, x: int, height: int, width: int) -> Tensor: ...


@dataclass(frozen=True)
class Level:
    """One resolution of a pyramid.

    Attributes:
        height, width: in pixels of this level.
        downsample: pixels of level 0 per pixel of this level, along one side.
    """

    height: int
    width: int
    downsample: float


@dataclass(frozen=True)
class _Source:
    """What it takes to open the same pixels again, here or in another process."""

    path: Path
    reader: str | None
    raw: tuple[int, tuple[int, ...]] | None  # offset and shape of a memory map
    cache: Path
    version: tuple[int, int]  # size and time of change, of the file


class LazyImage:
    """An image as a pyramid of levels, made by `open_image`.

    Attributes:
        levels: the finest first.
        channels: 1 for grey, 3 for colour, or what an array has.
        microns_per_pixel: (y, x) at level 0, or None where the file does not say.
        fill: the value of pixels outside the image and of tiles that are absent in the file.
    """

    def __init__(self, source: "_Source | Reader", fill: int, name: str) -> None:
        self._source, self.fill, self.name = source, fill, name
        reader = self._reader()
        factors = _downsamples([(grid.height, grid.width) for grid in reader.grids])
        self.levels = tuple(Level(g.height, g.width, f) for g, f in zip(reader.grids, factors, strict=True))
        self.channels = reader.channels
        self.microns_per_pixel = reader.microns_per_pixel

    def __repr__(self) -> str:
        sizes = ", ".join(f"{level.height} x {level.width}" for level in self.levels)
        return f"LazyImage({self.name}: {self.channels} channels, {sizes})"

    def read(self, level: int, y: int, x: int, height: int, width: int) -> UInt8[Tensor, "channels height width"]:
        """The pixels [y, y + height) x [x, x + width) of a level, in its own pixels; outside the image they are `fill`.

        The memory is channels-last, as decoders write it: `read(...).permute(1, 2, 0)` is contiguous.

        Raises:
            ValueError: no such level, or a patch without pixels.
            ImageError: the bytes cannot be decoded.
        """
        positions = torch.tensor([[[y, x]]])
        return read_patches([self], level, positions, (height, width), threads=1)[0, 0]

    def level_for(self, downsample: float) -> int:
        """The coarsest level that is at least as fine as `downsample`: 8 means an eighth of each side."""
        return max(i for i, level in enumerate(self.levels) if i == 0 or level.downsample <= downsample * (1 + ALMOST))

    def thumbnail(self, longest: int = 1024) -> UInt8[Tensor, "channels height width"]:
        """The whole image, its longer side at most `longest` pixels: the nearest finer level, averaged over areas."""
        finest = self.levels[0]
        scale = max(1.0, max(finest.height, finest.width) / longest)
        number = self.level_for(scale)
        pixels = self.read(number, 0, 0, self.levels[number].height, self.levels[number].width)
        size = max(1, round(finest.height / scale)), max(1, round(finest.width / scale))
        if size == tuple(pixels.shape[1:]):
            return pixels
        return F.interpolate(pixels[None].float(), size=size, mode="area")[0].round().byte()

    def _reader(self) -> "Reader":
        if isinstance(self._source, _Source):
            return _opened(self._source, os.getpid())
        return self._source


def open_image(source: Any, *, reader: str | None = None, cache: str | Path | None = None, fill: int = 0) -> LazyImage:
    """Open an image of any size as a lazy pyramid.

    - tiled TIFF and BigTIFF, with or without levels in it (reduced pages or SubIFDs), such as SVS: 8 bits, grey or RGB;
    - PNG, JPEG and what else Pillow reads; `.npy` files, arrays (H, W) or (H, W, C) and `numpy.memmap`s, uint8;
    - a zarr folder or OME-Zarr pyramid (`pip install 'flopwise[zarr]'`);
    - vendors' slides through OpenSlide (`pip install 'flopwise[openslide]'`).

    Levels that the file lacks are built once, each the mean of 2 x 2 pixels of the one before, down to 64 pixels. They
    are streamed into a file in `cache`, in bounded memory; images in rows (PNG, JPEG, stripped TIFF) are copied there
    as tiles, too. PNG and JPEG are decoded as a whole for that, once. The next `open_image` finds the file, in whatever
    process, as long as the image does not change.

    Arguments:
        source: a path, or an array.
        reader: "tiff", "pillow", "npy", "zarr", "openslide", or None for the one that fits the file.
        cache: the folder for levels that were built; by default `$XDG_CACHE_HOME/flopwise/pyramids`.
        fill: the value outside the image and of absent tiles, 0 to 255; slides often want 255.

    Raises:
        ImageError: a `ValueError`: the file is broken, hostile or of a kind that is not read here.
        ImportError: an extra is missing; the message names the command that installs it.
    """
    from flopwise.attention_sampling import readers

    if not 0 <= fill <= 255:
        raise ValueError(f"fill is the value of a missing pixel, 0 to 255; got {fill}.")
    raw: tuple[int, tuple[int, ...]] | None = None
    if not isinstance(source, str | os.PathLike):
        mapped = readers.mapped_file(source)
        if mapped is None:
            return LazyImage(readers.in_memory(source), fill, "array")
        source, raw = mapped
    path = Path(source).resolve()
    status = path.stat()
    folder = Path(cache) if cache is not None else _cache_folder()
    version = status.st_size, status.st_mtime_ns
    return LazyImage(_Source(path, reader, raw, folder, version), fill, path.name)


def read_patches(
    images: Sequence[Readable],
    level: int,
    positions: Int[Tensor, "batch n 2"],
    size: tuple[int, int],
    *,
    threads: int | None = None,
) -> Num[Tensor, "batch n channels height width"]:
    """The patches of a batch of images: n of each, at `positions`, (y, x) of the top-left pixel, in pixels of `level`.

    Every tile is read and decoded once, however many patches share it, by `threads` threads: by default as many as
    torch uses, that is all cores in a plain program and 1 in a worker of a DataLoader. The memory is channels-last.

    Raises:
        ValueError: images and positions do not fit, channels differ, no such level.
        ImageError: a tile cannot be decoded.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"a patch has at least one pixel; got {height} x {width}.")
    if len(images) != len(positions) or not len(images):
        raise ValueError(f"positions are (images, n, 2); got {tuple(positions.shape)} for {len(images)} images.")
    threads = threads or torch.get_num_threads()
    if not all(isinstance(image, LazyImage) for image in images):
        return _read_one_by_one(images, level, positions, size, threads)
    return _read_tiles([image for image in images if isinstance(image, LazyImage)], level, positions, size, threads)


def _read_tiles(
    images: Sequence[LazyImage], level: int, positions: Tensor, size: tuple[int, int], threads: int
) -> Tensor:
    from flopwise.attention_sampling.readers.paste import Jobs, Patch

    channels = {image.channels for image in images}
    if len(channels) > 1:
        raise ValueError(f"the images of a batch have the same channels; got {sorted(channels)}. Convert them alike.")
    out = torch.empty((*positions.shape[:2], *size, channels.pop()), dtype=torch.uint8)
    jobs = Jobs()
    for image, patches, places in zip(images, out, positions.tolist(), strict=True):
        if not 0 <= level < len(image.levels):
            raise ValueError(f"{image.name} has levels 0 to {len(image.levels) - 1}; got {level}.")
        grid = image._reader().grids[level]
        for pixels, (y, x) in zip(patches.numpy(), places, strict=True):
            jobs.add(grid, Patch(y, x, pixels, image.fill))
    others = [_pool("tiles", threads, os.getpid()).submit(jobs.work) for _ in range(min(threads, len(jobs)) - 1)]
    jobs.work()
    for other in others:
        if not other.cancel():  # not begun: nothing was left to do
            other.result()
    return out.permute(0, 1, 4, 2, 3)


def _read_one_by_one(
    images: Sequence[Readable], level: int, positions: Tensor, size: tuple[int, int], threads: int
) -> Tensor:
    """For images of other makers, who have nothing but `read`."""
    places = [(image, y, x) for image, rows in zip(images, positions.tolist(), strict=True) for y, x in rows]
    patches = _pool("reads", threads, os.getpid()).map(lambda place: place[0].read(level, *place[1:], *size), places)
    return torch.stack(list(patches)).unflatten(0, positions.shape[:2])


@lru_cache(OPEN_FILES)
def _opened(source: _Source, process: int) -> "Reader":
    """The open file of this process: a handle made before a fork belongs to the parent."""
    from flopwise.attention_sampling import readers

    reader = readers.open_reader(source.path, source.reader, source.raw)
    if readers.lacks_levels(reader):
        key = sha256(repr((str(source.path), source.reader, source.raw, source.version)).encode()).hexdigest()[:24]
        return readers.complete(reader, source.cache / f"{source.path.stem}-{key}.tiff", source.path)
    return reader


@lru_cache(8)
def _pool(purpose: str, threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix=f"flopwise-{purpose}")


def _downsamples(sizes: list[tuple[int, int]]) -> list[float]:
    """Of each level against the first. From one to the next it is whole when rounding explains the rest."""
    factors = [1.0]
    for (height, width), (h, w) in pairwise(sizes):
        whole = round(max(height, width) / max(h, w))
        fits = abs(height / whole - h) <= 1 and abs(width / whole - w) <= 1
        factors.append(factors[-1] * whole if fits else max(sizes[0]) / max(h, w))
    return factors


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flopwise" / "pyramids"
