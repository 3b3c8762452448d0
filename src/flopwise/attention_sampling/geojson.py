"""The patches that were read as GeoJSON, which QuPath and other viewers lay over the image."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor


def patches_geojson(
    positions: Int[Tensor, "n 2"],
    size: tuple[int, int],
    *,
    downsample: float = 1.0,
    measurements: Mapping[str, Sequence[float] | Tensor] | None = None,
    name: str = "patch",
) -> dict[str, Any]:
    """One rectangle for each patch, in pixels of the finest level, x before y as GeoJSON has it.

    Args:
        positions: (y, x) of the top-left pixels, in pixels of the level they were read from.
        size: height and width of a patch, likewise.
        downsample: of that level, `image.levels[level].downsample`.
        measurements: numbers for every patch, such as {"weight": glimpse.weights[0]}.
        name: of the patches, followed by their place in the order of reading.

    Returns:
        A FeatureCollection. A patch met twice is there twice; one may reach outside the image.

    Raises:
        ValueError: a measurement has not one number for each patch.

    Source: RFC 7946, with pixels in place of degrees; the properties are those that QuPath reads.
    """
    columns = {key: [float(value) for value in values] for key, values in (measurements or {}).items()}
    for key, values in columns.items():
        if len(values) != len(positions):
            raise ValueError(
                f"a measurement has a number for each of {len(positions)} patches; {key!r} has {len(values)}."
            )
    height, width = size[0] * downsample, size[1] * downsample
    features = []
    for i, (y, x) in enumerate(positions.tolist()):
        top, left = y * downsample, x * downsample
        bottom, right = top + height, left + width
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {
                    "objectType": "annotation",
                    "name": f"{name} {i + 1}",
                    "measurements": {key: values[i] for key, values in columns.items()},
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def write_geojson(path: str | Path, collection: Mapping[str, Any]) -> None:
    """Write it as UTF-8. Numbers that are not finite, which JSON has no word for, are an error."""
    Path(path).write_text(json.dumps(collection, allow_nan=False) + "\n", encoding="utf-8")
