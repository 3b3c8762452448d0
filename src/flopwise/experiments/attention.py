"""Claim 2: reading a few patches is as good as reading all pixels, for a hundredth of the work.

Digits hidden among strokes on 1500 x 1500 images: attention sampling with every estimator, and convolutional networks
on the whole image at several resolutions, all under the same budget.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flopwise.attention_sampling import entropy_loss
from flopwise.attention_sampling.expectation import Estimator
from flopwise.core import Budget, Ledger
from flopwise.core.batch import Examples
from flopwise.experiments.digits_in_noise import DigitsInNoise
from flopwise.experiments.runner import Records, run_all, save_checkpoint, tune_rate
from flopwise.models.glimpse import GlimpseClassifier, GlimpseConfig, feature_network, initialise

ESTIMATORS = tuple(name for name in get_args(Estimator) if name != "topk")
WHOLE = {"cnn_1": 1, "cnn_2": 2, "cnn_4": 4}  # the patches' layers on all of the image, each side reduced so much
LOW = {"lowres_4": 4, "lowres_8": 8}  # a network made for the reduced image
REDUCED = WHOLE | LOW
RATES = dict.fromkeys(LOW, 8e-3)  # the best of a grid, for a plan that tunes nothing
TEST_IMAGES = 2000
TEST_SEED = 1_000_000
CURVE_POINTS = 10
CURVE_IMAGES, WHOLE_CURVE_IMAGES = 500, 100  # networks on whole images take long
CHECKPOINT_SECONDS = 15.0
ATTENTION_WAITS = 0.07  # share of the budget in which attention stays the prior; it learns at full rate from twice that
ENTROPY_BONUS = 1e-2  # spreads attention; in one trial no better and no worse than 1e-4
ATTENTION_RATE = 6.0  # times the other networks' learning rate: its gradient is small and its network smaller


@dataclass(frozen=True)
class Plan:
    """What the experiment runs.

    Args:
        seconds: of CPU time, the budget of every run, data and all.
        methods: estimators, "cnn_1" (the full network), "cnn_2", "cnn_4" (on a reduced image), "lowres_4", "lowres_8".
        rates: learning rates on which the networks without attention are tuned, with seed 0.
        seeds: how many seeds each method gets.
        side: of an image.
    """

    seconds: float = 360.0
    methods: tuple[str, ...] = (*ESTIMATORS, "cnn_1", *LOW)
    rates: tuple[float, ...] = (4e-3, 8e-3, 1.6e-2)
    seeds: int = 3
    side: int = 1500


QUICK = Plan(seconds=100.0, methods=("murthy", "replacement", "lowres_8"), rates=(), seeds=1)
FULL = Plan()


@dataclass(frozen=True)
class Run:
    """One training run; two runs with equal fields are the same run."""

    method: str
    seed: int
    seconds: float
    rate: float = 2e-3
    batch_size: int = 8
    side: int = 1500
    n_patches: int = 10
    kind: str = "run"

    @property
    def name(self) -> str:
        return (
            f"{self.method}-seed{self.seed}-rate{self.rate:g}-batch{self.batch_size}"
            f"-seconds{self.seconds:g}-side{self.side}"
        )

    @property
    def reduction(self) -> int:
        return REDUCED.get(self.method, 8)


def compare(plan: Plan, folder: Path) -> None:
    """Tune the networks without attention, then train every method with every seed: `folder`/records.jsonl.

    What the folder has already is not run again; an interrupted run goes on from its checkpoint.
    """
    rates = RATES | {method: tune(method, plan, folder) for method in plan.methods if method in REDUCED and plan.rates}
    runs = [
        Run(method, seed, plan.seconds, rates.get(method, Run.rate), side=plan.side)
        for seed in range(plan.seeds)
        for method in plan.methods
    ]
    Records(folder).take_tuned(runs)
    run_all(runs, train, folder, title="training")


def tune(method: str, plan: Plan, folder: Path) -> float:
    """The rate with which a method has the lowest training loss."""

    def run_with(rate: float) -> Run:
        return Run(method, 0, plan.seconds, rate, side=plan.side, kind="tune")

    return tune_rate(plan.rates, run_with, train, folder, title=f"tuning {method}").rate


class WholeImage(nn.Module):
    """The feature network of the glimpse classifier over all of an image, and a linear layer on the sum.

    With the image at full resolution, these are the features that attention sampling chooses from, all of them.

    Args:
        divisor: of the sum over all positions.
    """

    def __init__(self, config: GlimpseConfig, reduction: int, divisor: float = 100.0) -> None:
        super().__init__()
        self.divisor = divisor
        patch = config.patch_size // reduction
        layers = feature_network(config.channels, config.feature_width, config.features, patch, config.scale)
        self.features = layers[:-2]  # without flattening and normalising, which are for patches
        self.head = nn.Linear(config.features, len(config.names))
        initialise(self, torch.Generator().manual_seed(config.seed))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        features = self.features(image.to(memory_format=torch.channels_last)).relu()
        return self.head(features.sum((2, 3)) / self.divisor)


class LowResolution(nn.Module):
    """A convolutional network for the reduced image: windows of 48 pixels, 16 apart, and of every feature the largest.

    What learned most in a minute of those tried: the layers of the patches are 20 times as slow, and sums, means and
    soft maxima over the positions left chance later or not at all.
    """

    def __init__(self, config: GlimpseConfig, reduction: int, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(config.channels, width, 48 // reduction, stride=16 // reduction),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, len(config.names))
        initialise(self, torch.Generator().manual_seed(config.seed))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        return self.head(self.features(image.to(memory_format=torch.channels_last)).amax((2, 3)))


Model = GlimpseClassifier | WholeImage | LowResolution


class CpuLedger(Ledger):
    """A ledger whose seconds are the CPU time of this process: on a busy machine, work is what counts, not waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu_seconds, self._running = 0.0, False
        self._start = 0.0

    @property
    def seconds(self) -> float:
        return self.cpu_seconds + (time.process_time() - self._start if self._running else 0.0)

    def __enter__(self) -> "CpuLedger":
        super().__enter__()
        self._start, self._running = time.process_time(), True
        return self

    def __exit__(self, *exception: object) -> None:
        self.cpu_seconds, self._running = self.seconds, False
        super().__exit__(*exception)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.cpu_seconds, self._running = self.seconds, False
        with super().paused():
            yield
        self._start, self._running = time.process_time(), True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "cpu_seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.cpu_seconds = state["cpu_seconds"]


