"""What the trained model of `flopwise demo attention` looked at in a few test images, for the page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flopwise.experiments.attention import TEST_SEED
from flopwise.experiments.digits_in_noise import DigitsInNoise
from flopwise.experiments.runner import Records
from flopwise.models import GlimpseClassifier

METHOD = "murthy"


@dataclass(frozen=True)
class Run:
    """One picture; two runs with equal fields are the same run."""

    image: int
    side: int
    kind: str = "looked"


def show_glimpses(folder: Path, *, side: int, images: int = 2) -> None:
    """What the model in `folder`/models saw, added to `folder`/records.jsonl; what is there is not made again."""
    records, saved = Records(folder), folder / "models" / METHOD
    runs = [Run(image, side) for image in range(images)]
    if not saved.is_dir() or all(records.find(run) for run in runs):
        return
    model = GlimpseClassifier.load(saved)
    low, high, labels = next(iter(DigitsInNoise(side=side, size=images, split="test", seed=TEST_SEED)))
    for run in runs:
        view, image = low[run.image], high[run.image]
        with torch.no_grad():
            logits, glimpse = model(view[None], [image], estimator="topk")
        records.add(
            run,
            {
                "experiment": "attention",
                "kind": "looked",
                "label": int(labels[run.image]),
                "predicted": int(logits.argmax()),
                "low": _grey(view[0]),
                "attention": [[round(a, 6) for a in row] for row in glimpse.attention[0].tolist()],
                "patches": [_grey(patch[0]) for patch in glimpse.patches[0]],
            },
        )


def _grey(pixels: Tensor) -> Any:
    return (255 * pixels).round().clamp(0, 255).int().tolist()
