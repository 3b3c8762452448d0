"""Will importance sampling help here? Measured on the user's own model, loss and data, before any long run.

    from flopwise.experiments.audit import audit_importance

    print(audit_importance(lambda: (model, loss, loader)))

The prediction is R, the variance of a drawn step relative to a uniform one at equal cost: 1 / R is the speed-up where
gradient noise is what limits training. It is not the score's own opinion: exact gradients of some hundred examples say
what drawing by the score is worth, and the ledger and a clock say what it costs.

The rule of the verdict. A uniform step's expected squared gradient is |G|^2 + tr(Sigma) / b; with the noise scale
N = tr(Sigma) / |G|^2, the share of noise in it is phi = N / (N + b). A step's progress at its best rate goes with
1 / (1 + N / b) (McCandlish et al. 2018, arXiv 1812.06162), so that a drawn step with v times the variance, which costs
1 + c r uniform steps, gets as far as they do for

    needed = (1 + c r) (1 - phi + phi v)    of the cost: R where all is noise, above 1 where nothing is.

While the gate is off it is 1. The answer is yes when the mean over the whole budget is at most `WORTH`: the gate itself
is taken through the budget, with what was measured at some stages and straight lines between them. Without a budget the
last stage stands for a training that is long.
"""

import copy
import importlib
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import islice
from statistics import median
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flopwise.core import Ledger, endless
from flopwise.core.batch import Examples
from flopwise.importance_sampling import upper_bound_score
from flopwise.importance_sampling.draw import draw_without_replacement, probabilities
from flopwise.importance_sampling.gate import RATIOS, Gate
from flopwise.importance_sampling.modes import scoring, tracked_norms
from flopwise.importance_sampling.sampler import LEARNED_EACH, POOLED
from flopwise.importance_sampling.scores import split_losses
from flopwise.importance_sampling.variance import cost_adjusted, variance_ratio

Loss = Callable[[Tensor, Any], Any]
Forward = Callable[[nn.Module, Any], Tensor]
SKETCH = 4096  # numbers kept of every example's gradient; the error of a variance is about sqrt(2 / SKETCH)
DRAWS = 300  # simulated steps a ratio
TIMINGS = 7
SMOOTHING = 0.1
WORTH = 0.8  # of uniform sampling's cost: what has to do for the same progress, so that the answer is yes


@dataclass(frozen=True)
class Stage:
    """What was measured after so many steps.

    Args:
        steps: uniform steps of training before.
        tau2: the variance ratio of the exact gradient norms, and score_tau2 what the score claims.
        variance: r -> variance of a step drawn by the score from r batches, over a uniform step's.
        exact_variance: the same when drawn by the exact gradient norms.
        noise_scale: gradient variance over squared mean gradient: the batch size at which noise and signal are equal.
        examples: whose gradients were measured.
    """

    steps: int
    tau2: float
    score_tau2: float
    variance: dict[float, float]
    exact_variance: dict[float, float]
    noise_scale: float
    examples: int

    def noise_share(self, batch_size: int) -> float:
        """phi, of a uniform step's squared gradient."""
        return 1 / (1 + batch_size / self.noise_scale) if self.noise_scale > 0 else 0.0


@dataclass(frozen=True)
class Course:
    """What a training would see; means over what it spends.

    Args:
        on: share spent while the gate is on.
        R: variance at equal cost, with 1 while the gate is off.
        needed: of uniform sampling's cost for the same progress.
    """

    on: float
    R: float
    needed: float


