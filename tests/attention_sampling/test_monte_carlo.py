"""The estimators' errors where most of the mass is on a few peaks: the order, and by how much the best is better."""

import torch
from torch.nn.functional import normalize

from flopwise.attention_sampling import expectation, sample
from flopwise.attention_sampling.expectation import WITH_REPLACEMENT, Estimator


def gradient_error(estimator: Estimator) -> float:
    """Relative mean square error of the gradient at the logits; 2,500 positions, 90 % of the mass on 5, 10 draws."""
    g = torch.Generator().manual_seed(0)
    a = torch.full((2500,), 0.1 / 2500)
    a[:5] += 0.18
    features, towards = normalize((1 + torch.randn(2500, 16, generator=g)).relu(), dim=1), torch.randn(16, generator=g)
    h = features @ towards
    gradient = a * (h - a @ h)
    logits = a.log().expand(400, -1).clone().requires_grad_()
    log_a = logits.log_softmax(1)
    index = sample(log_a, 10, replace=estimator in WITH_REPLACEMENT, generator=g)
    value = expectation(log_a.gather(1, index), features[index], estimator=estimator)
    (found,) = torch.autograd.grad((value @ towards).sum(), logits)
    return float((found - gradient).square().sum(1).mean() / gradient.square().sum())


def test_murthys_gradient_has_a_twentieth_of_the_error_of_sampling_with_replacement():
    errors = {name: gradient_error(name) for name in ("murthy", "des_raj", "replacement_loo", "replacement")}
    assert 20 * errors["murthy"] < errors["replacement"]
    assert errors["murthy"] < errors["des_raj"] < errors["replacement"]
    assert errors["replacement_loo"] < errors["replacement"]
