"""Drawing a batch from a scored presample, with weights that keep every average unbiased."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Draw = Literal["without_replacement", "with_replacement"]
FLOOR = 1e-4  # of the mean score: p = 0 is never allowed, and a score that underflows would blow up a weight


def probabilities(scores: Float[Tensor, " n"], smoothing: float) -> Float[Tensor, " n"]:
    """p = (1 - smoothing) S / sum S + smoothing / n, in float64, with the scores floored at 1e-4 of their mean.

    Smoothing by 0.1 keeps every weight below 10. All scores 0 (nothing left to learn here) gives the uniform draw.

    Raises:
        ValueError: a score is negative, infinite or not a number.
    """
    scores = scores.detach().double().cpu()
    smallest, largest = scores.aminmax()
    if not (smallest >= 0 and largest < float("inf")):  # false for NaN, too
        raise _complaint(scores)
    mean = scores.mean()
    if mean == 0:
        return torch.full_like(scores, 1 / len(scores))
    floored = scores + FLOOR * mean
    return floored * ((1 - smoothing) / floored.sum()) + smoothing / len(scores)


def _complaint(scores: Float[Tensor, " n"]) -> ValueError:
    where = (~(scores.isfinite() & (scores >= 0))).nonzero()[:, 0].tolist()
    return ValueError(
        f"scores are finite and not negative; examples {where[:8]} of {len(scores)} have "
        f"{[float(scores[i]) for i in where[:8]]}. The model diverged (lower the learning rate) or these inputs "
        "are broken: look at them before they are trained on."
    )


def inclusion_probabilities(p: Float[Tensor, " n"], draws: Float[Tensor, "*k"]) -> Float[Tensor, "*k n"]:
    """pi_i = min(1, k p_i), the excess handed on to the others until sum pi = draws; one row for each of `draws`."""
    descending, order = p.sort(descending=True)
    pi = descending_inclusion_probabilities(descending, draws)
    return torch.empty_like(pi).index_copy_(-1, order, pi)


def descending_inclusion_probabilities(p: Float[Tensor, " n"], draws: Float[Tensor, "*k"]) -> Float[Tensor, "*k n"]:
    """The same for p in descending order.

    With m examples certain, the others share draws - m: pi_i = (draws - m) p_i / (p_m + p_{m+1} + ...). m is the first
    number for which the largest of the others stays below 1.
    """
    place = torch.arange(len(p))
    rest = p.flip(0).cumsum(0).flip(0)
    share = (draws[..., None] - place) / rest
    certain = (share * p >= 1).sum(-1, keepdim=True)
    others = share.gather(-1, certain.clamp(max=len(p) - 1)) * p
    return torch.where(place < certain, 1.0, others)


def draw_without_replacement(
    p: Float[Tensor, " n"], draws: int, generator: torch.Generator
) -> tuple[Int[Tensor, " draws"], Float[Tensor, " draws"]]:
    """Systematic sampling over a random order: each example at most once, example i with probability pi_i.

    Returns:
        indices, and weights = draws / (n pi_i): mean(weights * loss[indices]) is unbiased for loss.mean().

    Source: Horvitz & Thompson 1952; Madow 1949 for the systematic draw.
    """
    pi = inclusion_probabilities(p, torch.tensor(float(draws), dtype=p.dtype))
    order = torch.randperm(len(p), generator=generator)
    ends = pi[order].cumsum(0)
    ends *= draws / ends[-1]
    marks = torch.rand(1, generator=generator, dtype=torch.float64) + torch.arange(draws)
    # right=True: example i owns [end_{i-1}, end_i); the clamp only catches a mark that rounding put on the last end
    indices = order[torch.searchsorted(ends, marks, right=True).clamp(max=len(p) - 1)]
    return indices, draws / (len(p) * pi[indices])


def draw_with_replacement(
    p: Float[Tensor, " n"], draws: int, generator: torch.Generator
) -> tuple[Int[Tensor, " draws"], Float[Tensor, " draws"]]:
    """The paper's draw: independent, example i with probability p_i each time, weights = 1 / (n p_i)."""
    indices = torch.multinomial(p, draws, replacement=True, generator=generator)
    return indices, 1 / (len(p) * p[indices])