@dataclass(frozen=True)
class Audit:
    """The result. `print` it, ask `helps`, or keep `record()`.

    Args:
        batch_size: of the loader.
        cost: what "equal cost" means in R: "flops" or "seconds".
        scoring_cost: c, the cost of scoring an example over that of training on one, by both measures.
        stages: before any training and after some, in order.
        seconds: that the audit took.
        budget: uniform steps of the training that is asked about; None for a long one, which the last stage stands for.
        largest_ratio: batches in a presample.
    """

    batch_size: int
    cost: Literal["flops", "seconds"]
    scoring_cost: dict[str, float]
    stages: tuple[Stage, ...]
    seconds: float
    budget: int | None = None
    largest_ratio: float = 6.0

    @property
    def ratio(self) -> float:
        """r with the smallest R."""
        return min(self.ratios, key=lambda r: self.R_at(r))

    @property
    def ratios(self) -> list[float]:
        return [r for r in RATIOS if r <= self.largest_ratio]

    @property
    def R(self) -> float:
        """Predicted variance at equal cost, relative to uniform sampling."""
        return self.R_at(self.ratio)

    def R_at(self, ratio: float, *, scoring_cost: float | None = None, exact: bool = False) -> float:
        last = self.stages[-1]
        c = self.scoring_cost[self.cost] if scoring_cost is None else scoring_cost
        return cost_adjusted((last.exact_variance if exact else last.variance)[ratio], ratio, c)

    @property
    def helps(self) -> bool:
        """Whether `WORTH` of the cost, or less, gets as far."""
        return self.course.needed <= WORTH

    @cached_property
    def course(self) -> Course:
        """The gate, taken through the budget."""
        c = self.scoring_cost[self.cost]
        if self.budget is None:
            return Course(1.0, self.R, self._needed(self.ratio, *self._after(self.stages[-1].steps)))
        gate = Gate("auto", "without_replacement", SMOOTHING)
        spent = on = total = needed = 0.0
        while spent < self.budget:
            variances, noise_share = self._after(spent)
            gate.decide(self.largest_ratio, c)
            if gate.on:
                price = 1 + c * gate.ratio
            else:  # plain steps until the gate learns again
                price = self.largest_ratio * (1 if gate.updates < LEARNED_EACH else POOLED)
            spent += price
            on += price * gate.on
            total += price * (cost_adjusted(variances[gate.ratio], gate.ratio, c) if gate.on else 1.0)
            needed += price * (self._needed(gate.ratio, variances, noise_share) if gate.on else 1.0)
            gate.learn([1.0, 1.0, 1.0, *variances.values()])
        return Course(on / spent, total / spent, needed / spent)

    def _needed(self, ratio: float, variances: dict[float, float], noise_share: float) -> float:
        return cost_adjusted(1 - noise_share + noise_share * variances[ratio], ratio, self.scoring_cost[self.cost])

    def _after(self, steps: float) -> tuple[dict[float, float], float]:
        """r -> variance, and the share of noise, on the line between the stages around `steps`."""
        i = min(bisect_right([stage.steps for stage in self.stages], steps), len(self.stages) - 1)
        before, after = self.stages[max(i - 1, 0)], self.stages[i]
        gap = after.steps - before.steps
        part = min((steps - before.steps) / gap, 1.0) if gap else 1.0
        variances = {r: (1 - part) * before.variance[r] + part * after.variance[r] for r in RATIOS}
        return variances, (1 - part) * before.noise_share(self.batch_size) + part * after.noise_share(self.batch_size)

    @property
    def score_share(self) -> float:
        """How much of the variance reduction of exact gradient norms the score keeps, at the best r."""
        exact = 1 - self.stages[-1].exact_variance[self.ratio]
        return (1 - self.stages[-1].variance[self.ratio]) / exact if exact > 0 else 0.0

    @property
    def reason(self) -> str:
        """Why, in a sentence."""
        last = self.stages[-1]
        end = self._needed(self.ratio, *self._after(last.steps))
        if last.noise_scale < self.batch_size or self.R <= WORTH < end:
            return (
                f"with batches of {self.batch_size}, {last.noise_share(self.batch_size):.0%} of a step's squared "
                f"gradient is noise (half at {last.noise_scale:.0f}): less noise buys little. Smaller batches would be "
                "cheaper"
            )
        if self.helps:
            return (
                f"a step drawn from {self.ratio:g} batches has {last.variance[self.ratio]:.2f} times the variance of a "
                f"uniform one and costs {1 + self.scoring_cost[self.cost] * self.ratio:.2f} times as much"
            )
        if self.R <= WORTH:
            return (
                f"that is after {last.steps} steps, but the gate would be on for {self.course.on:.0%} of {self.budget} "
                f"steps, and over all of them the same progress would take {self.course.needed:.0%} of the "
                f"{self.cost}: a longer training gains more"
            )
        if min(self.R_at(r, exact=True) for r in self.ratios) <= WORTH:
            return f"the score keeps only {self.score_share:.0%} of what exact gradient norms would gain"
        if self._paying_cost > 0:
            return (
                f"scoring costs too much: {self.scoring_cost[self.cost]:.2f} of a training step an example, and it "
                f"pays below {self._paying_cost:.2f}"
            )
        best = min(self.R_at(r, scoring_cost=0.0, exact=True) for r in self.ratios)
        return (
            f"the examples matter too equally (tau^2 = {last.tau2:.2f}): even exact gradient norms, for free, would "
            f"leave {best:.2f} of the variance"
        )

    @property
    def _paying_cost(self) -> float:
        """The largest c at which R would be `WORTH`."""
        return max(0.0, *((WORTH / self.stages[-1].variance[r] - 1) / r for r in self.ratios))

    @property
    def verdict(self) -> str:
        """One or two sentences."""
        over = "" if self.budget is None else f" (over {self.budget} steps, on for {self.course.on:.0%} of them)"
        if self.helps:
            text = (
                f"Importance sampling is likely to help: the progress of uniform sampling for {self.course.needed:.0%} "
                f"of its {self.cost}{over}; R = {self.R:.2f} at the end, since {self.reason}."
            )
        else:
            text = f"Importance sampling is unlikely to help: R = {self.R:.2f}; {self.reason}."
        first = min(cost_adjusted(self.stages[0].variance[r], r, self.scoring_cost[self.cost]) for r in self.ratios)
        if not self.helps and self.budget is None and len(self.stages) > 1 and first - 0.05 > self.R:
            text += (
                f" But R fell from {first:.2f} within {self.stages[-1].steps} steps: audit again with a checkpoint "
                "from later in training. The gate stays off until it pays."
            )
        return text

    def __str__(self) -> str:
        rows = [
            ("after steps", *(str(stage.steps) for stage in self.stages)),
            ("tau^2, exact gradient norms", *(f"{stage.tau2:.2f}" for stage in self.stages)),
            ("tau^2, as the score claims", *(f"{stage.score_tau2:.2f}" for stage in self.stages)),
            (f"variance of a step from {self.ratio:g} b", *(f"{s.variance[self.ratio]:.2f}" for s in self.stages)),
            ("the same by exact norms", *(f"{s.exact_variance[self.ratio]:.2f}" for s in self.stages)),
            ("batch where noise = signal", *(f"{stage.noise_scale:.0f}" for stage in self.stages)),
        ]
        costs = ", ".join(f"{value:.2f} in {name}" for name, value in self.scoring_cost.items())
        lines = [f"{name:<32}" + "".join(f"{value:>12}" for value in values) for name, *values in rows]
        return "\n".join([*lines, f"cost of scoring over training: {costs}", self.verdict])

    def record(self) -> dict[str, Any]:
        """For a JSON line."""
        return {
            "experiment": "audit",
            "technique": "importance",
            **asdict(self),
            "helps": self.helps,
            "R": self.R,
            "ratio": self.ratio,
            "score_share": self.score_share,
            "course": asdict(self.course),
            "verdict": self.verdict,
        }


