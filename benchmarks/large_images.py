"""Images larger than memory, from end to end: one classified, and many steps of training.

    python benchmarks/large_images.py [PART ...]

- predict: a sparse BigTIFF of 100,000 x 100,000 with its pyramid is opened and classified (class, attention, patches)
  by a model that is loaded from its folder. Seconds of the whole process, imports and all, and its peak memory.
- training: peak memory of training a classifier on pyramids of 5,000 and of 20,000 squared.

Every measurement is a fresh process with one thread; memory is its peak resident set in MB.
Appends its records to benchmarks/results/large_images.jsonl.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from parts import run_parts
from torch.nn.functional import cross_entropy

from flopwise.attention_sampling import entropy_loss, open_image
from flopwise.models import GlimpseClassifier, GlimpseConfig

sys.path.append(str(Path(__file__).parents[1] / "tests" / "attention_sampling"))
from pyramids import write_large  # pyright: ignore[reportMissingImports]

RESULTS = Path(__file__).parent / "results" / "large_images.jsonl"
HUGE, PATCHES, SIDE = 100_000, 64, 256
SIZES, FILES, BATCH, STEPS = (5_000, 20_000), 6, 4, 6
ROUNDS = 3  # of predicting; training is measured once


def predict() -> Iterator[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        image = Path(folder) / "huge.tiff"
        write_large(image, HUGE, HUGE, present=lambda level, row, column: level > 5 or (row + column) % 97 == 0)
        for reduction in (64, 128):
            model = Path(folder) / f"model-{reduction}"
            _model(reduction, PATCHES).save(model)
            rounds = [_measured("predict", image, model) for _ in range(ROUNDS)]
            yield {
                "part": "predict",
                "size": HUGE,
                "reduction": reduction,
                "seconds": [found["seconds"] for found in rounds],
                "peak MB": [found["peak"] for found in rounds],
                "after imports": {name: rounds[0][name] for name in ("imports", "start", "cpu")},
                "attention": rounds[0]["attention"],
                "patches": [PATCHES, SIDE],
            }


def training() -> Iterator[dict[str, Any]]:
    """With attention at 1/64 of both, and with low views of one size."""
    with TemporaryDirectory() as folder:
        files = {}
        for size in SIZES:
            files[size] = Path(folder) / str(size)
            files[size].mkdir()
            write_large(files[size] / "0.tiff", size, size)
            for i in range(1, FILES):
                (files[size] / f"{i}.tiff").hardlink_to(files[size] / "0.tiff")
        small, large = SIZES
        for name, reductions in (
            ("the same reduction", (64, 64)),
            ("a low view of the same size", (64 * small // large, 64)),
        ):
            found = {
                size: _measured("training", files[size], reduction)
                for size, reduction in zip(SIZES, reductions, strict=True)
            }
            peaks = {size: found[size]["peak"] for size in SIZES}
            added = {size: found[size]["peak"] - found[size]["start"] for size in SIZES}
            yield {
                "part": "training",
                "attention": name,
                "reduction": dict(zip(SIZES, reductions, strict=True)),
                "batch, steps, patches, side": [BATCH, STEPS, PATCHES // BATCH, SIDE],
                "peak MB": peaks,
                "MB above the imports": added,
                "peak, large over small": peaks[large] / peaks[small],
                "above the imports, large over small": added[large] / added[small],
            }


def _model(reduction: int, patches: int) -> GlimpseClassifier:
    return GlimpseClassifier(
        GlimpseConfig(classes=("without", "with"), channels=3, patch_size=SIDE, n_patches=patches, reduction=reduction)
    )


def _measured(what: str, *arguments: object) -> dict[str, Any]:
    """What a fresh process says that does it, and the seconds that it took from its start to its end."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "in-this-process", what, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout) | {"seconds": round(time.perf_counter() - start, 2)}


def _peak() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def _predict(image: str, model: str) -> dict[str, Any]:
    (found,) = GlimpseClassifier.load(model).predict([open_image(image)])
    return {"label": found.label, "attention": list(found.attention.shape), "read": list(found.patches.shape)}


def _train(folder: str, reduction: str) -> dict[str, Any]:
    model = _model(int(reduction), PATCHES // BATCH)
    images = [open_image(path) for path in sorted(Path(folder).iterdir())]
    optimizer, loss = torch.optim.Adam(model.parameters()), torch.zeros(())
    for step in range(STEPS):
        batch = [images[(step * BATCH + i) % len(images)] for i in range(BATCH)]
        logits, glimpse = model(model.low_views(batch), batch, seed=step)
        loss = cross_entropy(logits, torch.arange(BATCH) % 2) + entropy_loss(glimpse.entropy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"loss": float(loss.detach())}


def main() -> None:
    if sys.argv[1:2] == ["in-this-process"]:
        torch.set_num_threads(1)
        start, began = _peak(), time.process_time()
        found = {"predict": _predict, "training": _train}[sys.argv[2]](*sys.argv[3:])
        print(
            json.dumps(found | {"imports": began, "start": start, "cpu": time.process_time() - began, "peak": _peak()})
        )
    else:
        run_parts(__doc__, {"predict": predict, "training": training}, RESULTS)


if __name__ == "__main__":
    main()
