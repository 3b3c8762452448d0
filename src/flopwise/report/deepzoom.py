"""An image of any size inside a page: its coarse levels as a whole, its fine ones where something was looked at."""

import base64
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any, Protocol

TILE = 256


class Level(Protocol):
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def downsample(self) -> float: ...


class Pyramid(Protocol):
    """What is shown: levels, the finest first, whose pixels are read as (channels, height, width) of 8 bits."""

    @property
    def levels(self) -> Sequence[Level]: ...
    def read(self, level: int, y: int, x: int, height: int, width: int) -> Any: ...


Region = tuple[float, float, float, float]  # y, x, height and width, in pixels of the finest level


def deep_zoom(
    image: Pyramid, *, regions: Sequence[Region] = (), budget: int = 4_000_000, quality: int = 80
) -> dict[str, Any]:
    """Tiles of `image` as JPEG data URIs, for a page that needs no server: at most `budget` characters of them.

    From the coarsest on, whole levels while they fit into half of the budget; then, from coarse to fine, the tiles
    under `regions` until it is spent. A viewer draws the levels in this order, so that what is missing is only blurred.

    Args:
        regions: the patches that were read, the most important first.
        quality: of JPEG, 1 to 95.

    Returns:
        {"width", "height", "tile": 256, "whole": how many levels are, "levels": [{"downsample", "width", "height",
        "tiles": {"row,column": "data:image/jpeg;base64,..."}}, ...], the coarsest first}

    Raises:
        ImportError: Pillow is missing.
    """
    numbers = range(len(image.levels))[::-1]
    tiles: list[dict[str, str]] = [{} for _ in numbers]
    left, whole = budget, 0
    for found, number in zip(tiles, numbers, strict=True):
        level = image.levels[number]
        everything = _encoded(image, number, _under((0, 0, level.height, level.width), level), quality)
        added = _while_they_fit(everything, left - budget // 2)
        if added is None:
            break
        found.update(added)
        left, whole = left - _length(added), whole + 1
    for found, number in list(zip(tiles, numbers, strict=True))[whole:]:
        level = image.levels[number]
        for region in regions:
            y, x, height, width = (side / level.downsample for side in region)
            places = [place for place in _under((y, x, height, width), level) if _key(place) not in found]
            added = _while_they_fit(_encoded(image, number, places, quality), left)
            if added is None:
                left = 0
                break
            found.update(added)
            left -= _length(added)
    levels = [
        {"downsample": image.levels[n].downsample, "width": image.levels[n].width, "height": image.levels[n].height}
        for n in numbers
    ]
    return {
        "width": image.levels[0].width,
        "height": image.levels[0].height,
        "tile": TILE,
        "whole": whole,
        "levels": [level | {"tiles": found} for level, found in zip(levels, tiles, strict=True)],
    }


def viewer(
    tiles: dict[str, Any], label: str, *, boxes: Sequence[Region] = (), overlay: dict[str, Any] | None = None
) -> str:
    """The markup that `deepzoom.js` brings to life; its style is `.zoom canvas { width: 100%; height: ... }`.

    Args:
        tiles: what `deep_zoom` returned.
        label: what the image shows, for those who do not see it.
        boxes: drawn as outlines. An element with `data-box="i"` inside `.zoom`, when clicked, brings box i into view.
        overlay: {"uri", "y", "x", "height", "width"}: a picture with transparency laid over that part of the image,
            such as the attention. A checkbox inside `.zoom` turns it off.
    """
    outlines = [dict(zip(("y", "x", "height", "width"), box, strict=True)) for box in boxes]
    data = json.dumps(tiles | {"boxes": outlines, "overlay": overlay}).replace("<", "\\u003c")
    return (
        f'<div class="zoom"><canvas tabindex="0" role="img" aria-label="{escape(label)}"></canvas>'
        f'<script type="application/json">{data}</script></div>'
    )


def _under(region: Region, level: Level) -> Iterator[tuple[int, int]]:
    """(row, column) of the tiles of `level` that a region touches, in pixels of that level."""
    y, x, height, width = region
    top, bottom = max(0, int(y // TILE)), int(min(y + height, level.height) - 1e-6) // TILE
    left, right = max(0, int(x // TILE)), int(min(x + width, level.width) - 1e-6) // TILE
    if y + height > 0 and x + width > 0:
        yield from ((row, column) for row in range(top, bottom + 1) for column in range(left, right + 1))


def _encoded(image: Pyramid, number: int, places: Iterable[tuple[int, int]], quality: int) -> Iterator[tuple[str, str]]:
    """(key, data URI) of tiles, one after the other."""
    level = image.levels[number]
    for row, column in places:
        y, x = row * TILE, column * TILE
        pixels = image.read(number, y, x, min(TILE, level.height - y), min(TILE, level.width - x))
        yield _key((row, column)), as_jpeg(pixels, quality)


def as_jpeg(pixels: Any, quality: int = 80) -> str:
    """(channels, height, width) of 8 bits as a JPEG data URI: the first three channels, or the only one.

    Raises:
        ImportError: Pillow is missing.
    """
    try:
        import numpy as np
        from PIL import Image
    except ImportError as cause:
        raise ImportError(f"showing an image needs {cause.name}: pip install 'flopwise[images]'") from cause

    array = np.asarray(pixels)
    picture = Image.fromarray(array[:3].transpose(1, 2, 0) if len(array) > 2 else array[0])
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _while_they_fit(tiles: Iterator[tuple[str, str]], budget: int) -> dict[str, str] | None:
    """All of `tiles`, or None as soon as they are longer than the budget."""
    found: dict[str, str] = {}
    for key, uri in tiles:
        found[key] = uri
        budget -= len(uri)
        if budget < 0:
            return None
    return found


def _key(place: tuple[int, int]) -> str:
    return f"{place[0]},{place[1]}"


def _length(tiles: dict[str, str]) -> int:
    return sum(map(len, tiles.values()))