def make_model(run: Run) -> Model:
    """The network of a run, its weights from the run's seed."""
    config = GlimpseConfig(
        classes=10,
        n_patches=run.n_patches,
        prior="brightness",
        prior_strength=3.0,
        smoothing=0.02,
        attention_width=24,
        attention_window=6,  # 48 pixels: a glyph of 28, wherever it lies between positions 16 apart
        estimator=run.method if run.method in ESTIMATORS else "murthy",  # type: ignore[arg-type]
        seed=run.seed,
    )
    if run.method in LOW:
        return LowResolution(config, run.reduction)
    return WholeImage(config, run.reduction) if run.method in WHOLE else GlimpseClassifier(config)


def train(run: Run, checkpoint: Path, progress: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """Train until the budget is spent and return the record. A checkpoint is written every few seconds and resumed."""
    model = make_model(run)
    groups = [{"params": parameters} for parameters in parameter_groups(model)]
    optimizer = torch.optim.Adam(groups, run.rate)
    budget, ledger = Budget(seconds=run.seconds), CpuLedger()
    loader = DigitsInNoise(side=run.side, reduction=run.reduction, size=run.batch_size, seed=run.seed)
    test = TestImages(run)
    record: dict[str, Any] = {"curve": [], "steps": 0, "train_loss": None}
    parts = {"model": model, "optimizer": optimizer, "ledger": ledger, "loader": loader}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        record = saved["record"]
    written = time.monotonic()

    batches = iter(loader)
    with ledger:
        while not budget.spent(ledger):
            low, images, labels = next(batches)
            set_rates(optimizer, run.rate, budget.share(ledger))
            with ledger.phase("training", Examples((low, labels))):
                loss = step(model, optimizer, low, images, labels)
            record["steps"] += 1
            record["train_loss"] = loss if record["train_loss"] is None else 0.99 * record["train_loss"] + 0.01 * loss

            share = budget.share(ledger)
            progress(share)
            with ledger.paused():
                if share * CURVE_POINTS >= len(record["curve"]) + 1 and share < 1:
                    record["curve"].append(point(model, ledger, share, record, test))
                if time.monotonic() - written > CHECKPOINT_SECONDS:
                    save_checkpoint(
                        checkpoint, {name: part.state_dict() for name, part in parts.items()} | {"record": record}
                    )
                    written = time.monotonic()

    errors = {"": test.error(model)}
    if isinstance(model, GlimpseClassifier):
        errors |= {f"topk_{n}": test.error(model, estimator="topk", n_patches=n) for n in (5, 10, 20)}
        errors["n_5"] = test.error(model, n_patches=5)
        if run.seed == 0 and run.kind == "run":
            model.save(checkpoint.parent.parent / "models" / run.method)
    record["curve"].append(point(model, ledger, 1.0, record, test))
    return record | {
        "experiment": "attention",
        "kind": run.kind,
        "method": run.method,
        "seed": run.seed,
        "rate": run.rate,
        "batch_size": run.batch_size,
        "budget": {"seconds": run.seconds},
        "data": {"name": "digits in noise", "side": run.side, "test": TEST_IMAGES},
        "flops": ledger.flops,
        "seconds": ledger.seconds,
        "examples": ledger.examples,
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_error": errors.pop(""),
        "test_errors": errors,
    }


def parameter_groups(model: Model) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Everything but the attention network, and the attention network with the prior's strength."""
    attention = [p for name, p in model.named_parameters() if name.startswith(("look.attention", "look.beta"))]
    others = [p for name, p in model.named_parameters() if not name.startswith(("look.attention", "look.beta"))]
    return others, attention


def set_rates(optimizer: torch.optim.Optimizer, rate: float, share: float) -> None:
    """Half a cosine; attention begins to learn when there are features worth attending to."""
    from flopwise.importance_sampling import cosine

    others, attention = optimizer.param_groups
    others["lr"] = rate * cosine(share)
    attention["lr"] = ATTENTION_RATE * others["lr"] * min(1.0, max(0.0, share / ATTENTION_WAITS - 1))


def step(model: Model, optimizer: torch.optim.Optimizer, low: Tensor, images: Any, labels: Tensor) -> float:
    """One optimizer step; returns the cross-entropy."""
    if isinstance(model, GlimpseClassifier):
        logits, glimpse = model(low, images)
        regulariser = entropy_loss(glimpse.entropy, bonus=ENTROPY_BONUS)
    else:
        logits, regulariser = model(low), 0.0
    loss = cross_entropy(logits, labels)
    (loss + regulariser).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


class TestImages:
    """The same test images for every run, made anew each time they are looked at: they would not fit into memory."""

    def __init__(self, run: Run) -> None:
        self.options = {"side": run.side, "reduction": run.reduction, "split": "test", "seed": TEST_SEED}
        self.size = 100 if run.reduction > 4 else 10

    @torch.no_grad()
    def error(self, model: nn.Module, *, limit: int | None = None, **options: Any) -> float:
        """The share of images whose class is missed, of the first `limit` or of all."""
        limit = limit or TEST_IMAGES
        size = min(self.size, limit)
        batches = iter(DigitsInNoise(size=size, **self.options))
        wrong = 0
        for _ in range(limit // size):
            low, images, labels = next(batches)
            logits = model(low, images, **options).logits if isinstance(model, GlimpseClassifier) else model(low)
            wrong += int((logits.argmax(1) != labels).sum())
        return wrong / (limit // size * size)


def point(model: nn.Module, ledger: Ledger, share: float, record: dict[str, Any], test: TestImages) -> dict[str, Any]:
    """One point of the curves."""
    glimpses = isinstance(model, GlimpseClassifier)
    found = {
        "share": share,
        "seconds": ledger.seconds,
        "examples": ledger.examples,
        "flops": ledger.flops,
        "train_loss": record["train_loss"],
        "test_error": test.error(model, limit=CURVE_IMAGES if glimpses else WHOLE_CURVE_IMAGES),
    }
    if glimpses and model.look.beta is not None:
        found["beta"] = float(model.look.beta.detach())
    return found


def settings(run: Run) -> dict[str, Any]:
    """The model's configuration, for the report."""
    model = make_model(run)
    return asdict(model.config) if isinstance(model, GlimpseClassifier) else {}
