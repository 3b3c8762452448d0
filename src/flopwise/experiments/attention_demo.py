"""What `flopwise demo attention` shows: a trained model's errors, what a step costs, and what it looked at."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flopwise.experiments import attention
from flopwise.experiments.attention import TEST_SEED
from flopwise.experiments.attention_cost import compare_steps
from flopwise.experiments.digits_in_noise import DigitsInNoise
from flopwise.experiments.runner import Records, run_all
from flopwise.models import GlimpseClassifier

METHOD = "murthy"
SIDE = 1504  # of the images on which a step is timed: a multiple of 8
TESTED = 300  # images


@dataclass(frozen=True)
class Run:
    """One picture; two runs with equal fields are the same run."""

    image: int
    side: int
    kind: str = "looked"


@dataclass(frozen=True)
class Trial:
    """The shipped model on test images; two with equal fields are the same."""

    images: int
    kind: str = "shipped"

    @property
    def name(self) -> str:
        return f"shipped-{self.images}"


def shipped() -> Path:
    """The folder of the trained model that the package carries; how it was trained stands in the data's README."""
    return Path(str(files("flopwise.experiments") / "data" / "attention-digits"))


def show(folder: Path) -> None:
    """The shipped model's errors, costs and glimpses in `folder`/records.jsonl; what is there is not made again."""
    run_all([Trial(TESTED)], test, folder, title="looking at test images")
    compare_steps(folder, (METHOD, "cnn_1"), (SIDE,))
    show_glimpses(folder, side=attention.QUICK.side, model=shipped())


def test(run: Trial, checkpoint: Path, progress: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """The record of the shipped model's test: errors with its sampled patches, and with the ten most attended."""
    del checkpoint
    model, images = GlimpseClassifier.load(shipped()), attention.TestImages(attention.Run(METHOD, 0, 0.0))
    error = images.error(model, limit=run.images)
    progress(0.5)
    return {
        "experiment": "attention",
        "kind": "shipped",
        "test_error": error,
        "topk_error": images.error(model, limit=run.images, estimator="topk"),
        "tested": run.images,
        "side": attention.QUICK.side,
        "n_patches": model.config.n_patches,
        "patch_size": model.config.patch_size,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def show_glimpses(folder: Path, *, side: int, images: int = 2, model: Path | None = None) -> None:
    """What a model saw, added to `folder`/records.jsonl; what is there is not made again.

    Args:
        model: its folder; without one, the model trained in `folder`, and if there is none, nothing is shown.
    """
    records, saved = Records(folder), model or folder / "models" / METHOD
    runs = [Run(image, side) for image in range(images)]
    if not saved.is_dir() or all(records.find(run) for run in runs):
        return
    classifier = GlimpseClassifier.load(saved)
    low, high, labels = next(iter(DigitsInNoise(side=side, size=images, split="test", seed=TEST_SEED)))
    for run in runs:
        view, image = low[run.image], high[run.image]
        with torch.no_grad():
            logits, glimpse = classifier(view[None], [image], estimator="topk")
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
