"""The sampler: presamples in, weighted batches out."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from flopwise.core.batch import Examples
from flopwise.core.ledger import Cost, Ledger, active_ledger
from flopwise.importance_sampling.draw import Draw, draw_with_replacement, draw_without_replacement, probabilities
from flopwise.importance_sampling.gate import Gate, GateRule
from flopwise.importance_sampling.modes import find_models, scoring, statistics_frozen, tracked_norms
from flopwise.importance_sampling.ranks import Ranks
from flopwise.importance_sampling.scores import Losses, score_and_mask, score_from_gradient, split_losses
from flopwise.importance_sampling.variance import drawn_size

LEARNED_EACH, POOLED = 40, 8  # while off: the gate learns from each of the first presamples, then from so many at once
MANY = 2**20  # numbers: gradients at the outputs are kept up to here, then turned into scores
TIMED_STEPS = 10  # with cost="seconds": timings of each kind before their medians are frozen


@dataclass
class CheapDraw:
    """How a batch was drawn by a proxy's scores: what the gate learns from, once the batch's true scores are known."""

    scores: Float[Tensor, " n"]
    where: Int[Tensor, " b"]
    counts: Float[Tensor, " b"]  # how many of the n each stands for, 1 / pi

    def seen(self, true: Float[Tensor, " b"]) -> Float[Tensor, "3 n"]:
        """Scores, true scores (0: not seen) and counts, as `Gate.evidence` takes them."""
        norms, counts = torch.zeros(2, len(self.scores))
        norms[self.where] = true
        return torch.stack([self.scores, norms, counts.index_add(0, self.where, self.counts)])


@dataclass(frozen=True)
class WeightedBatch:
    """What to train on next: mean_i(weights_i * loss_i) is the presample's mean loss in expectation.

    Attributes:
        data: the examples, structured as the loader yields them.
        weights: one weight an example, on the device of the data; all 1 in a plain batch.
        indices: where in the presample each example was, on the CPU.
        drawn: whether this batch was drawn by importance; otherwise every example of the presample is trained on.
        positions: mean number of unmasked positions of the presample's examples, when the loss has a mask.
        examples: `data` taken apart, for the ledger.
        by: with a proxy, how it was drawn.
    """

    data: Any
    weights: Float[Tensor, " b"]
    indices: Int[Tensor, " b"]
    drawn: bool
    positions: float | None = None
    examples: Examples | None = field(default=None, repr=False, compare=False)
    by: CheapDraw | None = field(default=None, repr=False, compare=False)


_Output = tuple[Tensor, float | Tensor, CheapDraw | None]


class ImportanceSampler:
    """Trains on the examples that matter, at a price it knows, and steps aside when the price is too high.

        sampler = ImportanceSampler(model, lambda outputs, data: cross_entropy(outputs, data[1], reduction="none"))
        for batch in sampler.batches(loader):
            sampler.loss(model(batch.data), batch).backward()
            with sampler.scaled_rate(optimizer):
                optimizer.step()
            optimizer.zero_grad()

    The loader yields presamples of B examples, say 4 to 8 times `batch_size`. While the gate is on, a presample is cut
    into pieces of r * k; each is scored by a forward pass without gradient, S_i = ||d loss_i / d output_i||, and k
    examples are drawn from it with p = (1 - smoothing) S / sum S + smoothing / n; k is `batch_size` or, with gate
    "auto", less: see `shrink`. While it is off every example is trained on in plain batches, and its score comes from
    the outputs of the training step. A presample, or its last piece, that is no larger than k is trained on whole.

    Args:
        forward: data -> outputs (logits), dimension 0 the example. It runs without gradient to score, and should be the
            function that you train with. Put autocast inside it, so that scoring uses it too.
        loss: (outputs, data) -> losses of shape (b,) or (b, T), unreduced; or those and their mask (True = counts).
            Example and class weights belong in here: they multiply the loss, and so the score.
        batch_size: b, examples per training step on uniform data.
        gate: "auto" samples while the variance at equal cost is estimated below uniform's, and chooses r; "paper" uses
            the rule of Algorithm 1; "always"; "never".
        cost: what "equal cost" means: "flops", counted and so reproducible, or "seconds", timed over the first steps,
            with loading, and then frozen (they are in the state, so a resumed run goes on with them).
        draw: "without_replacement" (Horvitz-Thompson, the default: less variance) or "with_replacement" (the paper).
        smoothing: share of the uniform distribution in p, 0 to 1; caps every weight at 1 / smoothing.
        shrink: what a gain is spent on, with gate "auto": where a drawn batch of b has v of a uniform one's variance,
            b v^shrink examples are drawn, in eighths of b and no fewer than 4, and the rest of the gain is left to the
            rate. 0 draws whole batches, 1 keeps a uniform batch's variance and the rate. Above 0 steps cost fewer
            FLOPs and there are more of them: not worth it where a step of few examples takes as long as one of many.
        seed: of the draws.
        score: (outputs, data) -> (b,), in place of the upper bound; for instance a closed form for a large vocabulary.
        proxy: data -> outputs of a small network for the same task. Its scores draw, in place of the model's, and cost
            next to nothing; it learns along in `loss`, so give its parameters to the optimizer too. What its draw is
            worth the gate takes from the model's own gradients in the steps, not from the proxy's opinion. Presamples
            may then be larger. Under DDP wrap it as well. Not for a model whose batch normalisation is in training:
            no uniform data would reach its statistics.
        model: the module or modules that `forward` runs; needed when they cannot be seen from it.
        accumulate: batches per optimizer step; the gate is constant within such a window.
        weight_exponent: below 1 flattens the weights to w^k, scaled so that sum w S is kept. **Biased**, and opt-in.
        callback: called with `metrics()` after every presample, for loggers.
        group: the processes that train this model together, each with a sampler of its own; None for all of them once
            `torch.distributed` is initialised. They draw locally and share one gate, so their presamples must be of
            equal size and number; wrap the model first and let `forward` call the wrapped one.

    Raises:
        ValueError: an argument outside its range; a loss that is reduced; scores that are not finite (see `batches`); a
            proxy beside batch normalisation.

    Source: Katharopoulos & Fleuret, ICML 2018 (the score, Algorithm 1); the draw without replacement, the cost-aware
    gate and the free choice of r are ours, see the README beside this file.
    """

    def __init__(
        self,
        forward: Callable[[Any], Tensor],
        loss: Callable[[Tensor, Any], Losses],
        *,
        batch_size: int = 64,
        gate: GateRule = "auto",
        cost: Literal["flops", "seconds"] = "flops",
        draw: Draw = "without_replacement",
        smoothing: float = 0.1,
        shrink: float = 0.0,
        seed: int = 0,
        score: Callable[[Tensor, Any], Tensor] | None = None,
        proxy: Callable[[Any], Tensor] | None = None,
        model: nn.Module | list[nn.Module] | None = None,
        accumulate: int = 1,
        weight_exponent: float = 1.0,
        callback: Callable[[dict[str, float]], None] | None = None,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        _require(batch_size >= 1, f"batch_size is at least 1; got {batch_size}.")
        _require(accumulate >= 1, f"accumulate counts the batches of an optimizer step, at least 1; got {accumulate}.")
        _require(
            0 <= smoothing <= 1,
            f"smoothing is the share of the uniform distribution, from 0 to 1; got {smoothing}.",
        )
        _require(
            0 <= shrink <= 1,
            f"shrink goes from 0 (drawn batches are whole) to 1 (as small as keeps the variance); got {shrink}.",
        )
        _require(
            0 <= weight_exponent <= 1,
            f"weight_exponent goes from 0 (no weights) to 1 (unbiased); got {weight_exponent}.",
        )
        for name, value, allowed in (
            ("gate", gate, ("auto", "paper", "always", "never")),
            ("cost", cost, ("flops", "seconds")),
            ("draw", draw, ("without_replacement", "with_replacement")),
        ):
            _require(value in allowed, f"{name} is one of {', '.join(allowed)}; got {value!r}.")
        self.forward, self.loss_per_example = forward, loss
        self.score = score
        self.batch_size, self.accumulate, self.weight_exponent = batch_size, accumulate, weight_exponent
        self.draw: Draw = draw
        self.shrink = shrink
        self.callback = callback
        self.models = find_models(forward) if model is None else [model] if isinstance(model, nn.Module) else model
        self.proxy = proxy
        self._scorers = self.models if proxy is None else find_models(proxy)
        _require(
            proxy is None or not tracked_norms(self.models),
            "with a proxy the model sees drawn batches only, and its batch normalisation keeps statistics of uniform "
            "ones; got a model with batch normalisation in training. Put those layers in eval() first, or leave out "
            "proxy.",
        )
        self._gate = Gate(gate, draw, smoothing)
        self._ranks = Ranks(group)
        self.seed = seed
        self._ledger = Ledger()  # costs are measured even when the user keeps no ledger
        self._costs = _Costs(timed=cost == "seconds")
        self._common_cost: float | None = None  # c over all ranks, as of when the gate last learned
        self._scores: list[Tensor] = []  # not yet learned from: what `Gate.evidence` takes
        self._outputs: list[_Output] = []  # of steps; what scales their gradients, and by what they were drawn
        self._gradients: list[_Output] = []  # there, not yet turned into scores
        self._unlearned = 0  # presamples whose scores wait for the gate
        self._last: dict[str, float] = {"tau2": 1.0, "ess": 0.0}
        self._largest_weight = 1.0
        self._steps = self._steps_drawn = 0
        self._flops = {"scoring": 0, "training": 0}
        self._open_step: Cost | None = None
        self._presample, self._position = 0, 0  # where the pass over the loader is
        self._decided = False  # whether the gate has decided about this presample
        self._loader_state: Any = None
        self._resuming = False

    @cached_property
    def _generator(self) -> torch.Generator:
        """Of the draws; made at the first, since a trainer may start the processes' group after the sampler is made."""
        # torch's generator looks at 32 bits of a seed
        return torch.Generator().manual_seed((self.seed + 1_000_003 * self._ranks.rank) % 2**32)

    def batches(self, loader: Iterable[Any]) -> Iterator[WeightedBatch]:
        """One pass over `loader`, which yields presamples: pytrees of tensors whose dimension 0 is the example.

        What the loop does with a batch is booked as training in the active `Ledger`, the scoring as scoring.

        After `load_state_dict` the first pass goes on where the saved one was. The presample in progress is needed
        again: a loader with `state_dict` and `load_state_dict` is set back to it; any other must yield the same
        presamples in the same order as before, and those already used are skipped.
        """
        for batch in self.draws(loader):
            if batch.drawn:
                with self.step(batch):
                    yield batch
            else:  # `step` written out: another context manager would cost 0.4 % of a small step
                with self._phase("training", _examples(batch)) as self._open_step:
                    yield batch
                    self._book_step()
                self._keep_gradients()

    def draws(self, loader: Iterable[Any]) -> Iterator[WeightedBatch]:
        """The same batches for a trainer that fetches some before it trains on them: each is trained on inside
        `with sampler.step(batch)`, in order."""
        stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        skip = 0
        if not self._resuming:
            self._presample, self._position, self._decided = 0, 0, False
        elif stateful:
            loader.load_state_dict(self._loader_state)  # type: ignore[attr-defined]
        else:
            skip = self._presample
        self._resuming = False
        for presample in (active_ledger() or self._ledger).load(self._positioned(loader, stateful)):
            if skip > 0:
                skip -= 1
                continue
            yield from self._use(Examples(presample))
            self._presample, self._position, self._decided = self._presample + 1, 0, False
        self._presample = 0  # a state taken between two passes goes on with the next
        if stateful:
            self._loader_state = loader.state_dict()  # type: ignore[attr-defined]

    @contextmanager
    def step(self, batch: WeightedBatch) -> Iterator[None]:
        """Train on `batch` inside: for trainers that fetch with `draws`. `batches` does both."""
        modules = [*self.models, *self._scorers]
        statistics = statistics_frozen(modules) if batch.drawn else nullcontext()  # what is drawn is not uniform
        with self._phase("training", _examples(batch)) as self._open_step:
            with statistics:
                yield
            self._book_step()
        self._keep_gradients()

    def _positioned(self, loader: Iterable[Any], stateful: bool) -> Iterator[Any]:
        """The loader's presamples, after noting where it stood before each."""
        iterator = iter(loader)
        while True:
            if stateful:
                self._loader_state = loader.state_dict()  # type: ignore[attr-defined]
            started = perf_counter()
            try:
                presample = next(iterator)
            except StopIteration:
                return
            if self._costs.timed and self._costs.needs("loading"):
                self._costs.add_timing("loading", (perf_counter() - started) / len(Examples(presample)))
            yield presample

    def select(self, presample: Any) -> WeightedBatch:
        """Score `presample` and draw `batch_size` examples from it, whatever the gate says: for hand-written loops.

        A presample no larger than `batch_size` comes back whole, with weights 1.
        """
        self._keep_gradients()
        examples = Examples(presample)
        batch = self._draw(examples, slice(0, len(examples)))
        self._learn()
        return batch

    def loss(self, outputs: Tensor, batch: WeightedBatch) -> Float[Tensor, ""]:
        """mean_i(weights_i * loss_i), whose gradient is the presample's in expectation.

        Losses of shape (b, T) are averaged over T. With a mask an example's loss is the sum over its unmasked positions
        over the presample's mean number of them: dividing by the positions that happen to be drawn would be biased.
        In a plain batch that is the usual mean over the batch's positions, and its examples are scored from the
        gradient that reaches the outputs in the backward pass. With a proxy the gradient is that of its loss as well,
        the value is not.
        """
        learns = self._gate.rule != "never" and torch.is_grad_enabled() and outputs.requires_grad
        record = learns and (self.proxy is not None or not batch.drawn)
        if record:
            outputs = outputs.view_as(outputs)  # an alias: its gradient is this loss's alone, without regularisers
        value, positions = self._mean(outputs, batch)
        drawn = None
        if record and self.proxy is not None:
            cheap = self.proxy(batch.data)
            own = self._mean(cheap, batch)[0]
            value = value + (own - own.detach())
            drawn = batch.by or self._whole(cheap.detach(), batch.data)
        if record and self.score is None:
            outputs.retain_grad()
            scale = len(batch.weights) * positions
            self._outputs.append((outputs, scale / batch.weights if batch.drawn else scale, drawn))
        elif record:
            scores = self._scores_of(outputs.detach(), batch.data)[0]
            self._scores.append(scores if drawn is None else drawn.seen(scores))
        return value

    def _whole(self, cheap: Tensor, data: Any) -> CheapDraw:
        """A plain batch, in which every example stands for itself."""
        scores = self._scores_of(cheap, data)[0]
        return CheapDraw(scores, torch.arange(len(scores)), torch.ones(len(scores)))

    def _mean(self, outputs: Tensor, batch: WeightedBatch) -> tuple[Float[Tensor, ""], float | Tensor]:
        """The loss of a batch, and over how many positions an example's is averaged."""
        losses, mask = split_losses(self.loss_per_example(outputs, batch.data), len(batch.weights))
        positions: float | Tensor = 1.0
        if mask is not None:
            positions = mask.sum() / len(mask) if batch.positions is None else batch.positions
            losses = losses.flatten(1).sum(1) / positions if losses.ndim > 1 else losses / positions
        elif losses.ndim > 1:
            positions = losses[0].numel()
            losses = losses.flatten(1).mean(1)
        return (batch.weights * losses).mean() if batch.drawn else losses.mean(), positions

    @property
    def rate_scale(self) -> float:
        """What the learning rate may be multiplied by: sqrt of a drawn batch's variance gain, from 1 to 2; 1 while off.

        Less variance buys nothing at an unchanged, well-tuned rate.
        """
        return self.scale_of("sqrt")

    def scale_of(self, rule: Literal["sqrt", "linear"], cap: float = 2.0) -> float:
        """The rate scale by another rule: the gain's root or the gain itself, from 1 to `cap`; 1 while off."""
        if not self._gate.on:
            return 1.0
        gain = self.draw_size() / self.batch_size / self._gate.variance
        return min(cap, max(1.0, gain**0.5 if rule == "sqrt" else gain))

    @contextmanager
    def scaled_rate(
        self, optimizer: torch.optim.Optimizer, rule: Literal["sqrt", "linear"] = "sqrt", cap: float = 2.0
    ) -> Iterator[None]:
        """`with sampler.scaled_rate(optimizer): optimizer.step()`: this step at the scaled rate.

        The rates are put back afterwards, so any scheduler goes on as if nothing had happened.
        """
        rates = [group["lr"] for group in optimizer.param_groups]
        scale = self.scale_of(rule, cap)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        try:
            yield
        finally:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def metrics(self) -> dict[str, float]:
        """For loggers.

        tau, tau2 and ess (examples of the last presample that carry the gradient); on and ratio; scoring_cost, of one
        example relative to training on one, and R, the estimated variance at equal cost relative to uniform (both nan
        while unknown); rate_scale; largest_weight of the last draw; share_on, of all steps so far; scoring_share, of
        all FLOPs spent through this sampler.
        """
        spent = sum(self._flops.values()) + (self._open_step.flops if self._open_step else 0)
        scoring_cost = float("nan") if self._scoring_cost is None else self._scoring_cost
        return {
            "tau": self._last["tau2"] ** 0.5,
            "tau2": self._last["tau2"],
            "ess": self._last["ess"],
            "on": float(self._gate.on),
            "ratio": self._gate.ratio,
            "scoring_cost": scoring_cost,
            "R": self._gate.cost_adjusted_variance(scoring_cost),
            "rate_scale": self.rate_scale,
            "largest_weight": self._largest_weight,
            "share_on": self._steps_drawn / max(1, self._steps),
            "scoring_share": self._flops["scoring"] / spent if spent else 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to be identical to the last bit. Take it after an optimizer step.

        Tensors, numbers and the loader's own state: `torch.load(weights_only=True)` reads it.
        """
        self._book_step()
        self._keep_gradients()
        self._score_gradients()
        return {
            "gate": self._gate.state_dict(),
            "generator": self._generator.get_state(),
            "costs": self._costs.state_dict(),
            "common_cost": self._common_cost,
            "scores": self._unlearned_scores(),
            "unlearned": self._unlearned,
            "last": dict(self._last),
            "largest_weight": self._largest_weight,
            "steps": [self._steps, self._steps_drawn],
            "flops": dict(self._flops),
            "position": [self._presample, self._position, self._decided],
            "loader": self._loader_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`: the next `batches(loader)` starts with the batch after the last one used."""
        self._gate.load_state_dict(state["gate"])
        self._generator.set_state(state["generator"])
        self._costs.load_state_dict(state["costs"])
        self._common_cost = state["common_cost"]
        self._scores = [state["scores"]] if state["scores"].numel() else []
        self._unlearned = state["unlearned"]
        self._last, self._largest_weight = dict(state["last"]), state["largest_weight"]
        self._steps, self._steps_drawn = state["steps"]
        self._flops = dict(state["flops"])
        self._presample, self._position, self._decided = state["position"]
        self._loader_state = state["loader"]
        self._resuming = True

    def draw_size(self) -> int:
        """k, examples per drawn batch."""
        if self._gate.on and self._gate.rule == "auto":
            return drawn_size(self.batch_size, self._gate.variance, self.shrink)
        return self.batch_size

    def _use(self, presample: Examples) -> Iterator[WeightedBatch]:
        """The batches of one presample, from `_position` on."""
        size = len(presample)
        self._ranks.require_equal(size)
        plain: list[WeightedBatch] = []
        while self._position < size:
            left = size - self._position
            if not self._decided and self._steps % self.accumulate == 0:
                self._decide(presample)
            if self._gate.on and left > (draws := self.draw_size()):
                pieces = max(1, round(left / (self._gate.ratio * draws)))
                stop = self._position + ceil(left / pieces)
                batch = self._draw(presample, slice(self._position, stop))
            else:
                plain = plain or _plain(presample, self._position, self.batch_size)
                batch = plain.pop()
                stop = self._position + len(batch.indices)
            self._position = stop
            self._steps += 1
            self._steps_drawn += batch.drawn
            yield batch
        self._learn()

    def _decide(self, presample: Examples) -> None:
        """Let the gate decide, after making sure that it knows what scoring costs."""
        if self._gate.rule in ("auto", "paper") and self._scoring_unmeasured:
            self._score(presample[self._position : self._position + self.batch_size], statistics=False)
        self._gate.decide(len(presample) / self.batch_size, self._scoring_cost)
        self._decided = True

    @property
    def _scoring_cost(self) -> float | None:
        """c; None while unknown."""
        return self._costs.ratio if self._ranks.count == 1 else self._common_cost

    @property
    def _scoring_unmeasured(self) -> bool:
        """Whether the cost of scoring is still to be measured: on every rank alike, since a forward needs them all."""
        return self._costs.needs("scoring") if self._ranks.count == 1 else self._common_cost is None

    def _draw(self, presample: Examples, piece: slice) -> WeightedBatch:
        """Score a piece of the presample and draw from it."""
        draws = self.draw_size()
        if piece.stop - piece.start <= draws:
            return _plain(presample, piece.start, piece.stop - piece.start)[-1]
        candidates = presample[piece]
        scores, positions = self._score(candidates)
        if self.proxy is None:
            self._scores.append(scores)
        p = probabilities(scores, self._gate.smoothing)
        draw = draw_without_replacement if self.draw == "without_replacement" else draw_with_replacement
        indices, weights = draw(p, draws, self._generator)
        by = None if self.proxy is None else CheapDraw(scores, indices, weights.float() * (len(scores) / draws))
        if self.weight_exponent < 1:
            weights = _flattened(weights, scores[indices], self.weight_exponent)
        self._largest_weight = float(weights.max())
        drawn = candidates[indices]
        weights = weights.to(drawn.device, torch.float32)
        return WeightedBatch(drawn.data, weights, indices + piece.start, True, positions, drawn, by)

    def _score(self, examples: Examples, *, statistics: bool = True) -> tuple[Float[Tensor, " n"], float | None]:
        """The scores of `examples` and, when the loss has a mask, their mean number of unmasked positions."""
        data = examples.data
        with scoring(self._scorers, statistics=statistics), torch.no_grad(), self._phase("scoring", examples) as cost:
            outputs = (self.proxy or self.forward)(data)
            scores, mask = self._scores_of(outputs, data)
        self._costs.add("scoring", cost)
        self._flops["scoring"] += cost.flops
        return scores, None if mask is None else float(mask.sum() / len(mask))

    def _scores_of(self, outputs: Tensor, data: Any) -> tuple[Float[Tensor, " n"], Tensor | None]:
        """Scores on the CPU, and the mask of the loss if it has one."""
        if self.score is None:
            scores, mask = score_and_mask(outputs, data, self.loss_per_example)
        else:
            scores = self.score(outputs, data)
            _require(
                scores.shape == (len(outputs),),
                f"score gives one number an example, shape ({len(outputs)},); got {tuple(scores.shape)}.",
            )
            _, mask = split_losses(self.loss_per_example(outputs, data), len(outputs))
        return scores.detach().float().cpu(), mask

    def _keep_gradients(self) -> None:
        """Of the outputs of a step only the gradient is kept: the graph behind them can go."""
        for outputs, scale, drawn in self._outputs:
            if outputs.grad is not None:
                self._gradients.append((outputs.grad, scale, drawn))
        self._outputs.clear()
        if sum(gradient.numel() for gradient, *_ in self._gradients) > MANY:
            self._score_gradients()

    def _score_gradients(self) -> None:
        """Many steps' gradients at once: right after a step of the network this costs ten times as much."""
        for gradient, scale, drawn in self._gradients:
            scores = (scale * score_from_gradient(gradient)).cpu()
            self._scores.append(scores if drawn is None else drawn.seen(scores))
        self._gradients.clear()

    def _unlearned_scores(self) -> Tensor:
        return torch.cat(self._scores, -1) if self._scores else torch.empty(0)

    def _learn(self) -> None:
        """Update the gate with the scores of the presample that was used up; while it is off, of several at once."""
        self._unlearned += 1
        if self._gate.on or self._gate.updates < LEARNED_EACH or self._unlearned >= POOLED:
            self._score_gradients()
            seen = torch.atleast_2d(self._unlearned_scores())
            seen = seen[:, seen.isfinite().all(0)]  # what a GradScaler overflowed says nothing about the examples
            evidence = self._gate.evidence(*seen)
            if self._ranks.count > 1 and self._gate.rule != "never":
                evidence = self._agree(evidence)
            if evidence[0] > 0:
                tau2 = self._gate.learn(evidence)
                self._last = {"tau2": tau2, "ess": evidence[0] / self._unlearned / tau2}
            self._scores, self._unlearned = [], 0
        if self.callback is not None:
            self.callback(self.metrics())

    def _agree(self, evidence: list[float]) -> list[float]:
        """The evidence of all ranks, added up; on the way they agree on the cost of scoring."""
        known = self._costs.per_example
        costs = [float(known is not None), *(known or (0.0, 0.0))]
        ready, scoring, training, *evidence = self._ranks.sum(costs + evidence)
        self._common_cost = scoring / training if ready == self._ranks.count else None
        return evidence

    def _phase(self, name: str, examples: Examples) -> Cost:
        return (active_ledger() or self._ledger).phase(name, examples)

    def _book_step(self) -> None:
        """Take note of what the open training step costs, once."""
        if self._open_step is not None:
            self._costs.add("training", self._open_step)
            self._flops["training"] += self._open_step.flops
            self._open_step = None


@dataclass
class _Costs:
    """FLOPs (or seconds) per example of scoring and of training.

    Seconds are medians, frozen after the first steps, and have loading beside them: while sampling, every candidate is
    loaded, and otherwise only what is trained on.
    """

    timed: bool
    known: dict[str, float] = field(default_factory=dict)
    timings: dict[str, list[float]] = field(default_factory=dict)

    @property
    def per_example(self) -> tuple[float, float] | None:
        """Of a candidate, and of one that is trained on; None while unknown."""
        if any(map(self.needs, ("loading", "scoring", "training") if self.timed else ("scoring", "training"))):
            return None
        loading = self.known.get("loading", 0.0)
        candidate, trained = self.known["scoring"] + loading, self.known["training"] + loading
        return (candidate, trained) if trained > 0 else None

    @property
    def ratio(self) -> float | None:
        """c, the cost of scoring one example over that of training on one; None while unknown."""
        known = self.per_example
        return None if known is None else known[0] / known[1]

    def needs(self, kind: str) -> bool:
        return kind not in self.known

    def add(self, kind: str, cost: Cost) -> None:
        if not self.timed:
            self.known[kind] = cost.flops / cost.examples
        elif self.needs(kind) and not cost.counted:  # counting FLOPs slows the step that is counted
            self.add_timing(kind, cost.seconds / cost.examples)

    def add_timing(self, kind: str, seconds: float) -> None:
        timings = self.timings.setdefault(kind, [])
        timings.append(seconds)
        if len(timings) >= TIMED_STEPS:
            self.known[kind] = median(timings)

    def state_dict(self) -> dict[str, Any]:
        return {"known": dict(self.known), "timings": {kind: list(times) for kind, times in self.timings.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.known = dict(state["known"])
        self.timings = {kind: list(times) for kind, times in state["timings"].items()}


def _plain(presample: Examples, start: int, size: int) -> list[WeightedBatch]:
    """The plain batches of a presample from `start` on, last first.

    All at once: right after a step of the network none of this code is in the processor's caches, and to run it there
    costs ten times as much.
    """
    weights, indices = torch.ones(size, device=presample.device), torch.arange(len(presample))
    batches = []
    for a in reversed(range(start, len(presample), size)):
        examples = presample[a : a + size]
        examples.signature  # noqa: B018  (the ledger will ask)
        batch = WeightedBatch(examples.data, weights[: len(examples)], indices[a : a + size], False, None, examples)
        batches.append(batch)
    return batches


def _examples(batch: WeightedBatch) -> Examples:
    return Examples(batch.data) if batch.examples is None else batch.examples


def _flattened(weights: Tensor, scores: Tensor, exponent: float) -> Tensor:
    flat = weights**exponent
    total = (flat * scores).sum()
    return flat * ((weights * scores).sum() / total) if total > 0 else flat


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