def audit_importance(
    setup: str | Callable[[], tuple[nn.Module, Loss, Iterable[Any]]],
    *,
    forward: Forward | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    cost: Literal["flops", "seconds"] = "flops",
    seconds: float = 60.0,
    steps: int | Sequence[int] | None = None,
    examples: int = 512,
    seed: int = 0,
    budget: int | None = None,
    largest_ratio: float = 6.0,
) -> Audit:
    """Measure whether importance sampling helps, in about `seconds`, and predict R.

    A copy of the model is measured as it is, trained uniformly for a while, and measured again: at initialisation
    there is nothing to gain, so for a model that is trained for hours give a checkpoint from the middle.

    Args:
        setup: a function without arguments, or "module:function", that returns
            - the model;
            - the loss: (outputs, batch) -> one loss an example, (b,) or (b, T), or those and their mask;
            - a loader of batches of the size that you train with uniformly.
        forward: (model, batch) -> outputs. By default a mapping is `model(**batch).logits` without "labels", and of a
            tuple the first entry goes in: `model(batch[0])`.
        optimizer: parameters -> the optimizer of the short training; Adam at 1e-3 by default.
        cost: whether R counts FLOPs or seconds.
        seconds: the audit's time; half of it is the short training.
        steps: of the short training, in place of time; 0 for none. Of several, in order, each is a stage.
        examples: at most this many gradients at each stage; fewer if time is short, at least 64.
        seed: of the simulated draws.
        budget: uniform steps that your training will take; with it the answer is about all of them.
        largest_ratio: batches in a presample of your training.

    Raises:
        ValueError: `setup` cannot be found or returns something else, the loss is reduced, the loader is empty.
    """
    started = time.perf_counter()
    model, loss, loader = _checked(_find(setup)() if isinstance(setup, str) else setup())
    model = copy.deepcopy(model)
    run = forward or _forward
    device = next(model.parameters()).device
    stream = iter(endless(_Moved(loader, device)))
    make = optimizer or (lambda parameters: torch.optim.Adam(parameters, 1e-3))
    training = partial(_train, model, run, loss, stream, make(model.parameters()), seconds / 2)
    generator = torch.Generator().manual_seed(seed)
    pool_batches = [next(stream)]
    batch_size = len(Examples(pool_batches[0]))
    while batch_size * len(pool_batches) < examples:
        pool_batches.append(next(stream))

    costs = _costs(model, run, loss, pool_batches[0])
    goals = [steps] if steps is None or isinstance(steps, int) else list(steps)
    stage_seconds, done = seconds / 2 / (1 + len(goals)), 0
    stages = [_measure(model, run, loss, pool_batches, examples, stage_seconds, 0, batch_size, generator)]
    for goal in goals:
        trained = training(None if goal is None else goal - done)
        done += trained
        if trained:
            stages.append(
                _measure(model, run, loss, pool_batches, examples, stage_seconds, done, batch_size, generator)
            )
    took = time.perf_counter() - started
    return Audit(batch_size, cost, costs, tuple(stages), took, budget, largest_ratio)


