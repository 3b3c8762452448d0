"""What a saved classifier sees in one image: its class, its attention, and the patches that it read."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from flopwise.attention_sampling import open_image
from flopwise.attention_sampling.geojson import patches_geojson, write_geojson
from flopwise.attention_sampling.images import LazyImage
from flopwise.models import GlimpseClassifier


class Look(NamedTuple):
    """What was seen, ready for JSON, for the page; the image; the pixels of the patches."""

    seen: dict[str, Any]
    image: LazyImage
    pixels: UInt8[Tensor, "n c h w"]


def look(image_path: Path, model_folder: Path, out: Path, *, patches: int | None = None) -> Look:
    """Predict, and write `seen.json` and `patches.geojson` (for viewers of slides) into `out`.

    Args:
        patches: how many to read; the model's own number by default.

    Raises:
        ValueError: the image or the model cannot be read, or they do not fit together.
    """
    model = GlimpseClassifier.load(model_folder)
    image = open_image(image_path)
    if image.channels != model.config.channels:
        raise ValueError(
            f"the model was made for images of {model.config.channels} channels; {image_path} has {image.channels}."
        )
    (found,) = model.predict([image], n_patches=patches)
    size, finest, (low,) = model.config.patch_size, image.levels[0], model.low_views([image])
    field = model.look.field
    scale = finest.height / low.shape[1], finest.width / low.shape[2]
    step = [s * f for s, f in zip(field.stride, scale, strict=True)]
    first = [(e / 2 - p) * f for e, p, f in zip(field.size, field.padding, scale, strict=True)]  # the first centre
    seen = {
        "image": image_path.name,
        "model": model_folder.name,
        "label": found.label,
        "probabilities": dict(zip(model.config.names, found.probabilities.tolist(), strict=True)),
        "microns_per_pixel": image.microns_per_pixel,
        "attention": {
            "rows": found.attention.tolist(),
            "corner": [centre - s / 2 for centre, s in zip(first, step, strict=True)],
            "step": step,
        },
        "patches": [
            {"y": y, "x": x, "height": size, "width": size, "weight": weight}
            for (y, x), weight in zip(found.positions.tolist(), found.weights.tolist(), strict=True)
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "seen.json").write_text(json.dumps(seen), encoding="utf-8")
    outline = patches_geojson(found.positions, (size, size), measurements={"weight": found.weights})
    write_geojson(out / "patches.geojson", outline)
    return Look(seen, image, (255 * found.patches).round().to(torch.uint8))
