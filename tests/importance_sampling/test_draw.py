"""Both draws: probabilities, weights that are exactly unbiased, and the variance that the gate relies on."""

import pytest
import torch
from checks import chi_square_per_dimension
from hypothesis import given, settings
from hypothesis import strategies as st

from flopwise.importance_sampling import effective_sample_size, reference, relative_variance, variance_ratio
from flopwise.importance_sampling.draw import (
    draw_with_replacement,
    draw_without_replacement,
    inclusion_probabilities,
    probabilities,
)
from flopwise.importance_sampling.variance import relative_variances

DRAWS = {"without_replacement": draw_without_replacement, "with_replacement": draw_with_replacement}
positive = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40)


def heavy_tailed(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, generator=generator, dtype=torch.float64).mul(1.5).exp()


@given(positive, st.floats(0.01, 1.0))
def test_probabilities_are_a_distribution_with_capped_weights(scores: list[float], smoothing: float):
    p = probabilities(torch.tensor(scores), smoothing)
    assert float(p.sum()) == pytest.approx(1)
    assert float((1 / (len(p) * p)).max()) <= 1 / smoothing * (1 + 1e-9)


def test_all_zero_scores_draw_uniformly():
    assert torch.equal(probabilities(torch.zeros(4), 0.1), torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scores_that_are_no_scores_are_named(bad: float):
    with pytest.raises(ValueError, match=r"finite and not negative; examples \[2\] of 4.*diverged"):
        probabilities(torch.tensor([1.0, 1.0, bad, 1.0]), 0.1)


@settings(max_examples=200)
@given(positive, st.data())
def test_inclusion_probabilities_are_the_reference(scores: list[float], data: st.DataObject):
    draws = data.draw(st.integers(1, len(scores)))
    p = torch.tensor(scores, dtype=torch.float64)
    p /= p.sum()
    pi = inclusion_probabilities(p, torch.tensor(float(draws), dtype=torch.float64))
    assert float(pi.sum()) == pytest.approx(draws)
    if draws < len(scores):
        expected = reference.inclusion_probabilities(scores, draws)
        torch.testing.assert_close(pi, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    together = inclusion_probabilities(p, torch.tensor([float(draws), 1.0], dtype=torch.float64))
    torch.testing.assert_close(together[0], pi)


def test_the_systematic_draw_is_the_reference(generator: torch.Generator):
    for n, draws in ((1, 1), (9, 1), (9, 8), (50, 16)):
        p = heavy_tailed(n, generator)
        p /= p.sum()
        state = generator.get_state()
        indices, weights = draw_without_replacement(p, draws, generator)
        generator.set_state(state)
        order = torch.randperm(n, generator=generator).tolist()
        start = float(torch.rand(1, generator=generator, dtype=torch.float64))
        expected = reference.draw_without_replacement(p.tolist(), draws, order, start)
        assert indices.tolist() == [i for i, _ in expected]
        assert weights.tolist() == pytest.approx([w for _, w in expected])


def test_no_example_is_drawn_twice_without_replacement(generator: torch.Generator):
    p = probabilities(heavy_tailed(60, generator) ** 3, 0.1)
    for _ in range(300):
        indices, _ = draw_without_replacement(p, 20, generator)
        assert len(indices.unique()) == 20


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("draws", [1, 8, 39])
def test_weighted_means_are_unbiased(draw: str, smoothing: float, draws: int, generator: torch.Generator):
    values = torch.randn(40, 5, generator=generator, dtype=torch.float64) * heavy_tailed(40, generator)[:, None]
    p = probabilities(values.norm(dim=1), smoothing)
    estimates = torch.stack(
        [
            (weights[:, None] * values[i]).mean(0)
            for i, weights in (DRAWS[draw](p, draws, generator) for _ in range(3000))
        ]
    )
    assert chi_square_per_dimension(estimates, values.mean(0)) < 11


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("ratio", [1.5, 3.0, 8.0])
def test_the_variance_that_the_gate_expects_is_the_one_that_happens(
    draw: str, ratio: float, generator: torch.Generator
):
    """Gradients g_i = S_i u_i with random directions u_i; presample and draw, against uniform batches as large."""
    population, b = 20_000, 32
    norms = heavy_tailed(population, generator).clamp(max=30)
    directions = torch.randn(population, 20, generator=generator, dtype=torch.float64)
    gradients = norms[:, None] * directions / directions.norm(dim=1, keepdim=True)
    drawn, uniform = [], []
    for _ in range(1500):
        pre = torch.randint(population, (round(ratio * b),), generator=generator)
        i, w = DRAWS[draw](probabilities(norms[pre], 0.1), b, generator)
        drawn.append((w[:, None] * gradients[pre[i]]).mean(0))
        uniform.append(gradients[torch.randint(population, (b,), generator=generator)].mean(0))
    measured = float(torch.stack(drawn).var(0).sum() / torch.stack(uniform).var(0).sum())
    predicted = relative_variance(norms, ratio, draw=draw, smoothing=0.1)  # type: ignore[arg-type]
    assert predicted == pytest.approx(measured, rel=0.12)


def test_the_true_norms_tell_what_a_score_is_really_worth(generator: torch.Generator):
    norms = heavy_tailed(400, generator)
    exact = relative_variance(norms, 3.0)
    assert relative_variance(norms, 3.0, norms=norms) == exact
    shuffled = norms[torch.randperm(400, generator=generator)]
    assert relative_variance(shuffled, 3.0) == pytest.approx(exact)  # what it claims
    assert relative_variance(shuffled, 3.0, norms=norms) > 1  # what it does


def test_several_ratios_at_once(generator: torch.Generator):
    scores = heavy_tailed(200, generator)
    ratios = torch.tensor([1.5, 2.0, 6.0])
    for draw in DRAWS:
        one_by_one = [relative_variance(scores, float(r), draw=draw) for r in ratios]  # type: ignore[arg-type]
        assert relative_variances(scores, ratios, draw, 0.1, scores).tolist() == pytest.approx(one_by_one)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="above 1"):
        relative_variance(scores, 1.0)


@given(positive)
def test_tau_squared_is_the_papers_tau(scores: list[float]):
    tau2 = variance_ratio(torch.tensor(scores, dtype=torch.float64))
    assert 1 - 1e-9 <= tau2 <= len(scores) + 1e-9
    assert tau2 == pytest.approx(reference.tau(scores) ** 2, rel=1e-5)
    assert effective_sample_size(torch.tensor(scores, dtype=torch.float64)) == pytest.approx(len(scores) / tau2)


def test_tau_squared_of_nothing_is_one():
    assert variance_ratio(torch.zeros(5)) == 1.0
    assert relative_variance(torch.zeros(5), 2.0) == 1.0