def _find(name: str) -> Callable[[], Any]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"what to audit is named module:function, importable from here; got {name!r} ({error})."
        ) from error


def _checked(setup: Any) -> tuple[nn.Module, Loss, Iterable[Any]]:
    if not (isinstance(setup, tuple) and len(setup) == 3 and isinstance(setup[0], nn.Module) and callable(setup[1])):
        kinds = [type(part).__name__ for part in setup] if isinstance(setup, tuple) else type(setup).__name__
        raise ValueError(f"setup returns (model, loss, loader): an nn.Module, a function and an iterable; got {kinds}.")
    return setup


def _forward(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        return outputs if isinstance(outputs, Tensor) else outputs.logits
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


class _Moved:
    """The loader's batches, plain dicts instead of mappings, on the model's device."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            batch = dict(batch) if isinstance(batch, Mapping) else batch
            yield pytree.tree_map_only(Tensor, lambda leaf: leaf.to(self.device), batch)


def _mean_loss(loss: Loss, outputs: Tensor, batch: Any) -> Tensor:
    losses, mask = split_losses(loss(outputs, batch), len(outputs))
    return losses.mean() if mask is None else losses.sum() / mask.sum()


def _train(
    model: nn.Module,
    run: Forward,
    loss: Loss,
    stream: Any,
    optimizer: torch.optim.Optimizer,
    seconds: float,
    steps: int | None,
) -> int:
    """Uniform steps; returns how many."""
    stop, done = time.perf_counter() + seconds, 0
    for batch in stream if steps is None else islice(stream, steps):
        if steps is None and time.perf_counter() > stop:
            break
        _mean_loss(loss, run(model, batch), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
    return done


def _costs(model: nn.Module, run: Forward, loss: Loss, batch: Any) -> dict[str, float]:
    """c in FLOPs, counted, and in seconds, medians of alternating runs."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        torch.autograd.grad(_mean_loss(loss, run(model, batch), batch), parameters, allow_unused=True)

    def score() -> None:
        with torch.no_grad():
            upper_bound_score(run(model, batch), batch, loss)

    flops: dict[str, int] = {}
    times: dict[str, list[float]] = {"step": [], "score": []}
    with scoring([model], statistics=False):
        for name, work in (("step", step), ("score", score)):
            with Ledger() as ledger:
                work()
            flops[name] = ledger.flops
        for _ in range(TIMINGS):
            for name, work in (("step", step), ("score", score)):
                start = time.perf_counter()
                work()
                if parameters[0].is_cuda:
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
    return {
        "flops": flops["score"] / flops["step"] if flops["step"] else float("nan"),
        "seconds": median(times["score"]) / median(times["step"]),
    }


def _take_statistics(model: nn.Module, run: Forward, batches: list[Any]) -> None:
    """Batch normalisation in eval mode is then what training sees: running means lag behind, most in fine-tuning."""
    norms = tracked_norms([model])
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    if norms:
        with torch.no_grad(), scoring([model]):
            for batch in batches:
                run(model, batch)


def _measure(
    model: nn.Module,
    run: Forward,
    loss: Loss,
    batches: list[Any],
    limit: int,
    seconds: float,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
) -> Stage:
    """Exact gradients, one example at a time, sketched; then draws from them, simulated."""
    _take_statistics(model, run, batches)
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = sum(p.numel() for p in parameters)
    bucket = torch.randint(SKETCH, (total,), generator=torch.Generator().manual_seed(1)).to(parameters[0].device)
    sign = torch.randint(2, (total,), generator=torch.Generator().manual_seed(2)).to(parameters[0].device) * 2.0 - 1
    stop, sketches, norms, scores = time.perf_counter() + seconds, [], [], []
    with scoring([model], statistics=False):
        for batch in batches:
            pieces = Examples(batch)
            with torch.no_grad():
                batch_scores = upper_bound_score(run(model, batch), batch, loss)
            for i in range(len(pieces)):
                if len(norms) >= limit or (len(norms) >= 64 and time.perf_counter() > stop):
                    break
                one = pieces[i : i + 1].data
                losses, _ = split_losses(loss(run(model, one), one), 1)
                found = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
                gradient = torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).flatten().float()
                        for p, g in zip(parameters, found, strict=True)
                    ]
                )
                sketches.append(gradient.new_zeros(SKETCH).index_add_(0, bucket, sign * gradient).cpu())
                norms.append(float(gradient.norm()))
                scores.append(float(batch_scores[i]))
    sketch, exact, score = torch.stack(sketches).double(), torch.tensor(norms).double(), torch.tensor(scores).double()
    n, mean = len(norms), sketch.mean(0)
    spread = float((sketch - mean).square().sum() / n)  # of one example
    signal = max(float(mean.square().sum()) - spread / n, 0.0)
    parts = torch.cat([sketch - mean, mean[None]])
    products = parts @ parts.T
    by_score, by_norm = (
        {r: _simulated(products, s, r, batch_size, generator) / (spread / batch_size) for r in RATIOS}
        for s in (score, exact)
    )
    noise_scale = spread / signal if signal > 0 else float("inf")
    return Stage(steps, variance_ratio(exact), variance_ratio(score), by_score, by_norm, noise_scale, n)


def _simulated(
    products: Float[Tensor, "m m"],
    scores: Float[Tensor, " n"],
    ratio: float,
    batch_size: int,
    generator: torch.Generator,
) -> float:
    """tr Cov of a drawn step: a presample out of the n examples, then a draw from it, as training does.

    `products` are inner products of the centred gradients and, last, of their mean: what a step is off by is a
    combination of these.
    """
    size, total, n = round(ratio * batch_size), 0.0, len(scores)
    for _ in range(DRAWS):
        presample = torch.randint(n, (size,), generator=generator)
        drawn, weights = draw_without_replacement(
            probabilities(scores[presample], SMOOTHING), min(batch_size, size), generator
        )
        shares = weights.double() / len(drawn)
        index = torch.cat([presample[drawn], torch.tensor([n])])
        off = torch.cat([shares, shares.sum()[None] - 1])
        total += float(off @ products[index][:, index] @ off)
    return total / DRAWS
