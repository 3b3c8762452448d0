"""The checks that hold the estimator up, as functions: the tests run them, and the mutation tests see them fail."""

from typing import Any

import torch
from problems import examples, forward_of, gradient, loss, network
from torch import nn
from torch.nn import functional as F

from flopwise import ImportanceSampler


def chi_square_per_dimension(estimates: torch.Tensor, truth: torch.Tensor) -> float:
    """K ||mean - truth||^2 / tr Cov: 1 in expectation when unbiased. Above 11: probability 0.001 at most."""
    error = (estimates.mean(0) - truth).square().sum()
    return float(len(estimates) * error / estimates.var(0).sum())


def gradients_of_draws(sampler: ImportanceSampler, model: nn.Module, data: Any, draws: int) -> torch.Tensor:
    """The gradient of the sampler's loss for each of so many draws from one presample."""
    drawn = (sampler.select(data) for _ in range(draws))
    return torch.stack([gradient(sampler.loss(sampler.forward(b.data), b), model) for b in drawn])


def weighted_gradient_is_unbiased(draw: str = "without_replacement", smoothing: float = 0.1, draws: int = 300) -> None:
    """Mean of the weighted gradients over many draws, against the gradient of the presample's mean loss."""
    model, data = network(), examples(48)
    forward = forward_of(model)
    sampler = ImportanceSampler(forward, loss, batch_size=12, draw=draw, smoothing=smoothing)  # type: ignore[arg-type]
    truth = gradient(loss(forward(data), data).mean(), model)
    batch = sampler.select(data)
    assert batch.drawn and len(batch.weights) == 12
    assert chi_square_per_dimension(gradients_of_draws(sampler, model, data, draws), truth) < 11


def certain_examples_are_weighted_by_their_inclusion_probability(draws: int = 400) -> None:
    """One example holds most of the score, so its inclusion probability is capped at 1."""
    n, b = 20, 8
    x = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    x[0] = 5.0
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)

    def squared(outputs: torch.Tensor, data: tuple[torch.Tensor]) -> torch.Tensor:
        return outputs[:, 0].square() / 2

    def forward(data: tuple[torch.Tensor]) -> torch.Tensor:
        return model(data[0])

    sampler = ImportanceSampler(forward, squared, batch_size=b)
    with torch.no_grad():
        drawn = (sampler.select((x,)) for _ in range(draws))
        means = torch.stack([sampler.loss(forward(batch.data), batch) for batch in drawn]).double()
        truth = squared(forward((x,)), (x,)).double().mean()
    assert chi_square_per_dimension(means[:, None], truth) < 11


def token_losses_are_unbiased(draws: int = 500) -> None:
    """Sequences of very different lengths: the objective is the mean over the presample's tokens."""
    generator = torch.Generator().manual_seed(0)
    n, length, width = 24, 9, 4
    lengths = torch.randint(1, length + 1, (n,), generator=generator)
    data = {
        "x": torch.randn(n, length, width, generator=generator) * lengths[:, None, None],
        "y": torch.randint(3, (n, length), generator=generator),
        "mask": torch.arange(length) < lengths[:, None],
    }
    model = nn.Linear(width, 3)
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)

    def forward(data: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(data["x"])

    def masked(outputs: torch.Tensor, data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return F.cross_entropy(outputs.transpose(1, 2), data["y"], reduction="none"), data["mask"]

    sampler = ImportanceSampler(forward, masked, batch_size=6)
    losses, mask = masked(forward(data), data)
    truth = gradient(losses[mask].mean(), model)
    assert chi_square_per_dimension(gradients_of_draws(sampler, model, data, draws), truth) < 11
