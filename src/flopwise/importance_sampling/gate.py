"""When to sample, and from how large a presample."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flopwise.importance_sampling.draw import Draw
from flopwise.importance_sampling.variance import cost_adjusted, moving_average, relative_variances

GateRule = Literal["auto", "paper", "always", "never"]
RATIOS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
_RATIOS = torch.tensor(RATIOS, dtype=torch.float64)
MARGIN = 0.1  # "auto" switches on below R = 1 - MARGIN, and off above R = 1
PATIENCE = 20  # presamples between two changes of the ratio
WORTH_CHANGING = 0.02  # of R


@dataclass
class Gate:
    """Decides from the scores of past presamples whether the next one is sampled from.

    - "auto": on while the estimated R = (1 + c r) * relative_variance is below 1, with hysteresis; r = B / b is the
      ratio that minimises R, changed seldom. c is the cost of scoring one example over that of training on one.
    - "paper": on while (1 + c r) < tau, at the loader's own ratio. With c = 1/3 that is B + 3b < 3 tau b.
    - "always", "never": as they say, at the loader's own ratio.

    All estimates are moving averages that start from "no gain", so no rule samples in its first presamples.
    """

    rule: GateRule
    draw: Draw
    smoothing: float
    on: bool = False
    ratio: float = 0.0
    tau: float = 0.0
    variances: dict[float, float] = field(default_factory=lambda: dict.fromkeys(RATIOS, 1.0))
    updates: int = 0
    changed_at: int = 0

    def update(self, scores: Float[Tensor, " n"]) -> float:
        """Learn from the scores of a whole presample (uniform data, sampled from or not) and return their tau^2."""
        return self.learn(self.evidence(scores))

    def evidence(
        self,
        scores: Float[Tensor, " n"],
        true: Float[Tensor, " n"] | None = None,
        counts: Float[Tensor, " n"] | None = None,
    ) -> list[float]:
        """What a presample's scores say, in numbers that add up over ranks: n, sum S, sum S^2 and, for every ratio, the
        variance of a draw from it, sum S^2 * relative_variance. Local draws are independent: their variances add.

        Args:
            scores: draw.
            true: S, of those whose count is above 0, where `scores` come from elsewhere.
            counts: how many of the n each of `true` stands for, in expectation 1 (Horvitz & Thompson).
        """
        if len(scores) == 0:
            return [0.0] * (3 + len(RATIOS))
        true = (scores if true is None else true).double()
        first, second = (true, true.square()) if counts is None else (counts * true, counts * true.square())
        squares = float(second.sum())
        variances = relative_variances(scores, _RATIOS, self.draw, self.smoothing, second.sqrt())
        return [len(scores), float(first.sum()), squares, *(squares * variances).tolist()]

    def learn(self, evidence: list[float]) -> float:
        """Learn from the evidence of one presample, or the sum of several ranks', and return its tau^2."""
        count, total, squares, *variances = evidence
        tau2 = count * squares / total**2 if total > 0 else 1.0
        self.updates += 1
        self.tau = moving_average(self.tau, tau2**0.5)
        for ratio, variance in zip(RATIOS, variances, strict=True):
            new = variance / squares if squares > 0 else 1.0
            self.variances[ratio] = moving_average(self.variances[ratio], new)
        return tau2

    def decide(self, largest_ratio: float, scoring_cost: float | None) -> None:
        """Set `on` and `ratio` for the next batch. Unknown costs keep "auto" and "paper" off."""
        if self.rule in ("always", "never"):
            self.on, self.ratio = self.rule == "always", largest_ratio
        elif scoring_cost is None:
            self.on = False
        elif self.rule == "paper":
            self.ratio = largest_ratio
            self.on = 1 + scoring_cost * largest_ratio < self.tau
        else:
            self._choose_ratio(largest_ratio, scoring_cost)
            r = self.cost_adjusted_variance(scoring_cost)
            self.on = r < 1 if self.on else r < 1 - MARGIN

    def cost_adjusted_variance(self, scoring_cost: float) -> float:
        """R at the present ratio."""
        return cost_adjusted(self.variance, self.ratio, scoring_cost)

    @property
    def variance(self) -> float:
        """The smoothed relative variance of a drawn batch, at the tabulated ratio nearest to the present one."""
        return self.variances[min(RATIOS, key=lambda r: abs(r - self.ratio))]

    def _choose_ratio(self, largest_ratio: float, scoring_cost: float) -> None:
        possible = [r for r in RATIOS if r <= largest_ratio + 1e-9] or [largest_ratio]
        value = {r: cost_adjusted(self.variances.get(r, 1.0), r, scoring_cost) for r in possible}
        best = min(possible, key=value.__getitem__)
        if self.ratio not in value or (
            self.updates - self.changed_at >= PATIENCE and value[best] < value[self.ratio] * (1 - WORTH_CHANGING)
        ):
            self.ratio, self.changed_at = best, self.updates

    def state_dict(self) -> dict[str, Any]:
        return {
            "on": self.on,
            "ratio": self.ratio,
            "tau": self.tau,
            "variances": list(self.variances.values()),
            "updates": self.updates,
            "changed_at": self.changed_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.variances = dict(zip(RATIOS, state["variances"], strict=True))
        self.on, self.ratio, self.tau = state["on"], state["ratio"], state["tau"]
        self.updates, self.changed_at = state["updates"], state["changed_at"]
