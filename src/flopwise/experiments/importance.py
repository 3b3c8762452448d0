"""Claim 1: under a fixed budget, importance sampling reaches a lower training loss and test error than uniform.

A small convolutional network on augmented Fashion-MNIST, every method with the same FLOPs.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flopwise.core import Budget, Ledger
from flopwise.experiments.fashion_mnist import Augmented, Images, augment, load, normalise
from flopwise.experiments.runner import Records, run_all, save_checkpoint
from flopwise.importance_sampling import ImportanceSampler, cosine
from flopwise.importance_sampling.gate import GateRule

PRESAMPLE_RATIO = {"paper": 3, "same_rate": 6, "rate_scale": 6}
CURVE_POINTS = 12
CHECKPOINT_SECONDS = 10.0
VARIANCE_DRAWS = 100
GATE: dict[str, GateRule] = {"uniform": "never", "paper": "paper"}
METHODS = ("uniform", "paper", "same_rate", "rate_scale")


@dataclass(frozen=True)
class Plan:
    """What the experiment runs.

    Args:
        flops: the budget of every single run.
        rates, batch_sizes: the grid on which uniform is tuned, with seed 0 and the whole budget; while the best value
            is on an edge of a dimension with several values, the grid grows there.
        methods: besides uniform.
        seeds: how many seeds each method gets.
        data: folder of IDX files; None for the images that the package ships.
    """

    flops: float
    rates: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    methods: tuple[str, ...] = ("rate_scale",)
    seeds: int = 3
    data: str | None = None


# Runs of some 30 s and 50 s on one core, with batches of 16.
QUICK = Plan(flops=1.5e12, rates=(0.001, 0.002, 0.004), batch_sizes=(16,))
FULL = Plan(flops=2.5e12, rates=(0.0005, 0.001, 0.002), batch_sizes=(8, 16, 32), methods=METHODS[1:])


@dataclass(frozen=True)
class Run:
    """One training run; two runs with equal fields are the same run."""

    method: str
    seed: int
    rate: float
    batch_size: int
    flops: float
    data: str | None = None  # folder of IDX files, or the images that the package ships
    kind: str = "run"

    @property
    def presample_size(self) -> int:
        return self.batch_size * PRESAMPLE_RATIO.get(self.method, 1)

    @property
    def name(self) -> str:
        return f"{self.method}-seed{self.seed}-rate{self.rate:g}-batch{self.batch_size}-flops{self.flops:.4g}"


def compare(plan: Plan, folder: Path) -> None:
    """Tune uniform sampling, then train every method with every seed; the records are in `folder`/records.jsonl.

    What the folder has already is not run again; an interrupted run goes on from its checkpoint.
    """
    tuned = tune(plan, folder)
    runs = [
        replace(tuned, kind="run", method=method, seed=seed)
        for seed in range(plan.seeds)
        for method in ("uniform", *plan.methods)
    ]
    records = Records(folder)
    if records.find(runs[0]) is None:  # the best cell of the grid is uniform's run with seed 0
        records.add(runs[0], {**(records.find(tuned) or {}), "kind": "run"})
    run_all(runs, train, folder, title="training")


def tune(plan: Plan, folder: Path) -> Run:
    """The rate and batch size with which uniform sampling reaches the lowest training loss."""
    rates, batch_sizes = sorted(plan.rates), sorted(plan.batch_sizes)
    while True:
        grid = [
            Run("uniform", 0, rate, batch_size, plan.flops, plan.data, kind="tune")
            for rate in rates
            for batch_size in batch_sizes
        ]
        records = run_all(grid, train, folder, title="tuning uniform sampling")
        losses = [math.inf if record["train_loss"] is None else record["train_loss"] for record in records]
        best = grid[losses.index(min(losses))]
        if min(losses) == math.inf:
            rates = [rates[0] / 4, rates[0] / 2, *rates]
        elif len(rates) > 1 and best.rate in (rates[0], rates[-1]):
            rates = _widened(rates, best.rate)
        elif len(batch_sizes) > 1 and best.batch_size in (batch_sizes[0], batch_sizes[-1]) and best.batch_size > 1:
            batch_sizes = _widened(batch_sizes, best.batch_size)
        else:
            return best


def _widened(values: list[Any], edge: Any) -> list[Any]:
    """One more value beyond the edge, twice as far."""
    return [type(edge)(edge / 2), *values] if edge == values[0] else [*values, edge * 2]


def small_cnn(seed: int, width: int = 24) -> nn.Sequential:
    """Three convolutions and two linear layers; 0.18 million parameters, 3.6 MFLOP forward."""
    model = nn.Sequential(
        nn.Conv2d(1, width, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    generator = torch.Generator().manual_seed(seed)
    for module in model:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return model


def loss_per_example(outputs: Tensor, data: Any) -> Tensor:
    return cross_entropy(outputs, data[1], reduction="none")


def train(run: Run, checkpoint: Path, progress: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """Train until the budget is spent and return the record. A checkpoint is written every few seconds and resumed."""
    train_set, test_set = load(None if run.data is None else Path(run.data))
    model = small_cnn(run.seed)
    optimizer = torch.optim.Adam(model.parameters(), run.rate)
    budget, ledger = Budget(flops=run.flops), Ledger()
    loader = Augmented(train_set, size=run.presample_size, seed=run.seed)

    def forward(data: Any) -> Tensor:
        return model(data[0])

    sampler = ImportanceSampler(
        forward,
        loss_per_example,
        batch_size=run.batch_size,
        gate=GATE.get(run.method, "auto"),
        draw="with_replacement" if run.method == "paper" else "without_replacement",
        seed=run.seed,
    )
    record: dict[str, Any] = {"curve": [], "variance_ratio": None, "steps": 0}
    parts = {"model": model, "optimizer": optimizer, "sampler": sampler, "ledger": ledger}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        record = saved["record"]
    written = time.monotonic()

    batches = sampler.batches(loader)
    with ledger:
        while not budget.spent(ledger):
            batch = next(batches)
            share = budget.share(ledger)
            for group in optimizer.param_groups:
                group["lr"] = run.rate * cosine(share)
            sampler.loss(forward(batch.data), batch).backward()
            if run.method == "rate_scale":
                with sampler.scaled_rate(optimizer):
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
            record["steps"] += 1

            with ledger.paused():
                progress(share)
                if share * CURVE_POINTS >= len(record["curve"]):
                    record["curve"].append(_point(model, sampler, run, ledger, share, train_set, test_set))
                halfway = share >= 0.5 and record["variance_ratio"] is None and run.seed == 0
                if halfway and sampler.metrics()["ratio"] > 1:
                    record["variance_ratio"] = {
                        "predicted": sampler.metrics()["R"],
                        "measured": measured_variance(model, sampler, run, train_set),
                    }
                if time.monotonic() - written > CHECKPOINT_SECONDS:
                    save_checkpoint(
                        checkpoint, {name: part.state_dict() for name, part in parts.items()} | {"record": record}
                    )
                    written = time.monotonic()

    record["curve"].append(_point(model, sampler, run, ledger, 1.0, train_set, test_set))
    train_loss, _ = evaluate(model, train_set, augmented=True)
    _, test_error = evaluate(model, test_set)
    return record | {
        "experiment": "importance",
        "kind": run.kind,
        "method": run.method,
        "seed": run.seed,
        "rate": run.rate,
        "batch_size": run.batch_size,
        "presample_size": run.presample_size,
        "budget": {"flops": run.flops},
        "data": {"name": "Fashion-MNIST", "train": len(train_set), "test": len(test_set)},
        "flops": {"training": 0, "scoring": 0, "loading": 0} | ledger.flops_by_phase,
        "seconds": ledger.seconds,
        "examples": ledger.examples,
        "train_loss": train_loss,
        "test_error": test_error,
        "share_on": sampler.metrics()["share_on"],
    }


@torch.no_grad()
def evaluate(
    model: nn.Module, images: Images, *, limit: int | None = None, augmented: bool = False
) -> tuple[float, float]:
    """Mean loss and share of errors; on augmented images the augmentation is the same every time."""
    generator = torch.Generator().manual_seed(0)
    loss, errors, count = 0.0, 0, min(limit or len(images), len(images))
    for start in range(0, count, 1000):
        piece = slice(start, min(start + 1000, count))
        x, y = normalise(images.pixels[piece]), images.labels[piece]
        outputs = model(augment(x, generator) if augmented else x)
        loss += float(cross_entropy(outputs, y, reduction="sum"))
        errors += int((outputs.argmax(1) != y).sum())
    return loss / count, errors / count


def _point(
    model: nn.Module,
    sampler: ImportanceSampler,
    run: Run,
    ledger: Ledger,
    share: float,
    train_set: Images,
    test_set: Images,
) -> dict[str, Any]:
    """One point of the curves."""
    train_loss, _ = evaluate(model, train_set, limit=2000, augmented=True)
    _, test_error = evaluate(model, test_set)
    point = {"share": share, "flops": ledger.flops, "train_loss": train_loss, "test_error": test_error}
    if run.method != "uniform":
        metrics = sampler.metrics()
        point |= {"tau2": metrics["tau2"], "on": metrics["on"], "ratio": metrics["ratio"], "R": metrics["R"]}
        point["rate_scale"] = metrics["rate_scale"] if run.method == "rate_scale" else 1.0
    return point


def measured_variance(model: nn.Module, sampler: ImportanceSampler, run: Run, images: Images) -> float:
    """R by Monte Carlo: the trace of the covariance of drawn steps' gradients over uniform steps', at equal cost."""
    metrics = sampler.metrics()
    probe = ImportanceSampler(
        sampler.forward, sampler.loss_per_example, batch_size=run.batch_size, gate="always", draw=sampler.draw, seed=1
    )
    drawn_from = iter(Augmented(images, size=round(metrics["ratio"] * run.batch_size), seed=1_000_000))
    uniform_from = iter(Augmented(images, size=run.batch_size, seed=2_000_000))
    parameters = list(model.parameters())

    def gradient(data: Any, weights: Tensor | float) -> Tensor:
        loss = (weights * loss_per_example(sampler.forward(data), data)).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    spread = {}
    for name in ("drawn", "uniform"):
        total, squares = torch.zeros(sum(p.numel() for p in parameters)), 0.0
        for _ in range(VARIANCE_DRAWS):
            if name == "drawn":
                batch = probe.select(next(drawn_from))
                g = gradient(batch.data, batch.weights)
            else:
                g = gradient(next(uniform_from), 1.0)
            total, squares = total + g, squares + float(g.square().sum())
        mean = total / VARIANCE_DRAWS
        spread[name] = squares / VARIANCE_DRAWS - float(mean.square().sum())
    return (1 + metrics["scoring_cost"] * metrics["ratio"]) * spread["drawn"] / spread["uniform"]
