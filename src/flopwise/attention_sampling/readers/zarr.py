"""zarr arrays and OME-Zarr pyramids."""

from pathlib import Path
from typing import Any

import numpy as np

from flopwise.attention_sampling.readers.base import ImageError, Reader, check_tile, complaints, missing

try:
    import zarr
except ImportError as cause:
    raise missing("zarr", "reading zarr", cause) from cause


class ZarrGrid:
    """One level: an array with the axes y, x, perhaps c, and others of which the first plane is taken."""

    def __init__(self, array: zarr.Array, axes: str, path: Path) -> None:
        self.array, self.axes, self.path = array, axes, path
        if array.dtype != np.uint8 or len(axes) != array.ndim or not {"y", "x"} <= set(axes):
            raise ImageError(
                f"{path}: a level is uint8 with axes y and x (and c, z, t); got {array.dtype} "
                f"{array.shape}, axes {axes!r}."
            )
        sizes, chunks = dict(zip(axes, array.shape, strict=True)), dict(zip(axes, array.chunks, strict=True))
        self.height, self.width, self.channels = sizes["y"], sizes["x"], sizes.get("c", 1)
        if 0 in array.shape or self.channels > 16:
            raise ImageError(f"{path}: a level has pixels and at most 16 channels; got {array.shape}, axes {axes!r}.")
        self.tile_height, self.tile_width = chunks["y"], chunks["x"]
        check_tile(path, self.tile_height, self.tile_width, int(np.prod(array.chunks)) // (chunks["y"] * chunks["x"]))

    def tile(self, row: int, column: int) -> np.ndarray:
        y, x = row * self.tile_height, column * self.tile_width
        places = {"y": slice(y, y + self.tile_height), "x": slice(x, x + self.tile_width), "c": slice(None)}
        kept = "".join(axis for axis in self.axes if axis in places)
        with complaints(self.path, f"reading chunk ({row}, {column})"):
            pixels: Any = self.array[tuple(places.get(axis, 0) for axis in self.axes)]
        order = [kept.index(axis) for axis in "yxc" if axis in kept]
        pixels = np.asarray(pixels).transpose(order)
        return pixels if pixels.ndim == 3 else pixels[..., None]


def open_zarr(path: Path) -> Reader:
    """A single array, or the first multiscale image of an OME-Zarr group (0.4 and 0.5)."""
    with complaints(path, "opening it with zarr"):
        node = zarr.open(path, mode="r")
        if isinstance(node, zarr.Array):
            grid = ZarrGrid(node, _guessed_axes(node.shape), path)
            return Reader([grid], grid.channels)
        attributes: dict[str, Any] = dict(node.attrs)
        scales = attributes.get("ome", attributes).get("multiscales")
        if not scales:
            raise ImageError(f"{path}: a zarr group is an image when it has OME 'multiscales'; open one of its arrays.")
        axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in scales[0].get("axes", [])]
        names = "".join(axis["name"] for axis in axes)
        grids = []
        for dataset in scales[0]["datasets"]:
            array = node[dataset["path"]]
            if not isinstance(array, zarr.Array):
                raise ImageError(f"{path}: level {dataset['path']!r} of a multiscale image is an array.")
            grids.append(ZarrGrid(array, names or _guessed_axes(array.shape), path))
        return Reader(grids, grids[0].channels, _microns(axes, scales[0]["datasets"][0]))


def _guessed_axes(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        return "yxc" if shape[2] <= 4 else "cyx"
    return "tczyx"[-len(shape) :]


def _microns(axes: list[dict[str, str]], dataset: dict[str, Any]) -> tuple[float, float] | None:
    units = {
        axis["name"]: {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3}.get(axis.get("unit", ""))
        for axis in axes
    }
    scale = next((t["scale"] for t in dataset.get("coordinateTransformations", []) if t["type"] == "scale"), None)
    sizes = dict(zip(units, scale, strict=True)) if scale else {}
    y, x = units.get("y"), units.get("x")
    return (sizes["y"] * y, sizes["x"] * x) if sizes and y and x else None
