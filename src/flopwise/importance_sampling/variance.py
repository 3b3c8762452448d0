"""What the draw is worth: the paper's tau and the variance at equal cost."""

import torch
from jaxtyping import Float
from torch import Tensor

from flopwise.importance_sampling.draw import Draw, descending_inclusion_probabilities, probabilities

PARTS, FEWEST = 8, 4  # of a batch: few sizes suit compiled graphs; fewer examples cost as much as 4


def variance_ratio(scores: Float[Tensor, " n"]) -> float:
    """tau^2 = n sum g^2 = mean(S^2) / mean(S)^2, g the normalised scores: how many times larger a uniform batch would
    have to be to match a draw in proportion to the scores. From 1 (all alike, or all 0) to n.

    The paper's tau = (1 - ||g - 1/n||^2 / ||g||^2)^(-1/2) is its root.

    Source: Katharopoulos & Fleuret, ICML 2018, section 3.3.
    """
    scores = scores.detach().double()
    mean = scores.mean()
    return float(scores.pow(2).mean() / mean**2) if mean > 0 else 1.0


def effective_sample_size(scores: Float[Tensor, " n"]) -> float:
    """n / tau^2 = (sum S)^2 / sum S^2: how many of the examples carry the gradient."""
    return len(scores) / variance_ratio(scores)


def relative_variance(
    scores: Float[Tensor, " n"],
    ratio: float,
    *,
    draw: Draw = "without_replacement",
    smoothing: float = 0.1,
    norms: Float[Tensor, " n"] | None = None,
) -> float:
    """The variance of a weighted step relative to a uniform step on as many examples, at presample ratio r = B / b.

    With V = mean(S^2) for an example's gradient variance, a presample of B contributes V / B and the draw of b from it
    - without replacement: (1 / B^2) sum_i (1 - pi_i) / pi_i S_i^2. While no pi_i reaches 1 and smoothing is 0 the
      presample's part cancels and 1 / tau^2 is left.
    - with replacement: (1 / (b B^2)) sum_i S_i^2 / p_i, that is 1 / r + 1 / tau^2 in all.

    At equal cost, with scoring one example costing c of training on one, the variance is R = (1 + c r) times this.

    Args:
        scores: stand for the presample of every ratio; more scores, steadier estimate.
        ratio: r, above 1.
        norms: the true gradient norms, in place of the scores in S_i^2 (not in pi_i, p_i): what drawing by these scores
            is really worth, rather than what they claim.
    """
    if not ratio > 1:
        raise ValueError(f"ratio is presample over batch, above 1; got {ratio}.")
    norms = scores if norms is None else norms
    return float(relative_variances(scores, torch.tensor([float(ratio)]), draw, smoothing, norms)[0])


def relative_variances(
    scores: Float[Tensor, " n"], ratios: Float[Tensor, " k"], draw: Draw, smoothing: float, norms: Float[Tensor, " n"]
) -> Float[Tensor, " k"]:
    """`relative_variance` at several ratios."""
    ratios = ratios.double()
    p, order = probabilities(scores, smoothing).sort(descending=True)
    squares = norms.detach().double().cpu()[order].square()
    total = squares.sum()
    if total == 0:
        return torch.ones_like(ratios)
    if draw == "with_replacement":
        return 1 / ratios + (squares / p).sum() / (total * len(p))
    pi = descending_inclusion_probabilities(p, len(p) / ratios)
    return (1 + (1 / pi - 1) @ squares / total) / ratios


def drawn_size(batch_size: int, variance: float, shrink: float) -> int:
    """k = b v^shrink, to the nearest eighth of b and from 4 to b: what to draw where b drawn from r b have v times the
    variance of b uniform ones. k of r k have v b / k, about v^(1 - shrink)."""
    parts = min(PARTS, round(PARTS * variance**shrink))
    return max(min(FEWEST, batch_size), round(batch_size * parts / PARTS))


def cost_adjusted(variance: float, ratio: float, scoring_cost: float) -> float:
    """R = (1 + c r) * variance: below 1, importance sampling gives less variance than uniform for the same cost."""
    return (1 + scoring_cost * ratio) * variance


def moving_average(old: float, new: float, decay: float = 0.9) -> float:
    """An exponential moving average without bias correction: seeded at "no gain", it doubles as a warm-up."""
    return decay * old + (1 - decay) * new
