"""The method as the paper writes it: loops over examples, slow and plain. The tests hold everything else to it."""

import torch
from torch import Tensor, nn


def scores(outputs: Tensor, targets: Tensor, loss) -> list[float]:
    """S_i = ||d loss_i / d z_i||, one example at a time (paper, equation 20: the norm at the last pre-activations)."""
    found = []
    for z, y in zip(outputs.detach(), targets, strict=True):
        z = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(z[None], y[None]).sum(), z)
        found.append(float(gradient.norm()))
    return found


def gradient_norms(model: nn.Module, inputs: Tensor, targets: Tensor, loss) -> list[float]:
    """||G_i||: the norm of the gradient of one example's loss over all parameters, by one backward pass each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for x, y in zip(inputs, targets, strict=True):
        gradients = torch.autograd.grad(loss(model(x[None]), y[None]).sum(), parameters)
        found.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
    return found


def tau(scores: list[float]) -> float:
    """(1 - ||g - u||^2 / ||g||^2)^(-1/2), g the normalised scores and u uniform (paper, equation 26)."""
    n, total = len(scores), sum(scores)
    g = [s / total for s in scores]
    distance = sum((p - 1 / n) ** 2 for p in g)
    return (1 - distance / sum(p**2 for p in g)) ** -0.5


def inclusion_probabilities(scores: list[float], draws: int) -> list[float]:
    """pi_i proportional to the score, at most 1, adding up to the number of draws."""
    if draws == len(scores):
        return [1.0] * draws
    certain: set[int] = set()
    while True:
        rest = sum(s for i, s in enumerate(scores) if i not in certain)
        share = (draws - len(certain)) / rest
        pi = [1.0 if i in certain else share * s for i, s in enumerate(scores)]
        over = {i for i, p in enumerate(pi) if i not in certain and p >= 1}
        if not over:
            return pi
        certain |= over


def draw_without_replacement(
    scores: list[float], draws: int, order: list[int], start: float
) -> list[tuple[int, float]]:
    """Systematic sampling: lay the examples end to end, each as long as its pi_i, and step along by 1 from `start`.

    Returns (index, weight) pairs with weight = draws / (n pi_i), so that mean(weight * loss) is the presample's mean
    loss in expectation (Horvitz and Thompson 1952).
    """
    n = len(scores)
    pi = inclusion_probabilities(scores, draws)
    drawn, end, mark = [], 0.0, start
    for i in order:
        end += pi[i]
        if mark < end and len(drawn) < draws:
            drawn.append((i, draws / (n * pi[i])))
            mark += 1.0
    return drawn
