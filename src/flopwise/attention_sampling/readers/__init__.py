"""Readers of image files: each makes a `Reader`, whose levels are grids of tiles. They import what they need."""

from pathlib import Path

from flopwise.attention_sampling.readers import arrays
from flopwise.attention_sampling.readers.arrays import in_memory as in_memory
from flopwise.attention_sampling.readers.arrays import mapped_file as mapped_file
from flopwise.attention_sampling.readers.base import ImageError as ImageError
from flopwise.attention_sampling.readers.base import Reader as Reader

SLIDES = {
    ".bif",
    ".czi",
    ".mrxs",
    ".ndpi",
    ".scn",
    ".svslide",
    ".vms",
    ".vmu",
}  # OpenSlide's, though some look like TIFF
COARSE = 256  # a pyramid whose coarsest level has a longer side than that gets coarser ones
NAMES = ("tiff", "pillow", "npy", "zarr", "openslide")


def reader_for(path: Path) -> str:
    """The reader's name, from the suffix of the vendor formats, else from the first bytes."""
    if path.is_dir():
        return "zarr"
    if path.suffix.lower() in SLIDES:
        return "openslide"
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if head[:6] == b"\x93NUMPY":
        return "npy"
    if not head:
        raise ImageError(f"{path}: the file is empty.")
    return "pillow"


def open_reader(path: Path, name: str | None = None, raw: tuple[int, tuple[int, ...]] | None = None) -> Reader:
    """Open `path` with the named reader, or with the one that fits it; `raw`: the offset and shape of plain bytes."""
    if raw is not None:
        return arrays.open_raw(path, *raw)
    name = name or reader_for(path)
    if name == "npy":
        return arrays.open_npy(path)
    if name == "tiff":
        from flopwise.attention_sampling.readers.tiff import open_tiff as opened
    elif name == "pillow":
        from flopwise.attention_sampling.readers.pillow import open_pillow as opened
    elif name == "zarr":
        from flopwise.attention_sampling.readers.zarr import open_zarr as opened
    elif name == "openslide":
        from flopwise.attention_sampling.readers.openslide import open_openslide as opened
    else:
        raise ValueError(f"reader is one of {NAMES} or None; got {name!r}.")
    return opened(path)


def lacks_levels(reader: Reader) -> bool:
    """Whether a pyramid must be built before the image can be seen as a whole."""
    coarsest = reader.grids[-1]
    return reader.sequential or max(coarsest.height, coarsest.width) > COARSE


def complete(reader: Reader, cached: Path, name: object) -> Reader:
    """See `pyramid.complete`."""
    from flopwise.attention_sampling.readers import pyramid

    return pyramid.complete(reader, cached, name)
