"""Scores against the reference loops, closed forms against autograd, and extremes where naive formulas break."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from flopwise.importance_sampling import (
    binary_cross_entropy_score,
    cross_entropy_score,
    gradient_norm_score,
    last_layer_gradient_norm,
    loss_score,
    reference,
    squared_error_score,
    upper_bound_score,
)


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if outputs.ndim == 2:
        return F.cross_entropy(outputs, targets, reduction="none")
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")


def squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().flatten(1).sum(1)


def binary_cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("classes", [1, 2, 11])
def test_upper_bound_is_the_reference(n: int, classes: int):
    z, y = torch.randn(n, classes), torch.randint(classes, (n,))
    torch.testing.assert_close(
        upper_bound_score(z, y, cross_entropy), torch.tensor(reference.scores(z, y, cross_entropy))
    )


def test_upper_bound_leaves_the_graph_of_the_outputs_alone():
    z = torch.randn(4, 3, requires_grad=True)
    outputs = z * 2
    with torch.no_grad():
        assert not upper_bound_score(outputs, torch.zeros(4, dtype=torch.long), cross_entropy).requires_grad
    outputs.sum().backward()
    assert z.grad is not None and torch.equal(z.grad, torch.full_like(z, 2.0))


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("shape", [(5, 13), (3, 4, 13), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cross_entropy_closed_form(chunk: int, shape: tuple[int, ...], dtype: torch.dtype):
    z = (torch.randn(shape) * 3).to(dtype)
    y = torch.randint(shape[-1], shape[:-1])
    if len(shape) == 3:
        y[0, 1] = -100
    exact = upper_bound_score(z.double(), y, cross_entropy)
    torch.testing.assert_close(cross_entropy_score(z, y, chunk=chunk).double(), exact, rtol=1e-5, atol=1e-6)


def test_cross_entropy_closed_form_does_not_cancel_when_almost_sure():
    """1 - 2p + sum p^2 in float32 is 0 or noise here; the true score is 1e-6 * sqrt(1.5)."""
    z = torch.tensor([[0.0, 0.0, 20.0]])
    exact = upper_bound_score(z.double(), torch.tensor([2]), cross_entropy)
    torch.testing.assert_close(cross_entropy_score(z, torch.tensor([2])).double(), exact, rtol=1e-4, atol=0)


def test_the_other_closed_forms():
    z, y = torch.randn(5, 3), torch.rand(5, 3)
    torch.testing.assert_close(binary_cross_entropy_score(z, y), upper_bound_score(z, y, binary_cross_entropy))
    torch.testing.assert_close(squared_error_score(z, y), upper_bound_score(z, y, squared_error))
    one, label = torch.randn(5), torch.rand(5)
    torch.testing.assert_close(binary_cross_entropy_score(one, label), (one.sigmoid() - label).abs())
    torch.testing.assert_close(upper_bound_score(one, label, binary_cross_entropy), (one.sigmoid() - label).abs())


def test_masked_positions_do_not_count():
    z, y = torch.randn(4, 6, 5), torch.randint(5, (4, 6))
    mask = torch.rand(4, 6) < 0.5
    score = upper_bound_score(z, y, lambda z, y: (cross_entropy(z, y), mask))
    by_hand = torch.stack(
        [
            torch.stack([upper_bound_score(z[i, None, t], y[i, None, t], cross_entropy)[0] ** 2 for t in range(6)])
            .mul(mask[i])
            .sum()
            .sqrt()
            for i in range(4)
        ]
    )
    torch.testing.assert_close(score, by_hand)
    nan = torch.where(mask, 0.0, float("nan"))
    clean = upper_bound_score(z, y, lambda z, y: (cross_entropy(z, y) + nan, mask))
    torch.testing.assert_close(clean, by_hand)


def test_half_precision_outputs_are_scored_in_float32():
    z, y = torch.randn(8, 10).bfloat16(), torch.randint(10, (8,))
    score = upper_bound_score(z, y, cross_entropy)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, upper_bound_score(z.float(), y, cross_entropy))


@pytest.mark.parametrize("reduced", [torch.tensor(1.0), torch.ones(3)])
def test_a_reduced_loss_is_refused(reduced: torch.Tensor):
    with pytest.raises(ValueError, match=r"per example: 4 examples need .* reduction='none'"):
        upper_bound_score(torch.randn(4, 2), torch.zeros(4), lambda z, y: reduced + 0 * z.sum())


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"got mask \(4, 2\) and losses \(4,\)"):
        upper_bound_score(torch.randn(4), torch.zeros(4), lambda z, y: (z, torch.ones(4, 2, dtype=torch.bool)))


def make_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, 5), nn.Tanh(), nn.Linear(5, 4))


@pytest.mark.parametrize("chunk", [2, 64])
def test_gradient_norm_is_the_reference(chunk: int):
    model, x, y = make_network(), torch.randn(5, 1, 6, 6), torch.randint(4, (5,))
    expected = torch.tensor(reference.gradient_norms(model, x, y, cross_entropy))
    torch.testing.assert_close(gradient_norm_score(model, x, y, cross_entropy, chunk=chunk), expected)


def test_gradient_norm_counts_trainable_parameters_only():
    model, x, y = make_network(), torch.randn(5, 1, 6, 6), torch.randint(4, (5,))
    model[0].requires_grad_(False)
    expected = torch.tensor(reference.gradient_norms(model, x, y, cross_entropy))
    torch.testing.assert_close(gradient_norm_score(model, x, y, cross_entropy), expected)


def test_last_layer_norm_is_exact_for_the_last_layer():
    model, x, y = make_network(), torch.randn(6, 1, 6, 6), torch.randint(4, (6,))
    hidden = model[:-1](x)
    score = upper_bound_score(model(x), y, cross_entropy)
    exact = gradient_norm_score(model[-1], hidden.detach(), y, cross_entropy)
    torch.testing.assert_close(last_layer_gradient_norm(score, hidden), exact)


def test_loss_score_sums_an_examples_positions():
    z, y = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    torch.testing.assert_close(loss_score(z, y, cross_entropy), cross_entropy(z, y).sum(1))


@given(st.integers(2, 9), st.floats(-30, 30), st.integers(0, 8))
def test_the_bound_holds_for_the_last_layer_up_to_its_input(classes: int, scale: float, label: int):
    """||G_i|| over the last layer is S_i sqrt(||h||^2 + 1), so S_i is within a constant of it."""
    z = scale * torch.linspace(-1, 1, classes)[None]
    y = torch.tensor([label % classes])
    assert 0 <= float(cross_entropy_score(z, y)) <= 2**0.5 + 1e-6
